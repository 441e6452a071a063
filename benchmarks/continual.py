"""Continual learning: what a small deployed network still knows after streams of classes and of people.

    python -m benchmarks.continual [--seeds 5] [--quick] [--output FILE] [--figure PNG]

Two streams, met in an order that follows from the seed. *classes*: Fashion-MNIST, 200 images a class; a network of the
space `tiny_images` is trained on four classes, then meets three times two more. *people*: smartwatch exercises; one of
`sensor_1d` is trained on four people, then meets five others one by one, each with the first 60 % of each recording;
it is judged by the rest. Every method starts from the same trained network, and sees the data of a step only while
that step lasts (`joint`, the upper bound, keeps all). Replay has 64 KB. All have the same learning rate, batches and
passes; the strengths of EWC and LwF were chosen on seeds that are not reported (`--tune`): on validation images of
classes, and on the very parts of people's recordings that those seeds would be judged by.

`--output` keeps finished seeds and goes on from them. The last line is JSON: per stream and method mean and standard
deviation over seeds of accuracy at the end, forgetting, backward and forward transfer, and bytes of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hardware_profiles.paths import write_text
from nasbench.ondevice.continual import ContinualMethod, ContinualResult, Training, accuracy_figure, run_stream
from nasbench.ondevice.continual_methods import EWC, FineTuning, Joint, LatentReplay, LwF, Replay, StreamingLDA
from nasbench.ondevice.streams import Stream, class_stream, person_stream
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.tasks.smartwatch import SmartwatchExercises
from nasbench.training.network import train_network
from search_spaces import load_space

MEMORY = 64 * 1024
EPOCHS = 3
# Chosen by --tune: stream -> (EWC's strength, LwF's weight).
STRENGTHS = {"classes": (10000.0, 10.0), "people": (10.0, 1.0)}
TRIED = {"EWC": (10.0, 100.0, 1000.0, 10000.0), "LwF": (1.0, 3.0, 10.0, 30.0)}
KEYS = ("final_accuracy", "forgetting", "backward_transfer", "forward_transfer", "memory_bytes")


def streams(seed: int, quick: bool) -> Iterator[tuple[str, Stream, nn.Module, tuple[int, ...], str]]:
    """The streams of a seed: name, tasks, network trained on the first, its input shape, layer to replay at."""
    order = np.random.default_rng(seed).permutation(10).tolist()
    clothes = FashionMNIST()
    stream = class_stream(
        clothes, [order[:4], order[4:6], order[6:8], order[8:]], images=60 if quick else 200, seed=seed
    )
    space = load_space("tiny_images", 1, stream.classes)
    arch = space.references["largest"]
    yield "classes", stream, *_trained(space, arch, stream, 3 if quick else 12, seed), "layer2"
    watch = SmartwatchExercises(validation_persons=1, test_persons=1, seed=seed)
    people: list[Any] = [tuple(order[:4]), *order[4 : 6 if quick else 9]]
    numbers = sorted({int(p) for p in watch.recordings.persons})
    named = [tuple(numbers[i] for i in p) if isinstance(p, tuple) else numbers[p] for p in people]
    stream = person_stream(watch, named)
    space = load_space("sensor_1d", watch.input_shape[0], stream.classes)
    arch = space.references["smallest"]
    yield "people", stream, *_trained(space, arch, stream, 3 if quick else 12, seed), "layer2"


def _trained(space: Any, arch: Any, stream: Stream, epochs: int, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(seed)
    network = space.build(arch)
    first, shape = stream.tasks[0], space.input_shape
    train_network(network, first, shape, epochs=epochs, batch_size=32, lr=0.1, label_smoothing=0.0, seed=seed)
    return network, shape


def methods(name: str, layer: str, seed: int) -> list[ContinualMethod]:
    """All methods, with what was chosen for a stream."""
    training = Training(epochs=EPOCHS, batch_size=16, lr=0.02, seed=seed)
    strength, weight = STRENGTHS[name]
    return [
        FineTuning(training),
        EWC(training, strength=strength),
        LwF(training, weight=weight),
        Replay(training, memory_bytes=MEMORY),
        LatentReplay(layer, training, memory_bytes=MEMORY),
        StreamingLDA(training),
        Joint(training),
    ]


def tune(seeds: range, quick: bool) -> None:
    """Print the validation accuracies that the strengths were chosen by."""
    found: dict[tuple[str, str, float], list[float]] = {}
    for seed in seeds:
        training = Training(epochs=EPOCHS, batch_size=16, lr=0.02, seed=seed)
        for name, stream, network, shape, _ in streams(seed, quick):
            for value in TRIED["EWC"]:
                method: ContinualMethod = EWC(training, strength=value)
                result = run_stream(method, network, stream, shape, pretrained=True, judge="val")
                found.setdefault((name, "EWC", value), []).append(result.final_accuracy)
            for value in TRIED["LwF"]:
                method = LwF(training, weight=value)
                result = run_stream(method, network, stream, shape, pretrained=True, judge="val")
                found.setdefault((name, "LwF", value), []).append(result.final_accuracy)
    for (name, method_name, value), accuracies in found.items():
        print(f"{name:<8} {method_name} {value:<8g} {np.mean(accuracies):.1%}")


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, less data")
    parser.add_argument("--tune", action="store_true", help="the choice of strengths, on seeds 100 and 101")
    parser.add_argument("--output", type=Path, help="JSON file of finished seeds, to go on from")
    parser.add_argument("--figure", type=Path, help="heat maps of the last seed's accuracy matrices of classes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.tune:
        tune(range(100, 102), arguments.quick)
        return
    done: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    if arguments.output and arguments.output.exists():
        done = json.loads(arguments.output.read_text())
    for seed in range(1 if arguments.quick else arguments.seeds):
        if str(seed) in done:
            continue
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for name, stream, network, shape, layer in streams(seed, arguments.quick):
            results: list[ContinualResult] = []
            for method in methods(name, layer, seed):
                result = run_stream(method, network, stream, shape, pretrained=True)
                assert not result.stopped, result.stopped
                results.append(result)
                rows.setdefault(name, {})[result.method] = {key: float(getattr(result, key)) for key in KEYS}
                print(f"seed {seed}: {name:<8} {result.method:<14} {result.final_accuracy:6.1%} at the end, forgets "
                      f"{result.forgetting:6.1%}, {result.memory_bytes / 1024:8,.1f} KB", flush=True)  # fmt: skip
            if arguments.figure and name == "classes":
                accuracy_figure(results).savefig(arguments.figure, dpi=120)
        done[str(seed)] = rows
        if arguments.output:
            write_text(arguments.output, json.dumps(done, indent=1))
    summary: dict[str, Any] = {"seeds": len(done)}
    for name in next(iter(done.values())):
        summary[name] = {}
        for method_name in next(iter(done.values()))[name]:
            values = {key: [rows[name][method_name][key] for rows in done.values()] for key in KEYS}
            summary[name][method_name] = {key: round(float(np.mean(v)), 4) for key, v in values.items()} | {
                f"{key}_std": round(float(np.std(v, ddof=1)), 4) if len(v) > 1 else None
                for key, v in values.items()
                if key in ("final_accuracy", "forgetting")
            }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
