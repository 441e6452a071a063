"""How fast predictors are on whole populations: binding to a space, and 100,000 architectures after it.

    python -m benchmarks.bind [--space ofa_mobilenet_v3] [--target raspberry_pi_4] [--architectures 100000]

One thread. The operator model is fitted to the roofline's latencies of made-up networks: its speed does not depend on
what was measured. The last line is JSON, one object per kind of predictor:

bind_s            seconds of `bind`, for a space whose blocks nobody has asked for yet
predict_100k_s    seconds to predict 100,000 architectures then (scaled, where another number was asked for)
blocks            distinct blocks of the space
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

from hardware_profiles import load_target
from predictors import Count, OperatorModel, Predictor, Roofline, calibration_suite
from search_spaces import load_space


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of predictors on populations.")
    parser.add_argument("--space", default="ofa_mobilenet_v3")
    parser.add_argument("--target", default="raspberry_pi_4")
    parser.add_argument("--architectures", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5, help="predictions, of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    roofline = Roofline(load_target(args.target))
    suite = [network.workload() for network in calibration_suite(96)]
    predictors: dict[str, Predictor] = {
        "operator_model": OperatorModel.fit(suite, roofline.predict(suite).mean),
        "roofline": roofline,
        "macs": Count("macs"),
        "peak_memory_bytes": Count("peak_memory_bytes"),
    }
    archs = load_space(args.space).sample(args.architectures, np.random.default_rng(0))
    results = {}
    for name, predictor in predictors.items():
        space = load_space(args.space)  # a fresh one, as a space keeps the blocks that it has made
        start = time.perf_counter()
        bound = predictor.bind(space)
        bind_s = time.perf_counter() - start
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            bound.predict(archs)
            times.append(time.perf_counter() - start)
        predict_s = min(times) * 100_000 / args.architectures
        print(f"{name}: bind {bind_s:.2f} s, {args.architectures} architectures in {min(times):.3f} s", flush=True)
        results[name] = {"bind_s": bind_s, "predict_100k_s": predict_s, "blocks": len(space.catalog)}
    print(json.dumps({name: {k: round(v, 4) for k, v in row.items()} for name, row in results.items()}))


if __name__ == "__main__":
    main()
