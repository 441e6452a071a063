"""Architecture, width and bit width in one search space, as APQ searches them (Wang et al., CVPR 2020).

The space wraps any convolutional one; `nasbench.evaluators.joint` judges its networks by the files that they would be.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasbench.joint.space import JointSpace, JointSupernet

_HOMES = {"JointSpace": "space", "JointSupernet": "space"}
__all__ = ["JointSpace", "JointSupernet"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"nasbench.joint.{_HOMES[name]}"), name)
    raise AttributeError(name)
