"""Latency and energy from peaks and attained fractions of them: a roofline whose terms add up.

After the roofline model (Williams, Waterman and Patterson, CACM 2009), but with arithmetic and traffic one after the
other instead of the longer of both: on published latencies of phones, boards and accelerators sums err less than maxima
on networks that were left out, and they make time linear in its costs. What a device attains of its peaks is fitted to
its published latencies (`predictors.roofline_fitting`), or roughly assumed where there are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import numpy as np

from hardware_profiles.constraints import check_workload
from hardware_profiles.profile import Target
from hardware_profiles.profile_sections import RooflineFit, RooflineParameters
from predictors.base import AdditivePredictor, Array, Estimate
from predictors.quality import STRANGE
from search_spaces import Operator, UserError, Workload
from search_spaces.operators import ELEMENTWISE, FOLDED, KINDS

# What an inference pays for. Arithmetic by kind, parameters and activations are counted as milliseconds at the peaks,
# so that their costs are inverses of attained fractions; launches and the inference itself cost microseconds, the
# link inverse GB/s.
COSTS = (
    "conv2d", "pointwise", "linear", "depthwise_conv2d", "grouped_conv2d", "weights", "activations", "launch", "fixed",
    "link",
)  # fmt: skip
ARITHMETIC = COSTS[:5]
WEIGHTS, ACTIVATIONS, LAUNCH, FIXED, LINK = range(5, 10)

# Every runtime of interest writes these with their producer; gating (`mul`) waits for a pooled value and cannot be.
FUSED = ELEMENTWISE - FOLDED - {"mul"}
# Normalisation disappears into one of these before it.
_ABSORBS = frozenset({"conv2d", "depthwise_conv2d", "conv_transpose2d", "linear"})

# These need no memory besides that of what they change.
_IN_PLACE = FUSED | FOLDED
# Order of the norm that stands for the largest of many operators.
NORM = 8

# Standard deviation of ln(measured / predicted) assumed for an uncalibrated roofline: one measurement in three is off
# by more than a factor 1.6, one in twenty by more than 2.7.
LOG_STD = 0.5
# The same, in addition, for an operating point that borrows the fit of another one of its device.
BORROWED_LOG_STD = 0.25
# And for energy, of power where it is only stated.
POWER_LOG_STD = 0.2
# Latencies beyond the fitted range by more than this factor are said to be extrapolated; the standard deviation grows
# by `EXTRAPOLATION` times the logarithm of the distance to the range.
FAR = 2.0
EXTRAPOLATION = 0.3


def operator_work(op: Operator, lanes: tuple[int, int], batch: int) -> tuple[str, float, float, float, float]:
    """What one operator does: kind of arithmetic, multiply-accumulates, parameters, activation values, launches.

    Fused operators are not launched and move only their second operand. Arithmetic fills `lanes` of channels and of
    pixels in a row.
    """
    if op.kind in FUSED:
        return "", 0.0, 0.0, batch * sum(t.size for t in op.inputs[1:]), 0.0
    values = batch * (sum(t.size for t in op.inputs) + op.output.size)
    if not op.macs:
        return "", 0.0, op.params, values, 1.0
    if op.kind in ("linear", "matmul"):
        return "linear", batch * op.macs, op.params, values, 1.0
    channels, *pixels = op.output.shape
    if op.kind == "conv_transpose2d":
        pixels = list(op.inputs[0].shape[1:])
    filled = ceil(channels / lanes[0]) * lanes[0] / channels * ceil(pixels[-1] / lanes[1]) * lanes[1] / pixels[-1]
    macs = batch * op.macs * filled
    if op.kind == "depthwise_conv2d":
        kind = op.kind
    elif op.groups > 1:
        kind = "grouped_conv2d"
    else:
        kind = "pointwise" if set(op.kernel) == {1} else "conv2d"
    return kind, macs, op.params, values, 1.0


def kind_of(op: Operator) -> str:
    """What an operator counts as where kinds are compared: `conv2d` is told from `pointwise` and `grouped_conv2d`; ""
    for what is fused or folded into another one."""
    if op.kind == "conv2d":
        return operator_work(op, (1, 1), 1)[0]
    return "" if op.kind in _IN_PLACE else op.kind


def workload_work(workload: Workload, target: Target, lanes: tuple[int, int], kind: str = "") -> Array:
    """`(C,)` multiples of `COSTS` that the operators of a workload, or those of one kind (`kind_of`), ask of a target;
    none fixed, none over the link."""
    work = np.zeros(len(COSTS))
    writers: dict[int, str] = {}
    cache: dict[Operator, tuple[str, float, float, float, float]] = {}
    for op, reads, write in zip(workload.operators, workload.reads, workload.writes, strict=True):
        absorbed = op.kind in FOLDED and writers.get(reads[0]) in _ABSORBS
        # A normalisation stands for the convolution that absorbed it: one more after it would be absorbed, too.
        writers[write] = writers[reads[0]] if absorbed else op.kind
        if absorbed or (kind and kind_of(op) != kind):
            continue
        if op not in cache:
            cache[op] = operator_work(op, lanes, target.batch)
        arithmetic, macs, params, values, launches = cache[op]
        if arithmetic:
            work[ARITHMETIC.index(arithmetic)] += macs
        work[WEIGHTS] += params
        work[ACTIVATIONS] += values
        work[LAUNCH] += launches
    point = target.point
    work[: len(ARITHMETIC)] /= point.peak_gmacs * 1e6
    work[[WEIGHTS, ACTIVATIONS]] *= target.itemsize / (point.bandwidth_gbs * 1e6)
    work[LAUNCH] /= 1e3
    return work


def crossing_bytes(workload: Workload, target: Target) -> float:
    """Bytes of input less bytes of output: over a chain of blocks this telescopes to the network's own."""
    sizes = [sum(workload.tensors[t].size for t in ends) for ends in (workload.inputs, workload.outputs)]
    return float(target.itemsize * target.batch * (sizes[0] - sizes[1]))


