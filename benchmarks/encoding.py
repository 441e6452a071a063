"""How fast spaces encode whole populations: 100,000 architectures of every space that has a name.

    python -m benchmarks.encoding [--spaces fbnet nasbench201 ...] [--architectures 100000] [--repeats 5]

One thread; of every call the fastest repeat counts. The elastic space is that of ResNet-18. The last line is JSON, one
object per space, in seconds for 100,000 architectures (scaled, where another number was asked for):

canonical   inactive knobs set to zero, of raw rows
features    one-hot rows for accuracy predictors
blocks      catalog indices for cost predictors
sample      drawing them
knobs, positions, catalog   how many of each the space has
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from search_spaces import ElasticSpace, SearchSpace, load_space, presets, reference_network

ELASTIC = "elastic_resnet18"


def make(name: str) -> SearchSpace:
    """The space called `name`."""
    if name != ELASTIC:
        return load_space(name)
    reference = reference_network("resnet18")
    return ElasticSpace(reference.build(), reference.input_shape, name=name)


def fastest(call: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def measure(space: SearchSpace, count: int, repeats: int) -> dict[str, float]:
    """Seconds of every call, for 100,000 architectures."""
    rng = np.random.default_rng(0)
    raw = (rng.random((count, len(space.knobs))) * space.cardinalities).astype(space.dtype)
    archs = space.canonical(raw)
    seconds = {
        "canonical": fastest(lambda: space.canonical(raw), repeats),
        "features": fastest(lambda: space.features(archs), repeats),
        "blocks": fastest(lambda: space.blocks(archs), repeats),
        "sample": fastest(lambda: space.sample(count, rng), repeats),
    }
    scaled = {name: round(value * 100_000 / count, 4) for name, value in seconds.items()}
    return scaled | {"knobs": len(space.knobs), "positions": len(space.block_knobs), "catalog": len(space.catalog)}


def main() -> None:
    known = [*presets(), ELASTIC]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=known, choices=known, metavar="NAME")
    parser.add_argument("--architectures", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for name in args.spaces:
        results[name] = measure(make(name), args.architectures, args.repeats)
        print(f"{name:>24} " + "  ".join(f"{key} {value}" for key, value in results[name].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
