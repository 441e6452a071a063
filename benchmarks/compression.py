"""What compression costs and gains, measured: methods, latency-aware against uniform pruning, and the whole pipeline.

    python -m benchmarks.compression [--quick] [--output DIR] [--parts 3,4,1,2]

Part 1: a searched network, ResNet-18 and a vision transformer, each through one method at a time, with accuracy (test),
size, and latency measured with ONNX Runtime, OpenVINO and ExecuTorch. Part 2: uniform pruning to a share of the
multiply-accumulates against pruning by sensitivity to a share of the predicted latency, at several shares. Both train
on the 12,000 images of Fashion-MNIST that come with the package, and the parts below on all 55,000 (`$NASBENCH_DATA`,
or downloaded), unless `--quick`.

Part 3: networks of one search, fine-tuned, against the same networks distilled and quantised, with pruning and without,
trained for as many epochs: latency interpolated at equal test accuracy, and hypervolumes. Part 4: that against a search
of architecture, widths and bits together, from the same supernet. Both are of the space `resnet28`: plain convolutions
of 16 channels or a multiple, which int8 makes faster.

Every line is a run, kept in DIR: called again, finished ones are read and others continued. The last line is JSON:
`pipeline_speedup` (the smaller of two runtimes), `int8_accuracy_drop` (points, the mean over networks),
`joint_hypervolume_ratio` (to the pipeline's, the smaller of two runtimes), `latency_aware_speedup` (over uniform
pruning at equal accuracy, per network). One seed and short trainings: differences of less than about half a point of
accuracy are noise.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.compression_fronts import compare, front, measured
from hardware_profiles.extras import EXTRAS, require
from nasbench.config import find_experiment, load_config, parse_config
from nasbench.experiment import run_experiment
from nasbench.progress import Reporter
from nasbench.run import RunView, load_run
from search_spaces import UserError

NETWORKS = {"searched": "quickstart:largest", "resnet18": "resnet18@28", "vit": "vit28:largest"}
SHARES = (0.8, 0.6, 0.4)
EMBEDDED = {"name": "fashion_mnist", "flip": False}  # 16,000 images that come with the package
EPOCHS = 3  # of a network of the search, and of the pipeline in all
JOINT = Path(__file__).parents[1] / "experiments" / "joint.toml"


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


def all_images() -> dict[str, Any]:
    """Fashion-MNIST whole. On few images networks of 2 and of 20 M multiply-accumulates are equally good."""
    folder = os.environ.get("NASBENCH_DATA")
    return EMBEDDED | ({"path": str(Path(folder) / "fashion-mnist")} if folder else {"download": True})


def finished(path: Path, config: dict[str, Any]) -> RunView:
    """The run in `path`: read, continued or made."""
    if (path / "config.toml").is_file():
        view = load_run(path)
        if view.state["status"] == "finished":
            return view
        return run_experiment(view.config, path, resume=True, report=Reporter(quiet=True))
    return run_experiment(parse_config(config), path, report=Reporter(quiet=True))


def rows_of(view: RunView) -> pd.DataFrame:
    """Stage results of a run, with the paths of the files."""
    rows = view.stages()
    return rows.assign(file=[str(view.path / str(file)) for file in rows["file"]])


def compressed(
    path: Path, devices: list[str], networks: dict[str, Any], stages: list[dict[str, Any]], task: dict[str, Any]
) -> pd.DataFrame:
    """Stage results of networks that went through stages."""
    config = {
        "threads": 1,
        "task": task,
        "targets": {"devices": devices},
        "networks": networks,
        "stages": stages,
    }
    return rows_of(finished(path, config))


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


def show(title: str, rows: pd.DataFrame, devices: list[str]) -> None:
    """One line per network and step."""
    columns = ["network", "stage", "test_accuracy", *(f"latency_ms@{d}" for d in devices), "file_bytes", "macs"]
    print(f"\n{title}\n{rows[[c for c in columns if c in rows]].to_string(index=False)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer networks, epochs and methods, for the same figures")
    parser.add_argument("--output", type=Path, default=Path("runs/compression"), help="where runs are kept")
    parser.add_argument("--parts", default="3,4,1,2", help="which, in that order (%(default)s)")
    arguments = parser.parse_args()
    out, devices, quick = arguments.output, targets(), arguments.quick
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"pipeline_speedup": None, "int8_accuracy_drop": None}
    for part in arguments.parts.split(","):
        start = time.process_time()
        result |= PARTS[part](out, devices, quick)
        print(f"part {part}: {time.process_time() - start:.0f} s of processor time in this process", flush=True)
    print(json.dumps(result | {"quick": quick}))


def each_method(out: Path, devices: list[str], quick: bool) -> dict[str, Any]:
    """Part 1."""
    drops: list[float] = []
    for name, network in trained(out, devices, quick).items():
        for index, (method, stages) in enumerate(methods(1 if quick else 2).items()):
            if quick and method not in ("int8", "latency 60 %"):
                continue
            try:
                rows = compressed(out / f"{name}-{index}", devices, {name: network}, stages, EMBEDDED)
            except UserError as error:
                print(f"{name}, {method}: {error}", flush=True)
                continue
            show(f"{name}: {method}", rows, devices)
            if method == "int8":
                drops.append(100 * float(rows["test_accuracy"].iloc[0] - rows["test_accuracy"].iloc[-1]))
    return {"int8_accuracy_drop": round(float(np.mean(drops)), 3) if drops else None}


def trained(out: Path, devices: list[str], quick: bool) -> dict[str, dict[str, str]]:
    """The networks of parts 1 and 2, trained, for `[networks.NAME]`."""
    networks = {}
    for name in list(NETWORKS)[:1] if quick else NETWORKS:
        path = out / f"base-{name}"
        optimizer = {"optimizer": "adamw", "lr": 2e-3} if name == "vit" else {"lr": 0.1}
        stages = [{"name": "finetune", "epochs": 2 if quick else 6, **optimizer}]
        rows = compressed(path, devices[:1], {name: {"source": NETWORKS[name]}}, stages, EMBEDDED)
        show(f"{name}: as trained", rows, devices)
        weights = path / "stages" / name / "1-finetune.safetensors"
        networks[name] = {"source": NETWORKS[name], "weights": str(weights.resolve())}
    return networks


def latency_aware(out: Path, devices: list[str], quick: bool) -> dict[str, Any]:
    """Part 2."""
    speedups: dict[str, float | None] = {}
    for name, network in trained(out, devices, quick).items():
        kinds = {}
        uniform = {"name": "prune", "metric": "macs", "epochs": 1 if quick else 2, "lr": 0.01, "images": 256}
        aware = uniform | {"metric": "latency_ms", "allocation": "sensitivity", "importance": "taylor"}
        for kind, stage in (("uniform", uniform), ("latency", aware)):
            found: list[pd.DataFrame] = []
            for share in SHARES[1:] if quick else SHARES:
                path = out / f"prune-{name}-{kind}-{share}"
                try:
                    rows = compressed(path, devices[:1], {name: network}, [stage | {"budget": share}], EMBEDDED)
                except UserError as error:
                    print(f"{name}, {kind} {share}: {error}", flush=True)
                    continue
                if not found:
                    found.append(rows.iloc[[0]])  # the network as it was is on either front
                found.append(rows.iloc[[-1]].assign(stage=f"{kind} {share:.0%}"))
            if found:
                kinds[kind] = pd.concat(found)
        if len(kinds) < 2:
            continue
        column, shape = f"latency_ms@{devices[0]}", (1, 28, 28)
        both = pd.concat(kinds, names=["kind"])
        both = both.assign(**{column: measured(both["file"], shape, devices[0])})
        show(f"{name}: pruned", both, devices)
        speedup = compare({kind: front(of_run(both, kind), column) for kind in kinds}, column)["speedup"]
        speedups[name] = round(speedup, 3) if np.isfinite(speedup) else None
    return {"latency_aware_speedup": speedups}


def sized(config: dict[str, Any], quick: bool) -> None:
    """Give a search its images, and the effort that both searches take."""
    config["task"] = EMBEDDED if quick else all_images()
    config["selection"] |= {"count": 3 if quick else 6}
    if quick:
        config["evaluator"] |= {"samples": 40, "verify": 8}
        config["strategy"] |= {"evaluations": 5000}


def searched(out: Path, quick: bool) -> RunView:
    """A search among plain convolutional networks, its choice fine-tuned for as long as the pipeline trains."""
    config = load_config(find_experiment("quickstart"), ["threads=1"]).model_dump(exclude_none=True)
    sized(config, quick)
    config["space"] = {"name": "resnet28"}
    config["targets"]["devices"] = ["host:fp32"]
    config["supernet"] |= {"epochs": 2}
    if quick:
        config["targets"] |= {"calibration_networks": 16}
    config["stages"] = [{"name": "finetune", "epochs": EPOCHS, "distillation_weight": 0.25}]
    return finished(out / "search", config)


def starting_points(search: RunView) -> dict[str, dict[str, str]]:
    """The networks of a search as it left them, for `[networks.NAME]`."""
    archs = search.front().set_index("name")["arch"]
    return {
        name: {
            "source": "resnet28:" + ".".join(str(archs[name]).split()),
            "weights": str((search.path / "stages" / name / "0-search.safetensors").resolve()),
        }
        for name in search.stages()["network"].unique()
    }


def compressed_front(out: Path, devices: list[str], quick: bool) -> pd.DataFrame:
    """The networks of the search after each stage of the pipeline, which trains for as long as they were fine-tuned.

    Each goes two ways, since pruning is worth more to some than to others: with and without.
    """
    search = searched(out, quick)
    alone = search.stages()
    alone = alone[alone["step"] == 1]
    best = str(alone["network"].iloc[int(alone["accuracy"].argmax())])
    networks = starting_points(search)
    teacher = search.path / "stages" / best / "1-finetune.safetensors"
    distill = {"name": "distill", "teacher": networks[best]["source"], "teacher_weights": str(teacher.resolve()),
               "lr": 0.1}  # fmt: skip
    prune = {"name": "prune", "budget": 0.85, "allocation": "sensitivity", "importance": "taylor", "epochs": 1,
             "images": 256}  # fmt: skip
    quantize = {"name": "quantize", "stop_if_accuracy_falls": 0.02}
    ways: dict[str, list[dict[str, Any]]] = {
        "distilled": [distill | {"epochs": EPOCHS}, quantize],
        "pruned": [distill | {"epochs": EPOCHS - 1}, prune, quantize],
    }
    found = []
    for way, stages in ways.items():
        rows = compressed(out / way, devices[:1], networks, stages, search.config.task.model_dump())
        found.append(rows[rows["step"] > 0])
    return pd.concat(found)


def whole_pipeline(out: Path, devices: list[str], quick: bool) -> dict[str, Any]:
    """Part 3: networks of one search, fine-tuned, against the same pruned, distilled and quantised, trained as long.

    All forms after the first compete: where int8 is slower than fp32, the fp32 form is what one would deploy. What
    competes is chosen on validation images.
    """
    alone = rows_of(searched(out, quick))
    kinds = {"search": alone[alone["step"] == 1], "pipeline": compressed_front(out, devices, quick)}
    found = fronts(pd.concat(kinds, names=["run"]), devices[:2])
    speedups = [r["speedup"] for r in found.values()]
    return {
        "pipeline_speedup": round(min(speedups), 3) if len(speedups) > 1 else None,
        "per_runtime": {d: {k: round(v, 4) for k, v in r.items()} for d, r in found.items()},
    }


def joint(out: Path, devices: list[str], quick: bool) -> dict[str, Any]:
    """Part 4: from the same supernet, architecture, widths and bits searched together, against one after another."""
    searched(out, quick)  # the supernet
    sequential = compressed_front(out, devices, quick)
    config = load_config(JOINT, ["threads=1"]).model_dump(exclude_none=True)
    sized(config, quick)
    config["supernet"] |= {"checkpoint": str((out / "search" / "supernet.safetensors").resolve()), "epochs": 0}
    config["stages"] = [
        {"name": "finetune", "epochs": EPOCHS, "distillation_weight": 0.25},
        {"name": "quantize", "stop_if_accuracy_falls": 0.02},
    ]
    rows = rows_of(finished(out / "joint", config))
    both = pd.concat({"pipeline": sequential, "joint": rows[rows["step"] > 0]}, names=["run"])
    found = fronts(both, devices[:2])
    return {
        "joint_hypervolume_ratio": round(min(r["hypervolume_ratio"] for r in found.values()), 4),
        "joint_per_runtime": {d: {k: round(v, 4) for k, v in r.items()} for d, r in found.items()},
    }


def of_run(rows: pd.DataFrame, run: str) -> pd.DataFrame:
    """The rows of one run, the first index."""
    return rows[rows.index.get_level_values(0) == run]


def fronts(both: pd.DataFrame, devices: list[str]) -> dict[str, dict[str, float]]:
    """Stage results of two runs, the first index, compared on each device after measuring all their files together."""
    names = [str(run) for run in both.index.get_level_values("run").unique()]
    found = {}
    for device in devices:
        column = f"latency_ms@{device}"
        both[column] = measured(both["file"], (1, 28, 28), device)
        found[device] = compare({run: front(of_run(both, run), column) for run in names}, column)
    for run in names:
        show(run, of_run(both, run), devices)
    return found


PARTS = {"1": each_method, "2": latency_aware, "3": whole_pipeline, "4": joint}


if __name__ == "__main__":
    main()
