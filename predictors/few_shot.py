"""Latency on a new device from a few measured networks and the tables of other devices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

from hardware_profiles.paths import atomic
from predictors.base import Array, Estimate, Predictor
from predictors.table_features import table_features, workload_totals
from predictors.tables import BoundTable, MeasuredTable, describe, load_arrays, tied
from search_spaces import SearchSpace, UserError, Workload

LEAST_SAMPLES = 3
# A latency this many times off what sources and other measurements lead to expect is in another unit.
OTHER_UNIT = 100.0
# Networks whose output does not depend on their input may be optimised away in part or whole, so measured ones differ
# by orders of magnitude. With such a spread the mean of a log-normal says nothing (thousands of times the median) and
# would rank these networks last: predictions count no more of it than this.
_CUT_LOG_STD = 0.5

_FORMAT = "nasbench few-shot predictor 1"
_SOURCE_GROUPS = frozenset({"level", "contrast", "sources"})
_OFFSET_VARIANCE = 4.0  # of a device's overall speed, in squared logarithms: a factor of 50 either way
_FLOOR = 1e-5  # noise variance that every measurement has: 0.3 %
_CLIP = 4.0  # standard deviations: what a source says of networks that it optimised away must not drown the others
# Of the parameters' logarithms: standard deviation of the prior, and bounds.
_WIDTH, _LEAST, _MOST = 1.5, -7.0, 4.0
_TRAIN, _REPEATS = 100, 2  # networks per fit of a source's parameters, and fits that are summed
_NEGLIGIBLE = 1e-3  # weight below which a hypothesis is left out
# Of the smoothing of sources: landmarks, length in standard deviations of all features together, ridges tried.
_LANDMARKS, _SMOOTH_LENGTH, _RIDGES = 300, 4.0, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Of `suggest`: networks compared per network wanted, and networks whose uncertainty is to fall. Among many more
# candidates the most telling are extremes, where the model is least to be trusted.
_CANDIDATES, _REPRESENTATIVES = 4, 300


def device_family(name: str) -> str:
    """The part of a column's name before a batch size or model number: near-copies share it.

    >>> device_family("titan_rtx_256"), device_family("pixel3")
    ('titan_rtx', 'pixel3')
    """
    return re.sub(r"(_\d+[a-z]?)+$", "", name)


@dataclass(frozen=True)
class _Kernel:
    """Covariance of a device's log latencies: a linear term per group of features, and two smooth ones.

    Parameters are logarithms of standard deviations and lengths: noise, noise of networks that are cut, one per linear
    group, then per smooth term its size and one length per group.
    """

    linear: tuple[str, ...]
    smooth: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, groups: Mapping[str, Array]) -> _Kernel:
        own = tuple(name for name in groups if name != "sources")
        return cls(own, (("counts", "size"), ("sources",)) if "sources" in groups else (("counts", "size"),))

    @cached_property
    def prior(self) -> Array:
        """`(P,)` expected parameters of a device of which nothing is known."""
        smooth = [value for term in self.smooth for value in (-2.0, *[1.0] * len(term))]
        return np.array([-3.0, -1.0, *[-1.5] * len(self.linear), *smooth])

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
        total = np.full_like(next(iter(squared.values())), _OFFSET_VARIANCE)
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
        total = _OFFSET_VARIANCE + sum(size * (a[g] ** 2).sum(1) for size, g in zip(e[2:], self.linear, strict=False))
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
        total = _OFFSET_VARIANCE + 0.5 * sum(slopes)
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

    @cached_property
    def of_sources(self) -> NDArray[np.bool_]:
        """`(P,)` which parameters are sizes of terms in other devices' latencies."""
        marks = [False, False, *(g in _SOURCE_GROUPS for g in self.linear)]
        for term in self.smooth:
            marks += [term[0] in _SOURCE_GROUPS, *[False] * len(term)]
        return np.array(marks)

    def fit(
        self, data: Sequence[tuple[Any, NDArray[np.bool_], Array]], absent: NDArray[np.bool_] | None = None
    ) -> tuple[Array, float]:
        """Parameters `(P,)` of largest posterior probability given several sets of measurements, and its logarithm.

        Terms whose size is marked `absent` are left out.
        """
        start = self.prior if absent is None else np.where(absent, _LEAST, self.prior)

        def loss(p: Array) -> tuple[float, Array]:
            away = (p - start) / _WIDTH
            value, gradient = 0.5 * float(away @ away), away / _WIDTH
            for products, cut, y in data:
                one = self.loss(p, products, cut, y)
                value, gradient = value + one[0], gradient + one[1]
            return value, gradient

        bounds = [(_LEAST, _LEAST if at == _LEAST else _MOST) for at in start]
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        return found.x, -float(found.fun)


