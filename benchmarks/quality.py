"""Quality of the whole pipeline: the searched front after the stages against random search and hand-made networks.

    python -m benchmarks.quality [--networks 3] [--output DIR]

Three families, each of as many networks, fine-tuned or trained, exported and quantised the same way:

- `searched`: the quickstart experiment as it is;
- `random`: the same supernet, calibration, accuracy predictor and number of proposals, with random search;
- `hand_made`: width multipliers of the MobileNetV3 stage table with its middle choices, each trained alone for the
  epochs that the supernet and the fine-tuning had together, by the recipe of the fine-tuning.

All fp32 and int8 files are measured in one interleaved session at the end. The hypervolume is of (validation accuracy,
measured latency) against the worst corner of all points. Resumable: run it again with the same --output. Writes
`quality.png`, and ends with one JSON line.
"""

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from hardware_profiles import Artifact, load_target, meter_for
from nasbench.config import Config, find_experiment, load_config
from nasbench.experiment import SUPERNET, run_experiment
from nasbench.pareto import hypervolume
from nasbench.plan import make_plan
from nasbench.progress import Reporter
from nasbench.run import RunView, load_run
from nasbench.stages.artifacts import evaluate_artifact
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.training import train_network
from predictors.measuring import network_input_shape
from search_spaces import load_space, read_onnx

WIDTHS = (0.35, 0.5, 0.65, 0.8, 1.0, 1.25)
COLOURS = {"searched": "#0072B2", "random": "#9A9A9A", "hand_made": "#D55E00"}


def experiment(config: Config, path: Path) -> RunView:
    """Run, resume or just open an experiment."""
    if (path / "report.html").is_file():
        return load_run(path)
    return run_experiment(config, path, resume=(path / "config.toml").is_file(), report=Reporter())


def files_of(view: RunView) -> pd.DataFrame:
    """Network, precision, file and accuracies of the exported and the quantised networks of a run."""
    stages = view.stages()
    rows = stages[stages["stage"].isin(["export", "quantize"])].copy()
    rows["precision"] = np.where(rows["stage"] == "quantize", "int8", "fp32")
    rows["file"] = [str(view.path / f) for f in rows["file"]]
    return rows[["network", "precision", "file", "accuracy", "test_accuracy"]]


