"""Latency, energy or any other cost of whole networks as the sum of what their operators cost, learned from sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.stats import binom

from predictors.base import AdditivePredictor, Array, Estimate
from predictors.operator_features import (
    COORDINATES,
    GROUPS,
    QUANTITIES,
    describe,
    footprints,
    group_of,
    kernels,
    network_kernels,
    strained,
    streamed,
    weights_seldom_used,
)
from predictors.quality import STRANGE, spread_around
from search_spaces import Operator, UserError, Workload
from search_spaces.errors import explain

LEAST_NETWORKS = 8

Rows = tuple[tuple[float, ...], ...]


class Fit(BaseModel):
    """A fitted model as plain numbers: all that its predictions depend on.

    Args:
        metric: what was measured, with its unit in the name.
        groups, quantities, coordinates: names of the rows and columns below.
        rates: per group and quantity, logarithm of the cost per kernel, or per million.
        trends: per group and coordinate, slope of the log cost.
        centre: where the trends are zero.
        inducing_groups, inducing: groups and coordinates of the operators that the smooth rest leans on.
        rest: their weights.
        length: scale of the rest, in factors of two of a size.
        offset: what every network costs.
        cache: million values that the last cache holds, see `strained`.
        stream: cost of a million weights that are seldom used and come from memory, see `streamed`.
        strain: power of a network's footprint that its cost grows by, as caches hold less and less of it.
        signs: whether reading signed values matters; else the operators' coordinate of it counts as 0.
        doubts: per group, standard deviation of the log cost; 1 for groups that no network had.
        noise: standard deviation of a log measurement.
        stretch: factor on all spreads that made intervals cover 90 % of networks of families left out.
        lowest, highest: range of the fitted values.
        warning: what was wrong with the measurements, else empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = "latency_ms"
    groups: tuple[str, ...] = GROUPS
    quantities: tuple[str, ...] = QUANTITIES
    coordinates: tuple[str, ...] = COORDINATES
    rates: Rows
    trends: Rows
    centre: tuple[float, ...]
    inducing_groups: tuple[int, ...]
    inducing: Rows
    rest: tuple[float, ...]
    length: float
    offset: float
    cache: float = 1.0
    stream: float = 0.0
    strain: float = 0.0
    signs: bool = True
    doubts: tuple[float, ...]
    noise: float
    stretch: float
    lowest: float
    highest: float
    warning: str = ""


