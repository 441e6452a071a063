"""Differentiable search: how near LightNAS lands on a latency, and what gradient searches find beside evolution.

    python -m benchmarks.differentiable [--images 1000] [--epochs 6] [--train-images 3000] [--output FILE] [--quick]

**Landing.** LightNAS on the `quickstart` space for six latencies between the tenth and the ninetieth percentile of the
space on a Raspberry Pi 4 (as its profile's roofline predicts; the limit is the target, so that none may land above):
|reached - target| / target of the network that is handed over first, and of the most likely one, before the choice
among its surroundings.

**Comparison**, under one limit on latency, the median of the space: each gradient search with so many passes over so
many images of Fashion-MNIST; regularised evolution, and gradient ascent on an accuracy predictor, with a supernet that
is trained on single paths with as many (Guo et al., ECCV 2020). Both search on validation images only. Of what each
found, the best within the limit by its own word (the first that a gradient search hands over; the best evaluated or
predicted) is trained anew and tested once. Spaces: `quickstart`, with the methods that run single paths, and the cells
of NAS-Bench-201 with 4 channels and one cell a stage; where $NASBENCH_DATA is set, its cells are looked up in the
benchmark's table too, of which the search saw nothing. Times are processor seconds of one thread, training of the
supernet included.

Searches that are in the output file already are not done again. Ends with one JSON line.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hardware_profiles.paths import write_text
from nasbench.evaluators.base import Proposals
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.evaluators.supernet import SupernetEvaluator
from nasbench.objectives import Objective, make_objective
from nasbench.search import search
from nasbench.strategies.darts import DARTS
from nasbench.strategies.gradient import GradientSearch
from nasbench.strategies.gumbel import GDAS, FBNet
from nasbench.strategies.lightnas import LightNAS
from nasbench.strategies.predictor_gradient import PredictorGradient
from nasbench.strategies.proxylessnas import ProxylessNAS
from nasbench.strategies.regularized_evolution import RegularizedEvolution
from nasbench.tasks.base import Split, SplitName, Task
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training import train_network, train_supernet
from nasbench.training.evaluation import evaluate_network, fixed_subset
from predictors import predictor_for
from predictors.accuracy import AccuracyPredictor
from predictors.base import BoundPredictor
from predictors.measuring import network_input_shape
from search_spaces import Archs, NASBench201Space, SearchSpace, load_space
from search_spaces.supernet import Supernet

TARGET = "raspberry_pi_4"
EVALUATIONS = 100  # of evolution; the accuracy predictor learns from half as many
METHODS: dict[str, type[GradientSearch]] = {
    "darts": DARTS, "fbnet": FBNet, "gdas": GDAS, "proxylessnas": ProxylessNAS, "lightnas": LightNAS,
}  # fmt: skip
SINGLE_PATH = ("gdas", "proxylessnas", "lightnas")


class Fewer(Task):
    """Fashion-MNIST with so many of its training images."""

    name = "fashion_mnist_fewer"

    def __init__(self, images: int) -> None:
        self.whole = FashionMNIST(flip=False)
        self.train = fixed_subset(self.whole.split("train"), images, seed=0)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.whole.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.whole.class_names

    def split(self, name: SplitName) -> Split:
        return self.train if name == "train" else self.whole.split(name)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return self.whole.prepare(images)


class Record:
    """Results by key, kept in a file as they come."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings, self.rows = path, settings, {}
        if path is not None and path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] != settings:
                raise SystemExit(f"{path}: was made with {found['settings']}, not {settings}; name another file")
            self.rows = found["rows"]

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.rows:
            self.rows[key] = make()
            if self.path is not None:
                write_text(self.path, json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
        row: dict[str, Any] = self.rows[key]
        print(key, json.dumps({k: v for k, v in row.items() if k != "arch"}), flush=True)
        return row


def run_gradient(
    method: type[GradientSearch],
    space: SearchSpace,
    task: Task,
    objective: Objective,
    cost: BoundPredictor,
    epochs: int,
) -> tuple[GradientSearch, Archs]:
    """A finished search, and what it hands over."""
    torch.manual_seed(0)
    strategy = method(space, 0, epochs=epochs, warmup_epochs=epochs // 3, path_lr=0.1)
    objectives = [make_objective("accuracy"), objective]
    found = strategy.run(space.mixture_supernet(), task, {objective.name: cost}, objectives)
    return strategy, found.archs


def land(space: SearchSpace, task: Task, cost: BoundPredictor, target: float, epochs: int) -> dict[str, Any]:
    """One LightNAS search for one latency."""
    began = time.process_time()
    objective = make_objective("latency_ms", target=TARGET, limit=target)
    strategy, archs = run_gradient(LightNAS, space, task, objective, cost, epochs)
    likeliest = space.canonical(np.array([[p.argmax() for p in strategy.probabilities]]))
    reached, before = cost.predict(np.vstack([archs[:1], likeliest])).mean.tolist()
    return {
        "target_ms": target,
        "reached_ms": reached,
        "gap": abs(reached / target - 1),
        "gap_of_likeliest": abs(before / target - 1),
        "gap_of_expected": abs(strategy.history[-1]["latency_ms"] / target - 1),
        "cpu_s": time.process_time() - began,
    }


def trained_supernet(space: SearchSpace, task: Task, epochs: int) -> tuple[Supernet, float]:
    """A supernet trained on single paths, and its processor seconds."""
    began = time.process_time()
    torch.manual_seed(0)
    supernet = space.supernet()
    train_supernet(supernet, space, task, method="single_path", epochs=epochs, lr=0.1, validation_images=0)
    return supernet, time.process_time() - began


def by_evolution(
    space: SearchSpace, task: Task, supernet: Supernet, objective: Objective, cost: BoundPredictor
) -> Archs:
    """The best within the limit."""
    evaluator = SupernetEvaluator(space, task, supernet, calibration_images=200, validation_images=500)
    predicted = PredictedEvaluator((objective,), {objective.name: cost})
    strategy = RegularizedEvolution(space, 0, population_size=EVALUATIONS // 4, sample_size=6)
    archs, values = [], []
    for _ in range(EVALUATIONS // 20):
        proposals = strategy.ask(20)
        accuracy = evaluator.evaluate(proposals).values[:, 0]
        latency = predicted.evaluate(proposals).values[:, 0]
        assert objective.limit is not None
        over = np.maximum(latency / objective.limit - 1, 0.0)
        strategy.tell(proposals, -accuracy[:, None], over[:, None], np.zeros(20, dtype=np.uint8))
        archs.append(proposals.archs)
        values.append(np.where(over > 0, -np.inf, accuracy))
    everything, score = np.concatenate(archs), np.concatenate(values)
    return everything[[score.argmax()]]


def by_predictors(
    space: SearchSpace, task: Task, supernet: Supernet, objective: Objective, cost: BoundPredictor
) -> Archs:
    """The best within the limit by a predictor that learned from half as many evaluations."""
    evaluator = SupernetEvaluator(space, task, supernet, calibration_images=200, validation_images=500)
    archs = np.unique(space.sample(EVALUATIONS // 2, np.random.default_rng(0)), axis=0)
    accuracy = evaluator.evaluate(Proposals(np.arange(len(archs), dtype=np.int64), archs)).values[:, 0]
    predictors = {"accuracy": AccuracyPredictor(space).fit(archs, accuracy), objective.name: cost}
    objectives = (make_objective("accuracy"), objective)
    strategy = PredictorGradient(space, 0, rounds=2)
    strategy.use_predictors(predictors, objectives)
    archive = search(strategy, PredictedEvaluator(objectives, predictors), objectives, evaluations=2000, batch=500)
    found: Archs = archive.archs[[int(archive.values[:, 0].argmin())]]
    return found


def judged(space: SearchSpace, task: Task, arch: Archs, epochs: int) -> float:
    """Test accuracy of one architecture `(K,)`, trained anew."""
    torch.manual_seed(1)
    network, shape = space.build(arch), network_input_shape(space, arch)
    train_network(network, task, shape, epochs=epochs, lr=0.1, seed=1)
    return float(evaluate_network(network, task, "test", shape))


def benchmark_accuracy() -> pd.Series | None:
    """CIFAR-10 test accuracy by official index; None without the data."""
    folder = os.environ.get("NASBENCH_DATA")
    if not folder:
        return None
    return pd.read_csv(Path(folder) / "nb201_accuracy.csv.gz")["cifar10_test_acc"]


def compare(
    name: str, space: SearchSpace, methods: tuple[str, ...], task: Task, arguments: argparse.Namespace, record: Record
) -> dict[str, dict[str, Any]]:
    """Accuracy, latency and time of each method on one space."""
    cost = predictor_for(TARGET, "latency_ms").bind(space)
    limit = float(np.median(cost.predict(space.sample(2000, np.random.default_rng(0))).mean))
    objective = make_objective("latency_ms", target=TARGET, limit=limit)
    table = benchmark_accuracy() if isinstance(space, NASBench201Space) else None
    shared: dict[str, Any] = {}

    def supernet() -> tuple[Supernet, float]:
        if not shared:
            shared["supernet"] = trained_supernet(space, task, arguments.epochs)
        made: tuple[Supernet, float] = shared["supernet"]
        return made

    def row(method: str) -> dict[str, Any]:
        before = 0.0
        if method in METHODS:
            began = time.process_time()
            archs = run_gradient(METHODS[method], space, task, objective, cost, arguments.epochs)[1]
        else:
            network, before = supernet()
            began = time.process_time()
            if method == "evolution":
                archs = by_evolution(space, task, network, objective, cost)
            elif method == "predictor_gradient":
                archs = by_predictors(space, task, network, objective, cost)
            else:  # what is found without a search
                within = space.sample(500, np.random.default_rng(1))
                archs, before = within[cost.predict(within).mean <= limit][:1], 0.0
        seconds = before + time.process_time() - began
        found = {
            "arch": archs[0].tolist(),
            "test_accuracy": judged(space, Fewer(arguments.train_images), archs[0], arguments.train_epochs),
            "latency_ms": float(cost.predict(archs[:1]).mean[0]),
            "limit_ms": limit,
            "cpu_s": seconds,
        }
        if table is not None and isinstance(space, NASBench201Space):
            found["cifar10_in_table"] = float(table[int(space.official_index(archs[:1])[0])])
        return found

    chosen = ("evolution", "predictor_gradient", *methods, "random")
    return {method: record.once(f"{name}/{method}", lambda m=method: row(m)) for method in chosen}  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="training images of all searches")
    parser.add_argument("--epochs", type=int, default=6, help="passes over them of every search")
    parser.add_argument("--train-images", type=int, default=3000, help="for the networks found")
    parser.add_argument("--train-epochs", type=int, default=3, help="of the networks found")
    parser.add_argument("--output", type=Path, help="file that results are kept in, to go on from")
    parser.add_argument("--quick", action="store_true", help="three targets, and NAS-Bench-201's cells alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {k: v for k, v in vars(arguments).items() if k not in ("output", "quick")}
    record, task = Record(arguments.output, settings), Fewer(arguments.images)

    quickstart = load_space("quickstart", 1, 10)
    cost = predictor_for(TARGET, "latency_ms").bind(quickstart)
    latencies = cost.predict(quickstart.sample(2000, np.random.default_rng(0))).mean
    targets = np.quantile(latencies, [0.1, 0.5, 0.9] if arguments.quick else [0.1, 0.26, 0.42, 0.58, 0.74, 0.9])
    landed = [
        record.once(f"landing/{t:.3f}", lambda t=t: land(quickstart, task, cost, float(t), arguments.epochs))  # type: ignore[misc]
        for t in targets
    ]
    cells = NASBench201Space(1, 10, resolution=28, channels=4, cells=1)
    found = {"nasbench201": compare("nasbench201", cells, tuple(METHODS), task, arguments, record)}
    if not arguments.quick:
        found["quickstart"] = compare("quickstart", quickstart, SINGLE_PATH, task, arguments, record)

    summary: dict[str, Any] = {
        "landing_largest_gap": round(max(r["gap"] for r in landed), 5),
        "landing_mean_gap": round(float(np.mean([r["gap"] for r in landed])), 5),
        "landing_mean_gap_of_likeliest": round(float(np.mean([r["gap_of_likeliest"] for r in landed])), 5),
        "landing_targets": len(landed),
    }
    for space, rows in found.items():
        for method, row in rows.items():
            keys = ("test_accuracy", "latency_ms", "cpu_s", "cifar10_in_table")
            summary[f"{space}/{method}"] = {k: round(row[k], 4) for k in keys if k in row}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
