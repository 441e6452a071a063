"""Ways to fit what was measured on a target: one factor, a roofline, or a model of what operators cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from scipy.special import stdtrit

from hardware_profiles.profile import RooflineFit, Target
from hardware_profiles.records import Record
from predictors.base import AdditivePredictor, Array, Estimate, Predictor
from predictors.operator_model import LEAST_NETWORKS, OperatorModel
from predictors.quality import figures
from predictors.roofline import Roofline
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
    """

    method: Method
    numbers: dict[str, Any]
    log_std: Positive
    lowest: Positive
    highest: Positive
    quality: dict[str, float]

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
    if method != "auto" and len(y) < _WAYS[method].least:
        raise UserError(
            f"{sample.target.name}: {method} needs at least {_WAYS[method].least} networks, {len(y)} were measured"
        )
    names: list[Method] = [method] if method != "auto" else [n for n in METHODS if len(y) >= _WAYS[n].least]
    fits = {name: _WAYS[name].fit(sample) for name in names}
    # The mean, for it sees the one network in ten that a fit to a handful gets badly wrong. Of methods that cannot be
    # judged (one network), the simplest stays.
    best = min(fits, key=lambda n: float(np.mean(np.abs(fits[n].logs))) if len(fits[n].logs) else 0.0)
    fitted = fits[best]
    return FittedMetric(
        method=best,
        numbers=fitted.numbers,
        log_std=fitted.log_std,
        lowest=float(y.min()),
        highest=float(y.max()),
        quality={
            "networks": float(len(y)),
            "families": float(len(set(sample.families))),
            **figures(fitted.logs, y, fitted.inside),
        },
    )


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
        return spread_around(mean, self.log_std, *self.range)

    def doubts(self, features: Array) -> str:
        return self.base.doubts(features)

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        linear = self.base.coefficients
        return None if linear is None else (self.factor * linear[0], self.factor * linear[1])


def spread_around(mean: Array, log_std: float, lowest: float, highest: float) -> Estimate:
    """Log-normal estimate; wider, and with a warning, where the prediction lies outside what was measured."""
    beyond = np.maximum(
        np.log(np.maximum(mean, 1e-12) / (1.1 * highest)), np.log(lowest / 1.1 / np.maximum(mean, 1e-12))
    )
    outside = beyond > 0
    # A heuristic, as in the operator model: a factor two outside the range adds 0.14 to the log spread.
    spread = log_std + 0.2 * np.maximum(beyond, 0.0)
    warning = ""
    if outside.any():
        warning = f"{int(outside.sum())} of {len(mean)} networks lie outside the measured {lowest:.3g} to {highest:.3g}"
    return Estimate.relative(mean, spread, warning)


@dataclass(frozen=True)
class _Fitted:
    """A fit and how it did on networks left out of it.

    Args:
        numbers: of the method.
        logs: `(m,)` ln(measured / predicted) of networks left out; `m` is 0 where too few were measured for that.
        log_std: spread of them.
        inside: share of them in their 90 % interval.
    """

    numbers: dict[str, Any]
    logs: Array
    log_std: float
    inside: float


@dataclass(frozen=True)
class _Way:
    """One way to fit: from how many networks, how, what its numbers are, and what predicts then."""

    least: int
    fit: Callable[[Sample], _Fitted]
    parse: Callable[[dict[str, Any]], Any]
    load: Callable[[FittedMetric, Target, str], Predictor]


def _left_out_together(families: Sequence[str]) -> NDArray[np.intp]:
    """`(n,)` networks with the same number are left out together when a fit is judged: families, or where there are
    only one or two, single networks. The operator model draws the same line, so that errors of all methods compare."""
    several = len(set(families)) > 2
    return np.unique(np.array(families), return_inverse=True)[1] if several else np.arange(len(families))


def _base(target: Target, metric: str) -> Roofline:
    """A roofline of the metric; where nobody states the power, energy is taken as latency times some power."""
    if metric == "energy_mj" and target.point.power_w is None:
        point = target.point.model_copy(update={"power_w": 1.0})
        points = {**target.profile.operating_points, target.operating_point: point}
        target = Target(target.profile.model_copy(update={"operating_points": points}), target.operating_point)
    return Roofline(target, metric)


