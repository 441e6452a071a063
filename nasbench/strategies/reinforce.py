"""REINFORCE."""

from __future__ import annotations

from nasbench.strategies.policy import Floats, PolicyStrategy
from search_spaces.base import Archs


class Reinforce(PolicyStrategy):
    """REINFORCE (Williams, Machine Learning 1992) with a baseline, on a factorised policy.

    Keys as in `PolicyStrategy`.
    """

    def _learn(self, policy: int, archs: Archs, advantages: Floats) -> None:
        self._ascend(policy, archs, advantages)
