"""What evolutionary strategies share: a population as arrays, filled at random at first."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.strategies.base import Strategy
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs


class PopulationStrategy(Strategy):
    """A strategy whose next proposals depend on a population of evaluated architectures.

    The first `population_size` proposals are `initial` and random ones; later ones come from `_offspring`. Failed rows
    never enter the population; as long as it is empty, proposals stay random.

    Attributes:
        archs, values, violation: the population: `(p, K)`, `(p, M)` minimised, `(p,)` total violation.
    """

    def __init__(self, space: SearchSpace, seed: int, initial: Archs | None, population_size: int) -> None:
        super().__init__(space, seed, initial)
        if population_size < 2:
            raise UserError(f"strategy.population_size: must be at least 2, got {population_size}")
        self.population_size = population_size
        self.archs: Archs = np.empty((0, len(space.knobs)), dtype=space.dtype)
        self.values: NDArray[np.float64] = np.empty((0, 0))
        self.violation: NDArray[np.float64] = np.empty(0)

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
        ok = (status == 0) & ~np.isnan(values).any(axis=1)
        self.archs = np.concatenate([self.archs, proposals.archs[ok]])
        self.values = np.concatenate([self.values.reshape(-1, values.shape[1]), values[ok]])
        self.violation = np.concatenate([self.violation, violations[ok].sum(axis=1)])
        keep = self._select()
        self.archs, self.values, self.violation = self.archs[keep], self.values[keep], self.violation[keep]

    def state_dict(self) -> dict[str, Any]:
        own = {"archs": self.archs, "values": self.values, "violation": self.violation}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.archs = np.asarray(state["archs"], dtype=self.space.dtype).reshape(-1, len(self.space.knobs))
        self.values = np.asarray(state["values"], dtype=np.float64)
        self.violation = np.asarray(state["violation"], dtype=np.float64)
