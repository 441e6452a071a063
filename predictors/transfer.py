"""What the few-shot predictor knows of networks and devices: features, smoothed sources, and their covariances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve
from scipy.optimize import minimize

from predictors.base import Array
from predictors.table_features import table_features
from predictors.tables import MeasuredTable

OFFSET_VARIANCE = 4.0  # of a device's overall speed, in squared logarithms: a factor of 50 either way

_PLAIN = frozenset({"counts", "level", "contrast"})
_FLOOR = 1e-5  # noise variance that every measurement has: 0.3 %
_CLIP = 4.0  # standard deviations: what a source says of networks that it optimised away must not drown the others
# Of the parameters' logarithms: standard deviation of the prior, and bounds.
_WIDTH, _LEAST, _MOST = 1.5, -7.0, 4.0
# Of the smoothing of sources: landmarks, length in standard deviations of all features together, ridges tried.
_LANDMARKS, _SMOOTH_LENGTH, _RIDGES = 300, 4.0, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Kernel:
    """Covariance of a device's log latencies: a linear term per group of features, and two smooth ones.

    Parameters are logarithms of standard deviations and lengths: noise, noise of networks that are cut, one per linear
    group, then per smooth term its size and one length per group.
    """

    linear: tuple[str, ...]
    smooth: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, groups: Mapping[str, Array]) -> Kernel:
        own = tuple(name for name in groups if name != "sources")
        return cls(own, (("counts", "size"), ("sources",)) if "sources" in groups else (("counts", "size"),))

    @cached_property
    def prior(self) -> Array:
        """`(P,)` expected parameters of a device of which nothing is known."""
        smooth = [value for term in self.smooth for value in (-2.0, *[1.0] * len(term))]
        return np.array([-3.0, -1.0, *[-1.5] * len(self.linear), *smooth])

    @cached_property
    def plain(self) -> Array:
        """`(P,)` parameters that make it a Bayesian ridge on counts and what the sources say."""
        linear = [-2.0 if g in _PLAIN else _LEAST for g in self.linear]
        smooth = [value for term in self.smooth for value in (_LEAST, *[1.0] * len(term))]
        return np.array([-2.3, 0.0, *linear, *smooth])

    def products(self, a: Mapping[str, Array], b: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        """Everything of features `a` (n networks) and `b` (m) that covariances need, whatever the parameters."""
        inner = [a[g] @ b[g].T for g in self.linear]
        squared = {
            g: np.maximum((a[g] ** 2).sum(1)[:, None] + (b[g] ** 2).sum(1) - 2 * a[g] @ b[g].T, 0)
            for g in sorted({g for term in self.smooth for g in term})
        }
        return inner, squared

    def covariance(self, p: Array, products: tuple[list[Array], dict[str, Array]]) -> Array:
        """`(n, m)`."""
        inner, squared = products
        e = np.exp(2 * p)
        total = np.full_like(next(iter(squared.values())), OFFSET_VARIANCE)
        for size, product in zip(e[2:], inner, strict=False):
            total += size * product
        at = 2 + len(inner)
        for term in self.smooth:
            scaled = sum(squared[g] / e[at + 1 + i] for i, g in enumerate(term))
            total += e[at] * np.exp(-0.5 * scaled)
            at += 1 + len(term)
        return total

    def variance(self, p: Array, a: Mapping[str, Array]) -> Array:
        """`(n,)` the diagonal of the covariance of `a` with itself."""
        e = np.exp(2 * p)
        total = OFFSET_VARIANCE + sum(size * (a[g] ** 2).sum(1) for size, g in zip(e[2:], self.linear, strict=False))
        at = 2 + len(self.linear)
        for term in self.smooth:
            total = total + e[at]
            at += 1 + len(term)
        return np.asarray(total)

    def noise(self, p: Array, cut: NDArray[np.bool_]) -> Array:
        """`(n,)` variance of a measurement around its expectation."""
        e = np.exp(2 * p)
        return _FLOOR + e[0] + e[1] * cut

    def evidence(
        self, p: Array, products: tuple[list[Array], dict[str, Array]], cut: NDArray[np.bool_], y: Array
    ) -> float:
        """Logarithm of the probability of measurements `y` (n,), less a constant."""
        factor = np.linalg.cholesky(self.covariance(p, products) + np.diag(self.noise(p, cut)))
        return float(-0.5 * y @ cho_solve((factor, True), y) - np.log(np.diag(factor)).sum())

    def loss(
        self, p: Array, products: tuple[list[Array], dict[str, Array]], cut: NDArray[np.bool_], y: Array
    ) -> tuple[float, Array]:
        """Negative evidence and its gradient `(P,)` (Rasmussen and Williams, 2006, eq. 5.9)."""
        inner, squared = products
        e = np.exp(2 * p)
        slopes = [2 * size * product for size, product in zip(e[2:], inner, strict=False)]
        at = 2 + len(inner)
        total = OFFSET_VARIANCE + 0.5 * sum(slopes)
        for term in self.smooth:
            parts = [squared[g] / e[at + 1 + i] for i, g in enumerate(term)]
            here = e[at] * np.exp(-0.5 * sum(parts))
            total = total + here
            slopes += [2 * here, *(here * part for part in parts)]
            at += 1 + len(term)
        factor = np.linalg.cholesky(total + np.diag(self.noise(p, cut)))
        weights = cho_solve((factor, True), y)
        outer = cho_solve((factor, True), np.eye(len(y))) - np.outer(weights, weights)
        diagonal = np.diag(outer)
        gradient = [e[0] * diagonal.sum(), e[1] * (diagonal * cut).sum(), *(0.5 * (outer * s).sum() for s in slopes)]
        return float(0.5 * y @ weights + np.log(np.diag(factor)).sum()), np.array(gradient)

    def fit(self, data: Sequence[tuple[Any, NDArray[np.bool_], Array]]) -> Array:
        """Parameters `(P,)` of largest posterior probability given the measurements of one or several devices."""

        def loss(p: Array) -> tuple[float, Array]:
            away = (p - self.prior) / _WIDTH
            value, gradient = 0.5 * float(away @ away), away / _WIDTH
            for products, cut, y in data:
                one = self.loss(p, products, cut, y)
                value, gradient = value + one[0], gradient + one[1]
            return value, gradient

        bounds = [(_LEAST, _MOST)] * len(self.prior)
        found = minimize(loss, self.prior, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        return np.asarray(found.x)


@dataclass(frozen=True)
class Points:
    """Scaled features of networks: of all of each, and (True) of what is executed; and what is doubtful about them."""

    features: dict[bool, dict[str, Array]]
    cut: NDArray[np.bool_]
    doubt: Array


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
    """From networks to kernel inputs: features scaled as they vary over a table, and what its devices say of them.

    Attributes:
        known: inputs of the table's own rows.
        cut: `(n,)` of these.
    """

    def __init__(self, table: MeasuredTable, smooth: bool = True, smoother: _Smoother | None = None) -> None:
        self.table = table
        self._smooth = smooth
        features = table_features(table, table.keys, table.totals if table.knobs else None)
        self.cut = features.cut
        live = ~features.cut
        logs = np.log(table.latency_ms)
        middle, self._spread = np.median(logs[live], axis=0), np.maximum(logs[live].std(0), 1e-9)
        self._logs = np.clip((logs - middle) / self._spread, -_CLIP, _CLIP)
        self._centres: dict[str, Array] = {}
        self._scales: dict[str, float] = {}
        self._measure(features.groups, live)
        joined = _joined(self._scaled(features.groups))
        self.smoother = smoother or _Smoother(joined[live], self._logs[live])
        # Of networks that are cut, what was measured says more than what is like them.
        values = np.where(live[:, None] & smooth, self.smoother(joined), self._logs)
        groups = {**features.groups, **_source_groups(values)}
        self._measure(groups, live)
        whole = self._scaled(groups)
        self.known = {False: whole}
        if features.executed is not None:
            at = table.rows(features.executed)
            if (at >= 0).all():
                self.known[True] = {g: v[at] for g, v in whole.items()}
            else:
                self.known[True] = self._scaled(self._groups(features.executed)[0])

    def __call__(self, keys: NDArray[Any]) -> Points:
        rows = self.table.rows(keys)
        if (rows >= 0).all():
            known = {e: {g: v[rows] for g, v in f.items()} for e, f in self.known.items()}
            return Points(known, self.cut[rows], np.zeros(len(rows)))
        groups, cut, doubt, executed = self._groups(keys)
        features = {False: self._scaled(groups)}
        if executed is not None:
            features[True] = self._scaled(self._groups(executed)[0])
        return Points(features, cut, doubt)

    def _groups(self, keys: NDArray[Any]) -> tuple[dict[str, Array], NDArray[np.bool_], Array, NDArray[Any] | None]:
        rows = self.table.rows(keys)
        features = table_features(self.table, keys)
        smooth = self.smoother(_joined(self._scaled(features.groups)))
        there, logs = rows >= 0, self._logs[rows]
        smooth = np.where((there & (features.cut | (not self._smooth)))[:, None], logs, smooth)
        doubt = np.where(there, 0.0, float((self.smoother.error * self._spread**2).mean()))
        return {**features.groups, **_source_groups(smooth)}, features.cut, doubt, features.executed

    def _measure(self, groups: Mapping[str, Array], live: NDArray[np.bool_]) -> None:
        """Note centre and scale of each group over networks that are not cut."""
        for g, v in groups.items():
            self._centres[g] = v[live].mean(0)
            self._scales[g] = max(float(np.sqrt(((v[live] - self._centres[g]) ** 2).sum(1).mean())), 1e-9)

    def _scaled(self, groups: Mapping[str, Array]) -> dict[str, Array]:
        return {g: (v - self._centres[g]) / self._scales[g] for g, v in groups.items()}


def _joined(groups: Mapping[str, Array]) -> Array:
    """All groups side by side, of unit variance together."""
    return np.concatenate(list(groups.values()), axis=1) / np.sqrt(len(groups))


def _source_groups(smooth: Array) -> dict[str, Array]:
    level = smooth.mean(1, keepdims=True)
    return {"level": level, "contrast": smooth - level, "sources": smooth}


def centre(logs: Array, cut: NDArray[np.bool_]) -> float:
    return float(np.median(logs[~cut] if (~cut).any() else logs))


__all__ = ["OFFSET_VARIANCE", "Inputs", "Kernel", "Points", "centre"]