def hand_made(config: Config, folder: Path, networks: int, report: Reporter) -> pd.DataFrame:
    """The width-scaled family, trained alone."""
    plan = make_plan(config)
    epochs = plan.training_options["epochs"] + next(s.options["epochs"] for s in plan.config.stages)
    widths = [WIDTHS[i] for i in np.linspace(0, len(WIDTHS) - 1, networks).astype(int)]
    space = load_space("quickstart", plan.task.input_shape[0], plan.task.num_classes, widths=widths)
    rows = []
    for index, width in enumerate(widths):
        done = folder / f"width-{width}.csv"
        if not done.is_file():
            middle = {k.name: k.choices[len(k.choices) // 2] for k in space.knobs}
            arch = space.encode(middle | {"width": width, "resolution": max(plan.space.knobs[0].choices)})
            torch.manual_seed(index)
            network = space.build(arch)
            shape = network_input_shape(space, arch)
            with report.phase(f"train width {width}") as phase:
                recipe = asdict(plan.stages[0][1].recipe) | {"epochs": epochs}  # type: ignore[attr-defined]
                train_network(network, plan.task, shape, **recipe, seed=index, progress=phase.training())
            name = f"width-{width}"
            context = StageContext(plan.task, space, folder, seed=index, input_shape=shape)  # type: ignore[arg-type]
            candidate = Candidate(name, arch, Form.FLOAT, network=network.eval())
            files: list[dict[str, object]] = []
            for precision, (_, stage) in zip(("fp32", "int8"), plan.stages[-2:], strict=True):
                artifact = stage.run(candidate, context).artifact
                assert artifact is not None
                files.append({"network": name, "precision": precision, "file": str(artifact.path)})
                for split, column in (("val", "accuracy"), ("test", "test_accuracy")):
                    files[-1][column] = evaluate_artifact(artifact, plan.task, split)  # type: ignore[arg-type]
            pd.DataFrame(files).to_csv(done, index=False)
        rows.append(pd.read_csv(done))
    return pd.concat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=3, choices=range(2, 7))
    parser.add_argument("--output", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    report, out = Reporter(), arguments.output
    out.mkdir(parents=True, exist_ok=True)

    config = load_config(find_experiment("quickstart"), [f"selection.count={arguments.networks}"])
    searched = experiment(config, out / "searched")
    other = copy.deepcopy(searched.config)
    other.strategy = type(other.strategy)(name="random", evaluations=other.strategy.evaluations)
    other.supernet = other.supernet.model_copy(update={"checkpoint": str(out / "searched" / SUPERNET), "epochs": 0})
    other.targets.calibration = {"host:fp32": str(out / "searched" / "calibration" / "host-fp32.json")}
    families = {"searched": files_of(searched), "random": files_of(experiment(other, out / "random"))}
    (out / "hand_made").mkdir(exist_ok=True)
    families["hand_made"] = hand_made(config, out / "hand_made", arguments.networks, report)

    table = pd.concat([rows.assign(family=name) for name, rows in families.items()], ignore_index=True)
    target = load_target("host:fp32")
    shapes = [load_shape(f) for f in table["file"]]
    artifacts = [
        Artifact(Path(f), "onnx", p, s) for f, p, s in zip(table["file"], table["precision"], shapes, strict=True)
    ]
    table["latency_ms"] = [m.latency_ms for m in meter_for(target).measure(artifacts, target)]
    table["bytes"] = [a.file_bytes for a in artifacts]
    table.drop(columns="file").to_csv(out / "quality.csv", index=False)
    print(table.drop(columns="file").to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    draw(table, out / "quality.png")
    print(json.dumps(figures(table)))


def load_shape(file: str) -> tuple[int, ...]:
    """Input shape per sample of an ONNX file."""
    workload = read_onnx(Path(file))
    return workload.tensors[workload.inputs[0]].shape


def figures(table: pd.DataFrame) -> dict[str, object]:
    """Hypervolume per family and precision, and the ratios of int8 to fp32."""
    result: dict[str, object] = {}
    for precision, rows in table.groupby("precision"):
        corner = np.array([-rows["accuracy"].min(), rows["latency_ms"].max()])
        ideal = np.array([-rows["accuracy"].max(), rows["latency_ms"].min()])
        for family, group in rows.groupby("family"):
            costs = (group[["accuracy", "latency_ms"]].to_numpy() * [-1, 1] - ideal) / (corner - ideal)
            result[f"hypervolume_{family}_{precision}"] = round(hypervolume(costs, np.ones(2)), 4)
    searched = table[table["family"] == "searched"].pivot(index="network", columns="precision")
    result["int8_latency_ratio"] = round(float((searched["latency_ms"].int8 / searched["latency_ms"].fp32).median()), 3)
    result["int8_size_ratio"] = round(float((searched["bytes"].int8 / searched["bytes"].fp32).median()), 3)
    for precision in ("fp32", "int8"):
        result[f"test_accuracy_{precision}"] = [round(float(v), 4) for v in searched["test_accuracy"][precision]]
    return result


def draw(table: pd.DataFrame, path: Path) -> None:
    """Validation accuracy against measured latency, one panel per precision."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (precision, rows) in zip(figure.subplots(1, 2, sharey=True), table.groupby("precision"), strict=True):
        for family, group in rows.groupby("family"):
            group = group.sort_values("latency_ms")
            axes.plot(group["latency_ms"], group["accuracy"], marker="o", ms=5, lw=1, c=COLOURS[str(family)],
                      label=str(family).replace("_", "-"))  # fmt: skip
        axes.set(title=str(precision), xlabel="latency on this machine, measured (ms)")
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("accuracy (validation)")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
