"""What compression costs and gains, measured: methods, latency-aware against uniform pruning, and the whole pipeline.

    python -m benchmarks.compression [--quick] [--output DIR]

Part 1: a searched network, ResNet-18 and a vision transformer, trained on Fashion-MNIST, each through one method at a
time, with accuracy (test), size, and latency measured with ONNX Runtime, OpenVINO and ExecuTorch. Part 2: uniform
pruning to a share of the multiply-accumulates against pruning by sensitivity to a share of the predicted latency, at
several shares. Part 3: networks of one search, fine-tuned, against the same networks pruned, distilled and quantised,
with as many epochs: latency interpolated at equal test accuracy, and the gain in hypervolume. Every line is a run,
kept in DIR: called again, finished ones are read and others continued. The last line is JSON: `pipeline_speedup` (the
smaller of two runtimes), `int8_accuracy_drop` (points, the mean over networks).

One seed and short trainings: differences of less than about half a point of accuracy are noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hardware_profiles.extras import EXTRAS, require
from nasbench.config import parse_config
from nasbench.experiment import run_experiment
from nasbench.pareto import hypervolume
from nasbench.progress import Reporter
from nasbench.run import RunView, load_run
from search_spaces import UserError

NETWORKS = {"searched": "quickstart:largest", "resnet18": "resnet18@28", "vit": "vit28:largest"}
SHARES = (0.8, 0.6, 0.4)


def targets() -> list[str]:
    """The runtimes of this machine that are installed, ONNX Runtime first."""
    found = ["host:fp32"]
    for extra in ("openvino", "executorch"):
        try:
            require(extra, *EXTRAS[extra])
        except UserError:
            continue
        found.append(f"host:{extra}-fp32")
    return found


def finished(path: Path, config: dict[str, Any]) -> RunView:
    """The run in `path`: read, continued or made."""
    if (path / "config.toml").is_file():
        view = load_run(path)
        if view.state["status"] == "finished":
            return view
        return run_experiment(view.config, path, resume=True, report=Reporter(quiet=True))
    return run_experiment(parse_config(config), path, report=Reporter(quiet=True))


def compressed(path: Path, devices: list[str], networks: dict[str, Any], stages: list[dict[str, Any]]) -> pd.DataFrame:
    """Stage results of networks that went through stages."""
    config = {
        "threads": 1,
        "task": {"name": "fashion_mnist", "flip": False},
        "targets": {"devices": devices},
        "networks": networks,
        "stages": stages,
    }
    return finished(path, config).stages()


def methods(epochs: int) -> dict[str, list[dict[str, Any]]]:
    """Stages by the name of a method; all that change weights train for as many epochs."""
    after = {"epochs": epochs, "lr": 0.01, "images": 256}
    tuned = {"epochs": epochs, "lr": 0.01}
    latency = {"name": "prune", "metric": "latency_ms", "target": "host", "allocation": "sensitivity"}
    int8 = {"name": "quantize"}
    return {
        "finetune": [{"name": "finetune", **tuned}],
        "int8": [int8],
        "channels 50 %": [{"name": "prune", "ratio": 0.5, **after}],
        "latency 60 %": [latency | {"budget": 0.6, "importance": "taylor"} | after],
        "latency 60 %, int8": [latency | {"budget": 0.6, "importance": "taylor"} | after, int8],
        "blocks 1": [{"name": "prune_blocks", "count": 1, **after}],
        "weights 80 %": [{"name": "prune_weights", "sparsity": 0.8, **tuned}],
        "weights 2:4": [{"name": "prune_weights", "pattern": "2:4", **tuned}],
    }


def latency_at(front: pd.DataFrame, accuracy: float, column: str) -> float:
    """Least latency of a front at an accuracy, on straight lines in log latency between its networks; NaN outside."""
    points = front[["test_accuracy", column]].dropna().sort_values(column)
    best = points[points["test_accuracy"] > points["test_accuracy"].cummax().shift(fill_value=-1.0)]
    if len(best) < 2 or not best["test_accuracy"].iloc[0] <= accuracy <= best["test_accuracy"].iloc[-1]:
        return float("nan")
    return float(np.exp(np.interp(accuracy, best["test_accuracy"], np.log(best[column]))))


def compare(alone: pd.DataFrame, pipeline: pd.DataFrame, column: str) -> dict[str, float]:
    """Speed-up at equal test accuracy where both fronts reach (geometric mean), and the gain in hypervolume."""
    low = max(f["test_accuracy"].min() for f in (alone, pipeline))
    high = min(f["test_accuracy"].max() for f in (alone, pipeline))
    ratios = [
        latency_at(alone, a, column) / latency_at(pipeline, a, column) for a in np.linspace(low, high, 21)
    ]  # fmt: skip
    good = np.array([r for r in ratios if np.isfinite(r)])
    both = pd.concat([alone, pipeline])
    corner = np.array([np.log(both[column].max()) + 0.1, -both["test_accuracy"].min() + 0.01])
    volumes = []
    for front in (alone, pipeline):
        points = front[[column, "test_accuracy"]].dropna()
        costs = np.stack([np.log(points[column].to_numpy(float)), -points["test_accuracy"].to_numpy(float)], 1)
        volumes.append(hypervolume(costs, corner))
    return {
        "speedup": float(np.exp(np.log(good).mean())) if len(good) else float("nan"),
        "hypervolume_gain": volumes[1] / volumes[0] - 1 if volumes[0] > 0 else float("nan"),
    }


def show(title: str, rows: pd.DataFrame, devices: list[str]) -> None:
    """One line per network and step."""
    columns = ["network", "stage", "test_accuracy", *(f"latency_ms@{d}" for d in devices), "file_bytes", "macs"]
    print(f"\n{title}\n{rows[[c for c in columns if c in rows]].to_string(index=False)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one epoch, the searched network and one share: no figures"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compression"), help="where runs are kept")
    arguments = parser.parse_args()
    out, devices = arguments.output, targets()
    out.mkdir(parents=True, exist_ok=True)
    names = ["searched"] if arguments.quick else list(NETWORKS)
    base, epochs = (1, 1) if arguments.quick else (6, 2)

    trained: dict[str, Any] = {}
    drops: list[float] = []
    for name in names:
        path = out / f"base-{name}"
        optimizer = {"optimizer": "adamw", "lr": 2e-3} if name == "vit" else {"lr": 0.1}
        train = {"name": "finetune", "epochs": base, **optimizer}
        show(f"{name}: as trained", compressed(path, devices[:1], {name: {"source": NETWORKS[name]}}, [train]), devices)
        weights = path / "stages" / name / "1-finetune.safetensors"
        trained[name] = {"source": NETWORKS[name], "weights": str(weights.resolve())}
        chosen = ["int8", "latency 60 %"] if arguments.quick else list(methods(epochs))
        for index, method in enumerate(methods(epochs)):
            if method in chosen:
                stages = methods(epochs)[method]
                try:
                    rows = compressed(out / f"{name}-{index}", devices, {name: trained[name]}, stages)
                except UserError as error:
                    print(f"{name}, {method}: {error}", flush=True)
                    continue
                show(f"{name}: {method}", rows, devices)
                if method == "int8":
                    drops.append(100 * float(rows["test_accuracy"].iloc[0] - rows["test_accuracy"].iloc[-1]))

    for name in names:
        found = []
        for share in SHARES[1:2] if arguments.quick else SHARES:
            uniform = {"name": "prune", "budget": share, "metric": "macs", "epochs": epochs, "lr": 0.01, "images": 256}
            aware = {**uniform, "metric": "latency_ms", "allocation": "sensitivity", "importance": "taylor"}
            for kind, stage in (("uniform MACs", uniform), ("latency-aware", aware)):
                path = out / f"prune-{name}-{kind.partition(' ')[0]}-{share}"
                try:
                    rows = compressed(path, devices[:1], {name: trained[name]}, [stage])
                except UserError as error:
                    print(f"{name}, {kind} {share}: {error}", flush=True)
                    continue
                found.append(rows.iloc[[-1]].assign(stage=f"{kind} {share:.0%}"))
        if found:
            show(f"{name}: pruned", pd.concat(found), devices)

    result = whole_pipeline(out, devices, trained, arguments.quick)
    speedups = [r["speedup"] for r in result.values()]
    print(
        json.dumps(
            {
                "pipeline_speedup": round(min(speedups), 3) if len(speedups) > 1 else None,
                "int8_accuracy_drop": round(float(np.mean(drops)), 3) if drops else None,
                "per_runtime": {d: {k: round(v, 3) for k, v in r.items()} for d, r in result.items()},
                "quick": arguments.quick,
            }
        )
    )


def whole_pipeline(out: Path, devices: list[str], trained: dict[str, Any], quick: bool) -> dict[str, dict[str, float]]:
    """Networks of one search with as many epochs of fine-tuning as the pipeline has, against the pipeline."""
    from nasbench.config import find_experiment, load_config

    count, total = (3, 1) if quick else (8, 4)
    settings = ["threads=1", f"selection.count={count}", f"targets.devices={json.dumps(devices[:2])}"]
    if quick:
        settings += ["supernet.epochs=1", "evaluator.samples=20", "evaluator.verify=8", "strategy.evaluations=500"]
    config = load_config(find_experiment("quickstart"), settings).model_dump(exclude_none=True)
    config["stages"] = [{"name": "finetune", "epochs": total, "distillation_weight": 0.25}]
    search = finished(out / "search", config)
    rows = search.stages()
    alone = rows[rows["final"]]
    networks = {}
    for name in alone["network"]:
        arch = search.front().set_index("name").loc[name, "arch"]
        weights = out / "search" / "stages" / name / "0-search.safetensors"
        networks[name] = {"source": "quickstart:" + ".".join(str(arch).split()), "weights": str(weights.resolve())}
    teacher = trained.get("resnet18")
    distil = {"name": "distill", "epochs": max(1, total - 2), "lr": 0.02}
    if teacher is not None:
        distil |= {"teacher": teacher["source"], "teacher_weights": teacher["weights"]}
    stages = [
        {"name": "finetune", "epochs": 1},
        {"name": "prune", "budget": 0.7, "allocation": "sensitivity", "importance": "taylor", "epochs": 1, "lr": 0.02,
         "images": 256},
        *([distil] if teacher is not None else []),
        {"name": "quantize", "stop_if_accuracy_falls": 0.02},
    ]  # fmt: skip
    rows = compressed(out / "pipeline", devices[:2], networks, stages)
    show("search alone", alone, devices[:2])
    show("pipeline", rows[rows["step"] > 0], devices[:2])
    # All of its forms compete: where int8 is slower than fp32, the fp32 form is what one would deploy.
    return {d: compare(alone, rows[rows["step"] > 1], f"latency_ms@{d}") for d in devices[:2]}


if __name__ == "__main__":
    main()
