"""Statistics of repeated searches: curves over evaluations, bands over seeds, and rank tests with correction.

All values are minimised, as strategies are told them. A row that failed or breaks a limit counts as nothing found.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nasbench.pareto import hypervolume, non_dominated_mask

Floats = NDArray[np.float64]


def hypervolume_curve(values: Floats, reference: Floats) -> Floats:
    """Hypervolume `(n,)` of the first 1, 2, ..., n rows of `(n, M)` before the `reference` point `(M,)`.

    Rows with a NaN, or not better than the reference everywhere, add nothing. Two objectives take O(log n) a row for
    the search and the rows that it displaces; others compute the front's volume anew where it changes.
    """
    values, reference = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if values.ndim != 2 or reference.shape != values.shape[1:]:
        raise ValueError(f"values must be (n, M) and reference (M,), got {values.shape} and {reference.shape}")
    inside = (values < reference).all(axis=1)
    gains = np.zeros(len(values))
    if values.shape[1] == 2:
        xs: list[float] = []  # of the front, rising; ys fall
        ys: list[float] = []
        for row in np.flatnonzero(inside).tolist():
            gains[row] = _insert(xs, ys, float(values[row, 0]), float(values[row, 1]), reference)
        return np.cumsum(gains)
    front, volume = values[:0], 0.0
    for row in np.flatnonzero(inside).tolist():
        if (front <= values[row]).all(axis=1).any():
            continue
        front = np.concatenate([front[~(values[row] <= front).all(axis=1)], values[row : row + 1]])
        grown = hypervolume(front, reference)
        gains[row], volume = grown - volume, grown
    return np.cumsum(gains)


def _insert(xs: list[float], ys: list[float], x: float, y: float, reference: Floats) -> float:
    """Take a point into a front of two objectives; what its volume grows by."""
    at = bisect_left(xs, x)
    if (at > 0 and ys[at - 1] <= y) or (at < len(xs) and xs[at] == x and ys[at] <= y):
        return 0.0
    ceiling = ys[at - 1] if at > 0 else float(reference[1])
    left, gain, end = x, 0.0, at
    while end < len(xs) and ys[end] >= y:
        gain += (xs[end] - left) * (ceiling - y)
        left, ceiling = xs[end], ys[end]
        end += 1
    right = xs[end] if end < len(xs) else float(reference[0])
    gain += (right - left) * (ceiling - y)
    xs[at:end], ys[at:end] = [x], [y]
    return gain


def regret_curve(values: Floats, front: Floats, best: Floats, worst: Floats) -> Floats:
    """Simple regret `(n,)` after the first 1, 2, ..., n rows of `(n, M)`, 0..1.

    The least shift, as a share of each objective's range, by which what was found covers the whole `front` `(t, M)`:
    the additive epsilon indicator (Zitzler, Thiele, Laumanns, Fonseca & da Fonseca, IEEE TEC 2003). With one objective
    that is the gap between the best found and the best there is.

    Args:
        best, worst: `(M,)`, between which objectives are scaled to 0..1.
    """
    if not len(values):
        return np.empty(0)
    scaled = (values - best) / (worst - best)
    target = (np.unique(front, axis=0) - best) / (worst - best)
    gaps = np.stack([(scaled - row).max(axis=1) for row in target], axis=1)  # (n, t)
    gaps = np.where(np.isnan(gaps), np.inf, gaps)
    return np.clip(np.minimum.accumulate(gaps, axis=0).max(axis=1), 0.0, 1.0)


def evaluations_to(curve: Floats, share: float) -> float:
    """How many rows a rising `curve` `(n,)` of shares takes to reach `share`; infinite where it never does."""
    reached = np.flatnonzero(np.asarray(curve) >= share - 1e-12)
    return float(reached[0] + 1) if len(reached) else float("inf")


def band(curves: Sequence[Floats]) -> tuple[Floats, Floats, Floats]:
    """Lower quartile, median and upper quartile `(n,)` of runs' curves; one that ended early keeps its last value."""
    length = max(map(len, curves))
    padded = np.stack([np.concatenate([c, np.full(length - len(c), c[-1] if len(c) else np.nan)]) for c in curves])
    low, middle, high = np.nanpercentile(padded, [25, 50, 75], axis=0)
    return low, middle, high


def at_times(curve: Floats, seconds: Floats, times: Floats) -> Floats:
    """What a curve `(n,)` whose rows were known after `seconds` `(n,)`, rising, had at each of `times` `(t,)`.

    Before the first row it is NaN, after the last it stays.
    """
    at = np.searchsorted(seconds, times, side="right") - 1
    return np.where(at < 0, np.nan, curve[np.maximum(at, 0)])


@dataclass(frozen=True)
class RankTest:
    """Which of several methods is better, over the same blocks.

    Args:
        ranks: average rank per method, 1 is best; ties share theirs.
        friedman_p: of the hypothesis that all are equal (Friedman 1937); NaN for fewer than three methods.
        pairs: columns `first`, `second`, `median_difference` (first less second), `first_wins`, `ties`, `second_wins`,
            `p` (Wilcoxon signed-rank, two-sided) and `p_holm` (Holm 1979, over all pairs).
        blocks: how many.
    """

    ranks: dict[str, float]
    friedman_p: float
    pairs: pd.DataFrame
    blocks: int


def rank_test(scores: Mapping[str, Floats]) -> RankTest:
    """Compare methods by `scores`, `(blocks,)` per method, the larger the better, paired by block.

    Friedman's test and average ranks, then the Wilcoxon signed-rank test for each pair, corrected by Holm's step-down
    procedure (as Demsar, JMLR 2006, recommends for many data sets). Pairs of equal scores count for either side
    (Pratt's treatment).

    Raises:
        ValueError: fewer than two methods, or different numbers of blocks.
    """
    from scipy import stats

    names = list(scores)
    if len(names) < 2 or len({len(s) for s in scores.values()}) != 1:
        raise ValueError("a comparison needs two methods or more, with a score in every block")
    table = np.stack([np.asarray(scores[n], dtype=np.float64) for n in names])  # (methods, blocks)
    blocks = table.shape[1]
    ranks = stats.rankdata(-table, axis=0).mean(axis=1)
    friedman = float("nan")
    if len(names) > 2:
        same = (table == table[0]).all()
        friedman = 1.0 if same else float(stats.friedmanchisquare(*table).pvalue)
    rows = []
    for a, b in combinations(range(len(names)), 2):
        difference = table[a] - table[b]
        p = 1.0
        if difference.any():
            p = float(stats.wilcoxon(difference, zero_method="pratt", method="auto").pvalue)
        rows.append(
            (names[a], names[b], float(np.median(difference)), int((difference > 0).sum()),
             int((difference == 0).sum()), int((difference < 0).sum()), p)
        )  # fmt: skip
    columns = ["first", "second", "median_difference", "first_wins", "ties", "second_wins", "p"]
    pairs = pd.DataFrame(rows, columns=columns)
    pairs["p_holm"] = holm(pairs["p"].to_numpy())
    return RankTest(dict(zip(names, ranks.tolist(), strict=True)), friedman, pairs, blocks)


def holm(p: Floats) -> Floats:
    """p-values `(m,)` corrected for m tests by Holm's step-down procedure (Scand. J. Statist. 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    out = np.empty(len(p))
    out[order] = np.minimum(stepped, 1.0)
    return out


def front_of(values: Floats) -> Floats:
    """The distinct non-dominated rows of `(n, M)`."""
    return np.unique(values[non_dominated_mask(values)], axis=0)
