"""What weight sharing costs: training steps of subnets in the supernet against the same networks extracted.

    python -m benchmarks.supernet_step [--space ofa_mobilenet_v3] [--resolution 64] [--batch 64] [--repeats 5] [--quick]
                                       [--dtype fp32 bf16]

One thread, processor time, interleaved, median over repeats. A step is: gradients cleared, forward, cross-entropy,
backward and one SGD step with momentum and weight decay. In the supernet SGD runs over all parameters that got a
gradient, at their full size; each extracted network has its own SGD. Images come at the space's largest resolution: the
supernet resizes them within its step, an extracted network gets them resized beforehand. The supernet computes the
weight gradients of wide depthwise kernels by `search_spaces.depthwise`, the extracted networks by torch. With `bf16`
forward passes run under autocast. The last line is JSON; with several dtypes, as by default for vision transformers,
all keys but the last end in `_fp32` or `_bf16`:

random_s               processor seconds of a supernet step, mean over the random subnets
dynamic_over_static    total over the smallest, the largest and eight seeded random subnets, supernet / extracted
sandwich_over_static   one sandwich step (largest, smallest, two random; gradients accumulate, one SGD step) over the
                       total of separate steps of the same four networks extracted
sandwich_s             processor seconds of one sandwich step
sandwich_speedup       the same step with torch's depthwise gradients over it
images_per_s           batch / sandwich_s
peak_memory_mb         highest resident set size of this process
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces import SearchSpace, calibrate, depthwise, load_space
from search_spaces.base import Archs
from search_spaces.supernet import resize

CLASSES = 100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Training:
    """A model with its optimiser; `step` runs it for each given forward pass and returns processor seconds."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model = model.train()
        self.dtype = dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3e-5)

    def step(self, inputs: Sequence[tuple[Any, ...]], labels: Tensor) -> float:
        """One optimiser step on the sum of the losses of `model(*x)` for every x in `inputs`."""
        start = time.process_time()
        self.optimizer.zero_grad()
        for x in inputs:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(*x)
            F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()
        return time.process_time() - start


def measure(
    space: SearchSpace, archs: dict[str, Archs], images: Tensor, labels: Tensor, repeats: int, dtype: torch.dtype
) -> dict[str, float]:
    """The figures; the first four of `archs` (largest, smallest, two random) make the sandwich."""
    supernet = space.supernet()
    static, resized = {}, {}
    for name, arch in archs.items():
        static[name] = Training(supernet.extract(arch, calibrate(supernet, arch, images[:8])), dtype)
        size = space.decode(arch).get("resolution", space.input_shape[1])
        resized[name] = resize(images, int(size)).contiguous(memory_format=torch.channels_last)
    dynamic = Training(supernet, dtype)
    sandwich = list(archs)[:4]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in archs}
    sandwich_seconds: list[tuple[float, float]] = []
    for repeat in range(repeats + 1):
        for name, arch in archs.items():
            pair = dynamic.step([(images, arch)], labels), static[name].step([(resized[name],)], labels)
            if repeat:  # the first pass warms up
                seconds[name].append(pair)
        inputs = [(images, archs[name]) for name in sandwich]
        ours = dynamic.step(inputs, labels)
        with patch.object(depthwise, "WIDEST", sys.maxsize):
            plain = dynamic.step(inputs, labels)
        if repeat:
            sandwich_seconds.append((ours, plain))
    medians = {name: np.median(pairs, axis=0) for name, pairs in seconds.items()}
    print(f"{'subnet':>10} {'supernet ms':>12} {'extracted ms':>13} {'ratio':>7}")
    for name, (shared, alone) in medians.items():
        print(f"{name:>10} {shared * 1e3:12.1f} {alone * 1e3:13.1f} {shared / alone:7.3f}")
    total = np.sum(list(medians.values()), axis=0)
    sandwich_s, plain_s = (float(x) for x in np.median(sandwich_seconds, axis=0))
    return {
        "random_s": round(float(np.mean([medians[name][0] for name in archs if name.startswith("random")])), 4),
        "dynamic_over_static": round(float(total[0] / total[1]), 4),
        "sandwich_over_static": round(sandwich_s / float(sum(medians[name][1] for name in sandwich)), 4),
        "sandwich_s": round(sandwich_s, 4),
        "sandwich_speedup": round(plain_s / sandwich_s, 3),
        "images_per_s": round(len(images) / sandwich_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="ofa_mobilenet_v3", help="preset or TOML file")
    parser.add_argument("--resolution", type=int, help="instead of the space's resolutions; 64 for the published space")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="two random subnets, two repeats: seconds, and rough figures"
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), help="fp32 unless given; both for transformers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    resolution = options.resolution or (64 if options.space == "ofa_mobilenet_v3" else None)
    transformer = options.space.startswith(("autoformer", "vit"))
    sized: dict[str, Any] = {"resolution": resolution} if transformer else {"resolutions": [resolution]}
    space = load_space(options.space, 3, CLASSES, **(sized if resolution else {}))
    drawn = space.sample(2 if options.quick else 8, np.random.default_rng(options.seed))
    ends = space.references
    archs = {"largest": ends["largest"], "smallest": ends["smallest"]}
    archs |= {f"random {index}": arch for index, arch in enumerate(drawn)}
    images = torch.randn(options.batch, *space.input_shape).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (options.batch,))
    print(f"{options.space} at {space.input_shape[1]} pixels, batch {options.batch}, {CLASSES} classes, one thread")
    dtypes = options.dtype or (list(DTYPES) if transformer else ["fp32"])
    figures: dict[str, float] = {}
    for dtype in dtypes:
        found = measure(space, archs, images, labels, 2 if options.quick else options.repeats, DTYPES[dtype])
        figures |= {f"{key}_{dtype}" if len(dtypes) > 1 else key: value for key, value in found.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({**figures, "peak_memory_mb": round(peak / 1e6, 1)}))


if __name__ == "__main__":
    main()
