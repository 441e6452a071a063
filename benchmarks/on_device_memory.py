"""Training memory and accuracy after transfer of the ways to learn on a device.

    python -m benchmarks.on_device_memory [--width 0.35] [--quick] [--no-accuracy] [--seed 0]

The network is MobileNetV2 at a width, 96x96 input, batch 8, SGD with momentum. It is pretrained here on five classes of
Fashion-MNIST (T-shirt, pullover, dress, coat, shirt: the embedded images, enlarged) and transferred to the other five
with few images of each. Every method has its learning rate chosen on validation images, from the same list; the test
split is opened once, for the figure that is reported.

A table: per method analytic and measured bytes of saved activations, gradients and optimiser state, the weights beside
them, what plain autograd would keep for the same updates, and accuracies. The last line is JSON:

saving           training memory of full training over that of lite residuals (TinyTL), as measured
accuracy_drop    test accuracy of full training less that of lite residuals, in points
model_error      largest |analytic / measured - 1| of the training memory over the methods
methods          the table
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from nasbench.ondevice.methods import METHODS, Method, method_memory, prepared, with_new_head
from nasbench.ondevice.transfer import adapt, measured_memory
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.tasks.part import of_classes
from nasbench.training.evaluation import evaluate_network
from nasbench.training.network import train_network
from search_spaces import reference_network

SHAPE = (1, 96, 96)
BATCH = 8
BEFORE, AFTER = (0, 2, 3, 4, 6), (1, 5, 7, 8, 9)
RATES = (0.01, 0.03)


def memory(network: torch.nn.Module, method: Method, optimizer: Any = "momentum") -> dict[str, float]:
    """Bytes of one method, analytic and measured."""
    counted, _ = method_memory(network, SHAPE, method, batch=BATCH, optimizer=optimizer)
    plain, _ = method_memory(network, SHAPE, method, batch=BATCH, optimizer=optimizer, saving=False)
    trainable, _ = prepared(network, SHAPE, method)
    measured = measured_memory(trainable, torch.randn(BATCH, *SHAPE), optimizer)
    return {
        "activations": int(counted.activations.sum()),
        "activations_measured": measured.activations,
        "gradients": measured.gradients,
        "optimizer": measured.optimizer,
        "total": counted.total,
        "total_measured": measured.total,
        "weights": measured.weights,
        "plain_autograd": plain.total,
    }


def main() -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.35)
    parser.add_argument("--quick", action="store_true", help="less training: the accuracies mean less")
    parser.add_argument("--no-accuracy", action="store_true", help="memory alone, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    name = "mobilenet_v2" if arguments.width == 1 else f"mobilenet_v2_{arguments.width:g}"
    network = reference_network(name, resolution=SHAPE[-1], in_channels=1, num_classes=len(BEFORE)).build()
    rows: dict[str, dict[str, float]] = {method: dict(memory(network, method)) for method in METHODS}
    if not arguments.no_accuracy:
        task = FashionMNIST()
        images, epochs, few, passes = (1500, 1, 250, 2) if arguments.quick else (6000, 4, 500, 8)
        source = of_classes(task, BEFORE, images=images, seed=arguments.seed)
        start = time.perf_counter()
        train_network(network, source, SHAPE, epochs=epochs, batch_size=32, lr=0.1, seed=arguments.seed)
        took, right = time.perf_counter() - start, evaluate_network(network, source, "val", SHAPE)
        how = f"{images} images of 5 classes for {epochs} epochs in {took:.0f} s"
        print(f"{name}, pretrained on {how}: {right:.1%} of their validation images right", flush=True)
        target = of_classes(task, AFTER, images=few, seed=arguments.seed)
        fresh = with_new_head(network, len(AFTER))
        for method in METHODS:
            best = (-1.0, 0.0, 0.0)
            for lr in RATES:
                adapted, _ = adapt(
                    fresh, target, SHAPE, method=method, epochs=passes, batch_size=BATCH, lr=lr, seed=arguments.seed
                )
                found = evaluate_network(adapted, target, "val", SHAPE)
                if found > best[0]:
                    best = found, lr, evaluate_network(adapted, target, "test", SHAPE)
            rows[method] |= {"accuracy_validation": best[0], "lr": best[1], "accuracy_test": best[2]}
            print(f"{method}: validation {best[0]:.1%} at lr {best[1]:g}, test {best[2]:.1%}", flush=True)
    header = (
        "method",
        "activations",
        "measured",
        "gradients",
        "optimiser",
        "total",
        "measured",
        "weights",
        "autograd's",
    )
    print(("{:<14}" + "{:>13}" * 8).format(*header) + "   (KB)")
    for label, row in rows.items():
        keys = ("activations", "activations_measured", "gradients", "optimizer", "total", "total_measured", "weights",
                "plain_autograd")  # fmt: skip
        print(("{:<14}" + "{:>13,.0f}" * 8).format(label, *(row[k] / 1024 for k in keys)))
    result: dict[str, Any] = {
        "saving": round(rows["full"]["total_measured"] / rows["lite_residual"]["total_measured"], 2),
        "model_error": round(max(abs(r["total"] / r["total_measured"] - 1) for r in rows.values()), 4),
        "methods": rows,
    }
    if not arguments.no_accuracy:
        drop = rows["full"]["accuracy_test"] - rows["lite_residual"]["accuracy_test"]
        result["accuracy_drop"] = round(100 * drop, 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
