"""Supernet fidelity: does accuracy with shared weights rank architectures as training them alone does?

    python -m benchmarks.fidelity [--run DIR] [--space cnn | vit | PRESET] [--architectures 32] [--budget 60] [...]

Architectures spread evenly over the logarithm of their multiply-accumulates are trained alone, `--seeds` times each,
and judged with the weights of one supernet per training method. All methods have the same `--budget` of processor
seconds: a method's time per image is taken beforehand, and its epochs follow. One thread, fixed seeds, Fashion-MNIST.
Everything finished is kept in `--run`; the same command goes on from there. Prints a table by method:

epochs, seconds     that the budget allowed, and processor seconds that training took
tau, low, high      Kendall's tau-b with the accuracy alone (mean of the seeds), and its 90 % bootstrap interval
spearman            rank correlation
shared, largest     mean accuracy with shared weights, and that of the supernet's largest architecture
regret              accuracy alone of the best architecture less that of the one that the supernet thinks best

Below it, what no method can pass: tau between two trainings alone (`seeds`), and what multiply-accumulates alone tell
(`macs`). The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from hardware_profiles.paths import write_text
from nasbench.searches import spread_sample
from nasbench.tasks.array_task import Dataset
from nasbench.tasks.base import Split
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training import (
    evaluate_network,
    load_weights,
    sandwich_ends,
    subnet_accuracy,
    train_network,
    train_supernet,
)
from predictors.measuring import network_input_shape
from search_spaces import Archs, SearchSpace, Supernet, UserError, load_space

METHODS: dict[str, dict[str, Any]] = {
    "sandwich, kl": {"method": "sandwich", "distillation": "kl"},
    "sandwich, alpha": {"method": "sandwich", "distillation": "alpha"},
    "sandwich, labels": {"method": "sandwich", "distillation": "none"},
    "progressive shrinking, kl": {"method": "progressive_shrinking", "distillation": "kl"},
    "single path": {"method": "single_path"},
}
# How supernets and networks of a family are trained, beside their method and length. By the recipes of the experiments:
# the learning rate of a sandwich is that of the sum of its gradients, whose norm is limited for all.
RECIPES: dict[str, dict[str, Any]] = {
    "cnn": {"optimizer": "sgd", "lr": 0.1, "batch_size": 64, "label_smoothing": 0.0},
    "vit": {"optimizer": "adamw", "lr": 4e-3, "batch_size": 32, "label_smoothing": 0.0, "weight_decay": 0.05},
}


def tiny_cnn() -> SearchSpace:
    """A MobileNetV3 space of networks of 0.1 to 2 M multiply-accumulates at 28x28 pixels."""
    from search_spaces import MobileNetV3Space

    stages = [
        {"width": width, "kernels": [3, 5], "expansions": [2, 3, 4], "depths": [1, 2], "stride": stride}
        for width, stride in ((8, 1), (16, 2), (32, 2))
    ]
    return MobileNetV3Space(
        1, 10, stages=stages, resolutions=[20, 28], widths=[0.5, 0.75, 1.0], stem_width=8, final_width=96,
        feature_width=64, name="tiny_cnn",
    )  # fmt: skip


def tiny_vit() -> SearchSpace:
    """An AutoFormer space of networks with 16 patches of 7x7 pixels."""
    from search_spaces import AutoFormerSpace

    return AutoFormerSpace(
        1, 10, widths=[16, 24, 32, 48], depths=[1, 2, 3, 4], heads=[1, 2, 3], ratios=[1, 2, 3], head_width=8,
        resolution=28, patch=7, max_relative_position=3, dropout=0.0, drop_path=0.0, name="tiny_vit",
    )  # fmt: skip


SPACES: dict[str, Callable[[], SearchSpace]] = {"cnn": tiny_cnn, "vit": tiny_vit}


class FirstImages(FashionMNIST):
    """The first images of each embedded split, which are balanced but for chance."""

    def __init__(self, train: int, val: int) -> None:
        super().__init__(flip=False)
        self.counts = {"train": train, "val": val, "test": 100}

    def load(self) -> Dataset:
        full = super().load()
        return Dataset(
            {n: Split(s.images[: self.counts[n]], s.labels[: self.counts[n]]) for n, s in full.splits.items()},
            full.class_names,
        )


class Results:
    """Finished pieces by name in a JSON file, so that a killed benchmark goes on where it was."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._file = directory / "results.json"
        self._values: dict[str, Any] = json.loads(self._file.read_text()) if self._file.is_file() else {}
        if self._values.setdefault("settings", settings) != settings:
            raise UserError(f"{self._file}: of other settings ({self._values['settings']}); name another --run")

    def once(self, name: str, function: Callable[[], Any]) -> Any:
        """The value of a name: from the file, or computed and kept."""
        if name not in self._values:
            self._values[name] = function()
            write_text(self._file, json.dumps(self._values, indent=1) + "\n")
        return self._values[name]


