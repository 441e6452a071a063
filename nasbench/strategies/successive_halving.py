"""Successive halving over fidelities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.pareto import constrained_ranks, crowding_distance
from nasbench.strategies.members import MemberStrategy
from nasbench.variation import first_of_each, sample_distinct
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs


class SuccessiveHalving(MemberStrategy):
    """Asynchronous successive halving: many architectures cheaply, the best of them ever more thoroughly.

    Rung `k` evaluates at `minimum * factor ** k` of a fidelity, such as training epochs, and the last at full fidelity.
    Whenever some member of the best `1 / factor` of a rung has not been promoted, it is evaluated on the next rung;
    else a new random architecture enters the first (Jamieson & Talwalkar, AISTATS 2016; asynchronous: Li et al., MLSys
    2020). With several objectives a rung is ordered by fronts, then crowding (Schmucker et al., 2021); limits go first.

    Made for evaluators that train: one that keeps its checkpoints continues a promoted network. Rows of lower fidelity
    are recorded, and never stand on a front. The budget counts evaluations of any fidelity.

    Args:
        fidelity: that the evaluator knows: `epochs` where it trains, `images` where it judges with a supernet.
        minimum: of the fidelity, on the first rung.
        factor: between rungs, and one in how many is promoted.
        rungs: with the one of full fidelity.
    """

    needs_fidelity: ClassVar[bool] = True

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        fidelity: str = "epochs",
        minimum: float = 1,
        factor: int = 3,
        rungs: int = 3,
    ) -> None:
        super().__init__(space, seed, initial)
        for key, value, least in (("factor", factor, 2), ("rungs", rungs, 1)):
            if value < least:
                raise UserError(f"strategy.{key} = {value}: expected {least} or more")
        if not minimum > 0:
            raise UserError(f"strategy.minimum = {minimum}: expected a number above 0")
        self.fidelity, self.factor, self.rungs = fidelity, factor, rungs
        self._levels = np.array([minimum * factor**k for k in range(rungs - 1)] + [np.nan])
        self.fidelities = {fidelity: self._levels[:-1].tolist()}
        self.rung: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.promoted: NDArray[np.bool_] = np.empty(0, dtype=bool)

    def ask(self, n: int) -> Proposals:
        given = np.empty(0, dtype=np.int64) if self._untaught_left() else self._promotable()[:n]
        self.promoted[given] = True
        fresh = self._fresh(n - len(given))
        archs = np.concatenate([self.archs[given], fresh])
        rungs = np.concatenate([self.rung[given] + 1, np.zeros(len(fresh), dtype=np.int64)])
        proposals = self._proposals(archs)
        return Proposals(proposals.ids, archs, {self.fidelity: self._levels[rungs]})

    def _untaught_left(self) -> bool:
        return self.initial is not None and self.next_id < len(self.initial)

    def _fresh(self, n: int) -> Archs:
        """New architectures for the first rung."""
        if self._untaught_left():
            return self._untaught(n)
        return sample_distinct(self.space, n, self.rng, first_of_each(self.archs)) if n else self.archs[:0]

    def _promotable(self) -> NDArray[np.int64]:
        """Members that deserve the next rung, highest rungs first, the best of each rung first."""
        out = []
        for rung in range(self.rungs - 2, -1, -1):
            members = np.flatnonzero(self.rung == rung)
            ranks = constrained_ranks(self.values[members], self.violation[members, None]) if len(members) else members
            best = np.lexsort((-crowding_distance(self.values[members], ranks), ranks)) if len(members) else members
            top = members[best[: len(members) // self.factor]]
            out.append(top[~self.promoted[top]])
        return np.concatenate(out) if out else np.empty(0, dtype=np.int64)

    def tell(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        ok = self._join(proposals, values, violations, status)
        levels = proposals.fidelity[self.fidelity]
        rung = np.where(np.isnan(levels), self.rungs - 1, np.searchsorted(self._levels[:-1], levels))
        self.rung = np.concatenate([self.rung, rung[ok]])
        self.promoted = np.concatenate([self.promoted, np.zeros(int(ok.sum()), dtype=bool)])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"rung": self.rung, "promoted": self.promoted.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.rung = np.asarray(state["rung"], dtype=np.int64)
        self.promoted = np.array(state["promoted"], dtype=bool)
