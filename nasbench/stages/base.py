"""The contract of post-search stages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from hardware_profiles.meter import Artifact
    from nasbench.tasks.base import Task
    from search_spaces import SearchSpace
    from search_spaces.supernet import Supernet


class Form(Enum):
    """What a network is at a point of the pipeline."""

    FLOAT = "float module"
    FAKE_QUANT = "fake-quantised module"
    ARTIFACT = "runtime artifact"


@dataclass(frozen=True)
class Candidate:
    """A network on its way through the stages.

    Args:
        name: short name, unique in the run, such as `knee`.
        arch: its architecture `(K,)`, or None for a network from elsewhere.
        form: which of the fields below holds the network.
        network: for the module forms.
        artifact: for `ARTIFACT`.
        metrics: as measured after the stage that produced it.
    """

    name: str
    arch: np.ndarray[Any, Any] | None
    form: Form
    network: nn.Module | None = None
    artifact: Artifact | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StageContext:
    """What a stage may use: train and validation data, the space, a teacher, a directory of its own, the seed."""

    task: Task
    space: SearchSpace
    directory: Path
    seed: int
    supernet: Supernet | None = None
    input_shape: tuple[int, int, int] = (0, 0, 0)


class Stage(ABC):
    """One post-search step.

    It declares the forms it takes and the form it gives, so that an impossible order is refused before the first stage
    runs. `run` changes the network; the runner measures the result anew, whatever the stage believes of it.
    """

    accepts: frozenset[Form]
    produces: Form
    once: bool = False  # a second time would do nothing good, whatever form it gets

    @abstractmethod
    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate after this step; the given one stays as it is."""


def check_order(stages: Sequence[tuple[str, Stage]], first: Form = Form.FLOAT) -> None:
    """Refuse a pipeline in which a stage would get a form that it does not take.

    Raises:
        UserError: naming the stage, what it takes and what it would get.
    """
    form = first
    for index, (name, stage) in enumerate(stages):
        if stage.once and any(type(stage) is type(earlier) for _, earlier in stages[:index]):
            raise UserError(f"stages[{index}] ({name!r}) stands there a second time; it can be done once")
        if form not in stage.accepts:
            wanted = " or ".join(sorted(f.value for f in stage.accepts))
            raise UserError(
                f"stages[{index}] ({name!r}) takes a {wanted}, but the step before it gives a {form.value}; "
                "move it before the step that produces one"
            )
        form = stage.produces
