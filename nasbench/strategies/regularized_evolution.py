"""Regularised (aging) evolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nasbench.strategies.population import PopulationStrategy
from nasbench.variation import mutate
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

# Share of the plain sum in the augmented Chebyshev scalarisation (Knowles, ParEGO, IEEE TEC 2006).
_RHO = 0.05


class RegularizedEvolution(PopulationStrategy):
    """Aging evolution (Real, Aggarwal, Huang & Le, AAAI 2019): tournaments, one mutation, and the oldest member dies.

    With one objective the tournament's best is the parent. With several each tournament draws a random weighting and
    takes the least augmented Chebyshev value (Knowles 2006) of the objectives scaled over the population. Under limits
    feasible rows win over infeasible ones, and these by total violation (Deb 2000).

    Args:
        population_size: members of the queue (the paper's P). Several objectives want a large one, some 1,000: a small
            queue soon forgets the parts of the front that are hard to reach.
        sample_size: members that compete, with replacement, to be a parent (the paper's S).
        mutation_rate: chance of each further knob to change beside the one that always does; 0 is the paper's mutation.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        population_size: int = 100,
        sample_size: int = 25,
        mutation_rate: float = 0.0,
    ) -> None:
        super().__init__(space, seed, initial, population_size)
        if sample_size < 1:
            raise UserError(f"strategy.sample_size: must be at least 1, got {sample_size}")
        if not 0 <= mutation_rate <= 1:
            raise UserError(f"strategy.mutation_rate: must be within 0..1, got {mutation_rate}")
        self.sample_size = sample_size
        self.mutation_rate = mutation_rate

    @property
    def preferred_batch(self) -> int:
        """The population's size: of a larger batch only the newest would ever be parents."""
        return self.population_size

    def _select(self) -> slice:
        return slice(max(len(self.archs) - self.population_size, 0), None)

    def _offspring(self, n: int) -> Archs:
        entrants = self.rng.integers(len(self.archs), size=(n, self.sample_size))
        winners = entrants[np.arange(n), self._scores(entrants).argmin(axis=1)]
        return mutate(self.space, self.archs[winners], self.rng, self.mutation_rate)

    def _scores(self, entrants: NDArray[np.int64]) -> NDArray[np.float64]:
        """Scores `(n, S)` of members that meet in tournaments; least is best."""
        objectives = self.values.shape[1]
        if objectives == 1:
            scores = self._scaled()[:, 0][entrants]
        else:
            scaled = self._scaled()
            weights = self.rng.exponential(size=(len(entrants), objectives))
            weights /= weights.sum(axis=1, keepdims=True)  # uniform on the simplex
            parts = [weights[:, m, None] * scaled[:, m][entrants] for m in range(objectives)]
            largest, total = parts[0], parts[0].copy()
            for part in parts[1:]:
                largest, total = np.maximum(largest, part), total + part
            scores = largest + _RHO * total
        if self.violation.any():
            # Scaled scores stay below 2, so that any violation loses to none.
            violation = self.violation[entrants]
            scores = np.where(violation > 0, 2.0 + violation, scores)
        return scores

    def _scaled(self) -> NDArray[np.float64]:
        """The population's objectives scaled to 0..1 over its feasible members, clipped; infinities are worst."""
        feasible = self.violation <= 0
        basis = self.values[feasible] if feasible.any() else self.values
        finite = np.where(np.isfinite(basis), basis, np.nan)
        if np.isnan(finite).all(axis=0).any():
            return np.where(np.isfinite(self.values), 0.0, 1.0)
        low, high = np.nanmin(finite, axis=0), np.nanmax(finite, axis=0)
        scaled = (self.values - low) / np.where(high > low, high - low, 1.0)
        return np.clip(scaled, 0.0, 1.0)
