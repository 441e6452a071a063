"""REINFORCE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from nasbench.strategies.policy import Floats, PolicyStrategy
from search_spaces import SearchSpace
from search_spaces.base import Archs


class Reinforce(PolicyStrategy):
    """REINFORCE (Williams, Machine Learning 1992) with a baseline, on a factorised policy; see `PolicyStrategy`.

    Args:
        reward: `mnasnet` (one trade-off) or `pareto` (a front, several policies).
        targets: per minimised objective, in their order, for `mnasnet`.
        exponents: within and beyond a target.
        policies: of `pareto`.
        lr: step of Adam on the logits.
        entropy: weight of the policy's entropy beside the reward.
        batch_size: results that one update learns from.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        reward: Literal["mnasnet", "pareto"] = "mnasnet",
        targets: Sequence[float] = (),
        exponents: tuple[float, float] = (-0.07, -0.07),
        policies: int = 3,
        lr: float = 0.1,
        entropy: float = 0.01,
        batch_size: int = 20,
    ) -> None:
        super().__init__(space, seed, initial, reward, targets, exponents, policies, lr, entropy, batch_size)

    def _learn(self, policy: int, archs: Archs, advantages: Floats) -> None:
        self._ascend(policy, archs, advantages)
