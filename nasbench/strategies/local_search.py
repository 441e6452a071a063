"""Local search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.pareto import constrained_ranks
from nasbench.strategies.members import MemberStrategy
from nasbench.variation import first_of_each, neighbours, row_keys, sample_distinct
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs


class LocalSearch(MemberStrategy):
    """Climbs through neighbourhoods (White, Nolen & Savani, UAI 2021), and starts anew in a local optimum.

    A climb starts from the best of a few random architectures. All neighbours of its best member, those that differ in
    one knob, are evaluated; then those of the best among them, until none is better. With several objectives it is
    Pareto local search (Paquete, Chiarandini & Stützle, 2004): the members that no other member of the climb dominates
    are explored in random order, until all of them are. Under limits a feasible member beats an infeasible one, and of
    those the lower total violation wins (Deb 2000). Nothing is proposed twice until all of the space has been.

    Args:
        starts: random architectures that a climb begins with.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, initial: Archs | None = None, *, starts: int = 10) -> None:
        super().__init__(space, seed, initial)
        if starts < 1:
            raise UserError(f"strategy.starts: must be at least 1, got {starts}")
        self.starts = starts
        self._known: set[int] = set()  # keys of what was proposed
        self._queue = np.empty((0, len(space.knobs)), dtype=space.dtype)  # to be proposed before the climb goes on
        self._reset()
        self._queue = self._untaught(max(starts, 0 if self.initial is None else len(self.initial)))

    def _reset(self) -> None:
        """An empty climb: members and which of them were explored."""
        self._forget()
        self.explored: NDArray[np.bool_] = np.empty(0, dtype=bool)

    @property
    def preferred_batch(self) -> int:
        """About a neighbourhood, so that a step of the climb is one batch."""
        return int(np.clip((self.space.menu.counts - 1).sum(), 1, 1000))

    def ask(self, n: int) -> Proposals:
        parts: list[Archs] = []
        missing = n
        while missing:
            if not len(self._queue):
                self._extend(missing, waiting=bool(parts))
            part, self._queue = self._queue[:missing], self._queue[missing:]
            self._known.update(row_keys(part).tolist())
            parts.append(part)
            missing -= len(part)
        return self._proposals(np.concatenate(parts) if parts else self._queue[:0])

    def _extend(self, n: int, waiting: bool) -> None:
        """Fill the empty queue: with neighbours of members that deserve it, else with random rows of a new climb.

        Where results are waited for, the climb may yet go on: `n` random rows fill the batch and join it.
        """
        while len(open_members := self._open()):
            member = self.rng.choice(open_members)
            self.explored[member] = True
            around = self._unknown(first_of_each(neighbours(self.space, self.archs[member], self.rng)))
            if len(around):
                self._queue = around[self.rng.permutation(len(around))]
                return
        if not waiting:
            self._reset()
        fresh = sample_distinct(self.space, 10 * max(self.starts, n), self.rng)
        unknown = self._unknown(fresh)
        fresh = unknown if len(unknown) else fresh  # a space seen whole gives repeats
        self._queue = fresh[: n if waiting else self.starts]

    def _open(self) -> NDArray[np.int64]:
        """The climb's best members that were not explored yet."""
        return np.flatnonzero(~self.explored)  # `tell` keeps the best only

    def _unknown(self, archs: Archs) -> Archs:
        return archs[[key not in self._known for key in row_keys(archs).tolist()]]

    def tell(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        ok = self._join(proposals, values, violations, status)
        if len(self.archs):
            explored = np.concatenate([self.explored, np.zeros(int(ok.sum()), dtype=bool)])
            best = np.flatnonzero(constrained_ranks(self.values, self.violation[:, None]) == 0)
            self._keep(best)
            self.explored = explored[best]

    def state_dict(self) -> dict[str, Any]:
        own = {
            "explored": self.explored.copy(),
            "queue": self._queue,
            "known": np.array(sorted(self._known), dtype=np.uint64),
        }
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.explored = np.array(state["explored"], dtype=bool)
        self._queue = np.asarray(state["queue"], dtype=self.space.dtype).reshape(-1, len(self.space.knobs))
        self._known = {int(key) for key in state["known"]}
