"""Architectures looked up by their row: keys, and an index over many."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.unsignedinteger[Any]]


def row_keys(rows: Rows) -> NDArray[np.uint64]:
    """A 64-bit key `(n,)` per row of `(n, K)`: equal rows have equal keys, and two others hardly ever."""
    # Fixed odd multipliers spread over 64 bits (Weyl sequence, then two rounds of splitmix64's finaliser).
    weights = np.arange(1, rows.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    weights = (weights ^ (weights >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    weights = (weights ^ (weights >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.uint64] = rows.astype(np.uint64) @ (weights ^ (weights >> np.uint64(31)))
    return keys


class RowIndex:
    """Where each of many rows stands: one sorted search for any number of look-ups.

    Args:
        rows: `(n, K)`. Of equal rows the first is found.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        keys = row_keys(rows)
        self._order = keys.argsort(kind="stable")
        self._sorted = keys[self._order]

    def __len__(self) -> int:
        return len(self.rows)

    def find(self, rows: Rows) -> NDArray[np.intp]:
        """The place `(m,)` of each of `(m, K)` rows, -1 where it is not there."""
        if not len(self):
            return np.full(len(rows), -1, dtype=np.intp)
        at = np.searchsorted(self._sorted, row_keys(rows))
        found = self._order[np.minimum(at, len(self) - 1)]
        return np.where((self.rows[found] == rows).all(axis=1), found, -1)

    def nearest(self, rows: Rows, other_than: Rows, rng: np.random.Generator) -> NDArray[np.intp]:
        """The place `(m,)` of the row that differs from each of `(m, K)` in the fewest columns; ties at random.

        Args:
            other_than: `(m, K)`; a place that holds this very row is taken only where there is no other.
        """
        out = np.empty(len(rows), dtype=np.intp)
        step = max(1, 2**24 // max(self.rows.size, 1))  # bounds the memory of a comparison to some 16 MB
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            distance = (rows[part, None] != self.rows).sum(axis=2) + rng.random((len(rows[part]), len(self)))
            distance[(other_than[part, None] == self.rows).all(axis=2)] = np.inf
            out[part] = distance.argmin(axis=1)
        return out
