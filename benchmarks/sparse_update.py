"""Personalisation within a memory budget: sparse updates against last-layer, bias and full training.

    python -m benchmarks.sparse_update [--splits 3] [--quick] [--seed 0]

A network of the space `sensor_1d` is trained on six people's exercises from a smartwatch. For people whom it never saw,
it learns from the first 40 % of each of their recordings and is tested on the rest. What each layer brings is measured
on the two validation people; from that the updates for every budget are chosen, and learning rates too. The test people
are met once, at the end. Training memory is activations, gradients and momentum, at batch 8, float32; analytic (see
`benchmarks.on_device_memory` for how well it is met), and measured for the budget's own network.

The last line is JSON: per way its mean test accuracy over people and splits, its training memory, and for budgets how
many layers train. `none` is the network without personalisation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nasbench.ondevice.memory import Update
from nasbench.ondevice.methods import Method, method_memory, prepared
from nasbench.ondevice.sparse import choose_updates, contributions
from nasbench.ondevice.transfer import adapt, measured_memory
from nasbench.tasks.smartwatch import SmartwatchExercises
from nasbench.training.evaluation import evaluate_network
from nasbench.training.network import train_network
from search_spaces import load_space

BATCH = 8
BUDGETS = (64, 128, 256, 512)
RATES = (0.003, 0.01, 0.03)
WAYS: tuple[Method, ...] = ("last", "bias", "lite_residual", "full")


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=3, help="choices of who is held out")
    parser.add_argument("--quick", action="store_true", help="one split, less training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits, epochs, passes = (1, 4, 3) if arguments.quick else (arguments.splits, 10, 5)
    found: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    layers: dict[str, list[int]] = {}
    for split in range(arguments.seed, arguments.seed + splits):
        task = SmartwatchExercises(seed=split)
        space = load_space("sensor_1d", task.input_shape[0], task.num_classes)
        torch.manual_seed(split)
        network, shape = space.build(space.references["largest"]), space.input_shape
        train_network(network, task, shape, epochs=epochs, batch_size=64, lr=0.1, seed=split)

        def learn(
            person: int, part: Any, lr: float, method: Method, updates: Mapping[str, Update] | None = None,
            network: nn.Module = network, task: SmartwatchExercises = task, shape: Any = shape, split: int = split,
        ) -> float:  # fmt: skip
            own = task.of_person(person)
            adapted, _ = adapt(
                network, own, shape, method=method, updates=updates, epochs=passes, batch_size=BATCH, lr=lr, seed=split
            )
            return evaluate_network(adapted, own, part, shape)

        def validated(lr: float, method: Method, updates: Mapping[str, Update] | None = None,
                      learn: Any = learn, task: SmartwatchExercises = task) -> float:  # fmt: skip
            return float(np.mean([learn(p, "val", lr, method, updates) for p in task.persons["val"]]))

        gains = contributions(network, shape, lambda updates: validated(RATES[1], "sparse", updates), shares=(0.5, 1.0))
        ways: dict[str, tuple[Method, Mapping[str, Update] | None]] = {way: (way, None) for way in WAYS}
        for budget in BUDGETS:
            ways[f"{budget} KB"] = "sparse", choose_updates(network, shape, gains, budget * 1024, batch=BATCH)
        for p in task.persons["test"]:
            found.setdefault("none", []).append(evaluate_network(network, task.of_person(p), "test", shape))
        for name, (method, updates) in ways.items():
            lr = max(RATES, key=lambda rate: validated(rate, method, updates))
            found.setdefault(name, []).extend(learn(p, "test", lr, method, updates) for p in task.persons["test"])
            counted = method_memory(network, shape, method, updates, batch=BATCH)[0].total
            memory.setdefault(name, []).append(counted / 1024)
            if updates:
                layers.setdefault(name, []).append(sum(u.weights > 0 for u in updates.values()))
                trainable, _ = prepared(network, shape, method, updates)
                taken = measured_memory(trainable, torch.randn(BATCH, *shape)).total
                assert taken <= 1.05 * int(name.split()[0]) * 1024
            print(f"split {split}: {name:<14} lr {lr:<6g} {np.mean(found[name][-len(task.persons['test']):]):.1%}"
                  f" {counted / 1024:9,.0f} KB", flush=True)  # fmt: skip
    result = {
        name: {
            "accuracy": round(float(np.mean(values)), 4),
            "standard_error": round(float(np.std(values, ddof=1) / len(values) ** 0.5), 4) if len(values) > 1 else None,
            **({"memory_kb": round(float(np.mean(memory[name])), 1)} if name in memory else {}),
            **({"layers": float(np.mean(layers[name]))} if name in layers else {}),
        }
        for name, values in found.items()
    }
    for name, row in result.items():
        print(f"{name:<14} {row['accuracy']:.1%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
