"""Latency on a new device from a few measured networks and the tables of other devices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware_profiles.paths import atomic
from predictors.base import Array, Estimate, Predictor
from predictors.table_features import table_features, workload_totals
from predictors.tables import BoundTable, MeasuredTable, describe, load_arrays, tied
from predictors.transfer import Inputs, Points, centre
from predictors.units import OTHER_UNIT
from search_spaces import SearchSpace, UserError, Workload

LEAST_SAMPLES = 3
# Networks whose output does not depend on their input may be optimised away in part or whole, so measured ones differ
# by orders of magnitude. With such a spread the mean of a log-normal says nothing (thousands of times the median) and
# would rank these networks last: predictions count no more of it than this.
_CUT_LOG_STD = 0.5
_CUT_VARIANCE = 1.0  # by which they differ from any expectation

_FORMAT = "nasbench few-shot predictor 3"
OFFSET_VARIANCE = 1.0  # of a device's overall speed around the measured median, relative
_FLOOR = 1e-5  # noise variance that every measurement has: 0.3 %
# Of relative latencies that are sums: more than that many times the expected says no more; less than that is not
# believed of a prediction.
_MOST, _LEAST = 4.0, 0.03
# Networks of each source that teach together, and how many times. A table of fewer teaches too little: of NAS-Bench-201
# with five sources, up to ten networks measured on a device rank 400 others by a Spearman correlation of 0.95 by tables
# of 15 (the worst of five devices and four draws of a table: 0.87), of 0.94 (0.56) by 10, and of 0.86 (0.26) by 5.
_LESSON, _LESSONS = 15, 8
_ITERATIONS = 100
_NEGLIGIBLE = 1e-3  # probability below which a hypothesis is left out
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
class Design:
    """The hypotheses about a new device; the default is what `benchmarks.few_shot --select` chose.

    Every combination is one: a Bayesian ridge (linear regression with normal priors) with variances of its own.

    Args:
        scales: whether the latency is a sum of costs (`linear`), or its logarithm is (`log`), each over what the
            sources lead to expect.
        executed: whether a device may drop operators that the output does not depend on.
        noise: standard deviations of what the regression does not explain, relative.
        costs: prior standard deviations of what operators contribute, relative, all of a group together.
        sources: likewise of how the sources differ from each other.
        unlike: as how many source devices it counts that a device may be like none of them: every hypothesis alike.
        smooth: take of the sources what is a smooth function of features, without rounding and noise.
    """

    scales: tuple[str, ...] = ("linear", "log")
    executed: bool = True
    noise: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16)
    costs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    sources: tuple[float, ...] = (0.03, 0.1, 0.3)
    unlike: float = 0.2
    smooth: bool = True

    @cached_property
    def variances(self) -> Array:
        """`(H, 3)` of noise, costs and sources, of the hypotheses of one scale and view."""
        return np.array(list(product(self.noise, self.costs, self.sources))) ** 2


@dataclass(frozen=True)
class _Regression:
    """All hypotheses of one scale and one view of networks, given a device's measurements."""

    executed: bool
    scale: str
    design: Design
    of_costs: NDArray[np.bool_]
    known: Array  # (k, F) features of what was measured
    noise: Array  # (k,) variance, in addition to that of a hypothesis
    target: Array  # (k,)
    speed: float  # latency over what the sources lead to expect
    jacobian: float  # what makes the probabilities of different targets those of the same measurements

    @classmethod
    def of(
        cls, executed: bool, scale: str, design: Design, inputs: Inputs, points: Points, latency_ms: Array
    ) -> _Regression:
        view = points.views[executed]
        logs = np.log(latency_ms) - view.base
        speed = centre(logs, points.cut) if len(logs) else 0.0
        logs = logs - speed
        noise = np.where(points.cut, _CUT_VARIANCE, 0.0)
        linear = scale == "linear"
        target = np.minimum(np.expm1(logs), _MOST) if linear else logs
        jacobian = float(-(view.base + speed if linear else np.log(latency_ms)).sum())
        return cls(
            executed, scale, design, inputs.of_costs[scale], getattr(view, scale), noise, target, speed, jacobian
        )

    def covariances(self, variances: Array) -> Array:
        """`(H, k, k)` of the measurements."""
        costs, sources = (self.known[:, own] @ self.known[:, own].T for own in (self.of_costs, ~self.of_costs))
        noise = (variances[:, :1] + _FLOOR + self.noise)[:, :, None] * np.eye(len(self.noise))
        return np.asarray(
            OFFSET_VARIANCE + variances[:, 1, None, None] * costs + variances[:, 2, None, None] * sources + noise
        )

    @property
    def evidence(self) -> Array:
        """`(H,)` logarithm of the probability of the measurements under each hypothesis, less a constant."""
        whitening = np.linalg.cholesky(self.covariances(self.design.variances))
        white = np.linalg.solve(whitening, np.broadcast_to(self.target[:, None], (*whitening.shape[:2], 1)))
        determinant = np.log(np.diagonal(whitening, axis1=1, axis2=2)).sum(1)
        return np.asarray(self.jacobian - 0.5 * (white[:, :, 0] ** 2).sum(1) - determinant)

    def posterior(self, weights: Array) -> tuple[float, Array, Array, float]:
        """Of hypotheses together, each with its weight `(H,)`: weight, mean `(F + 1,)` and covariance of the regression
        coefficients, the constant first, and mean variance of noise."""
        known = np.concatenate([np.ones((len(self.known), 1)), self.known], axis=1)
        total = float(weights.sum())
        means: Array = np.zeros(known.shape[1])
        second: Array = np.zeros((known.shape[1], known.shape[1]))
        noise = 0.0
        for h in np.flatnonzero(weights):
            variances, share = self.design.variances[h], weights[h] / total
            prior = np.concatenate([[OFFSET_VARIANCE], np.where(self.of_costs, variances[1], variances[2])])
            spread = known * prior
            gain = np.linalg.solve(self.covariances(variances[None])[0], spread).T
            mean = gain @ self.target
            means += share * mean
            second += share * (np.diag(prior) - gain @ spread + np.outer(mean, mean))
            noise += share * float(variances[0] + _FLOOR)
        return total, means, second - np.outer(means, means), noise