def train_alone(
    space: SearchSpace, arch: Archs, task: FashionMNIST, recipe: dict[str, Any], epochs: int, seed: int
) -> tuple[float, float]:
    """Validation accuracy of one architecture trained alone, and the processor seconds that it took."""
    start = time.process_time()
    torch.manual_seed(seed)
    network, shape = space.build(arch), network_input_shape(space, arch)
    train_network(network, task, shape, **recipe, epochs=epochs, seed=seed)
    return evaluate_network(network, task, "val", shape), time.process_time() - start


def affordable_epochs(
    space: SearchSpace, task: FashionMNIST, options: dict[str, Any], budget: float, supernet: Supernet
) -> int:
    """How many epochs of a method fit into `budget` processor seconds, by a short trial on a copy."""
    few = FirstImages(min(512, len(task.split("train"))), 10)
    start = time.process_time()
    twin = copy.deepcopy(supernet, {id(space): space})
    sandwich_ends(space)
    fixed = time.process_time() - start
    train_supernet(twin, space, few, **options, epochs=5, validation_images=0)
    spent = time.process_time() - start - 2 * fixed
    per_epoch = spent / (5 * len(few.split("train"))) * len(task.split("train"))
    return max(1, round(budget / per_epoch))


def shared_accuracies(
    space: SearchSpace, archs: Archs, task: FashionMNIST, options: dict[str, Any], budget: float, path: Path
) -> dict[str, Any]:
    """Train a supernet (from its checkpoint in `path`) and judge all architectures with it."""
    torch.manual_seed(0)
    supernet = space.supernet()
    epochs = affordable_epochs(space, task, options, budget, supernet)
    start = time.process_time()
    train_supernet(supernet, space, task, **options, epochs=epochs, validation_images=0, checkpoint=path)
    seconds = time.process_time() - start
    load_weights(supernet, path)
    calibration, validation = task.split("train").images[:500], task.split("val")
    judged = [*archs, sandwich_ends(space)[1]]
    accuracy = [subnet_accuracy(supernet, arch, task, calibration, validation) for arch in judged]
    return {"epochs": epochs, "seconds": seconds, "accuracy": accuracy[:-1], "largest": accuracy[-1]}