def working_power(workload: Workload, target: Target) -> float:
    """The `NORM`-th powers of the megabytes that inputs and output of each operator take, added up.

    The root of the sum is nearly what the largest takes, and unlike a maximum it follows from sums over blocks.
    """
    sizes = [sum(t.size for t in op.inputs) + op.output.size for op in workload.operators if op.kind not in _IN_PLACE]
    return float(((target.itemsize * target.batch / 1e6 * np.array(sizes)) ** NORM).sum())


def over_link(crossing: Any, params: Any, working: Any, on_chip_bytes: int | None) -> Any:
    """Megabytes that cross the link: the input, or a larger output (less the smaller of both, for all that adds up over
    blocks is the difference), and parameters for which the chip has no memory beside the activations (the compiler's
    logs say how much it leaves them: 8.2 MiB of a small network, google-coral/edgetpu issue 324; 1.9 MiB where feature
    maps are large, issue 427)."""
    moved = abs(crossing)
    if on_chip_bytes is not None:
        beyond = params + 1e6 * working ** (1 / NORM) - on_chip_bytes
        moved = moved + (beyond + abs(beyond)) / 2
    return moved / 1e6


def costs_of(roof: RooflineParameters) -> Array:
    """`(C,)` `COSTS` of a set of parameters."""
    efficiency = [roof.efficiency.get(kind, roof.efficiency["other"]) for kind in ARITHMETIC]
    weights = roof.weight_bandwidth_efficiency or roof.bandwidth_efficiency
    link = 1 / roof.host_link_gbs if roof.host_link_gbs else 0.0
    return np.array(
        [*(1 / e for e in efficiency), 1 / weights, 1 / roof.bandwidth_efficiency, roof.launch_us, roof.fixed_us, link]
    )


