"""What the few-shot predictor sees of networks: what they cost as sums, and what other devices say of them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.base import Array
from predictors.table_features import Features, table_features
from predictors.tables import MeasuredTable

# Of standard deviations: what a source says of networks that it optimised away must not drown the others, and a column
# that hardly varies over the table must not lead far outside it.
_CLIP = 4.0
# Of the smoothing of sources: landmarks, length in standard deviations of all features together, ridges tried.
_LANDMARKS, _SMOOTH_LENGTH, _RIDGES = 300, 4.0, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class View:
    """Networks as a device may see them: in full, or only what their output depends on.

    Args:
        base: `(n,)` logarithm of what the sources lead to expect of a device as fast as they are in the middle.
        linear: `(n, F)` features that the latency is about linear in, over `exp(base)`: a constant, costs, sources.
        log: `(n, G)` features that its logarithm less `base` is about linear in.
    """

    base: Array
    linear: Array
    log: Array

    def __getitem__(self, rows: Any) -> View:
        return View(self.base[rows], self.linear[rows], self.log[rows])


@dataclass(frozen=True)
class Points:
    """Networks seen in full, and (True) by what is executed; and what is doubtful about them."""

    views: dict[bool, View]
    cut: NDArray[np.bool_]
    doubt: Array

    def __getitem__(self, rows: Any) -> Points:
        return Points({e: view[rows] for e, view in self.views.items()}, self.cut[rows], self.doubt[rows])


class _Smoother:
    """What a table says of each device, less what does not repeat: log latencies as a smooth function of features.

    Kernel ridge regression on landmarks (Williams and Seeger, NeurIPS 2000); the ridge of each device by generalised
    cross-validation (Golub, Heath and Wahba, Technometrics 1979). Sources that count whole milliseconds lose their
    rounding that way, and networks outside the table get a value.

    Attributes:
        error: `(D,)` mean squared error of each device, in its own units.
    """

    def __init__(self, inputs: Array, logs: Array) -> None:
        self._centre, self._offset = inputs.mean(0), logs.mean(0)
        x = inputs - self._centre
        self._landmarks = x[np.random.default_rng(0).permutation(len(x))[:_LANDMARKS]]
        values, vectors = np.linalg.eigh(self._similarity(self._landmarks))
        kept = values > 1e-9 * values[-1]
        basis = vectors[:, kept] / np.sqrt(values[kept])
        phi = self._similarity(x) @ basis
        strengths, turned = np.linalg.eigh(phi.T @ phi)
        strengths = np.maximum(strengths, 0)
        y = logs - self._offset
        projected = turned.T @ (phi.T @ y)
        scores, solutions, errors = [], [], []
        for ridge in _RIDGES:
            share = strengths / (strengths + ridge)
            weights = projected / (strengths + ridge)[:, None]
            fitted = phi @ (turned @ weights)
            error = ((y - fitted) ** 2).mean(0) / max(1 - share.sum() / len(x), 0.05) ** 2
            scores.append(error)
            solutions.append(basis @ (turned @ weights))
            errors.append(error)
        best = np.argmin(scores, axis=0)
        self._weights = np.stack([solutions[r][:, d] for d, r in enumerate(best)], axis=1)
        self.error = np.array([errors[r][d] for d, r in enumerate(best)])

    def _similarity(self, x: Array) -> Array:
        z = self._landmarks
        squared = np.maximum((x**2).sum(1)[:, None] + (z**2).sum(1) - 2 * x @ z.T, 0)
        return np.exp(-0.5 * squared / _SMOOTH_LENGTH**2)

    def __call__(self, inputs: Array) -> Array:
        """`(n, D)` from scaled features `(n, F)`."""
        return self._similarity(inputs - self._centre) @ self._weights + self._offset

    def select(self, columns: Sequence[int]) -> _Smoother:
        """The same for some of the devices."""
        part = copy(self)
        part._weights, part._offset = self._weights[:, columns], self._offset[columns]
        part.error = self.error[columns]
        return part


class Inputs:
    """From networks to what is known of them: features scaled as they vary over a table, and what its devices say.

    Attributes:
        known: the table's own rows.
        of_costs: for `linear` and `log`, `(F,)` whether a feature is of operators and not of sources.
    """

    def __init__(self, table: MeasuredTable, smooth: bool = True, smoother: _Smoother | None = None) -> None:
        self.table = table
        self._smooth = smooth
        features = table_features(table, table.keys)
        live = ~features.cut
        logs = np.log(table.latency_ms)
        self._middle, self._spread = np.median(logs[live], axis=0), np.maximum(logs[live].std(0), 1e-9)
        self._logs = np.clip((logs - self._middle) / self._spread, -_CLIP, _CLIP)
        self._places = {g: _Scale(v[live]) for g, v in features.places.items()}
        joined = self._joined(features)
        self.smoother = smoother or _Smoother(joined[live], self._logs[live])
        base, groups = _groups(features, self._said(features, np.arange(len(table)), joined))
        self._scales = {name: [_Scale(v[live], own) for own, v in part] for name, part in groups.items()}
        self.of_costs = {
            name: np.concatenate([np.full(v.shape[1], own) for own, v in part]) for name, part in groups.items()
        }
        self._whole = self._scaled(base, groups)
        self.known = self._points(table.keys, features)

    def __call__(self, keys: NDArray[Any]) -> Points:
        rows = self.table.rows(keys)
        return self.known[rows] if (rows >= 0).all() else self._points(keys, table_features(self.table, keys))

    def _points(self, keys: NDArray[Any], features: Features) -> Points:
        rows = self.table.rows(keys)
        views = {False: self._view(features, rows)}
        if features.executed is not None:
            at = self.table.rows(features.executed)
            views[True] = self._view(table_features(self.table, features.executed), at)
        doubt = np.where(rows >= 0, 0.0, float((self.smoother.error * self._spread**2).mean()))
        return Points(views, features.cut, doubt)

    def _view(self, features: Features, rows: NDArray[np.intp]) -> View:
        """Of networks with these rows in the table, or -1."""
        if (rows >= 0).all():
            return self._whole[rows]
        return self._scaled(*_groups(features, self._said(features, rows, self._joined(features))))

    def _scaled(self, base: Array, groups: dict[str, list[tuple[bool, Array]]]) -> View:
        scaled = {
            name: np.concatenate([scale(v) for scale, (_, v) in zip(self._scales[name], part, strict=True)], axis=1)
            for name, part in groups.items()
        }
        return View(base, **scaled)

    def _said(self, features: Features, rows: NDArray[np.intp], joined: Array) -> Array:
        """`(n, D)` log latency on each source, over its median: smooth, and as measured of networks that are cut."""
        measured = (rows >= 0) & (features.cut | (not self._smooth))
        return np.where(measured[:, None], self._logs[rows], self.smoother(joined)) * self._spread

    def _joined(self, features: Features) -> Array:
        """Everything side by side, of unit variance together."""
        parts = [self._places[g](v) for g, v in features.places.items()]
        return np.concatenate(parts, axis=1) / np.sqrt(len(parts))


class _Scale:
    """Centres and scales columns, so that together they have unit variance over the table; each alike, if `each`."""

    def __init__(self, values: Array, each: bool = False) -> None:
        self._centre = values.mean(0)
        variance = ((values - self._centre) ** 2).mean(0)
        self._scale = np.maximum(np.sqrt(variance * len(variance) if each else variance.sum()), 1e-9)

    def __call__(self, values: Array) -> Array:
        return np.clip((values - self._centre) / self._scale, -_CLIP, _CLIP)


def _groups(features: Features, said: Array) -> tuple[Array, dict[str, list[tuple[bool, Array]]]]:
    """Base, and groups of features of either scale, each with whether it is of operators and not of sources."""
    base = said.mean(1)
    level = base[:, None]
    share = np.exp(-level)
    return base, {
        "linear": [(True, share), (True, features.costs * share), (False, np.exp(said - level))],
        "log": [(True, features.logs), (False, level), (False, said - level)],
    }


def centre(logs: Array, cut: NDArray[np.bool_]) -> float:
    """Median log latency `(n,)` of the networks that are not cut off, or of all where each of them is.

    Args:
        cut: `(n,)` networks whose output does not depend on their input.
    """
    return float(np.median(logs[~cut] if (~cut).any() else logs))


__all__ = ["Inputs", "Points", "View", "centre"]