def agreement(shared: NDArray[np.float64], alone: NDArray[np.float64]) -> dict[str, float]:
    """Rank agreement of two accuracies `(n,)`, with a bootstrap interval over the architectures."""
    rng = np.random.default_rng(0)
    samples = rng.integers(len(alone), size=(1000, len(alone)))
    taus = [kendalltau(shared[rows], alone[rows]).statistic for rows in samples]
    low, high = np.nanquantile(taus, [0.05, 0.95])
    return {
        "tau": float(kendalltau(shared, alone).statistic),
        "low": float(low),
        "high": float(high),
        "spearman": float(spearmanr(shared, alone).statistic),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="directory for what is finished; runs/fidelity-SPACE by default")
    parser.add_argument("--space", default="cnn", help="cnn, vit, or a preset that takes 28x28 grey images")
    parser.add_argument("--architectures", type=int, default=32)
    parser.add_argument("--images", type=int, default=4000, help="for training")
    parser.add_argument("--validation", type=int, default=2000, help="images")
    parser.add_argument("--epochs", type=int, default=4, help="of training alone")
    parser.add_argument("--seeds", type=int, default=1, help="trainings alone of each architecture")
    parser.add_argument("--budget", type=float, default=60, help="processor seconds of every method")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    space = SPACES[given.space]() if given.space in SPACES else load_space(given.space, 1, 10)
    recipe = RECIPES["vit" if given.space == "vit" else "cnn"]
    task = FirstImages(given.images, given.validation)
    settings = {key: value for key, value in vars(given).items() if key not in ("run", "methods", "seeds")}
    given.run = given.run or Path("runs") / f"fidelity-{Path(given.space).stem}"
    given.run.mkdir(parents=True, exist_ok=True)
    results = Results(given.run, settings | {"recipe": recipe})
    archs = spread_sample(space, given.architectures, 1, {})
    macs = np.array([space.workload(arch).macs for arch in archs], dtype=float)
    print(f"{space.name}: {len(archs)} of {space.size:,} architectures, {macs.min() / 1e6:.2f} to "
          f"{macs.max() / 1e6:.2f} M MACs; {given.images} images, {given.epochs} epochs alone", flush=True)  # fmt: skip

    runs = np.empty((given.seeds, len(archs), 2))
    for seed in range(given.seeds):
        for index, arch in enumerate(archs):
            name = f"alone {seed} {'-'.join(map(str, arch))}"
            train = partial(train_alone, space, arch, task, recipe, given.epochs, seed)
            runs[seed, index] = results.once(name, train)
    each = runs[..., 0]
    alone = each.mean(0)
    print(f"alone: accuracy {alone.min():.3f} to {alone.max():.3f}, {runs[..., 1].mean():.1f} s each")
    print(f"{'':<26} {'epochs':>6} {'seconds':>7} {'tau':>6} {'low':>6} {'high':>6} {'spearman':>8} {'shared':>7} "
          f"{'largest':>7} {'regret':>7}", flush=True)  # fmt: skip
    figures: dict[str, dict[str, float]] = {}
    for method in given.methods:
        path = given.run / f"{method.replace(', ', '-').replace(' ', '_')}.safetensors"
        options = {**recipe, **METHODS[method]}
        found = results.once(method, partial(shared_accuracies, space, archs, task, options, given.budget, path))
        shared = np.array(found["accuracy"])
        row = {"epochs": found["epochs"], "seconds": found["seconds"], **agreement(shared, alone)}
        row |= {"shared": float(shared.mean()), "largest": found["largest"]}
        row["regret"] = float(alone.max() - alone[int(shared.argmax())])
        figures[method] = {key: round(float(value), 4) for key, value in row.items()}
        print(f"{method:<26} {row['epochs']:>6} {row['seconds']:>7.0f} {row['tau']:>6.2f} {row['low']:>6.2f} "
              f"{row['high']:>6.2f} {row['spearman']:>8.2f} {row['shared']:>7.3f} {row['largest']:>7.3f} "
              f"{row['regret']:>7.3f}", flush=True)  # fmt: skip
    limits = {"macs": float(kendalltau(macs, alone).statistic)}
    if given.seeds > 1:
        limits["seeds"] = float(kendalltau(each[0], each[1]).statistic)
    print("tau of " + ", ".join(f"{name}: {value:.2f}" for name, value in limits.items()))
    print(json.dumps({"space": space.name, "n": len(archs), **settings, "methods": figures, "limits": limits}))


if __name__ == "__main__":
    main()
