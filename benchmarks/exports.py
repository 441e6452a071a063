"""What exports keep: five networks in four formats, each run by its own runtime on real images.

    python -m benchmarks.exports [--images 1000] [--output exports.json] [--quick]

A network of the `quickstart` space, MobileNetV2 (width 0.35, 32x32), ResNet-18 (28x28), a tiny vision transformer
(DeiT-Ti, 32x32) on Fashion-MNIST, and a network of the `sensor_1d` space on smartwatch recordings (their validation
windows, as many as there are up to `--images`). Each is trained for one epoch on a part of the training split, so that
its answers are not those of chance, and exported in fp32 as ONNX, LiteRT, ExecuTorch and OpenVINO IR. One thread; the
times are of a machine that may be busy with other work: read them as orders of magnitude.

A row per network and format: largest difference of an output relative to the network's largest, share of images with
the same top-1, milliseconds to load and run once and to run. The last line is JSON:

largest_difference     over all networks and formats
same_top1              the smallest share
exports                the rows
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hardware_profiles.paths import write_text
from nasbench.exporting import SUFFIX, export_network, export_target
from nasbench.tasks.base import Task
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.tasks.smartwatch import SmartwatchExercises
from nasbench.training import evaluate_network, train_network
from search_spaces import UserError, load_space, reference_network

Made = tuple[nn.Module, tuple[int, ...]]


def networks(images: FashionMNIST, signals: Task) -> dict[str, tuple[Task, Callable[[], Made]]]:
    """By name: the task, and what builds the network with its input shape."""

    def of_space(name: str, task: Task) -> Made:
        space = load_space(name, task.input_shape[0], task.num_classes)
        network = space.build(space.sample(1, np.random.default_rng(0))[0])
        return network, getattr(network, "input_shape", space.input_shape)

    def reference(name: str, resolution: int) -> Made:
        found = reference_network(name, resolution=resolution, in_channels=1, num_classes=images.num_classes)
        return found.build(), found.input_shape

    return {
        "quickstart": (images, lambda: of_space("quickstart", images)),
        "mobilenet_v2_0.35": (images, lambda: reference("mobilenet_v2_0.35", 32)),
        "resnet18": (images, lambda: reference("resnet18", 28)),
        "deit_tiny": (images, lambda: reference("deit_tiny", 32)),
        "sensor_1d": (signals, lambda: of_space("sensor_1d", signals)),
    }


class Part(FashionMNIST):
    """Fewer training images."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def split(self, name: Any) -> Any:
        from nasbench.training.evaluation import fixed_subset

        full = super().split(name)
        return fixed_subset(full, self.count, 0) if name == "train" else full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="validation images to compare on")
    parser.add_argument("--training-images", type=int, default=2000)
    parser.add_argument("--networks", nargs="*", help="some of them")
    parser.add_argument("--output", type=Path, help="JSON to write rows to, and to go on from")
    parser.add_argument("--quick", action="store_true", help="two networks, 100 images")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count = 100 if arguments.quick else arguments.images
    chosen = networks(Part(500 if arguments.quick else arguments.training_images), SmartwatchExercises())
    wanted = arguments.networks or (list(chosen)[:2] if arguments.quick else list(chosen))
    rows: list[dict[str, Any]] = []
    if arguments.output is not None and arguments.output.is_file():
        rows = json.loads(arguments.output.read_text())["exports"]
    for name in wanted:
        done = {row["format"] for row in rows if row["network"] == name}
        if done == set(SUFFIX):
            continue
        task, make = chosen[name]
        torch.manual_seed(0)
        network, shape = make()
        adam = name == "deit_tiny"
        options: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3} if adam else {"lr": 0.05}
        train_network(network, task, shape, epochs=1, batch_size=50, **options)
        accuracy = evaluate_network(network, task, "val", shape)
        for format, suffix in SUFFIX.items():
            if format in done:
                continue
            row: dict[str, Any] = {"network": name, "format": format, "network_accuracy": accuracy}
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{name}.{suffix}"
                try:
                    manifest = export_network(
                        network, shape, path, export_target(format), task=task, images=count
                    ).manifest
                except UserError as error:
                    row["error"] = str(error)
                else:
                    (measured,) = manifest["measurements"]
                    check = manifest["check"]
                    row |= {
                        "images": check["images"],
                        "largest_difference": check["largest_relative_difference"],
                        "same_top1": check["same_top1"],
                        "accuracy": check["accuracy"],
                        "load_and_first_run_ms": measured["load_and_first_run_ms"],
                        "run_ms": measured["latency_ms"],
                        "throttled": measured["throttled"],
                        "file_bytes": sum(f["bytes"] for f in manifest["files"].values()),
                    }
            row["export_s"] = time.perf_counter() - began
            rows.append(row)
            print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
            if arguments.output is not None:
                write_text(arguments.output, json.dumps(summary(rows), indent=1) + "\n")
    print(json.dumps(summary(rows)))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The last line."""
    good = [row for row in rows if "error" not in row]
    return {
        "largest_difference": max((row["largest_difference"] for row in good), default=None),
        "same_top1": min((row["same_top1"] for row in good), default=None),
        "failed": len(rows) - len(good),
        "exports": rows,
    }


if __name__ == "__main__":
    main()
