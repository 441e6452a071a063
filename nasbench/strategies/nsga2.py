"""NSGA-II."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nasbench.pareto import constrained_ranks, crowding_distance
from nasbench.strategies.population import PopulationStrategy
from nasbench.variation import crossover, mutate, new_rows
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs


class NSGA2(PopulationStrategy):
    """Non-dominated sorting genetic algorithm II (Deb, Pratap, Agarwal & Meyarivan, IEEE TEC 2002), with limits.

    Binary tournaments by rank, then crowding; uniform crossover; per-knob mutation; the best of parents and children
    survive. Ranks put feasible rows first and order the others by total violation. Children equal to a member or to
    each other are mutated again, a few times at most: a small space gives repeats rather than an endless search.

    Args:
        population_size: survivors of each generation. Ask for as many at a time to get the paper's algorithm.
        crossover_rate: chance of a child to have two parents.
        mutation_rate: chance of each knob to change; by default one knob a child on average.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        population_size: int = 100,
        crossover_rate: float = 0.9,
        mutation_rate: float | None = None,
    ) -> None:
        super().__init__(space, seed, initial, population_size)
        for name, rate in (("crossover_rate", crossover_rate), ("mutation_rate", mutation_rate)):
            if rate is not None and not 0 <= rate <= 1:
                raise UserError(f"strategy.{name}: must be within 0..1, got {rate}")
        self.crossover_rate = crossover_rate
        self.mutation_rate = 1.0 / len(space.knobs) if mutation_rate is None else mutation_rate

    def _select(self) -> NDArray[np.int64]:
        distinct = np.flatnonzero(new_rows(self.archs))
        values, violation = self.values[distinct], self.violation[distinct]
        ranks = constrained_ranks(values, violation[:, None])
        best = np.lexsort((-crowding_distance(values, ranks), ranks))
        return distinct[best[: self.population_size]]

    def _parents(self, n: int) -> NDArray[np.int64]:
        """Two parents for each of `n` children, `(2, n)` places in the population."""
        # Members stand best first, so that the lower place wins a tournament.
        return self.rng.integers(len(self.archs), size=(2, n, 2)).min(axis=2)

    def breed(self, n: int) -> Archs:
        """`n` children `(n, K)` of the population, which must not be empty: for strategies that judge them first."""
        return self._offspring(n)

    def _offspring(self, n: int) -> Archs:
        winners = self._parents(n)
        children = self.archs[winners[0]]
        crossed = self.rng.random(n) < self.crossover_rate
        children[crossed] = crossover(self.space, children[crossed], self.archs[winners[1][crossed]], self.rng)
        children = mutate(self.space, children, self.rng, self.mutation_rate, at_least_one=False)
        for _ in range(5):
            repeated = np.flatnonzero(~new_rows(children, self.archs))
            if not len(repeated):
                break
            children[repeated] = mutate(self.space, children[repeated], self.rng, self.mutation_rate)
        return children
