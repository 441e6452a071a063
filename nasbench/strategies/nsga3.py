"""NSGA-III."""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray

from nasbench.pareto import constrained_ranks, non_dominated_mask
from nasbench.strategies.nsga2 import NSGA2
from nasbench.variation import new_rows


class NSGA3(NSGA2):
    """NSGA-III (Deb & Jain, IEEE TEC 2014; with limits: Jain & Deb, same issue): for three objectives and more.

    As NSGA-II, but the last front that survives in part is thinned by niches along reference directions instead of by
    crowding, and feasible parents are drawn at random. The directions are Das and Dennis' (1998) with as many divisions
    as the population has members for.

    Args:
        population_size: survivors of each generation. Ask for as many at a time to get the paper's algorithm.
        crossover_rate: chance of a child to have two parents.
        mutation_rate: chance of each knob to change; by default one knob a child on average.
    """

    def _select(self) -> NDArray[np.int64]:
        distinct = np.flatnonzero(new_rows(self.archs))
        values, violation = self.values[distinct], self.violation[distinct]
        ranks = constrained_ranks(values, violation[:, None])
        order = np.argsort(ranks, kind="stable")
        if len(order) <= self.population_size:
            return distinct[order]
        last = ranks[order[self.population_size - 1]]
        sure = order[ranks[order] < last]
        split = order[ranks[order] == last]
        wanted = self.population_size - len(sure)
        if wanted < len(split) and violation[split[0]] <= 0:
            split = self._niched(values, sure, split, wanted)
        return distinct[np.concatenate([sure, split[:wanted]])]

    def _niched(
        self, values: NDArray[np.float64], sure: NDArray[np.int64], split: NDArray[np.int64], wanted: int
    ) -> NDArray[np.int64]:
        """Rows of the `split` front that serve the emptiest niches (Algorithms 3 and 4)."""
        directions = reference_directions(values.shape[1], self.population_size)
        candidates = np.concatenate([sure, split])
        scaled = normalised(values[candidates])
        # Distance to the line of each direction; a row belongs to the nearest.
        along = scaled @ directions.T
        distance = np.sqrt(np.maximum((scaled**2).sum(axis=1)[:, None] - along**2, 0.0))
        niche = distance.argmin(axis=1)
        distance = distance[np.arange(len(niche)), niche]
        counts = np.bincount(niche[: len(sure)], minlength=len(directions))
        niche, distance = niche[len(sure) :], distance[len(sure) :]
        left = np.ones(len(split), dtype=bool)
        chosen = []
        for _ in range(wanted):
            open_niches = np.unique(niche[left])
            least = open_niches[counts[open_niches] == counts[open_niches].min()]
            j = self.rng.choice(least)
            rows = np.flatnonzero(left & (niche == j))
            row = rows[distance[rows].argmin()] if counts[j] == 0 else self.rng.choice(rows)
            chosen.append(row)
            left[row] = False
            counts[j] += 1
        return split[chosen]

    def _parents(self, n: int) -> NDArray[np.int64]:
        entrants = self.rng.integers(len(self.archs), size=(2, n, 2))
        # Members stand feasible first; among feasible ones the first entrant wins, which is a random one.
        feasible = self.violation[entrants] <= 0
        return np.where(feasible.all(axis=2), entrants[..., 0], entrants.min(axis=2))


def reference_directions(objectives: int, most: int) -> NDArray[np.float64]:
    """Das and Dennis' structured unit vectors `(H, M)`: the most divisions with `H <= most`, at least one division."""
    if objectives == 1:
        return np.ones((1, 1))
    divisions = 1
    while comb(objectives + divisions, divisions + 1) <= most:
        divisions += 1
    # All ways to share `divisions` among the objectives: bars among stars.
    points = np.zeros((1, 0), dtype=np.int64)
    for _ in range(objectives - 1):
        used = points.sum(axis=1)
        points = np.concatenate(
            [np.column_stack([points[used <= divisions - k], np.full((used <= divisions - k).sum(), k)])
             for k in range(divisions + 1)]
        )  # fmt: skip
    shares = np.column_stack([points, divisions - points.sum(axis=1)]).astype(float)
    return shares / np.linalg.norm(shares, axis=1, keepdims=True)


def normalised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(n, M)` moved to the ideal point and scaled by the intercepts of the extreme points' plane (Algorithm 2).

    Where that plane is degenerate, the front's own ranges scale, as the paper's authors do. Infinite values count as
    the worst finite ones.
    """
    finite = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(finite).all(axis=0).any():
        return np.zeros_like(values)
    values = np.where(np.isfinite(values), values, np.nanmax(finite, axis=0))
    moved = values - values.min(axis=0)
    front = moved[non_dominated_mask(values)]
    span = np.where((top := front.max(axis=0)) > 0, top, 1.0)
    # Per axis the row of the front that lies nearest to it, by the achievement scalarising function.
    weights = np.where(np.eye(values.shape[1]) > 0, 1.0, 1e-6)
    extreme = front[((front / span)[None] / weights[:, None]).max(axis=2).argmin(axis=1)]
    scale = span
    if abs(np.linalg.det(extreme / span)) > 1e-9:
        plane = np.linalg.solve(extreme, np.ones(len(span)))
        if (plane > 1e-12).all() and (1.0 / plane <= 10.0 * span).all():
            scale = 1.0 / plane
    return moved / scale
