"""What evolutionary strategies share: a population as arrays, filled at random at first."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.strategies.members import MemberStrategy
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs


class PopulationStrategy(MemberStrategy):
    """A strategy whose next proposals depend on a population of evaluated architectures.

    The first `population_size` proposals are `initial` and random ones; later ones come from `_offspring`. Failed rows
    never enter the population, which are the members; as long as it is empty, proposals stay random.
    """

    def __init__(self, space: SearchSpace, seed: int, initial: Archs | None, population_size: int) -> None:
        super().__init__(space, seed, initial)
        if population_size < 2:
            raise UserError(f"strategy.population_size: must be at least 2, got {population_size}")
        self.population_size = population_size

    def remark(self, evaluations: int) -> str:
        if evaluations > self.population_size:
            return ""
        return (
            f"evaluations = {evaluations} is not above population_size = {self.population_size}, the random "
            "architectures that it begins with: this is random search. Take a smaller population, such as a fifth of "
            "the evaluations, or more of these"
        )

    @abstractmethod
    def _offspring(self, n: int) -> Archs:
        """`n` architectures `(n, K)` bred from a population of at least one."""

    @abstractmethod
    def _select(self) -> NDArray[np.integer[Any]] | slice:
        """Which members stay, now that `archs`, `values` and `violation` hold the newcomers at their end."""

    def ask(self, n: int) -> Proposals:
        first = max(self.population_size, 0 if self.initial is None else len(self.initial)) - self.next_id
        untaught = n if not len(self.archs) else min(n, max(first, 0))
        parts = [self._untaught(untaught)] if untaught else []
        if n > untaught:
            parts.append(self._offspring(n - untaught))
        return self._proposals(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def tell(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        self._join(proposals, values, violations, status)
        self._keep(self._select())
