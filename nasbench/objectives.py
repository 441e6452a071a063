"""What a search optimises: metrics, and objectives with direction, unit and limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        Metric("accuracy_int8", "", True, False, "accuracy after int8 quantisation"),
        Metric("latency_ms", "ms", False, True, "latency"),
        Metric("energy_mj", "mJ", False, True, "energy"),
        Metric("peak_memory_bytes", "bytes", False, False, "peak activation memory"),
        Metric("params", "", False, False, "parameters"),
        Metric("macs", "", False, False, "multiply-accumulates"),
        Metric("file_bytes", "bytes", False, False, "weights in a file"),
        Metric("throughput_ips", "1/s", True, True, "throughput"),
        Metric("training_memory_bytes", "bytes", False, False, "training memory"),
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
        opposite: a hard limit on the other side: at least, or at most where `maximise`; None for no such.
        batch: samples at a time, of metrics that depend on it and not on a target (training memory).
        method: what trains, of training memory: `full` or `bias`.
        key: under which `limit` was given, for messages.
    """

    name: str
    metric: str
    target: str = ""
    maximise: bool = False
    limit: float | None = None
    quantile: float | None = None
    unit: str = ""
    opposite: float | None = None
    batch: int = 1
    method: str = "full"
    key: str = "limit"

    @property
    def limited(self) -> bool:
        """Whether it has a hard limit, on either side."""
        return self.limit is not None or self.opposite is not None

    @property
    def sides(self) -> tuple[tuple[str, Objective], ...]:
        """The hard limits one by one, each with its key and as an objective with that `limit` only."""
        found: list[tuple[str, Objective]] = []
        if self.limit is not None:
            found.append((self.key, replace(self, opposite=None)))
        if self.opposite is not None:
            key = "at_most" if self.maximise else "at_least"
            found.append((key, replace(self, maximise=not self.maximise, limit=self.opposite, opposite=None)))
        return tuple(found)

    @property
    def limits_text(self) -> str:
        """The hard limits in words, as ` (limit 20)` or ` (at_most 3, at_least 1)`; empty without any."""
        told = ", ".join(f"{key} {side.limit:.4g}" for key, side in self.sides)
        return f" ({told})" if told else ""

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
    at_least: float | None = None,
    at_most: float | None = None,
    batch: int | None = None,
    method: str | None = None,
    default_target: str = "",
) -> Objective:
    """An objective from configuration values; `name` may be a metric or `metric@target`.

    Args:
        limit: hard limit in the direction that is worse; `at_least` and `at_most` say which side they mean.

    Raises:
        UserError: an unknown metric without a direction, so it is not one of the user's own either; two limits on one
            side; or a batch for a metric that has none.
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
    maximise = known.maximise if direction is None and known else direction == "maximise"
    same, opposite = (at_least, at_most) if maximise else (at_most, at_least)
    key = "at_least" if maximise else "at_most"
    if limit is not None and same is not None and same != limit:
        raise UserError(f"objectives.{name}: limit = {limit:g} and {key} = {same:g} say the same; keep one of them")
    if method is not None and metric != "training_memory_bytes":
        raise UserError(f"objectives.{name}.method is a key of training_memory_bytes, not of {metric}")
    if batch is not None and metric != "training_memory_bytes":
        raise UserError(
            f"objectives.{name}.batch is a key of training_memory_bytes; the batch of {metric}, if any, belongs "
            "to the target's operating point"
        )
    return Objective(
        name=name,
        metric=metric,
        target=(target or at or default_target) if needs_target else (target or at),
        maximise=maximise,
        limit=limit if same is None else same,
        quantile=quantile,
        unit=known.unit if known else "",
        opposite=opposite,
        batch=batch or 1,
        method=method or "full",
        key="limit" if same is None else key,
    )


def given_as(objective: Objective, metrics: Sequence[str]) -> str | None:
    """Under which of an evaluator's `metrics` it gives an objective; None where it does not.

    That is the objective's name, or its metric with its target, or its metric alone.
    """
    names = (objective.name, f"{objective.metric}@{objective.target}", objective.metric)
    return next((name for name in names if name in metrics), None)


def check_contradictions(objectives: Sequence[Objective]) -> None:
    """Refuse limits on one metric that no value keeps, whatever the architecture.

    Raises:
        UserError: naming both.
    """
    lowest: dict[tuple[str, str], tuple[str, Objective]] = {}
    highest: dict[tuple[str, str], tuple[str, Objective]] = {}
    for objective in objectives:
        for key, side in objective.sides:
            assert side.limit is not None
            kept, better = (lowest, 1.0) if side.maximise else (highest, -1.0)
            what, told = (side.metric, side.target), (f"objectives.{side.name}.{key}", side)
            if what not in kept or better * side.limit > better * (kept[what][1].limit or 0.0):
                kept[what] = told
    for what in lowest.keys() & highest.keys():
        (low, least), (high, most) = lowest[what], highest[what]
        assert least.limit is not None
        assert most.limit is not None
        if least.limit > most.limit:
            unit = f" {least.unit}" if least.unit else ""
            where = f"{what[0]} on {what[1]}" if what[1] else what[0]
            raise UserError(
                f"{low} = {least.limit:g}{unit} and {high} = {most.limit:g}{unit} contradict each other: no {where} is "
                "at least the one and at most the other"
            )


def minimised(values: NDArray[np.float64], objectives: tuple[Objective, ...]) -> NDArray[np.float64]:
    """`(n, M)` values with the sign turned where more is better, so that less is better everywhere."""
    return values * np.where([o.maximise for o in objectives], -1.0, 1.0)


def violations(values: NDArray[np.float64], objectives: Sequence[Objective]) -> NDArray[np.float64]:
    """How far each limit is broken, relative to the limit: `(n, L)` >= 0, one column per limit, in order.

    `values` `(n, M)` are those that the limit applies to (the mean, or the objective's quantile). NaN counts as +inf.
    """
    sides = [(column, side) for column, o in enumerate(objectives) for _, side in o.sides]
    if not sides:
        return np.zeros((len(values), 0))
    limits = np.array([side.limit for _, side in sides], dtype=float)
    sign = np.where([side.maximise for _, side in sides], -1.0, 1.0)
    excess = sign * (values[:, [column for column, _ in sides]] - limits) / np.maximum(np.abs(limits), 1e-12)
    return np.where(np.isnan(excess), np.inf, np.maximum(excess, 0.0))