def lessons(
    table: MeasuredTable, families: Mapping[str, str] | None = None, design: Design = Design()
) -> dict[tuple[bool, str], Array]:
    """Probabilities, before anything is measured, of all hypotheses: (executed, scale) -> `(H,)`.

    Each source in turn is taken for the new device among the others, measured on a few networks, several times. The
    probabilities are those under which these measurements are most likely (expectation-maximisation of the proportions
    of a mixture; Dempster, Laird and Rubin, 1977), drawn towards equal ones as `Design.unlike` says.

    Raises:
        UserError: fewer than two families, or than the networks that teach together.
    """
    family = {d: (families or {}).get(d, device_family(d)) for d in table.devices}
    if len(set(family.values())) < 2:
        raise UserError(f"few-shot predictor: needs sources of at least two families, got {', '.join(table.devices)}")
    cut = table_features(table, table.keys).cut
    if (live := int((~cut).sum())) < _LESSON:
        cut_off = f", without {int(cut.sum())} whose output does not depend on their input" if cut.any() else ""
        raise UserError(
            f"few-shot predictor: {table.source or table.space}: {live} networks measured on the sources{cut_off}; at "
            f"least {_LESSON} are needed to learn how they differ"
        )
    whole = Inputs(table, design.smooth)
    draws = [np.random.default_rng(i).choice(len(table), _LESSON, replace=False) for i in range(_LESSONS)]
    seen, keys = [], _views(design, whole)
    for device in table.devices:
        others = table.select([d for d in table.devices if family[d] != family[device]])
        smoother = whole.smoother.select([table.devices.index(d) for d in others.devices])
        inputs = Inputs(others, design.smooth, smoother)
        for rows in draws:
            points, values = inputs.known[rows], table.column(device)[rows]
            seen.append([_Regression.of(*key, design, inputs, points, values).evidence for key in keys])
    evidence = np.array(seen).reshape(len(seen), -1)
    likelihood = np.exp(evidence - evidence.max(1, keepdims=True))
    proportions = np.full(likelihood.shape[1], 1 / likelihood.shape[1])
    for _ in range(_ITERATIONS):
        shares = likelihood * proportions
        shares /= shares.sum(1, keepdims=True)
        proportions = shares.sum(0) / len(draws) + design.unlike / len(proportions)
        proportions /= proportions.sum()
    return dict(zip(keys, proportions.reshape(len(keys), -1), strict=True))


def _views(design: Design, inputs: Inputs) -> list[tuple[bool, str]]:
    executed = [e for e in inputs.known.views if design.executed or not e]
    return [(e, scale) for e in executed for scale in design.scales]