def _fit_scale(m: Sample) -> _Fitted:
    """The median of measured over predicted."""
    from predictors.roofline_fitting import OTHER_UNIT

    ratios = np.log(m.y / _base(m.target, m.metric).predict(m.workloads).mean)
    groups = _left_out_together(m.families)
    left = [
        ratio - np.median(ratios[groups != group])
        for ratio, group in zip(ratios, groups, strict=True)
        if (groups != group).any()
    ]
    logs = np.array(left)
    # With more networks, fitted costs tell other units from small networks that are all overhead.
    if len(logs) and len(m.y) < ROOFLINE_NETWORKS and np.abs(logs).max() > np.log(OTHER_UNIT):
        worst = int(np.argmax(np.abs(ratios - np.median(ratios))))
        raise UserError(
            f"{m.target.name}: {m.metric} of {m.networks[worst]}, {m.y[worst]:g}, is {np.exp(np.abs(logs).max()):.0f} "
            "times off what the other networks lead to expect: is it in another unit?"
        )
    log_std = max(LEAST_LOG_STD, _spread(logs)) if len(logs) else UNJUDGED_LOG_STD
    inside = float(np.mean(np.abs(logs) <= 1.645 * log_std)) if len(logs) else np.nan
    return _Fitted({"factor": float(np.exp(np.median(ratios)))}, logs, log_std, inside)


def _parse_scale(numbers: dict[str, Any]) -> float:
    factor = float(numbers["factor"])
    if not (np.isfinite(factor) and factor > 0):
        raise ValueError(f"factor is {factor}")
    return factor


def _load_scale(model: FittedMetric, target: Target, metric: str) -> Predictor:
    return ScaledRoofline(_base(target, metric), model.parsed(), model.log_std, model.lowest, model.highest)


def _fit_operators(m: Sample) -> _Fitted:
    model, logs = OperatorModel.fit_report(m.workloads, m.y, metric=m.metric, families=m.families, warning=m.warning)
    log_std = float(max(LEAST_LOG_STD, model.numbers.stretch * model.numbers.noise))
    # The interval of each was stretched to hold these very errors.
    return _Fitted(model.to_dict(), logs, log_std, np.nan)


def _load_operators(model: FittedMetric, target: Target, metric: str) -> Predictor:
    found = model.parsed()
    assert isinstance(found, OperatorModel)
    return found


def _fit_roofline(m: Sample) -> _Fitted:
    """The roofline's parameters, with what other devices of the class teach; of energy, time stands for mJ at 1 W."""
    from predictors.roofline_fitting import fit_sample, leave_out, measured_sample, prior, shipped_costs

    data = measured_sample(m.target, m.networks, m.families, m.workloads, m.y)
    others = shipped_costs()
    fit = fit_sample(data, others)
    assumed = prior(m.target, others)
    logs = -leave_out(data, assumed, _left_out_together(m.families)).errors
    return _Fitted(fit.model_dump(mode="json"), logs, max(LEAST_LOG_STD, fit.log_std), fit.errors.family_coverage_90)


def _parse_roofline(numbers: dict[str, Any]) -> RooflineFit:
    return RooflineFit.model_validate({**numbers, "power_w": 1.0})


def _load_roofline(model: FittedMetric, target: Target, metric: str) -> Predictor:
    profile = target.profile.model_copy(
        update={"fits": {**target.profile.fits, target.operating_point: model.parsed()}}
    )
    return Roofline(Target(profile, target.operating_point), metric)


_WAYS: dict[Method, _Way] = {
    "scale": _Way(1, _fit_scale, _parse_scale, _load_scale),
    "roofline": _Way(ROOFLINE_NETWORKS, _fit_roofline, _parse_roofline, _load_roofline),
    "operator_model": _Way(LEAST_NETWORKS, _fit_operators, OperatorModel.from_dict, _load_operators),
}


def _spread(logs: Array) -> float:
    """Log standard deviation whose 90 % interval covers 90 % of new ones (conformal rank, Vovk et al., 2005)."""
    ordered = np.sort(np.abs(logs))
    rank = min(len(ordered), int(np.ceil(0.9 * (len(ordered) + 1))))
    # With few networks the largest seen is no bound of the next: Student's t in place of the normal.
    few = stdtrit(max(1, len(ordered) - 1), 0.95) / 1.645
    return float(few * max(1.4826 * np.median(ordered), ordered[rank - 1] / 1.645))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
