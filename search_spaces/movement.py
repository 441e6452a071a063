"""Data that is moved between operators: slices and transpositions on the way from one to the next."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from search_spaces.operators import Operator, Tensor


class Moves:
    """What lies between the tensors that operators write and the views of them that others read.

    Views are named by anything hashable. A move is named by the first operator behind it, as runtimes make it once.
    """

    def __init__(self) -> None:
        self._behind: dict[Hashable, tuple[Operator, ...]] = {}
        self._named: set[int] = set()  # identities: the slices of one split are equal, but not the same

    def view(self, source: Hashable, result: Hashable, before: Tensor, after: Tensor, transposed: bool) -> None:
        """`result` is a view of `source`, which looks like `before`: of fewer values, or in another order, or neither.

        Args:
            transposed: the values are in another order, see `reorders`.
        """
        kind = "slice" if after.size < before.size else "transpose" if transposed else ""
        behind = self._behind.get(source, ())
        if kind:
            behind += (Operator(kind, (before,), after),)
        if behind:
            self._behind[result] = behind

    def name(self, views: Iterable[Hashable]) -> tuple[Operator, ...]:
        """The moves that an operator is the first to need, `Operator.moved`."""
        new = [move for view in views for move in self._behind.get(view, ()) if id(move) not in self._named]
        moves = {id(move): move for move in new}
        self._named.update(moves)
        return tuple(moves.values())


def reorders(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a permutation of dimensions changes where values lie, which those of size 1 do not."""
    rank = len(shape)
    moved = [d % rank for d in order if shape[d] != 1]
    return moved != sorted(moved)
