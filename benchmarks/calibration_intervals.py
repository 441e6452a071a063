"""Do intervals of calibrations from a handful of networks hold what they claim?

    python -m benchmarks.calibration_intervals [--draws 12]

Published latencies of a device stand for what a user would measure. Some networks are drawn at random and calibrate a
bare profile of it, of which nothing but the datasheet is known; all others are predicted. Keys of the JSON line, per
number of networks drawn, over all devices and draws:

coverage_90    share of the others inside their 90 % intervals
median_error   median absolute error relative to the measurement, median over draws
median_width   upper over lower end of the interval, median over draws
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from hardware_profiles import Target, load_profile
from nasbench.tables import table
from predictors.calibration import MeasuredRow, fit_target
from predictors.roofline_fitting import fitted_points, sample
from search_spaces import Workload
from search_spaces.reference import reference_network

DEVICES = ("jetson_agx_xavier", "pixel_3", "jetson_nano", "oak_rvc2", "pixel_1")
COUNTS = (3, 5, 8, 16)


def bare(target: Target) -> Target:
    """The target as its datasheet describes it."""
    profile = target.profile.model_copy(update={"fits": {}, "references": ()})
    return Target(profile, target.operating_point)


def published(device: str) -> tuple[Target, list[MeasuredRow], list[Workload]]:
    """The bare target, and its published networks as rows with their workloads."""
    target = fitted_points(load_profile(device))[0]
    data = sample(target)
    rows, workloads = [], []
    for name, family, ms in zip(data.names, data.families, data.latency_ms, strict=True):
        base, _, size = name.partition("@")
        height, _, width = size.partition("x")
        resolution = (int(height), int(width)) if width else int(height)
        rows.append(MeasuredRow(network=name, family=family, latency_ms=ms))
        workloads.append(reference_network(base, resolution=resolution).workload())
    return bare(target), rows, workloads


def coverage(
    target: Target, rows: list[MeasuredRow], workloads: list[Workload], count: int, draw: int
) -> tuple[float, float, float]:
    """Coverage, median error and median width of one draw."""
    order = np.random.default_rng([count, draw]).permutation(len(rows))
    drawn, others = order[:count], order[count:]
    calibration = fit_target(target, [rows[i] for i in drawn], [workloads[i] for i in drawn])
    estimate = calibration.predictor(target).predict([workloads[i] for i in others])
    measured = np.array([rows[i].latency_ms for i in others])
    low, high = estimate.quantile(0.05), estimate.quantile(0.95)
    inside = (low <= measured) & (measured <= high)
    return float(inside.mean()), float(np.median(np.abs(estimate.mean / measured - 1))), float(np.median(high / low))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=12, help="per device and number of networks")
    draws = parser.parse_args().draws
    devices = [published(d) for d in DEVICES]
    results = {}
    for count in COUNTS:
        found = np.array([coverage(*device, count, draw) for device in devices for draw in range(draws)])
        results[str(count)] = {
            "coverage_90": round(float(found[:, 0].mean()), 3),
            "median_error": round(float(np.median(found[:, 1])), 3),
            "median_width": round(float(np.median(found[:, 2])), 2),
        }
    keys = list(next(iter(results.values())))
    table(("networks", *keys), [(count, *values.values()) for count, values in results.items()])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