@dataclass(frozen=True)
class Lesson:
    """What one source device teaches, taken for a new one among the others.

    Args:
        source: its name.
        executed: whether networks were taken without the operators that their output does not depend on.
        alone: whether it was explained by operators only, as if no other device were like it.
        parameters: `(P,)` of the kernel, fitted to it.
        evidence: logarithm of the probability of its measurements, less a constant.
    """

    source: str
    executed: bool
    alone: bool
    parameters: Array
    evidence: float


@dataclass(frozen=True)
class Design:
    """What the hypotheses about a new device are; the default is what `benchmarks.few_shot --select` chose.

    Args:
        executed: whether a device may drop operators that the output does not depend on.
        alone: whether a device may be like no source, so that only operators explain it.
        noise: factors of the standard deviation of a source's noise; each is a hypothesis of its own.
        best_only: use the most probable hypothesis instead of the average.
        smooth: take of the sources what is a smooth function of features, without rounding and noise.
    """

    executed: bool = True
    alone: bool = True
    noise: tuple[float, ...] = (0.5, 1.0, 2.0)
    best_only: bool = False
    smooth: bool = True


@dataclass(frozen=True)
class _Hypothesis:
    """One way in which a device may behave: like this source, and running all of a network or only what is used."""

    source: str
    executed: bool
    parameters: Array
    log_prior: float


def lessons(table: MeasuredTable, families: Mapping[str, str] | None = None, smooth: bool = True) -> list[Lesson]:
    """The lessons of all devices of a table; see `FewShot.learn`."""
    family = {d: (families or {}).get(d, device_family(d)) for d in table.devices}
    if len(set(family.values())) < 2:
        raise UserError(f"few-shot predictor: needs sources of at least two families, got {', '.join(table.devices)}")
    whole = _Inputs(table, smooth)
    rng = np.random.default_rng(0)
    drawn = [rng.choice(len(table), min(_TRAIN, len(table)), replace=False) for _ in range(_REPEATS)]
    found = []
    for device in table.devices:
        others = table.select([d for d in table.devices if family[d] != family[device]])
        inputs = _Inputs(others, smooth, whole.smoother.select([table.devices.index(d) for d in others.devices]))
        values = np.log(table.column(device))
        kernel = _Kernel.of(inputs.known[False])
        for executed, features in inputs.known.items():
            data = []
            for rows in drawn:
                part = {g: v[rows] for g, v in features.items()}
                cut = inputs.cut[rows]
                data.append((kernel.products(part, part), cut, values[rows] - _centre(values[rows], cut)))
            for alone in (False, True):
                found.append(Lesson(device, executed, alone, *kernel.fit(data, kernel.of_sources if alone else None)))
    return found


