"""The weight gradient of depthwise convolutions in strips, against torch's own.

    python -m benchmarks.depthwise [--repeats 7]

One thread, processor time, interleaved, median over repeats; channels-last, batch 64, shapes of once-for-all's stages
at 64 pixels. The last line is JSON: torch's time over ours, the least and the geometric mean over all shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from search_spaces.depthwise import weight_gradient

SHAPES = ((64, 32), (72, 16), (240, 8), (480, 4), (960, 2))


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    ratios = []
    print(f"{'channels':>8} {'pixels':>6} {'kernel':>6} {'stride':>6} {'torch ms':>9} {'strips ms':>9} {'ratio':>6}")
    for (channels, size), kernel, stride in ((s, k, t) for s in SHAPES for k in (5, 7) for t in (1, 2)):
        x = torch.randn(64, channels, size, size).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, 1, kernel, kernel, requires_grad=True)
        out = F.conv2d(x, weight, None, stride, kernel // 2, 1, channels)
        grad = torch.randn_like(out)
        runs = (
            lambda out=out, weight=weight, grad=grad: torch.autograd.grad(out, weight, grad, retain_graph=True),
            lambda x=x, grad=grad, k=kernel, s=stride: weight_gradient(x, grad, (k, k), (s, s), (k // 2, k // 2)),
        )
        times = [[seconds(run) for run in runs] for _ in range(repeats + 1)][1:]
        own, strips = np.median(times, axis=0)
        ratios.append(own / strips)
        print(
            f"{channels:8} {size:6} {kernel:6} {stride:6} {own * 1e3:9.2f} {strips * 1e3:9.2f} {own / strips:6.1f}",
            flush=True,
        )
    print(json.dumps({"least": round(min(ratios), 2), "mean": round(float(np.exp(np.mean(np.log(ratios)))), 2)}))


if __name__ == "__main__":
    main()
