"""Proximal policy optimisation."""

from __future__ import annotations

from typing import Unpack

import numpy as np

from nasbench.strategies.policy import Floats, PolicyOptions, PolicyStrategy
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs


class PPO(PolicyStrategy):
    """Proximal policy optimisation (Schulman et al., 2017), as MnasNet uses it, on a factorised policy.

    Each batch of results is learned from in several steps, none of which may move the chance of an architecture out of
    `1 ± clip` times what it was.

    Args:
        steps: of each update.
        clip: of the likelihood ratio.
        options: as in `PolicyStrategy`.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        steps: int = 5,
        clip: float = 0.2,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(space, seed, initial, **options)
        if steps < 1 or not 0 < clip < 1:
            raise UserError(f"strategy.steps = {steps}, strategy.clip = {clip}: expected steps >= 1 and clip in 0..1")
        self.steps, self.clip = steps, clip

    def _learn(self, policy: int, archs: Archs, advantages: Floats) -> None:
        before = self._log_likelihood(policy, archs)
        for _ in range(self.steps):
            ratio = np.exp(np.clip(self._log_likelihood(policy, archs) - before, -20.0, 20.0))
            # The clipped objective has no slope once the ratio has left the interval the way its advantage pushes.
            inside = np.where(advantages > 0, ratio < 1 + self.clip, ratio > 1 - self.clip)
            self._ascend(policy, archs, advantages * ratio * inside)
