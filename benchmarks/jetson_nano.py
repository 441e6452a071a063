"""Operator model against the measured latency and energy of 8,780 networks on a Jetson Nano.

    python -m benchmarks.jetson_nano [--data FOLDER] [--draws 3] [--seed 0]

The table (github.com/iCAS-Lab/NAS-Performance-Modeling; in `$NASBENCH_DATA`) holds stacks of 2 to 10 convolutions,
plain, of two alternating kernels, or depthwise separable, and six real networks, in TensorRT with batch 1. Stacks are
rebuilt as workloads from the table's columns; their parameters and multiply-accumulates equal the table's in every row.
A fixed fifth of the stacks is the test; training rows are drawn from the rest at random, and figures are medians over
draws. Energy is GPU energy; rows that are more than 25 % off mean power times latency are left out of it. The real
networks are predicted from all training stacks: unlike those in everything, so an extrapolation.

The last line is JSON: per metric and number of training rows (`latency_100`, `latency_500`, `latency_all`,
`energy_...`) and for the real networks (`latency_real`, `energy_real`):

median_ape         median of |predicted / measured - 1|
within_10_percent  share of rows within 10 %
spearman           rank correlation
coverage_90        share of measurements inside the 90 % interval
n                  rows predicted
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from predictors import OperatorModel
from predictors.quality import estimate_figures
from search_spaces import Tensor, UserError, Workload, WorkloadBuilder, reference_network, reference_networks

FILE = "jetson_nano_cnn_tensorrt.csv.gz"
CLASSES = 10
# The table's real networks that the reference networks have: the same parameters. Its Xception, U-Net and
# EfficientNet-B4 and V2-M are not among them.
REAL = {"MobileNetV2": "mobilenet_v2", "ResNet50": "resnet50"}


def stack(layers: int, filters: int, kernels: Sequence[int], size: int, depthwise: bool) -> Workload:
    """The workload of one stack: convolutions with ReLU, and a linear layer over all that is left.

    Padding is 2, but 1 from the first kernel on that is odd (mixed kernels), 3 (depthwise) or 1 or 3 (plain): so the
    generators of the networks have it.
    """
    net = WorkloadBuilder()
    last = net.input(Tensor((3, size, size)))
    channels, padding = 3, 2
    small = (1, 3, 5, 7) if len(kernels) > 1 else (3,) if depthwise else (1, 3)
    for layer in range(layers):
        kernel = kernels[layer % len(kernels)]
        padding = 1 if kernel in small else padding
        size += 2 * padding - kernel + 1
        if depthwise:
            last = net.add(
                "depthwise_conv2d", [last], (channels, size, size), kernel=(kernel, kernel), stride=(1, 1),
                groups=channels, params=channels * (kernel**2 + 1),
            )  # fmt: skip
            kernel = 1
        last = net.add(
            "conv2d", [last], (filters, size, size), kernel=(kernel, kernel), stride=(1, 1),
            params=filters * (channels * kernel**2 + 1),
        )  # fmt: skip
        last = net.add("relu", [last], (filters, size, size))
        channels = filters
    flat = filters * size**2
    last = net.add("linear", [last], (CLASSES,), inputs=[Tensor((flat,))], params=CLASSES * (flat + 1))
    return net.build([last])


def stack_of(row: Any) -> Workload:
    """The workload of one row of the table.

    Raises:
        UserError: parameters or multiply-accumulates are not the row's.
    """
    kernels = [int(row.k1)] + ([] if np.isnan(row.k2) else [int(row.k2)])
    workload = stack(int(row.layers), int(row.filters), kernels, int(row.input_size), bool(row.depthwise))
    # The table counts the addition of a bias as one multiply-accumulate.
    products = [op for op in workload.operators if op.macs]
    macs = workload.macs + sum(op.output.size for op in products)
    if (workload.params, macs) != (row.params, row.macs):
        raise UserError(f"{row.model}: rebuilt with {workload.params} parameters and {macs} multiply-accumulates")
    return workload


def figures(model: OperatorModel, workloads: Sequence[Workload], measured: np.ndarray) -> dict[str, float]:
    """How well a model predicts."""
    found = estimate_figures(model.predict(workloads), measured)
    return {
        "median_ape": found["median_error"],
        "within_10_percent": found["within_10_percent"],
        "spearman": found.get("spearman", float("nan")),
        "coverage_90": found["interval_90_coverage"],
        "n": len(measured),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Operator model against measured networks on a Jetson Nano.")
    parser.add_argument("--data", type=Path, default=os.environ.get("NASBENCH_DATA"), help="folder of the table")
    parser.add_argument("--draws", type=int, default=3, help="random draws of 100 and of 500 rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.data is None:
        parser.error(f"needs --data or $NASBENCH_DATA, the folder of {FILE}")
    table = pd.read_csv(args.data / FILE)
    real, stacks = table[table.source == "real_data"], table[table.source != "real_data"].reset_index(drop=True)
    workloads = [stack_of(row) for row in stacks.itertuples()]
    print(f"{len(stacks)} stacks, all with the table's parameters and multiply-accumulates")
    held_out = np.random.default_rng(args.seed).random(len(stacks)) < 0.2

    results: dict[str, dict[str, float]] = {}
    for metric, column in {"latency_ms": "latency_ms", "energy_mj": "gpu_energy_mj"}.items():
        reckoned = stacks.avg_gpu_mw * stacks.latency_ms / 1000
        fair = np.abs(stacks[column] / reckoned - 1).to_numpy() <= 0.25 if metric == "energy_mj" else True
        test, pool = np.flatnonzero(held_out & fair), np.flatnonzero(~held_out & fair)
        values, name = stacks[column].to_numpy(), metric.partition("_")[0]
        for rows in (100, 500, len(pool)):
            drawn = []
            for draw in range(args.draws if rows < len(pool) else 1):
                chosen = np.random.default_rng([args.seed, draw]).permutation(pool)[:rows]
                start = time.perf_counter()
                model = OperatorModel.fit([workloads[i] for i in chosen], values[chosen], metric=metric)
                fitted = time.perf_counter() - start
                drawn.append(figures(model, [workloads[i] for i in test], values[test]))
            key = f"{name}_{rows if rows < len(pool) else 'all'}"
            results[key] = {k: float(np.median([d[k] for d in drawn])) for k in drawn[0]}
            shown = ", ".join(f"{k} {v:.4g}" for k, v in results[key].items())
            print(f"{key}: {shown}; fitted to {rows} rows in {fitted:.1f} s", flush=True)
        known = real[real.model.map(REAL).isin(reference_networks())]
        if not len(known):
            continue
        real_workloads = [reference_network(REAL[name]).workload() for name in known.model]
        results[f"{name}_real"] = figures(model, real_workloads, known[column].to_numpy())
        for label, predicted, measured in zip(
            known.model, model.predict(real_workloads).mean, known[column], strict=True
        ):
            print(f"  {label}: predicted {predicted:.4g}, measured {measured:.4g}")
    print(json.dumps({key: {k: round(v, 4) for k, v in row.items()} for key, row in results.items()}))


if __name__ == "__main__":
    main()
