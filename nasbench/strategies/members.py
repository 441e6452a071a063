"""What strategies share that keep evaluated architectures: members, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.strategies.base import Strategy
from search_spaces import SearchSpace
from search_spaces.base import Archs


class MemberStrategy(Strategy):
    """A strategy that keeps rows it was told; failed ones are never among them.

    Attributes:
        archs, values, violation: of the members: `(p, K)`, `(p, M)` minimised, `(p,)` total violation.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, initial: Archs | None = None) -> None:
        super().__init__(space, seed, initial)
        self._forget()

    def _forget(self) -> None:
        """No members."""
        self.archs: Archs = np.empty((0, len(self.space.knobs)), dtype=self.space.dtype)
        self.values: NDArray[np.float64] = np.empty((0, 0))
        self.violation: NDArray[np.float64] = np.empty(0)

    def _join(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> NDArray[np.bool_]:
        """Put the rows of a `tell` that did not fail behind the members; returns which rows these are, `(n,)`."""
        ok: NDArray[np.bool_] = (status == 0) & ~np.isnan(values).any(axis=1)
        self.archs = np.concatenate([self.archs, proposals.archs[ok]])
        self.values = np.concatenate([self.values.reshape(-1, values.shape[1]), values[ok]])
        self.violation = np.concatenate([self.violation, violations[ok].sum(axis=1)])
        return ok

    def _keep(self, rows: NDArray[np.integer[Any]] | slice) -> None:
        """Drop all other members."""
        self.archs, self.values, self.violation = self.archs[rows], self.values[rows], self.violation[rows]

    def state_dict(self) -> dict[str, Any]:
        own = {"archs": self.archs, "values": self.values, "violation": self.violation}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.archs = np.asarray(state["archs"], dtype=self.space.dtype).reshape(-1, len(self.space.knobs))
        self.values = np.asarray(state["values"], dtype=np.float64)
        self.violation = np.asarray(state["violation"], dtype=np.float64)
