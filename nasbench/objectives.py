"""What a search optimises: metrics, and objectives with direction, unit and limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity with its unit, the direction that is better, and whether it belongs to a target."""

    name: str
    unit: str
    maximise: bool
    needs_target: bool
    label: str


METRICS = {
    m.name: m
    for m in (
        Metric("accuracy", "", True, False, "accuracy"),
        Metric("latency_ms", "ms", False, True, "latency"),
        Metric("energy_mj", "mJ", False, True, "energy"),
        Metric("peak_memory_bytes", "bytes", False, False, "peak activation memory"),
        Metric("params", "", False, False, "parameters"),
        Metric("macs", "", False, False, "multiply-accumulates"),
    )
}


@dataclass(frozen=True, slots=True)
class Objective:
    """One axis of the front.

    Args:
        name: as in the configuration; column name in the archive and in figures.
        metric: a metric's name, known or the user's own.
        target: `device` or `device:operating-point`, empty where the metric needs none.
        maximise: direction.
        limit: hard limit: at most, or at least where `maximise`; None for no limit.
        quantile: with a limit on a prediction, the quantile that must keep it; None means the mean.
    """

    name: str
    metric: str
    target: str = ""
    maximise: bool = False
    limit: float | None = None
    quantile: float | None = None
    unit: str = ""

    @property
    def label(self) -> str:
        """Axis label, with unit and target."""
        metric = METRICS.get(self.metric)
        base = metric.label if metric else self.metric
        return base + (f" on {self.target}" if self.target else "") + (f" ({self.unit})" if self.unit else "")


def make_objective(
    name: str,
    *,
    metric: str | None = None,
    target: str | None = None,
    direction: str | None = None,
    limit: float | None = None,
    quantile: float | None = None,
    default_target: str = "",
) -> Objective:
    """An objective from configuration values; `name` may be a metric or `metric@target`.

    Raises:
        UserError: an unknown metric without a direction, so it is not one of the user's own either.
    """
    from_name, _, at = name.partition("@")
    metric = metric or from_name
    known = METRICS.get(metric)
    if known is None and direction is None:
        raise UserError(
            f"objectives.{name}: unknown metric {metric!r}. {nearest(metric, METRICS)} "
            'A metric of your own evaluator needs direction = "minimise" or "maximise".'
        )
    needs_target = known.needs_target if known else False
    return Objective(
        name=name,
        metric=metric,
        target=(target or at or default_target) if needs_target else (target or at),
        maximise=known.maximise if direction is None and known else direction == "maximise",
        limit=limit,
        quantile=quantile,
        unit=known.unit if known else "",
    )


def given_as(objective: Objective, metrics: Sequence[str]) -> str | None:
    """Under which of an evaluator's `metrics` it gives an objective; None where it does not.

    That is the objective's name, or its metric with its target, or its metric alone.
    """
    names = (objective.name, f"{objective.metric}@{objective.target}", objective.metric)
    return next((name for name in names if name in metrics), None)


def minimised(values: NDArray[np.float64], objectives: tuple[Objective, ...]) -> NDArray[np.float64]:
    """`(n, M)` values with the sign turned where more is better, so that less is better everywhere."""
    return values * np.where([o.maximise for o in objectives], -1.0, 1.0)


def violations(values: NDArray[np.float64], objectives: tuple[Objective, ...]) -> NDArray[np.float64]:
    """How far each limit is broken, relative to the limit: `(n, L)` >= 0, one column per objective with a limit.

    `values` `(n, M)` are those that the limit applies to (the mean, or the objective's quantile). NaN counts as +inf.
    """
    columns = [i for i, o in enumerate(objectives) if o.limit is not None]
    if not columns:
        return np.zeros((len(values), 0))
    limits = np.array([objectives[i].limit for i in columns], dtype=float)
    sign = np.where([objectives[i].maximise for i in columns], -1.0, 1.0)
    excess = sign * (values[:, columns] - limits) / np.maximum(np.abs(limits), 1e-12)
    return np.where(np.isnan(excess), np.inf, np.maximum(excess, 0.0))