class Roofline(AdditivePredictor):
    """Predicted latency or energy of one inference (one batch) on a device, from its profile alone.

    Each operator takes the time of its arithmetic, of its parameters and of its activations at attained fractions of
    the peaks, and a launch; normalisation after a convolution costs nothing and element-wise operators only the traffic
    of their second operand, as both are fused. Around that: a fixed cost, and, for a device behind a link, the transfer
    of the network's input and of parameters that do not fit on the chip beside the activations. Energy is latency times
    power.

    Where the profile has a fit for the operating point (`profile.fits`), the fractions are fitted and the interval is
    meant to hold 90 % of networks that were left out; it widens for networks whose costs the references do not
    determine, and beyond the range of their latencies. An operating point without one borrows that of the nearest point
    with its runtime. Without any fit the fractions are rough, the spread is assumed, and a warning says so.

    Args:
        target: device and operating point.
        metric: `latency_ms` or `energy_mj`.
        kinds: of operators that the user's own measurements had (`kind_of`); predictions of others say so. Empty where
            nobody knows.

    Raises:
        UserError: energy of an operating point whose power nobody states.
    """

    # Columns of the features; directions of uncertainty follow, then the number of unsupported and unknown operators.
    TIME_MS, PARAM_BYTES, LINK_BYTES, WORKING = range(4)

    def __init__(self, target: Target, metric: str = "latency_ms", kinds: Iterable[str] = ()) -> None:
        if metric not in ("latency_ms", "energy_mj"):
            raise UserError(f"a roofline predicts latency_ms or energy_mj, not {metric!r}")
        self.target = target
        self.metric = metric
        self.kinds = frozenset(kinds)
        self.fitted_at, self.fit = _fit_for(target)
        power = self.fit.power_w if self.fit and self.fitted_at == target.operating_point else None
        self._power = power or target.point.power_w
        self._power_measured = power is not None
        if metric == "energy_mj" and self._power is None:
            raise UserError(f"{target.name}: energy needs power_w at this operating point, and the profile has none")
        roof = self.fit.parameters if self.fit else target.profile.roofline
        self.on_chip_bytes = target.profile.roofline.on_chip_bytes
        self.lanes = roof.lanes
        self.costs = costs_of(roof)
        nominal = target.profile.operating_points[self.fitted_at].host_link_gbs if self.fit else None
        if nominal and target.point.host_link_gbs:
            self.costs[LINK] *= nominal / target.point.host_link_gbs
        self.directions = np.array(self.fit.deviations if self.fit else ()).reshape(-1, len(COSTS))
        self.leading = 4 + len(self.directions)

    @property
    def power(self) -> tuple[float, float, str]:
        """Watts that energy is counted with, the standard deviation of their logarithm, and what is doubtful there.

        Raises:
            UserError: nobody states any.
        """
        if self._power is None:
            raise UserError(f"{self.target.name}: the profile states no power")
        if self._power_measured:
            return self._power, 0.0, ""
        return self._power, POWER_LOG_STD, f"{self.target.name}: energy is latency times stated power"

    @property
    def basis(self) -> str:
        """What predictions rest on, in a few words."""
        if self.fit is None:
            return "roofline from datasheet figures"
        where = "" if self.fitted_at == self.target.operating_point else f" at {self.fitted_at}"
        return f"roofline fitted to published latencies of {self.fit.networks} networks{where}"

    def block_features(self, workload: Workload) -> Array:
        """`(F,)`: operators' ms, parameter bytes, input less output bytes, powers of their working memory, uncertainty
        of the ms in each direction, number of unsupported or unknown operators."""
        spent = workload_work(workload, self.target, self.lanes) * self.costs
        size = self.target.itemsize
        return np.array(
            [
                spent.sum(),
                size * workload.params,
                crossing_bytes(workload, self.target),
                working_power(workload, self.target) if self.on_chip_bytes is not None else 0.0,
                *(self.directions @ spent),
                len(check_workload(workload, self.target)) + sum(op.kind not in KINDS for op in workload.operators),
            ]
        )

    def head(self, totals: Any) -> Any:
        latency = totals[:, self.TIME_MS] + self.costs[LINK] * self._link(totals) + self.costs[FIXED] / 1e3
        return latency * self._scale

    def _link(self, totals: Any) -> Any:
        crossing, params, working = (totals[:, c] for c in (self.LINK_BYTES, self.PARAM_BYTES, self.WORKING))
        return over_link(crossing, params, working, self.on_chip_bytes)

    def estimate(self, totals: Array) -> Estimate:
        """The head, with a spread that depends on what the time is spent on."""
        mean = self.head(totals)
        if self.fit is None or not len(totals):
            return self.around(mean)
        link = self._link(totals)
        around = np.stack([np.full(len(link), self.costs[FIXED] / 1e3), self.costs[LINK] * link], axis=1)
        spread = totals[:, self.WORKING + 1 : self.leading] + around @ self.directions[:, [FIXED, LINK]].T
        return self._estimate(mean, (spread * self._scale / mean[:, None]) ** 2)

    def around(self, mean: Array) -> Estimate:
        return self._estimate(mean, np.zeros((len(mean), 1)))

    def _estimate(self, mean: Array, variances: Array) -> Estimate:
        warnings = []
        energy = self.metric == "energy_mj"
        variance = variances.sum(1) + (self.power[1] ** 2 if energy else 0.0)
        if self.fit is None:
            variance += LOG_STD**2
            what = "latency" if not energy else "energy (latency times stated power)"
            warnings.append(f"{self.target.name}: {what} from datasheet figures, not calibrated by measurements")
        else:
            variance += self.fit.log_std**2
            if self.fitted_at != self.target.operating_point:
                variance += BORROWED_LOG_STD**2
                warnings.append(f"{self.target.name}: no measurements here; calibrated at {self.fitted_at}")
            if energy and self.power[2]:
                warnings.append(self.power[2])
            low, high = np.log(self.fit.range_ms) + np.log(self._scale)
            away = np.maximum(0, np.maximum(low - np.log(mean), np.log(mean) - high))
            variance += (EXTRAPOLATION * away) ** 2
            far = int((away > np.log(FAR)).sum())
            if far and self.fitted_at == self.target.operating_point:
                least, most = self.fit.range_ms
                warnings.append(
                    f"{self.target.name}: {far} of {len(mean)} predictions are far outside the {least:g} to {most:g} "
                    "ms of the networks that it was calibrated with"
                )
        return Estimate.relative(mean, np.sqrt(variance), "; ".join(warnings))

    def doubts(self, features: Array, workloads: Iterable[Workload], blocks: bool = False) -> str:
        if not (self.kinds or features[:, -1].any()):
            return ""
        refused: dict[str, None] = {}
        unknown: dict[str, None] = {}
        strange: dict[str, None] = {}
        # Of a space's blocks, those that cost next to nothing do not count.
        least = 0.5 * float(features[:, self.TIME_MS].mean()) if blocks else 0.0
        for workload, row in zip(workloads, features, strict=True):
            if row[-1]:
                refused |= dict.fromkeys(f.operator.kind for f in check_workload(workload, self.target))
                unknown |= dict.fromkeys(op.kind for op in workload.operators if op.kind not in KINDS)
            if not self.kinds:
                continue
            for kind in {kind_of(op) for op in workload.operators} - self.kinds - {""}:
                spent = float(workload_work(workload, self.target, self.lanes, kind) @ self.costs)
                if spent > STRANGE * max(row[self.TIME_MS], least):
                    strange[kind] = None
        told = (
            (refused, f"{self.target.name} does not run some of these operators ({', '.join(refused)})"),
            (unknown, f"unknown operators, taken as ones that only move data: {', '.join(unknown)}"),
            (strange, f"no calibration network had operators like some of these: {', '.join(strange)}"),
        )
        return "; ".join(words for found, words in told if found)

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        """Linear where all parameters may stay, for networks whose output is smaller than their input."""
        if self.on_chip_bytes is not None:
            return None
        weights = np.zeros(self.leading + 1)
        weights[[self.TIME_MS, self.LINK_BYTES]] = 1.0, self.costs[LINK] / 1e6
        return self._scale * weights, self._scale * self.costs[FIXED] / 1e3

    @property
    def _scale(self) -> float:
        """From ms to the metric's unit; W times ms is mJ."""
        return 1.0 if self.metric == "latency_ms" else self._power or 0.0


def _fit_for(target: Target) -> tuple[str, RooflineFit | None]:
    """The fit of an operating point, or of the nearest with its runtime, and which point it is of."""
    fits, points = target.profile.fits, target.profile.operating_points
    if target.operating_point in fits:
        return target.operating_point, fits[target.operating_point]
    kin = [name for name in fits if points[name].runtime == target.runtime]
    # Precision matters most, then the number of threads; the default operating point decides ties.
    kin.sort(
        key=lambda name: (
            points[name].precision != target.precision,
            points[name].threads != target.threads,
            name != target.profile.default,
        )
    )
    return (kin[0], fits[kin[0]]) if kin else ("", None)