class FewShot(Predictor):
    """Latency on a device where k networks were measured (10 or 20 are plenty), learned with tables of other devices.

    Log latency is a Gaussian process over three kinds of features: log latencies of the same network on the source
    devices (their mean, and how each deviates from it), operator counts and size, and where the operators stand. How
    far each kind is to be trusted is what the sources teach: each in turn is taken for the new device, and the
    kernel's parameters are fitted to it. The new device's prediction is the average over these hypotheses, each
    weighted by the probability of the new measurements under it (Bayesian model averaging; Hoeting et al., Statistical
    Science 1999), so that nothing is fitted to k points but weights. A second kind of hypothesis is that the device's
    converter drops operators that the output does not depend on; a third, that it is like no source at all.

    Needs: a `MeasuredTable` of source devices (`learn`), and the new device's measurements (`adapt`). It is tied to the
    space of its table; a table of networks from ONNX files serves any workload. Source latencies
    are smoothed first, which takes rounding and noise out of them; the same regression gives those of networks outside
    the table, which get wider intervals.

    Life: `learn` once per table (seconds), `suggest` what to measure, `adapt` (less than a second), then `bind(space)`
    or `of(archs)`; immutable throughout. With a metric other than latency, whatever is positive may take its place.

    Attributes:
        table: the sources.
        measured: `(k,)` rows of the adapted-to networks in the table, and `latency_ms (k,)` their values; empty before
            `adapt`.
    """

    metric = "latency_ms"

    def __init__(
        self,
        table: MeasuredTable,
        hypotheses: Sequence[_Hypothesis],
        measured: NDArray[Any] | None = None,
        latency_ms: Array | None = None,
        design: Design = Design(),
        _inputs: _Inputs | None = None,
    ) -> None:
        self.table = table
        self.design = design
        self.hypotheses = tuple(hypotheses)
        self.measured = table.keys[:0] if measured is None else measured
        self.latency_ms = np.empty(0) if latency_ms is None else latency_ms
        self._inputs = _inputs or _Inputs(table, design.smooth)
        self._kernel = _Kernel.of(self._inputs.known[False])
        self._points = self._inputs(self.measured)
        self._posteriors = self._weigh()

    @classmethod
    def learn(
        cls,
        table: MeasuredTable,
        sources: Sequence[str] | None = None,
        families: Mapping[str, str] | None = None,
        design: Design = Design(),
    ) -> FewShot:
        """Learn from source devices how devices differ; some seconds.

        Args:
            table: measurements of them, on one space.
            sources: which columns, by default all. Never the device to be predicted, nor a near-copy of it.
            families: column -> name that its near-copies share; by default `device_family`. A source is never explained
                by its own family.
            design: what hypotheses are made.

        Raises:
            UserError: an unknown column, or fewer than two families.
        """
        table = table.select(sources or table.devices)
        return cls.of_lessons(table, lessons(table, families, design.smooth), design)

    @classmethod
    def of_lessons(cls, table: MeasuredTable, taught: Sequence[Lesson], design: Design = Design()) -> FewShot:
        """From what `lessons(table)` gave, so that several designs can share it."""
        taught = [x for x in taught if (design.executed or not x.executed) and (design.alone or not x.alone)]
        # How often a device drops operators, and how often it is like no other: by rule of succession over the sources.
        best = [max((x for x in taught if x.source == d), key=lambda x: x.evidence) for d in table.devices]
        drops = (1 + sum(x.executed for x in best)) / (2 + len(best)) if any(x.executed for x in taught) else 0.0
        lonely = (1 + sum(x.alone for x in best)) / (2 + len(best)) if design.alone else 0.0
        hypotheses = [
            _Hypothesis(
                x.source,
                x.executed,
                np.array([x.parameters[0] + np.log(factor), *x.parameters[1:]]),
                float(np.log(drops if x.executed else 1 - drops) + np.log(lonely if x.alone else 1 - lonely)),
            )
            for x in taught
            for factor in design.noise
        ]
        return cls(table, hypotheses, design=design)

    @classmethod
    def from_csv(cls, path: Path, space: SearchSpace | None = None) -> FewShot:
        """Learn from a file that `MeasuredTable.from_csv` reads, with a column per source device."""
        return cls.learn(MeasuredTable.from_csv(path, space))

    def adapt(self, networks: NDArray[Any] | Sequence[Workload], latency_ms: Sequence[float] | Array) -> FewShot:
        """The predictor of a device from its measurements, in addition to those that this one has been given already.

        Args:
            networks: `(k, K)` architectures (or workloads, for a table of ONNX files); distinct ones.
            latency_ms: `(k,)` milliseconds.

        Raises:
            UserError: fewer than three networks in all, a latency that is not a positive number, or a network that was
                measured twice with different results, or a latency that must be in another unit.
        """
        keys = self._keys(networks)
        values = np.asarray(latency_ms, dtype=float)
        if values.shape != (len(keys),):
            raise UserError(f"few-shot predictor: {len(keys)} networks, but latencies of shape {values.shape}")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise UserError(
                f"few-shot predictor: measurement {bad[0]}: a latency is a positive number of ms, got {values[bad[0]]}"
            )
        keys, values = np.concatenate([self.measured, keys]), np.concatenate([self.latency_ms, values])
        distinct, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        twice = np.flatnonzero(values != values[first[inverse.ravel()]])
        if len(twice):
            other = first[inverse.ravel()[twice[0]]]
            raise UserError(
                f"few-shot predictor: measurement {twice[0]}: {describe(self.table, keys[twice[0]])} was measured "
                f"twice, {values[other]:g} and {values[twice[0]]:g} ms; give one value, such as the median"
            )
        if len(distinct) < LEAST_SAMPLES:
            raise UserError(
                f"few-shot predictor: needs at least {LEAST_SAMPLES} measured networks, got {len(distinct)}; "
                "`suggest` says which"
            )
        self._check_units(keys, values)
        rows = np.sort(first)
        return FewShot(self.table, self.hypotheses, keys[rows], values[rows], self.design, self._inputs)

    def _check_units(self, keys: NDArray[Any], values: Array) -> None:
        """Raises UserError where one network takes a hundred times more or less, next to the others, than on sources.

        Networks that a device may optimise away are left out of it, as are those that are not in the table.
        """
        rows = self.table.rows(keys)
        asked = np.flatnonzero(rows >= 0)
        asked = asked[~self._inputs.cut[rows[asked]]]
        if len(asked) < LEAST_SAMPLES:
            return
        ratios = np.log(values[asked, None] / self.table.latency_ms[rows[asked]])
        off = np.median(ratios - np.median(ratios, axis=0), axis=1)
        worst = int(np.argmax(np.abs(off)))
        if abs(off[worst]) > np.log(OTHER_UNIT):
            raise UserError(
                f"few-shot predictor: measurement {asked[worst]}: {values[asked[worst]]:g} ms is "
                f"{np.exp(abs(off[worst])):.0f} times {'more' if off[worst] > 0 else 'less'} than other devices and "
                "measurements lead to expect; latencies are in milliseconds"
            )

    def of(self, keys: NDArray[Any]) -> Estimate:
        """Estimate of `(n, K)` architectures (or of `(n, F)` operator totals, for a table of ONNX files).

        Raises:
            UserError: before `adapt`.
        """
        if not len(self.latency_ms):
            raise UserError("few-shot predictor: no measurements of the device yet; call adapt(networks, latency_ms)")
        points = self._inputs(keys)
        products = {e: self._kernel.products(f, self._points.features[e]) for e, f in points.features.items()}
        means, variances, weights = [], [], []
        for post in self._posteriors:
            h = post.hypothesis
            covariance = self._kernel.covariance(h.parameters, products[h.executed])
            explained = solve_triangular(post.factor, covariance.T, lower=True)
            left = self._kernel.variance(h.parameters, points.features[h.executed]) - (explained**2).sum(0)
            means.append(covariance @ post.coefficients)
            noise = self._kernel.noise(h.parameters, np.zeros_like(points.cut))
            more = self._kernel.noise(h.parameters, points.cut) - noise
            variances.append(np.maximum(left, 1e-9) + noise + np.minimum(more, _CUT_LOG_STD**2))
            weights.append(post.weight)
        w = np.array(weights)
        mean = w @ np.array(means)
        variance = w @ (np.array(variances) + (np.array(means) - mean) ** 2) + points.doubt
        warnings = []
        if (points.doubt > 0).any():
            warnings.append(
                f"{int((points.doubt > 0).sum())} networks are not in the table of sources; intervals are wider"
            )
        if points.cut.any():
            warnings.append(
                f"the output of {int(points.cut.sum())} networks does not depend on their input: a device may leave "
                "out any part of them, and their latency is hardly known"
            )
        return Estimate.relative(np.exp(mean + self._centre), np.sqrt(variance), "; ".join(warnings))

    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        if self.table.knobs:
            raise tied(self.table)
        return self.of(self._keys(workloads)) if workloads else Estimate(np.empty(0), np.empty(0), lognormal=True)

    def bind(self, space: SearchSpace) -> BoundTable:
        return BoundTable(self, self.table, space)

    def suggest(self, n: int, seed: int = 0) -> NDArray[np.intp]:
        """Rows `(n,)` of the table to measure next, best first: those that leave the least uncertainty about others.

        Greedy: each network lowers the summed posterior variance of a sample of the table the most (Cohn, NeurIPS
        1996), averaged over the hypotheses, given what was measured before. Best asked for ten at a time,
        with `adapt` in between.

        Args:
            n: how many.
            seed: of the sample of candidates.

        Raises:
            UserError: more networks than the table has left.
        """
        measured = self.table.rows(self.measured) if len(self.measured) else np.empty(0, dtype=np.intp)
        free = np.setdiff1d(np.arange(len(self.table)), measured)
        if not 1 <= n <= len(free):
            raise UserError(f"few-shot predictor: cannot suggest {n} of {len(free)} networks left in the table")
        rng = np.random.default_rng(seed)
        candidates = rng.choice(free, min(_CANDIDATES * n, len(free)), replace=False)
        others = rng.choice(len(self.table), min(_REPRESENTATIVES, len(self.table)), replace=False)
        others = others[~self._inputs.cut[others]]
        states = []
        for post in self._posteriors:
            h = post.hypothesis
            known = self._inputs.known[h.executed]
            at, rest = ({g: v[rows] for g, v in known.items()} for rows in (candidates, others))
            inner = self._kernel.covariance(h.parameters, self._kernel.products(at, at))
            cross = self._kernel.covariance(h.parameters, self._kernel.products(at, rest))
            noise = self._kernel.noise(h.parameters, self._inputs.cut[candidates])
            if len(self.measured):
                old = self._points.features[h.executed]
                seen = solve_triangular(
                    post.factor, self._kernel.covariance(h.parameters, self._kernel.products(old, at)), lower=True
                )
                seen_rest = solve_triangular(
                    post.factor, self._kernel.covariance(h.parameters, self._kernel.products(old, rest)), lower=True
                )
                inner, cross = inner - seen.T @ seen, cross - seen.T @ seen_rest
            total = np.maximum(self._kernel.variance(h.parameters, rest).mean() - _OFFSET_VARIANCE, 1e-9)
            states.append((post.weight / total, inner, cross, noise))
        chosen: list[int] = []
        for _ in range(n):
            gain = np.zeros(len(candidates))
            for weight, inner, cross, noise in states:
                gain += weight * (cross**2).mean(1) / (np.diag(inner) + noise)
            gain[chosen] = -1.0
            best = int(np.argmax(gain))
            chosen.append(best)
            for i, (weight, inner, cross, noise) in enumerate(states):
                column = inner[:, best] / (inner[best, best] + noise[best])
                states[i] = (
                    weight, inner - np.outer(column, inner[best]), cross - np.outer(column, cross[best]), noise,
                )  # fmt: skip
        return candidates[chosen]

    def save(self, path: Path) -> None:
        """Write table, hypotheses and measurements as `.npz` without objects, atomically."""
        about = {
            "format": _FORMAT,
            "design": asdict(self.design),
            "hypotheses": [[h.source, h.executed, h.log_prior] for h in self.hypotheses],
        }
        with atomic(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                few_shot=np.array(json.dumps(about)),
                parameters=np.array([h.parameters for h in self.hypotheses]),
                measured=self.measured,
                measured_ms=self.latency_ms,
                **{f"table_{name}": array for name, array in self.table.arrays().items()},
            )

    @classmethod
    def load(cls, path: Path) -> FewShot:
        """A predictor from `save`, predicting to the same bits.

        Raises:
            UserError: no such file, or another kind of file.
        """
        arrays = load_arrays(path, "a few-shot predictor")
        try:
            about = json.loads(str(arrays["few_shot"]))
            if about.get("format") != _FORMAT:
                raise ValueError("is no few-shot predictor of this version")
            table = MeasuredTable.from_arrays(
                {name.removeprefix("table_"): a for name, a in arrays.items() if name.startswith("table_")}
            )
            hypotheses = [
                _Hypothesis(source, executed, p, log_prior)
                for (source, executed, log_prior), p in zip(about["hypotheses"], arrays["parameters"], strict=True)
            ]
            return cls(table, hypotheses, arrays["measured"], arrays["measured_ms"], Design(**about["design"]))
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as a few-shot predictor: {error}") from error

    def _keys(self, networks: NDArray[Any] | Sequence[Workload]) -> NDArray[Any]:
        if not self.table.knobs and not isinstance(networks, np.ndarray):
            return workload_totals(networks)
        keys = np.atleast_2d(np.asarray(networks))
        if keys.shape[1] != self.table.keys.shape[1]:
            raise UserError(
                f"few-shot predictor: a network of {self.table.space!r} has {self.table.keys.shape[1]} columns, "
                f"got shape {keys.shape}"
            )
        if self.table.knobs:
            counts = np.array([len(k.choices) for k in self.table.knobs])
            wrong = np.argwhere((keys < 0) | (keys >= counts))
            if len(wrong):
                row, column = wrong[0]
                raise UserError(
                    f"few-shot predictor: network {row}: knob {self.table.knobs[column].name!r} has choices "
                    f"0..{counts[column] - 1}, got {keys[row, column]}"
                )
        return keys

    @cached_property
    def _centre(self) -> float:
        return _centre(np.log(self.latency_ms), self._points.cut) if len(self.latency_ms) else 0.0

    def _weigh(self) -> list[_Posterior]:
        """The hypotheses that matter, given the measurements."""
        y = np.log(self.latency_ms) - self._centre
        products = {e: self._kernel.products(f, f) for e, f in self._points.features.items()}
        scores = np.array([h.log_prior for h in self.hypotheses])
        if len(y):
            scores = scores + [
                self._kernel.evidence(h.parameters, products[h.executed], self._points.cut, y) for h in self.hypotheses
            ]
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        weights[weights < (weights.max() if self.design.best_only and len(y) else _NEGLIGIBLE)] = 0.0
        weights /= weights.sum()
        posteriors = []
        for weight, h in zip(weights, self.hypotheses, strict=True):
            if weight:
                noise = np.diag(self._kernel.noise(h.parameters, self._points.cut))
                factor = np.asarray(
                    np.linalg.cholesky(self._kernel.covariance(h.parameters, products[h.executed]) + noise),
                    dtype=np.float64,
                )
                posteriors.append(_Posterior(h, float(weight), factor, cho_solve((factor, True), y) if len(y) else y))
        return posteriors


@dataclass(frozen=True)
class _Posterior:
    """A hypothesis with its probability, and what predictions under it need."""

    hypothesis: _Hypothesis
    weight: float
    factor: Array
    coefficients: Array


@dataclass(frozen=True)
class _Points:
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


class _Inputs:
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

    def __call__(self, keys: NDArray[Any]) -> _Points:
        rows = self.table.rows(keys)
        if (rows >= 0).all():
            known = {e: {g: v[rows] for g, v in f.items()} for e, f in self.known.items()}
            return _Points(known, self.cut[rows], np.zeros(len(rows)))
        groups, cut, doubt, executed = self._groups(keys)
        features = {False: self._scaled(groups)}
        if executed is not None:
            features[True] = self._scaled(self._groups(executed)[0])
        return _Points(features, cut, doubt)

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


def _centre(logs: Array, cut: NDArray[np.bool_]) -> float:
    return float(np.median(logs[~cut] if (~cut).any() else logs))


__all__ = ["LEAST_SAMPLES", "Design", "FewShot", "device_family", "lessons"]
