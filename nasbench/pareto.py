"""Dominance: fast exact sorting, crowding, hypervolume, the knee of a front, and an archive of the best.

All values are minimised. A row dominates another when it is nowhere worse and somewhere better; equal rows do not
dominate each other. Infinities are ordinary values; a row with a NaN dominates nothing and ranks behind every other.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.variation import new_rows
from search_spaces import SearchSpace
from search_spaces.base import Archs

Floats = NDArray[np.float64]
_BLOCK = 512  # rows compared at once: bounds memory at block x n booleans


def _matrix(values: Floats) -> Floats:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must be (n, M), got shape {values.shape}")
    return values


def dominated_by(values: Floats, by: Floats) -> NDArray[np.bool_]:
    """Which rows of `values` `(n, M)` some row of `by` `(m, M)` dominates, `(n,)` bool; no NaNs.

    O((n + m) log m) for two objectives, O(n m M) comparisons in blocks otherwise.
    """
    if not len(by):
        return np.zeros(len(values), dtype=bool)
    if values.shape[1] == 1:
        return values[:, 0] > by.min()
    if values.shape[1] == 2:
        by = by[np.argsort(by[:, 0])]
        best = np.minimum.accumulate(by[:, 1])  # least second objective among rows up to here
        left = np.searchsorted(by[:, 0], values[:, 0], side="left")
        right = np.searchsorted(by[:, 0], values[:, 0], side="right")
        # Better in the first and no worse in the second, or no worse in the first and better in the second.
        first = (left > 0) & (best[left - 1] <= values[:, 1])
        second = (right > 0) & (best[right - 1] < values[:, 1])
        return np.asarray(first | second)
    out = np.zeros(len(values), dtype=bool)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        no_worse = np.ones((len(block), len(by)), dtype=bool)
        better = np.zeros((len(block), len(by)), dtype=bool)
        for m in range(values.shape[1]):
            no_worse &= by[:, m] <= block[:, m, None]
            better |= by[:, m] < block[:, m, None]
        out[start : start + _BLOCK] = (no_worse & better).any(axis=1)
    return out


def non_dominated_mask(values: Floats) -> NDArray[np.bool_]:
    """Which rows of `(n, M)` no other row dominates, `(n,)` bool. Duplicates of a front's row are all on it; NaN never.

    O(n log n) for one and two objectives; otherwise O(n f M) for a front of f rows, in blocks.
    """
    values = _matrix(values)
    out = np.zeros(len(values), dtype=bool)
    rows = np.flatnonzero(~np.isnan(values).any(axis=1))
    if values.shape[1] <= 2:
        out[rows] = ~dominated_by(values[rows], values[rows])
        return out
    # In lexicographic order nothing is dominated by what comes after it, so one pass over blocks builds the front.
    rows = rows[np.lexsort(values[rows].T[::-1])]
    front = values[:0]
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        block = block[~dominated_by(values[block], front)]
        block = block[~dominated_by(values[block], values[block])]
        out[block] = True
        front = np.concatenate([front, values[block]])
    return out


def non_dominated_sort(values: Floats) -> NDArray[np.int64]:
    """The front of each row of `(n, M)`: `(n,)` int64, 0 for the non-dominated, 1 for those once these are gone, ...

    Two objectives: one sweep in lexicographic order with a bisection over the fronts' last rows, O(n log n) (Jensen,
    IEEE TEC 2003). More: fronts are peeled off one by one, O(n^2 M) comparisons in all and no n x n matrix. Rows with a
    NaN share one last front of their own.
    """
    values = _matrix(values)
    ranks = np.zeros(len(values), dtype=np.int64)
    valid = ~np.isnan(values).any(axis=1)
    rows = np.flatnonzero(valid)
    if not len(rows):
        return ranks
    if values.shape[1] == 1:
        ranks[rows] = np.unique(values[rows, 0], return_inverse=True)[1]
    elif values.shape[1] == 2:
        ranks[rows] = _sort_two(values[rows])
    else:
        rank, left = 0, rows[np.lexsort(values[rows].T[::-1])]
        while len(left):
            on_front = non_dominated_mask(values[left])
            ranks[left[on_front]] = rank
            left = left[~on_front]
            rank += 1
    ranks[~valid] = ranks.max() + 1
    return ranks


def _sort_two(values: Floats) -> NDArray[np.int64]:
    order = np.lexsort((values[:, 1], values[:, 0]))
    ordered = values[order]
    distinct = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))
    # lows[k] is the least second objective on front k so far; it never falls with k. A row is dominated by front k
    # exactly if lows[k] is no larger than its own second objective (equal rows aside, which share a front).
    lows: list[float] = []
    found: list[int] = []
    for second in ordered[distinct, 1].tolist():
        rank = bisect_right(lows, second)
        found.append(rank)
        if rank == len(lows):
            lows.append(second)
        else:
            lows[rank] = second
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.array(found)[np.cumsum(distinct) - 1]
    return ranks


def constrained_ranks(values: Floats, violations: Floats) -> NDArray[np.int64]:
    """Ranks `(n,)` under limits: feasible rows by front, then infeasible ones by total violation (Deb et al. 2002, VI).

    Args:
        values: `(n, M)`; rows with a NaN have failed and come last of all.
        violations: `(n, L)` >= 0, or NaN / inf where unknown; infeasible rows with equal totals share a rank.
    """
    values = _matrix(values)
    total = violations.sum(axis=1)
    total[np.isnan(total) | np.isnan(values).any(axis=1)] = np.inf
    feasible = total <= 0
    if feasible.all():
        return non_dominated_sort(values)
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[feasible] = non_dominated_sort(values[feasible])
    first = ranks[feasible].max() + 1 if feasible.any() else 0
    ranks[~feasible] = first + np.unique(total[~feasible], return_inverse=True)[1]
    return ranks


def crowding_distance(values: Floats, ranks: NDArray[np.int64] | None = None) -> Floats:
    """Crowding distance `(n,)` of each row of `(n, M)` within its front (Deb et al. 2002, III.B).

    A front's extreme rows get inf. Gaps are relative to the front's range; a range of zero, infinite or NaN adds
    nothing.

    Args:
        ranks: `(n,)` the front of each row; None for one front.
    """
    values = _matrix(values)
    n = len(values)
    distance = np.zeros(n)
    if not n:
        return distance
    ranks = np.zeros(n, dtype=np.int64) if ranks is None else ranks
    ordered_ranks = np.sort(ranks)
    starts = np.concatenate([[True], ordered_ranks[1:] != ordered_ranks[:-1]])
    ends = np.append(starts[1:], True)
    edges = starts | ends
    front = np.cumsum(starts) - 1
    with np.errstate(invalid="ignore", over="ignore"):
        for column in values.T:
            order = np.lexsort((column, ranks))
            ordered = column[order]
            span = (ordered[ends] - ordered[starts])[front]
            usable = np.isfinite(span) & (span > 0)
            gap = np.zeros(n)
            gap[1:-1] = ordered[2:] - ordered[:-2]
            gap = np.divide(gap, span, out=np.zeros(n), where=usable & ~edges)
            gap[edges] = np.inf
            distance[order] += gap
    return distance


def hypervolume(values: Floats, reference: Floats) -> float:
    """Volume between the front of `(n, M)` and the `reference` point `(M,)`, exact for any M.

    Rows that are not better than the reference everywhere, or have a NaN, add nothing; no rows give 0. Two objectives
    take a sweep, O(n log n); more are sliced along the last one, each slice's own part found by recursion on the
    limited set of the others (While, Bradstreet & Barone, IEEE TEC 2012): O(n^2 log n) for three, and at worst n times
    more for each further one.
    """
    values, reference = _matrix(values), np.asarray(reference, dtype=np.float64)
    if reference.shape != values.shape[1:]:
        raise ValueError(f"reference must be ({values.shape[1]},), got shape {reference.shape}")
    values = values[(values < reference).all(axis=1)]
    return _volume(np.unique(values[non_dominated_mask(values)], axis=0), reference)


def _volume(front: Floats, reference: Floats) -> float:
    """Hypervolume of distinct non-dominated rows."""
    if not len(front):
        return 0.0
    if front.shape[1] == 1:
        return float(reference[0] - front[:, 0].min())
    if front.shape[1] == 2:
        front = front[np.argsort(front[:, 0])]
        ceilings = np.concatenate([reference[1:], front[:-1, 1]])
        return float(((reference[0] - front[:, 0]) * (ceilings - front[:, 1])).sum())
    # Worst in the last objective first: all later rows are then limited to this row's value there, so that the
    # dimension falls by one.
    front = front[np.argsort(-front[:, -1], kind="stable")]
    total = 0.0
    for i, row in enumerate(front):
        limited = np.maximum(front[i + 1 :, :-1], row[:-1])
        others = _volume(np.unique(limited[non_dominated_mask(limited)], axis=0), reference[:-1])
        total += float(reference[-1] - row[-1]) * (float(np.prod(reference[:-1] - row[:-1])) - others)
    return total


def hypervolume_box(values: Floats) -> tuple[Floats, Floats]:
    """Best and worst value `(M,)` of each objective over the rows `(n, M)` without NaN or infinity.

    The worst is the reference point in which hypervolumes of one problem are compared. An objective that is the same
    everywhere gets a width of one, so that the others still count.

    Raises:
        ValueError: no finite row.
    """
    values = _matrix(values)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        raise ValueError("a box needs at least one finite row")
    best, worst = values.min(axis=0), values.max(axis=0)
    return best, np.where(worst > best, worst, best + 1.0)


def knee(values: Floats) -> int:
    """Index of the row of `(n, M)` that bulges farthest from the chord of the front.

    Objectives are scaled to 0..1 over the front; the knee is the row of the front that lies farthest below the line
    (plane) through the unit points of the axes, hence the one with the least sum of scaled objectives (Das 1999). For
    two objectives these points are the front's ends. An objective that is constant over the front has no say. Ties go
    to the least first objective, then the second, ..., then the first row.

    Raises:
        ValueError: no finite row.
    """
    values = _matrix(values)
    finite = np.isfinite(values).all(axis=1)
    rows = np.flatnonzero(finite)[non_dominated_mask(values[finite])]
    if not len(rows):
        raise ValueError("a knee needs at least one finite row")
    front = values[rows]
    low, span = front.min(axis=0), np.ptp(front, axis=0)
    total = ((front - low) / np.where(span > 0, span, 1.0)).sum(axis=1)
    tied = rows[total <= total.min() + 1e-12]
    return int(tied[np.lexsort(values[tied].T[::-1])[0]])


class ParetoArchive:
    """The best architectures seen so far, and counts of the others: all that remains of predicted populations.

    With limits only feasible rows enter. Rows with equal values stay side by side if their architectures differ; an
    architecture is kept once, as first seen. The front is not bounded: with many objectives it grows.

    Attributes:
        archs: `(f, K)` of the front, in the order found.
        values: `(f, M)` minimised.
        evaluated, feasible, failed: rows seen so far, repeats included.
        nearest: `(M,)` values of the row that broke the limits least, `violation` in all; NaN before any.
    """

    def __init__(self, space: SearchSpace, objectives: int) -> None:
        self.archs: Archs = np.empty((0, len(space.knobs)), dtype=space.dtype)
        self.values: Floats = np.empty((0, objectives))
        self.evaluated = 0
        self.feasible = 0
        self.failed = 0
        self.nearest = np.full(objectives, np.nan)
        self.violation = np.inf

    def __len__(self) -> int:
        return len(self.archs)

    def update(self, archs: Archs, values: Floats, violation: Floats, full: NDArray[np.bool_] | None = None) -> None:
        """Take in a batch.

        Args:
            archs: `(n, K)` canonical.
            values: `(n, M)` minimised; rows with a NaN have failed.
            violation: `(n,)` by how much all limits together are broken; 0 where they are kept.
            full: `(n,)` rows of full fidelity; the others are only counted. None for all.
        """
        ok = ~np.isnan(values).any(axis=1)
        self.evaluated += len(values)
        self.failed += int(len(values) - ok.sum())
        if full is not None:
            ok = ok & full
        good = ok & (violation == 0)
        if ok.any():
            best = int(np.argmin(np.where(ok, violation, np.inf)))
            if violation[best] < self.violation:
                self.nearest, self.violation = values[best].copy(), float(violation[best])
        self.feasible += int(good.sum())
        rows = np.flatnonzero(good)
        rows = rows[~dominated_by(values[rows], self.values)]
        rows = rows[non_dominated_mask(values[rows])]
        if not len(rows):
            return
        kept = ~dominated_by(self.values, values[rows])
        archs = np.concatenate([self.archs[kept], archs[rows]])
        first = new_rows(archs)
        self.archs = archs[first]
        self.values = np.concatenate([self.values[kept], values[rows]])[first]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers and arrays."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.archs = np.asarray(state["archs"], dtype=self.archs.dtype).reshape(-1, self.archs.shape[1])
        self.values = np.asarray(state["values"], dtype=np.float64).reshape(-1, self.values.shape[1])
        self.evaluated, self.feasible, self.failed = (int(state[k]) for k in ("evaluated", "feasible", "failed"))
        self.nearest, self.violation = np.asarray(state["nearest"], dtype=np.float64), float(state["violation"])
