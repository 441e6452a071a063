"""Predicted against measured latency on this machine, for networks that the calibration never saw.

    python -m benchmarks.host_latency [--networks 100] [--calibration 32] [--seed 0]

For the `quickstart` and the `mobile96` space: a fresh calibration, then seeded random architectures, converted and
measured twice by independent runs of the meter. fp32, one thread, batch 1. The last line is JSON, one object per space:

within_10_percent         share of networks predicted within 10 % of the first measurement
repeat_within_10_percent  share of networks whose second measurement is within 10 % of the first: what noise allows
within_10_relative        ratio of the two
spearman                  rank correlation of prediction and first measurement
measuring_s               seconds that the calibration took, conversion included
n                         networks compared
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from hardware_profiles import OnnxConverter, OnnxRuntimeMeter, load_target
from predictors.calibration import calibrate, network_input_shape
from search_spaces import load_space

# The spaces with the task that each is meant for: input channels and classes.
SPACES = {"quickstart": (1, 10), "mobile96": (3, 100)}


def evaluate(name: str, networks: int, calibration_networks: int, seed: int) -> dict[str, float]:
    """The figures of one space."""
    space = load_space(name, *SPACES[name])
    target = load_target("host")
    with tempfile.TemporaryDirectory(prefix="nasbench-host-latency-") as directory:
        calibration = calibrate(target, space, calibration_networks, seed=seed, cache=Path(directory) / "calibrations")
        known = {tuple(space.encode(n.architecture)) for n in calibration.networks}
        drawn = space.sample(networks + 2 * len(known), np.random.default_rng([seed, 1]))
        archs = np.array([arch for arch in np.unique(drawn, axis=0) if tuple(arch) not in known])
        archs = np.random.default_rng([seed, 2]).permutation(archs)[:networks]
        artifacts = [
            OnnxConverter().convert(
                space.build(arch), target, network_input_shape(space, arch), Path(directory) / f"{i}.onnx"
            )
            for i, arch in enumerate(archs)
        ]
        first, second = (
            np.array([m.latency_ms for m in OnnxRuntimeMeter(seed=seed + run).measure(artifacts, target)])
            for run in range(2)
        )
    estimate = calibration.predictor().bind(space).predict(archs)
    within = float(np.mean(np.abs(estimate.mean / first - 1) <= 0.1))
    repeat = float(np.mean(np.abs(second / first - 1) <= 0.1))
    inside = (first >= estimate.quantile(0.05)) & (first <= estimate.quantile(0.95))
    print(
        f"{name}: {len(archs)} networks of {first.min():.3f}-{first.max():.3f} ms (median {np.median(first):.3f}), "
        f"median error {np.median(np.abs(estimate.mean / first - 1)):.1%}, "
        f"median difference of the two measurements {np.median(np.abs(second / first - 1)):.1%}, "
        f"90 % interval holds {inside.mean():.0%}"
    )
    return {
        "within_10_percent": within,
        "repeat_within_10_percent": repeat,
        "within_10_relative": within / repeat,
        "spearman": float(spearmanr(estimate.mean, first).statistic),
        "measuring_s": round(sum(calibration.seconds.values()), 1),
        "n": len(archs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Predicted against measured latency of unseen networks on this machine."
    )
    parser.add_argument("--networks", type=int, default=100, help="random architectures per space")
    parser.add_argument("--calibration", type=int, default=32, help="networks measured for the calibration")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: evaluate(name, args.networks, args.calibration, args.seed) for name in SPACES}
    keys = list(next(iter(results.values())))
    print("space".ljust(12) + "".join(k.rjust(26) for k in keys))
    for name, row in results.items():
        print(name.ljust(12) + "".join(f"{row[k]:.3f}".rjust(26) for k in keys))
    print(json.dumps({name: {k: round(v, 4) for k, v in row.items()} for name, row in results.items()}))


if __name__ == "__main__":
    main()