class OperatorModel(AdditivePredictor):
    """Cost of any network, learned from measured networks of any kind.

    A network costs an offset and the sum of its kernels (operators after fusion, see `kernels`). What a kernel costs
    is learned per group of kinds from its multiply-accumulates, values moved and parameters, bent by smooth functions
    of its sizes: a hierarchical model with a Gaussian process over operators, of which sums are observed. nn-Meter
    (Zhang et al., MobiSys 2021) learns the same per kernel from kernels measured alone; measuring whole networks keeps
    out the graph inputs and layout changes that kernels alone pay for, and needs no detector of fusion rules.

    Costs are positive; a larger operator is not always dearer, as padding to vector width makes real ones. One model
    serves every space and family; operators unlike all measured ones widen the interval, and a warning names them.

    Make one with `OperatorModel.fit(workloads, values)`; it never changes afterwards.

    Args:
        fit: the fitted numbers.
    """

    # Features: cost, cost times its log standard deviation, footprint, weights that are seldom used, and cost in
    # strange operators by group.
    COST, DOUBT, FOOTPRINT, SELDOM, STRANGE_FROM = range(5)

    leading = STRANGE_FROM

    def __init__(self, fit: Fit) -> None:
        from predictors.operator_fitting import Basis, Parameters

        if (fit.groups, fit.quantities, fit.coordinates) != (GROUPS, QUANTITIES, COORDINATES):
            raise UserError("this operator model was fitted by another version, on other features; calibrate again")
        self.numbers = fit
        self.metric = fit.metric
        self._basis = Basis(
            np.array(fit.inducing_groups, dtype=np.int64),
            np.array(fit.inducing, dtype=float).reshape(-1, len(COORDINATES)),
            fit.length,
        )
        self._parameters = Parameters(
            np.array(fit.rates), np.array(fit.trends), np.array(fit.centre), np.array(fit.rest), fit.offset,
            fit.cache, fit.stream, fit.strain, np.array(fit.doubts),
        )  # fmt: skip
        self._rows: dict[Operator, Array] = {}

    @classmethod
    def fit(
        cls,
        workloads: Sequence[Workload],
        values: Sequence[float] | Array,
        *,
        metric: str = "latency_ms",
        families: Sequence[str] | None = None,
        warning: str = "",
    ) -> OperatorModel:
        """A model of measured networks.

        Args:
            workloads: at least `LEAST_NETWORKS`.
            values: one per workload, positive and finite.
            metric: what the values are: `latency_ms`, `energy_mj`, ...
            families: one per workload; those of a family are left out together to calibrate the interval, which then
                holds for networks of other families. Else an eighth of the networks is left out at a time.
            warning: what is wrong with the measurements, to be repeated with every estimate.

        Raises:
            UserError: too few networks, or a value that is none.
        """
        return cls.fit_report(workloads, values, metric=metric, families=families, warning=warning)[0]

    @classmethod
    def fit_report(
        cls,
        workloads: Sequence[Workload],
        values: Sequence[float] | Array,
        *,
        metric: str = "latency_ms",
        families: Sequence[str] | None = None,
        warning: str = "",
    ) -> tuple[OperatorModel, Array]:
        """As `fit`, and `(n,)` ln(measured / predicted) of each network, predicted without its fold."""
        from predictors.operator_fitting import Observations, fit

        y = np.asarray(values, dtype=float)
        if len(y) != len(workloads) or len(y) < LEAST_NETWORKS:
            raise UserError(
                f"an operator model needs at least {LEAST_NETWORKS} networks and a {metric} for each, "
                f"got {len(workloads)} networks and {len(y)} values"
            )
        if families is not None and len(families) != len(y):
            raise UserError(f"an operator model needs one family per network, got {len(families)} for {len(y)}")
        if not (np.isfinite(y).all() and (y > 0).all()):
            raise UserError(f"{metric} must be positive and finite, got {y[~(np.isfinite(y) & (y > 0))][0]}")
        found = fit(Observations.of(workloads, y, families))
        p = found.parameters
        numbers = Fit(
            metric=metric,
            rates=_rows(p.rates),
            trends=_rows(p.trends),
            centre=tuple(p.centre.tolist()),
            inducing_groups=tuple(found.basis.groups.tolist()),
            inducing=_rows(found.basis.coordinates),
            rest=tuple(p.rest.tolist()),
            length=found.basis.length,
            offset=p.offset,
            cache=p.cache,
            stream=p.stream,
            strain=p.strain,
            signs=found.signs,
            doubts=tuple(p.doubt.tolist()),
            noise=found.noise,
            stretch=_stretch(np.abs(found.residuals) / found.spread),
            lowest=float(y.min()),
            highest=float(y.max()),
            warning=warning,
        )
        return cls(numbers), found.residuals

    def block_features(self, workload: Workload) -> Array:
        """`(4 + groups,)`: cost, cost times its doubt, footprint, weights that are seldom used, and cost in
        operators of each group unlike all measured ones."""
        return self.block_rows([workload])[0]

    def block_rows(self, workloads: Sequence[Workload]) -> Array:
        return self._totals([kernels(workload) for workload in workloads])

    def network_rows(self, workloads: Sequence[Workload]) -> Array:
        return self._totals([network_kernels(workload) for workload in workloads])

    def _totals(self, found: Sequence[Counter[Operator]]) -> Array:
        self._describe(list(dict.fromkeys(op for counts in found for op in counts if op not in self._rows)))
        rows = np.zeros((len(found), self.STRANGE_FROM + len(GROUPS)))
        for row, counts in zip(rows, found, strict=True):
            for op, count in counts.items():
                row += count * self._rows[op]
        return rows

    def head(self, totals: Any) -> Any:
        cost, footprint = totals[:, self.COST] + self.numbers.offset, totals[:, self.FOOTPRINT]
        cache = self.numbers.cache
        if self.numbers.stream:
            cost = cost + self.numbers.stream * totals[:, self.SELDOM] * streamed(footprint, cache)
        return cost * strained(footprint, cache) ** self.numbers.strain if self.numbers.strain else cost

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        if self.numbers.stream or self.numbers.strain:
            return None
        weights = np.zeros(self.STRANGE_FROM + len(GROUPS))
        weights[self.COST] = 1.0
        return weights, self.numbers.offset

    def estimate(self, totals: Array) -> Estimate:
        """Log-normal; wider where operators or the whole are unlike what was measured, with a warning for the whole."""
        # Full correlation of the operators' doubts: an upper bound that adds up over blocks.
        doubt = totals[:, self.DOUBT] / np.maximum(totals[:, self.COST] + self.numbers.offset, 1e-12)
        log_std = self.numbers.stretch * np.sqrt(self.numbers.noise**2 + doubt**2)
        unit = self.metric.rpartition("_")[2]
        estimate = spread_around(self.head(totals), log_std, self.numbers.lowest, self.numbers.highest, unit)
        return replace(estimate, warning="; ".join(w for w in (self.numbers.warning, estimate.warning) if w))

    def doubts(self, features: Array, workloads: Iterable[Workload], blocks: bool = False) -> str:
        strange = features[:, self.STRANGE_FROM :]
        # Of a space's blocks, those that cost next to nothing do not count.
        least = 0.5 * float(features[:, self.COST].mean()) if blocks else 0.0
        cost = np.maximum(features[:, self.COST], max(1e-12, least))
        share = (strange / cost[:, None]).max(0, initial=0.0)
        names = [GROUPS[g] for g in np.argsort(-share) if share[g] > STRANGE]
        return f"no calibration network had operators like some of these: {', '.join(names)}" if names else ""

    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        estimate = super().predict(workloads)
        unknown = sorted({op.kind for w in workloads for op in w.operators if group_of(op) == "other"})
        if not unknown:
            return estimate
        told = f"unknown operators, taken as ones that only move data: {', '.join(unknown)}"
        return replace(estimate, warning="; ".join(w for w in (estimate.warning, told) if w))

    def to_dict(self) -> dict[str, Any]:
        """The fitted numbers as JSON-able values."""
        return self.numbers.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OperatorModel:
        """The inverse of `to_dict`, predicting to the same bits.

        Raises:
            UserError: missing or unknown keys, or features of another version.
        """
        try:
            return cls(Fit.model_validate(values))
        except ValidationError as error:
            raise UserError(explain(error, "operator model", Fit.model_fields)) from error

    def _describe(self, operators: Sequence[Operator]) -> None:
        """Fill in the rows of operators that were not met before."""
        from predictors.operator_fitting import UNSIGNED, costs, doubts

        for start in range(0, len(operators), 1024):
            some = operators[start : start + 1024]
            groups, quantities, coordinates = describe(some)
            if not self.numbers.signs:
                coordinates = coordinates * UNSIGNED
            rows = np.zeros((len(some), self.STRANGE_FROM + len(GROUPS)))
            rows[:, self.COST] = costs(self._parameters, self._basis, groups, quantities, coordinates)
            std, strange = doubts(self._parameters, self._basis, groups, coordinates)
            rows[:, self.DOUBT] = rows[:, self.COST] * std
            rows[:, self.FOOTPRINT] = footprints(quantities)
            rows[:, self.SELDOM] = weights_seldom_used(quantities, coordinates)
            rows[np.arange(len(some)), self.STRANGE_FROM + groups] = rows[:, self.COST] * strange
            self._rows.update(zip(some, rows, strict=True))


def _rows(values: Array) -> Rows:
    return tuple(tuple(row) for row in values.tolist())


def _stretch(ratios: Array) -> float:
    """The factor on spreads whose 90 % interval covers at least 90 % of new networks, four times in five.

    A tolerance bound by order statistics (Wilks, Ann. Math. Stat. 1941), so free of assumptions about the tails: with
    few networks the largest ratio, with many the 90th percentile.
    """
    ordered = np.sort(ratios)
    rank = int(binom.ppf(0.8, len(ordered), 0.9)) + 1
    return float(max(ordered[min(rank, len(ordered)) - 1] / 1.645, 1e-3))