class FewShot(Predictor):
    """Latency on a device where k networks were measured (10 or 20 are plenty), learned with tables of other devices.

    A hypothesis about the device is a Bayesian ridge: its latency, over what the sources lead to expect, is linear in
    operator counts and in how the sources differ from each other, or the logarithm is; a network counts as a whole, or
    less the operators that its output does not depend on, which some converters drop; and noise, costs and sources
    have variances from a small grid (`Design`). The prediction is the average over all hypotheses, each weighted by the
    probability of the new measurements under it (Bayesian model averaging; Hoeting et al., Statistical Science 1999)
    and by how well it explained each source from the others (`lessons`): nothing is fitted to k points but weights.

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
        prior: Mapping[tuple[bool, str], Array],
        measured: NDArray[Any] | None = None,
        latency_ms: Array | None = None,
        design: Design = Design(),
        _inputs: Inputs | None = None,
    ) -> None:
        self.table = table
        self.design = design
        self.prior = dict(prior)
        self.measured = table.keys[:0] if measured is None else measured
        self.latency_ms = np.empty(0) if latency_ms is None else latency_ms
        self._inputs = _inputs or Inputs(table, design.smooth)
        self._points = self._inputs(self.measured)
        self._weighed = self._weigh()

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
            UserError: an unknown column, fewer than two families, or than 15 networks.
        """
        table = table.select(sources or table.devices)
        return cls(table, lessons(table, families, design), design=design)

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
        return FewShot(self.table, self.prior, keys[rows], values[rows], self.design, self._inputs)

    def _check_units(self, keys: NDArray[Any], values: Array) -> None:
        """Raises UserError where one network takes a hundred times more or less, next to the others, than on sources.

        Networks that a device may optimise away are left out of it, as are those that are not in the table.
        """
        rows = self.table.rows(keys)
        asked = np.flatnonzero(rows >= 0)
        asked = asked[~self._inputs.known.cut[rows[asked]]]
        if len(asked) < LEAST_SAMPLES:
            return
        ratios = np.log(values[asked, None] / self.table.latency_ms[rows[asked]])
        off = np.median(ratios - np.median(ratios, axis=0), axis=1)
        worst = int(np.argmax(np.abs(off)))
        if abs(off[worst]) > np.log(OTHER_UNIT):
            raise UserError(
                f"few-shot predictor: measurement {asked[worst]}: {describe(self.table, keys[asked[worst]])}: "
                f"{values[asked[worst]]:g} ms is "
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
        weights, means, variances = [], [], []
        for regression, weight in self._weighed:
            total, coefficients, covariance, noise = regression.posterior(weight)
            view = points.views[regression.executed]
            features = getattr(view, regression.scale)
            mean = coefficients[0] + features @ coefficients[1:]
            variance = covariance[0, 0] + features @ (2 * covariance[0, 1:])
            variance += np.einsum("nf,nf->n", features @ covariance[1:, 1:], features)
            variance = np.maximum(variance, 1e-9) + noise
            if regression.scale == "linear":
                positive = np.maximum(1 + mean, _LEAST)
                mean, variance = np.log(positive), np.log1p(variance / positive**2)
            weights.append(total)
            means.append(mean + view.base + regression.speed)
            variances.append(variance)
        w = np.array(weights)
        mean = w @ np.array(means)
        variance = w @ (np.array(variances) + (np.array(means) - mean) ** 2) + points.doubt
        variance += np.where(points.cut, _CUT_LOG_STD**2, 0.0)
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
        return Estimate.relative(np.exp(mean), np.sqrt(variance), "; ".join(warnings))

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
        live = ~self._inputs.known.cut
        free = free[live[free]] if live[free].sum() >= n else free
        rng = np.random.default_rng(seed)
        strata = np.array_split(free[np.argsort(self._inputs.known.views[False].base[free], kind="stable")], n)
        drawn = [rng.choice(rows, min(_CANDIDATES, len(rows)), replace=False) for rows in strata]
        candidates, stratum = np.concatenate(drawn), np.repeat(np.arange(n), [len(rows) for rows in drawn])
        others = np.flatnonzero(live) if live.any() else np.arange(len(self.table))
        others = rng.choice(others, min(_REPRESENTATIVES, len(others)), replace=False)
        states = []
        known = self._inputs.known
        for regression, weights in self._weighed:
            total, _, covariance, residual = regression.posterior(weights)
            features = getattr(known.views[regression.executed], regression.scale)
            at, rest = (np.insert(features[rows], 0, 1.0, axis=1) for rows in (candidates, others))
            left = at @ covariance @ at.T, at @ covariance @ rest.T
            # That of the device's speed is the same for all, and says nothing of the order of networks.
            total /= max(float(np.einsum("nf,fg,ng->n", rest[:, 1:], covariance[1:, 1:], rest[:, 1:]).mean()), 1e-9)
            states.append((total, *left, residual + np.where(known.cut[candidates], _CUT_VARIANCE, 0.0)))
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
            "views": list(self.prior),
        }
        with atomic(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                allow_pickle=False,
                few_shot=np.array(json.dumps(about)),
                prior=np.array(list(self.prior.values())),
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
            prior = {(executed, scale): p for (executed, scale), p in zip(about["views"], arrays["prior"], strict=True)}
            options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in about["design"].items()}
            return cls(table, prior, arrays["measured"], arrays["measured_ms"], Design(**options))
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

    def _weigh(self) -> list[tuple[_Regression, Array]]:
        """Regressions, each with the probabilities of its hypotheses; those that matter, given the measurements."""
        regressions = [
            _Regression.of(executed, scale, self.design, self._inputs, self._points, self.latency_ms)
            for executed, scale in self.prior
        ]
        scores = np.log(np.array(list(self.prior.values())))
        if len(self.latency_ms):
            scores = scores + np.array([regression.evidence for regression in regressions])
        weights = np.exp(scores - scores.max())
        weights[weights < _NEGLIGIBLE * weights.sum()] = 0.0
        weights /= weights.sum()
        return [(r, w) for r, w in zip(regressions, weights, strict=True) if w.any()]


__all__ = ["LEAST_SAMPLES", "Design", "FewShot", "device_family", "lessons"]
