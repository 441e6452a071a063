"""Latency on a new device from a few measured networks and the tables of other devices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

from hardware_profiles.paths import atomic
from predictors.base import Array, Estimate, Predictor
from predictors.table_features import workload_totals
from predictors.tables import BoundTable, MeasuredTable, describe, load_arrays, tied
from predictors.transfer import OFFSET_VARIANCE, Inputs, Kernel, centre
from search_spaces import SearchSpace, UserError, Workload

LEAST_SAMPLES = 3
# A latency this many times off what sources and other measurements lead to expect is in another unit.
OTHER_UNIT = 100.0
# Networks whose output does not depend on their input may be optimised away in part or whole, so measured ones differ
# by orders of magnitude. With such a spread the mean of a log-normal says nothing (thousands of times the median) and
# would rank these networks last: predictions count no more of it than this.
_CUT_LOG_STD = 0.5

_FORMAT = "nasbench few-shot predictor 3"
_TRAIN = 100  # networks of each source that its parameters are fitted to
_NEGLIGIBLE = 1e-3  # weight below which a hypothesis is left out
# Of `suggest`: networks compared per network wanted, and networks whose uncertainty is to fall. Among many more
# candidates the most telling are extremes, where the model is least to be trusted.
_CANDIDATES, _REPRESENTATIVES = 8, 300


def device_family(name: str) -> str:
    """The part of a column's name before a batch size or model number: near-copies share it.

    >>> device_family("titan_rtx_256"), device_family("pixel3")
    ('titan_rtx', 'pixel3')
    """
    return re.sub(r"(_\d+[a-z]?)+$", "", name)


@dataclass(frozen=True)
class Lesson:
    """What source devices teach when each in turn is taken for a new one among the others.

    Args:
        sources: their names.
        parameters: `(P,)` of the kernel, fitted to them together.
        dropping: how many are better explained without the operators that a network's output does not depend on.
    """

    sources: tuple[str, ...]
    parameters: Array
    dropping: int


@dataclass(frozen=True)
class Design:
    """What the hypotheses about a new device are; the default is what `benchmarks.few_shot --select` chose.

    Args:
        plain: probability, before measuring, that counts and sources explain a device linearly: Bayesian ridge.
        noise: factors of the standard deviation of the sources' noise; each is a hypothesis of its own.
        executed: whether a device may drop operators that the output does not depend on.
        apart: whether each source is a hypothesis of its own, instead of one that is fitted to all of them together.
        smooth: take of the sources what is a smooth function of features, without rounding and noise.
    """

    plain: float = 0.3
    noise: tuple[float, ...] = (0.5, 1.0, 2.0)
    executed: bool = True
    apart: bool = False
    smooth: bool = True


@dataclass(frozen=True)
class _Hypothesis:
    """One way in which a device may behave; whether it runs all of a network or only what is used."""

    executed: bool
    parameters: Array
    log_prior: float


def lessons(table: MeasuredTable, families: Mapping[str, str] | None = None, design: Design = Design()) -> list[Lesson]:
    """The lessons of a table of source devices; see `FewShot.learn`. Depends on `smooth` and `apart` of the design."""
    family = {d: (families or {}).get(d, device_family(d)) for d in table.devices}
    if len(set(family.values())) < 2:
        raise UserError(f"few-shot predictor: needs sources of at least two families, got {', '.join(table.devices)}")
    whole = Inputs(table, design.smooth)
    kernel = Kernel.of(whole.known[False])
    rows = np.random.default_rng(0).choice(len(table), min(_TRAIN, len(table)), replace=False)
    cut = whole.cut[rows]
    data: dict[str, list[Any]] = {}  # of each device, as a whole network and as executed
    for device in table.devices:
        others = table.select([d for d in table.devices if family[d] != family[device]])
        smoother = whole.smoother.select([table.devices.index(d) for d in others.devices])
        known = Inputs(others, design.smooth, smoother).known
        logs = np.log(table.column(device)[rows])
        data[device] = []
        for features in known.values():
            part = {g: v[rows] for g, v in features.items()}
            data[device].append((kernel.products(part, part), cut, logs - centre(logs, cut)))
    found = []
    for sources in [(d,) for d in table.devices] if design.apart else [table.devices]:
        p = kernel.fit([data[d][0] for d in sources])
        choices = [int(np.argmax([kernel.evidence(p, *one) for one in data[d]])) for d in sources]
        if any(choices):
            p = kernel.fit([data[d][choice] for d, choice in zip(sources, choices, strict=True)])
        found.append(Lesson(sources, p, sum(choices)))
    return found


class FewShot(Predictor):
    """Latency on a device where k networks were measured (10 or 20 are plenty), learned with tables of other devices.

    Log latency is a Gaussian process over three kinds of features: log latencies of the same network on the source
    devices (their mean, and how each deviates from it), operator counts and size, and where the operators stand. How
    far each kind is to be trusted is what the sources teach: each in turn is taken for the new device, and one set of
    parameters of the kernel is fitted to all of them. Hypotheses are these parameters and those of a plain Bayesian
    ridge, with less or more noise, for a device that runs a whole network or one whose converter drops operators that
    the output does not depend on. The prediction is their average, each weighted by the probability of the new
    measurements under it (Bayesian model averaging; Hoeting et al., Statistical Science 1999): nothing is fitted to k
    points but weights.

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
        _inputs: Inputs | None = None,
    ) -> None:
        self.table = table
        self.design = design
        self.hypotheses = tuple(hypotheses)
        self.measured = table.keys[:0] if measured is None else measured
        self.latency_ms = np.empty(0) if latency_ms is None else latency_ms
        self._inputs = _inputs or Inputs(table, design.smooth)
        self._kernel = Kernel.of(self._inputs.known[False])
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
        return cls.of_lessons(table, lessons(table, families, design), design)

    @classmethod
    def of_lessons(cls, table: MeasuredTable, taught: Sequence[Lesson], design: Design = Design()) -> FewShot:
        """From what `lessons(table)` gave, so that several designs can share it."""
        inputs = Inputs(table, design.smooth)
        # How often a device drops operators: by rule of succession over the sources.
        count = sum(len(x.sources) for x in taught)
        drops = (1 + sum(x.dropping for x in taught)) / (2 + count)
        if not design.executed or True not in inputs.known:
            drops = 0.0
        kinds = [(x.parameters, (1 - design.plain) / len(taught)) for x in taught if design.plain < 1]
        kinds += [(Kernel.of(inputs.known[False]).plain, design.plain)] if design.plain else []
        hypotheses = [
            _Hypothesis(executed, np.array([p[0] + np.log(factor), *p[1:]]), float(np.log(prior * share)))
            for p, prior in kinds
            for factor in design.noise
            for executed, share in ((False, 1 - drops), (True, drops))
            if share
        ]
        return cls(table, hypotheses, design=design, _inputs=inputs)

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
        """Rows `(n,)` of the table to measure next: those that leave the least uncertainty about others.

        One network from each of n strata of the sources' mean latency, so that all speeds are seen even if the model is
        wrong about the device. Greedily, each is the one of a few of its stratum that lowers the summed posterior
        variance of a sample of the table the most (Cohn, NeurIPS 1996), averaged over the hypotheses, given what was
        measured before. Networks that are cut off are left out while there are others.

        Args:
            n: how many.
            seed: of the samples.

        Raises:
            UserError: more networks than the table has left.
        """
        measured = self.table.rows(self.measured) if len(self.measured) else np.empty(0, dtype=np.intp)
        free = np.setdiff1d(np.arange(len(self.table)), measured)
        if not 1 <= n <= len(free):
            raise UserError(f"few-shot predictor: cannot suggest {n} of {len(free)} networks left in the table")
        live = ~self._inputs.cut
        free = free[live[free]] if live[free].sum() >= n else free
        rng = np.random.default_rng(seed)
        strata = np.array_split(free[np.argsort(self._inputs.known[False]["level"][free, 0], kind="stable")], n)
        drawn = [rng.choice(rows, min(_CANDIDATES, len(rows)), replace=False) for rows in strata]
        candidates, stratum = np.concatenate(drawn), np.repeat(np.arange(n), [len(rows) for rows in drawn])
        others = np.flatnonzero(live) if live.any() else np.arange(len(self.table))
        others = rng.choice(others, min(_REPRESENTATIVES, len(others)), replace=False)
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
            total = np.maximum(self._kernel.variance(h.parameters, rest).mean() - OFFSET_VARIANCE, 1e-9)
            states.append((post.weight / total, inner, cross, noise))
        chosen: list[int] = []
        for _ in range(n):
            gain = np.zeros(len(candidates))
            for weight, inner, cross, noise in states:
                gain += weight * (cross**2).mean(1) / (np.diag(inner) + noise)
            gain[np.isin(stratum, stratum[chosen])] = -1.0
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
            "hypotheses": [[h.executed, h.log_prior] for h in self.hypotheses],
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
                _Hypothesis(executed, p, log_prior)
                for (executed, log_prior), p in zip(about["hypotheses"], arrays["parameters"], strict=True)
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
        return centre(np.log(self.latency_ms), self._points.cut) if len(self.latency_ms) else 0.0

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
        weights[weights < _NEGLIGIBLE] = 0.0
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


__all__ = ["LEAST_SAMPLES", "Design", "FewShot", "device_family", "lessons"]
