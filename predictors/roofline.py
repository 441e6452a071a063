"""Latency and energy from a datasheet: the roofline model (Williams, Waterman and Patterson, CACM 2009)."""

from __future__ import annotations

from typing import Any

import numpy as np

from hardware_profiles.constraints import check_workload
from hardware_profiles.profile import Target
from predictors.base import AdditivePredictor, Array, Estimate
from search_spaces import Operator, UserError, Workload
from search_spaces.operators import ELEMENTWISE, FOLDED

# Every runtime of interest writes these with their producer; gating (`mul`) waits for a pooled value and cannot be.
FUSED = ELEMENTWISE - FOLDED - {"mul"}

# Standard deviation of ln(measured / predicted) assumed for an uncalibrated roofline: one measurement in three is off
# by more than a factor 1.6, one in twenty by more than 2.7. An assumption; the profiles' references agree with it.
LOG_STD = 0.5

MILLI = 1e3


class Roofline(AdditivePredictor):
    """Predicted latency or energy of one inference (one batch) on a device that nobody has measured.

    Each operator takes the longer of its arithmetic and its memory traffic, at the profile's attained fractions of the
    peaks, plus the launch overhead; normalisation costs nothing and element-wise operators only the traffic of their
    second operand, as both are fused. Around that: a fixed cost, and, for a device behind a link, the transfer of the
    network's input (less its output, which is small in classifiers) and of parameters that do not fit on the chip.
    Energy is latency times the operating point's power.

    The figures are estimates, never measurements: the estimate says so in its warning, and its spread is assumed.

    Args:
        target: device and operating point.
        metric: `latency_ms` or `energy_mj`.

    Raises:
        UserError: energy of an operating point whose power nobody states.
    """

    # Columns of the features.
    TIME_MS, PARAM_BYTES, LINK_BYTES, UNSUPPORTED = range(4)

    def __init__(self, target: Target, metric: str = "latency_ms") -> None:
        if metric not in ("latency_ms", "energy_mj"):
            raise UserError(f"a roofline predicts latency_ms or energy_mj, not {metric!r}")
        if metric == "energy_mj" and target.point.power_w is None:
            raise UserError(f"{target.name}: energy needs power_w at this operating point, and the profile has none")
        self.target = target
        self.metric = metric
        self._times: dict[Operator, float] = {}
        self._lacking: dict[str, None] = {}  # kinds met so far that the device does not run, in order

    def operator_ms(self, op: Operator) -> float:
        """Milliseconds of one operator for the target's batch, launch included."""
        if op.kind in FOLDED:
            return 0.0
        point, roof = self.target.point, self.target.profile.roofline
        bandwidth = point.bandwidth_gbs * 1e9 * roof.bandwidth_efficiency
        size, batch = self.target.itemsize, self.target.batch
        if op.kind in FUSED:
            return MILLI * batch * size * sum(t.size for t in op.inputs[1:]) / bandwidth
        moved = batch * (sum(t.size for t in op.inputs) + op.output.size) + op.params
        efficiency = roof.efficiency.get(op.kind, roof.efficiency["other"])
        if op.kind == "conv2d" and set(op.kernel) == {1}:
            efficiency = roof.efficiency.get("pointwise", efficiency)
        compute = batch * op.macs / (point.peak_gmacs * 1e9 * efficiency)
        return MILLI * max(compute, size * moved / bandwidth) + roof.launch_us / 1e3

    def block_features(self, workload: Workload) -> Array:
        """`(4,)`: operators' ms, parameter bytes, input less output bytes, number of unsupported operators."""
        size, batch = self.target.itemsize, self.target.batch
        total = 0.0
        for op in workload.operators:
            if op not in self._times:
                self._times[op] = self.operator_ms(op)
            total += self._times[op]
        # Input less output telescopes over a chain of blocks to the network's own input less its output.
        crossing = sum(workload.tensors[t].size for t in workload.inputs) - sum(
            workload.tensors[t].size for t in workload.outputs
        )
        findings = check_workload(workload, self.target)
        self._lacking.update((f.operator.kind, None) for f in findings)
        return np.array([total, size * workload.params, size * batch * crossing, len(findings)], dtype=float)

    def head(self, totals: Any) -> Any:
        weights, offset = self._linear
        result = sum(w * totals[:, i] for i, w in enumerate(weights) if w) + offset
        roof = self.target.profile.roofline
        if roof.on_chip_bytes is not None and roof.host_link_gbs is not None:
            beyond = totals[:, self.PARAM_BYTES] - roof.on_chip_bytes
            result = result + self._scale * MILLI / (roof.host_link_gbs * 1e9) * (beyond + abs(beyond)) / 2
        return result

    def around(self, mean: Array) -> Estimate:
        std = mean * np.sqrt(np.expm1(LOG_STD**2))
        what = "latency" if self.metric == "latency_ms" else "energy (latency times stated power)"
        warning = f"{self.target.name}: {what} from datasheet figures, not calibrated by measurements"
        return Estimate(mean, std, lognormal=True, warning=warning)

    def doubts(self, features: Array) -> str:
        if not features[:, self.UNSUPPORTED].any():
            return ""
        return f"{self.target.name} does not run some of these operators ({', '.join(self._lacking)})"

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        return self._linear if self.target.profile.roofline.on_chip_bytes is None else None

    @property
    def _scale(self) -> float:
        """From ms to the metric's unit; W times ms is mJ."""
        return 1.0 if self.metric == "latency_ms" else self.target.point.power_w or 0.0

    @property
    def _linear(self) -> tuple[Array, float]:
        roof = self.target.profile.roofline
        link = MILLI / (roof.host_link_gbs * 1e9) if roof.host_link_gbs else 0.0
        return self._scale * np.array([1.0, 0.0, link, 0.0]), self._scale * roof.fixed_us / 1e3
