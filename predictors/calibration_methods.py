"""Ways to fit what was measured on a target: one factor, a roofline, or a model of what operators cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from scipy.special import stdtrit

from hardware_profiles.constraints import check_workload
from hardware_profiles.profile import Target
from hardware_profiles.profile_sections import RooflineFit
from hardware_profiles.records import Record
from predictors.base import AdditivePredictor, Array, Estimate, Predictor
from predictors.operator_model import LEAST_NETWORKS, OperatorModel
from predictors.quality import covered, figures, poor, spread_around
from predictors.roofline import Roofline, kind_of
from predictors.units import check_mixed, level_doubt
from search_spaces import UserError, Workload

Method = Literal["scale", "roofline", "operator_model"]
METHODS: tuple[Method, ...] = ("scale", "roofline", "operator_model")

# Spread of ln(measured / predicted) that a fit with so few networks cannot get below.
LEAST_LOG_STD = 0.05
# Assumed of a fit to one network.
UNJUDGED_LOG_STD = 0.35
# From so many networks on, the parameters of a roofline are fitted anew.
ROOFLINE_NETWORKS = 4

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FittedMetric(Record):
    """A fitted model of one metric as numbers.

    Args:
        method: `operator_model` (many networks), `roofline` (its parameters fitted anew) or `scale` (the profile's
            roofline times one factor).
        numbers: of that method.
        log_std: spread of ln(measured / predicted) of a network that the fit has not seen; of `roofline` and
            `operator_model`, whose numbers say how it grows, where it is least.
        lowest, highest: range of the measured values.
        quality: `predictors.quality.figures` of networks left out, and how many `networks` and `families` there were.
        kinds: of the operators of networks that were measured, as `predictors.roofline.kind_of` has them; empty where
            the method tells strange operators itself.
        doubt: what is doubtful of the measurements, or of the fit to them.
    """

    method: Method
    numbers: dict[str, Any]
    log_std: Positive
    lowest: Positive
    highest: Positive
    quality: dict[str, float]
    kinds: tuple[str, ...] = ()
    doubt: str = ""

    def parsed(self) -> Any:
        """The numbers as their method takes them.

        Raises:
            UserError: they are not of that method, or of another version.
        """
        try:
            return _WAYS[self.method].parse(self.numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"numbers of {self.method!r} are damaged: {_first_line(error)}") from error

    def predictor(self, target: Target, metric: str) -> Predictor:
        """The predictor that they stand for. Raises UserError as `parsed` does."""
        return _WAYS[self.method].load(self, target, metric)


@dataclass(frozen=True)
class Sample:
    """One metric of measured networks: their names, families, workloads and values `(n,)`.

    `warning` tells what was wrong with the measurements; predictions repeat it.
    """

    target: Target
    metric: str
    networks: tuple[str, ...]
    families: tuple[str, ...]
    workloads: Sequence[Workload]
    y: Array
    warning: str = ""


def fit_metric(sample: Sample, method: Method | Literal["auto"] = "auto") -> FittedMetric:
    """Fit one metric. Of the methods that so many networks allow, the one that predicts best those left out of it is
    taken, or the one that is named.

    Raises:
        UserError: too few networks for the method that is named, or a value in another unit.
    """
    y = sample.y
    doubt = unit_doubt(sample)
    if method != "auto" and len(y) < _WAYS[method].least:
        raise UserError(
            f"{sample.target.name}: {method} needs at least {_WAYS[method].least} networks, {len(y)} were measured"
        )
    names: list[Method] = [method] if method != "auto" else [n for n in METHODS if len(y) >= _WAYS[n].least]
    fits = {name: _WAYS[name].fit(sample) for name in names}
    best = _best([fits[n].logs for n in names])
    fitted = fits[names[best]]
    model = FittedMetric(
        method=names[best],
        numbers=fitted.numbers,
        log_std=fitted.log_std,
        lowest=float(y.min()),
        highest=float(y.max()),
        quality={"networks": float(len(y)), "families": float(len(set(sample.families)))},
        kinds=() if names[best] == "operator_model" else _kinds(sample.workloads),
        doubt=doubt,
    )
    if not len(fitted.logs):
        return model
    errors = _chosen_errors([fits[n].logs for n in names])
    stated = _log_spread(model.predictor(sample.target, sample.metric).predict(sample.workloads))
    ratios, groups = np.abs(errors) / stated, _left_out_together(sample.families)
    count = len(np.unique(groups))
    model = _widened(model, max(1.0, interval_factor(ratios, count)))
    inside = covered(ratios, groups, lambda others: 1.645 * max(1.0, interval_factor(ratios[others], count - 1)))
    quality = {**model.quality, **figures(errors, y, inside)}
    doubts = "; ".join(w for w in (doubt, poor(sample.metric, quality)) if w)
    return model.model_copy(update={"quality": quality, "doubt": doubts})


def unit_doubt(m: Sample) -> str:
    """What the profile's guessed figures say against the unit of the values; "" for nothing.

    Raises:
        UserError: one value is in another unit than the others, or all are in another than figures that are no guesses.
    """
    # Of what the device does not run, and leaves to a host, the profile tells nothing.
    runs = [i for i, w in enumerate(m.workloads) if not check_workload(w, m.target)]
    if not runs:
        return ""
    base, workloads, values = _base(m.target, m.metric), [m.workloads[i] for i in runs], m.y[runs]
    expected = base.predict(workloads).mean
    check_mixed(m.target, m.metric, [m.networks[i] for i in runs], values, expected)
    doubt = level_doubt(m.target, m.metric, workloads, values, expected)
    if doubt and (base.fit is not None or not m.target.point.estimated):
        raise UserError(
            f"{m.target.name}: {doubt}: are these values in another unit? If they are not, the profile is wrong; "
            f"`nasbench devices show {m.target.profile.name} --toml` prints it, to be corrected under another name"
        )
    return f"{doubt}, which were guessed; if these values are in another unit, convert them" if doubt else ""


def _kinds(workloads: Sequence[Workload]) -> tuple[str, ...]:
    return tuple(sorted({kind_of(op) for workload in workloads for op in workload.operators} - {""}))


def _best(logs: Sequence[Array]) -> int:
    """The method whose errors of networks left out are least on average.

    The mean, for it sees the one network in ten that a fit to a handful gets badly wrong. Of methods that cannot be
    judged (one network), the simplest stays.
    """
    return int(np.argmin([float(np.mean(np.abs(errors))) if len(errors) else 0.0 for errors in logs]))


def _chosen_errors(logs: Sequence[Array]) -> Array:
    """`(m,)` errors of choosing a method: each network's own error has no say in which method predicts it.

    Those of the method that came out best would flatter, for it is best partly by luck with these very networks
    (Varma and Simon, BMC Bioinformatics 2006).
    """
    m = len(logs[0])
    others = [_best([np.delete(errors, i) for errors in logs]) for i in range(m)]
    return np.array([logs[others[i]][i] for i in range(m)])


def interval_factor(ratios: Array, groups: int) -> float:
    """What stated spreads are multiplied by for 90 % intervals that hold 90 % of new networks.

    The larger of Student's prediction interval for as many groups of networks as were left out, and of the conformal
    quantile (Vovk et al., 2005): a handful has too few errors for the second, and many show tails that the first, whose
    errors are normal, does not have. That ratios divide by what the final fit states of networks that it has seen, less
    than of those it has not, makes up for the networks of a search being stranger than those that were measured.

    Args:
        ratios: `(m,)` sizes of errors of networks left out, over the spreads that the fit states for them.
        groups: of networks that were left out together.
    """
    ordered = np.sort(ratios)
    rank = min(len(ordered), int(np.ceil(0.9 * (len(ordered) + 1))))
    student = stdtrit(max(1, groups - 1), 0.95) * np.sqrt(np.mean(ratios**2) * (1 + 1 / len(ratios)))
    return float(max(student, ordered[rank - 1]) / 1.645)


def _log_spread(estimate: Estimate) -> Array:
    """`(n,)` log standard deviations of a log-normal estimate."""
    return np.asarray(np.log(estimate.quantile(0.95) / estimate.quantile(0.5)) / 1.645)


def _widened(model: FittedMetric, factor: float) -> FittedMetric:
    """The model with all spreads multiplied."""
    numbers = _WAYS[model.method].widen(model.numbers, factor)
    return model.model_copy(update={"numbers": numbers, "log_std": model.log_std * factor})


class ScaledRoofline(AdditivePredictor):
    """The profile's roofline times one factor, with the spread that was measured.

    Args:
        base: the roofline.
        factor: geometric mean of measured over predicted.
        log_std: spread of ln(measured / predicted).
    """

    def __init__(self, base: Roofline, factor: float, log_std: float, lowest: float, highest: float) -> None:
        self.base = base
        self.metric = base.metric
        self.factor = factor
        self.log_std = log_std
        self.range = (lowest, highest)

    def block_features(self, workload: Workload) -> Array:
        return self.base.block_features(workload)

    def head(self, totals: Any) -> Any:
        return self.factor * self.base.head(totals)

    def around(self, mean: Array) -> Estimate:
        return spread_around(mean, self.log_std, *self.range, self.metric.rpartition("_")[2])

    def doubts(self, features: Array, workloads: Iterable[Workload], blocks: bool = False) -> str:
        return self.base.doubts(features, workloads, blocks)

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        linear = self.base.coefficients
        return None if linear is None else (self.factor * linear[0], self.factor * linear[1])


@dataclass(frozen=True)
class _Fitted:
    """A fit and how it did on networks left out of it.

    Args:
        numbers: of the method.
        logs: `(m,)` ln(measured / predicted) of networks left out; `m` is 0 where too few were measured for that.
        log_std: spread that it states, where it is least.
    """

    numbers: dict[str, Any]
    logs: Array
    log_std: float


@dataclass(frozen=True)
class _Way:
    """One way to fit: from how many networks, how, its numbers, those of wider intervals, and what predicts then."""

    least: int
    fit: Callable[[Sample], _Fitted]
    parse: Callable[[dict[str, Any]], Any]
    widen: Callable[[dict[str, Any], float], dict[str, Any]]
    load: Callable[[FittedMetric, Target, str], Predictor]


def _left_out_together(families: Sequence[str]) -> NDArray[np.intp]:
    """`(n,)` networks with the same number are left out together when a fit is judged: families, or where there are
    only one or two, single networks. The operator model draws the same line, so that errors of all methods compare."""
    several = len(set(families)) > 2
    return np.unique(np.array(families), return_inverse=True)[1] if several else np.arange(len(families))


def _base(target: Target, metric: str, kinds: Iterable[str] = ()) -> Roofline:
    """A roofline of the metric; where nobody states the power, energy is taken as latency times some power."""
    if metric == "energy_mj" and target.point.power_w is None:
        point = target.point.model_copy(update={"power_w": 1.0})
        points = {**target.profile.operating_points, target.operating_point: point}
        target = Target(target.profile.model_copy(update={"operating_points": points}), target.operating_point)
    return Roofline(target, metric, kinds)


def _fit_scale(m: Sample) -> _Fitted:
    """The median of measured over predicted."""
    ratios = np.log(m.y / _base(m.target, m.metric).predict(m.workloads).mean)
    groups = _left_out_together(m.families)
    left = [
        ratio - np.median(ratios[groups != group])
        for ratio, group in zip(ratios, groups, strict=True)
        if (groups != group).any()
    ]
    logs = np.array(left)
    log_std = LEAST_LOG_STD if len(logs) else UNJUDGED_LOG_STD
    return _Fitted({"factor": float(np.exp(np.median(ratios)))}, logs, log_std)


def _parse_scale(numbers: dict[str, Any]) -> float:
    factor = float(numbers["factor"])
    if not (np.isfinite(factor) and factor > 0):
        raise ValueError(f"factor is {factor}")
    return factor


def _widen_scale(numbers: dict[str, Any], factor: float) -> dict[str, Any]:
    return numbers  # its spread is the model's `log_std`


def _load_scale(model: FittedMetric, target: Target, metric: str) -> Predictor:
    base = _base(target, metric, model.kinds)
    return ScaledRoofline(base, model.parsed(), model.log_std, model.lowest, model.highest)


def _fit_operators(m: Sample) -> _Fitted:
    model, logs = OperatorModel.fit_report(m.workloads, m.y, metric=m.metric, families=m.families, warning=m.warning)
    log_std = float(max(LEAST_LOG_STD, model.numbers.stretch * model.numbers.noise))
    return _Fitted(model.to_dict(), logs, log_std)


def _widen_operators(numbers: dict[str, Any], factor: float) -> dict[str, Any]:
    return {**numbers, "stretch": factor * numbers["stretch"]}


def _load_operators(model: FittedMetric, target: Target, metric: str) -> Predictor:
    found = model.parsed()
    assert isinstance(found, OperatorModel)
    return found


def _fit_roofline(m: Sample) -> _Fitted:
    """The roofline's parameters, with what other devices of the class teach; of energy, time stands for mJ at 1 W."""
    from predictors.roofline_fitting import fit_sample, leave_out, measured_sample, near, prior, shipped_costs

    data = measured_sample(m.target, m.networks, m.families, m.workloads, m.y)
    assumed = near(prior(m.target, shipped_costs()), data)
    fit = fit_sample(data, assumed)
    logs = -leave_out(data, assumed, _left_out_together(m.families)).errors
    return _Fitted(fit.model_dump(mode="json"), logs, max(LEAST_LOG_STD, fit.log_std))


def _parse_roofline(numbers: dict[str, Any]) -> RooflineFit:
    return RooflineFit.model_validate({**numbers, "power_w": 1.0})


def _widen_roofline(numbers: dict[str, Any], factor: float) -> dict[str, Any]:
    wider = [[factor * value for value in row] for row in numbers["deviations"]]
    return {**numbers, "log_std": factor * numbers["log_std"], "deviations": wider}


def _load_roofline(model: FittedMetric, target: Target, metric: str) -> Predictor:
    profile = target.profile.model_copy(
        update={"fits": {**target.profile.fits, target.operating_point: model.parsed()}}
    )
    return Roofline(Target(profile, target.operating_point), metric, model.kinds)


_WAYS: dict[Method, _Way] = {
    "scale": _Way(1, _fit_scale, _parse_scale, _widen_scale, _load_scale),
    "roofline": _Way(ROOFLINE_NETWORKS, _fit_roofline, _parse_roofline, _widen_roofline, _load_roofline),
    "operator_model": _Way(LEAST_NETWORKS, _fit_operators, OperatorModel.from_dict, _widen_operators, _load_operators),
}


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
