"""What an evaluation is expected to add to a front: expected improvement of its hypervolume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nasbench.pareto import non_dominated_mask

Floats = NDArray[np.float64]
_DIRECTIONS = 256  # random scalarisations that stand for hypervolume beyond two objectives


class ExpectedImprovement:
    """Expected hypervolume improvement of candidates over a front, from weighted points per candidate and objective.

    Objectives are independent given the models. One objective: expected improvement (Jones et al. 1998). Two: the exact
    integral over the strips between the front's rows (Emmerich et al. 2011; Yang et al. 2019), which separates into one
    factor per objective. More: hypervolume as the mean of random scalarisations (Deng & Zhang 2019; Golovin & Zhang,
    ICML 2020), whose improvement is averaged over as many random combinations of points.

    Args:
        front: `(f, M)` minimised; rows beyond the reference or dominated do no harm.
        reference: `(M,)` the point up to which volume counts.
        rng: draws the directions for three objectives and more.
    """

    def __init__(self, front: Floats, reference: Floats, rng: np.random.Generator) -> None:
        self.reference = np.asarray(reference, dtype=np.float64)
        self.front = np.empty((0, len(self.reference)))
        if len(self.reference) > 2:
            # Directions are those of |normal| vectors: uniform on the positive part of the sphere.
            self._rays = np.abs(rng.normal(size=(_DIRECTIONS, len(self.reference))))
            self._rays /= np.linalg.norm(self._rays, axis=1, keepdims=True)
            self._ranks = rng.random((_DIRECTIONS, len(self.reference)))
        self.add(front)

    def add(self, rows: Floats) -> None:
        """Let `(m, M)` rows be part of the front."""
        rows = np.concatenate([self.front, rows[(rows < self.reference).all(axis=1)]])
        self.front = rows[non_dominated_mask(rows)]

    def __call__(self, points: Sequence[Floats], weights: Sequence[Floats]) -> Floats:
        """Expected improvement `(n,)`.

        Args:
            points: per objective `(n, S)` values; S may differ between objectives, and is 1 where a value is known.
            weights: per objective `(S,)`, adding up to one.
        """
        if len(points) == 1:
            best = self.front[:, 0].min() if len(self.front) else self.reference[0]
            return _below(points[0], weights[0], np.array([best]))[:, 0]
        return self._strips(points, weights) if len(points) == 2 else self._directions(points, weights)

    def _strips(self, points: Sequence[Floats], weights: Sequence[Floats]) -> Floats:
        front = np.unique(self.front, axis=0)
        ends = np.append(front[:, 0], self.reference[0])
        heights = np.append(self.reference[1], front[:, 1])
        reached = _below(points[0], weights[0], ends)  # expected length to the left of each end
        reached[:, 1:] -= reached[:, :-1].copy()
        return np.einsum("ns,ns->n", reached, _below(points[1], weights[1], heights))

    def _directions(self, points: Sequence[Floats], weights: Sequence[Floats]) -> Floats:
        size = len(self.reference)
        best = self._lengths(self.front[:, None, :]).max(axis=0) if len(self.front) else np.zeros(_DIRECTIONS)
        # Each direction sees one random combination of points, the same for all candidates.
        columns = []
        for m, (values, weight) in enumerate(zip(points, weights, strict=True)):
            columns.append(values[:, np.searchsorted(np.cumsum(weight)[:-1], self._ranks[:, m])])
        picked = np.stack(columns, axis=2)
        return np.asarray(np.maximum(self._lengths(picked) ** size - best**size, 0.0).mean(axis=1))

    def _lengths(self, values: Floats) -> Floats:
        """How far along each ray from the reference values `(n, directions or 1, M)` reach, `(n, directions)`."""
        return np.maximum((self.reference - values) / self._rays, 0.0).min(axis=2)


def _below(points: Floats, weights: Floats, ends: Floats) -> Floats:
    """Expected amount `(n, k)` by which points `(n, S)` lie below each of `ends` `(k,)`."""
    out = np.zeros((len(points), len(ends)))
    for column, weight in zip(points.T, weights, strict=True):
        out += weight * np.maximum(ends - column[:, None], 0.0)
    return out
