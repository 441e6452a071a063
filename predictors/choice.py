"""Which predictor a metric on a target needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hardware_profiles.profile import Target, load_target
from predictors.base import Predictor
from predictors.counts import COUNTS, Count
from predictors.roofline import Roofline
from search_spaces import UserError, nearest

if TYPE_CHECKING:
    from predictors.calibration import Calibration

METRICS = ("latency_ms", "energy_mj", *COUNTS)


def predictor_for(target: str | Target | None, metric: str, calibration: Calibration | None = None) -> Predictor:
    """The best predictor there is: exact counts; a calibrated model where there is a calibration; else a roofline.

    Args:
        target: `device` or `device:operating-point`; counts need none (peak memory then means fp32).
        metric: `latency_ms`, `energy_mj`, `peak_memory_bytes`, `params` or `macs`.
        calibration: measurements of that target.

    Raises:
        UserError: an unknown metric or target, a calibration of another target, this machine without a calibration, or
            energy of a target whose power nobody states.
    """
    if metric not in METRICS:
        raise UserError(f"no predictor for metric {metric!r}. {nearest(metric, METRICS)}")
    if isinstance(target, str):
        target = load_target(target) if target else None
    if metric in COUNTS:
        return Count(metric, itemsize=target.itemsize if target else 4)
    if target is None:
        raise UserError(f'{metric} needs a target, such as "host" or "raspberry_pi_4"')
    if calibration is not None and metric == "latency_ms":
        if calibration.target != target.name:
            raise UserError(f"the calibration is of {calibration.target}, not of {target.name}")
        return calibration.predictor()
    if target.profile.local and metric == "latency_ms":
        raise UserError(
            f"{target.name}: latency on this machine is predicted from measurements; make them with "
            "`nasbench devices calibrate`, or predictors.calibrate(target, space), and pass the calibration"
        )
    return Roofline(target, metric)
