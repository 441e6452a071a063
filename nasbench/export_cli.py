"""The command `nasbench export`: networks of a run, or one by name, as files of a real runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasbench.tables import table
from search_spaces.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from nasbench.plan import Plan
    from nasbench.run import RunView
    from nasbench.tasks.base import Task


@dataclass(frozen=True)
class Exportable:
    """A network with what its manifest says of it beside the task's own words."""

    name: str
    network: nn.Module
    input_shape: tuple[int, ...]
    extra: dict[str, Any]


def export(
    source: Annotated[str, typer.Argument(help="A run directory; or a network: resnet18@64, SPACE:ARCHITECTURE.")],
    format: Annotated[
        str | None, typer.Option("--format", help="onnx, litert, executorch or openvino; the target's by default.")
    ] = None,
    target: Annotated[str, typer.Option(help="device or device:operating-point the file is for.")] = "",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8; the target's by default.")] = "",
    name: Annotated[list[str] | None, typer.Option(help="Networks of the run; all it chose by default.")] = None,
    output: Annotated[Path, typer.Option(help="Where files and manifests go.")] = Path("exported"),
    task: Annotated[str, typer.Option(help="For a network by name: the task whose images it is compared on.")] = "",
    weights: Annotated[Path | None, typer.Option(help="For a network by name: a checkpoint of this project.")] = None,
    images: Annotated[int, typer.Option(help="Validation images to compare on; 0 for all.")] = 1000,
    calibration_images: Annotated[int, typer.Option(help="Training images that int8 ranges are taken from.")] = 256,
    fallback: Annotated[str, typer.Option(help="allow: keep operators that a device leaves to its host.")] = "refuse",
    measure: Annotated[bool, typer.Option(help="Time the file where its runtime is here.")] = True,
) -> None:
    """Write checked files of a real runtime: ONNX, LiteRT (.tflite), ExecuTorch (.pte) or OpenVINO IR (.xml, .bin)."""
    from hardware_profiles import converter_for
    from nasbench.exporting import export_network, export_target

    chosen = export_target(format, target, precision)
    suffix = converter_for(chosen).format
    if images < 0:
        raise UserError(f"--images {images}: expected 0 (all) or more")
    from_run = (Path(source) / "run.json").is_file()
    if from_run and (task or weights):
        raise UserError("--task and --weights are for a network by name; a run knows its own")
    if not from_run and name:
        raise UserError(f"--name {name[0]}: names networks of a run, and {source} is none")
    data, networks = of_run(Path(source), name or []) if from_run else by_name(source, task, weights)
    rows = []
    for one in networks:
        label = target.replace(":", "-") or chosen.runtime
        path = output / f"{one.name}-{label}-{chosen.precision}.{suffix}"
        done = export_network(
            one.network,
            one.input_shape,
            path,
            chosen,
            task=data,
            images=images,
            calibration=calibration_images,
            fallback=fallback,
            measure=measure,
            extra=one.extra,
        )
        check, times = done.manifest["check"], done.manifest.get("measurements", [])
        rows.append(
            (
                str(path),
                check["largest_relative_difference"],
                check["same_top1"],
                check.get("accuracy", ""),
                "; ".join(_told(m) for m in times),
            )
        )
        for line in done.manifest["on_host_cpu"]:
            print(f"{one.name}: {line}")
    table(("file", "largest difference", "same top-1", "accuracy", "measured"), rows)


def _told(row: dict[str, Any]) -> str:
    """One measurement in a line."""
    if row.get("error"):
        return f"{row['target']}: {row['error']}"
    more = [f"{row['cycles']} cycles"] if "cycles" in row else []
    if "cycles" in row and "peak_memory_bytes" in row:
        more.append(f"{row['peak_memory_bytes'] / 1024:.0f} KB SRAM")
    estimate = "estimated, " if "cycles" in row else ""
    return f"{row['target']}: {estimate}{row['latency_ms']:.3g} ms" + "".join(f", {m}" for m in more)


def of_run(path: Path, names: list[str]) -> tuple[Task, Iterator[Exportable]]:
    """The task of a run and its chosen networks, each as the last stage that left a float network gave it.

    Raises:
        UserError: no run, one that has not come to its stages, or a network that it did not choose.
    """
    from nasbench.plan import make_plan
    from nasbench.run import load_run, run_origin

    view = load_run(path)
    plan = make_plan(view.config, run_origin(path))
    rows = view.stages()
    if len(rows):  # what a network went back from is not its form
        last = rows[rows["final"].astype(bool)].groupby("network")["step"].max()
        rows = rows[rows["step"] <= rows["network"].map(last)]
    rows = rows[rows["form"] == "float module"] if len(rows) else rows
    if not len(rows):
        raise UserError(f"{path}: no network of this run has been chosen and trained yet; nothing to export")
    known = list(dict.fromkeys(rows["network"]))
    for name in names:
        if name not in known:
            raise UserError(f"--name {name}: no such network in {path}. {nearest(name, known)}")
    return plan.task, _networks(path, plan, view, rows, names or known)


def _networks(path: Path, plan: Plan, view: RunView, rows: pd.DataFrame, names: list[str]) -> Iterator[Exportable]:
    from nasbench.experiment import choose
    from nasbench.pipeline import input_shape
    from nasbench.run import run_origin
    from nasbench.stages.structure import load_network
    from nasbench.starts import given_networks, searched

    given = plan.config.networks
    starts = given_networks(plan, run_origin(path)) if given else searched(plan, choose(plan, view.front()), None)
    for name in names:
        row, start = rows[rows["network"] == name].iloc[-1], starts[name]
        assert start.fresh is not None  # it had a float form
        weights = path / "stages" / name / f"{row['step']}-{row['stage']}.safetensors"
        network = load_network(weights, start.fresh()).eval()
        said: dict[str, Any] = {"run": str(path.resolve()), "network": name, "after_stage": row["stage"]}
        if start.arch is not None:
            said |= {"space": plan.config.space.name, "architecture": plan.space.decode(start.arch)}
        else:
            said["source"] = given[name].source
        yield Exportable(name, network, input_shape(network, plan), said)


def by_name(source: str, task: str, weights: Path | None) -> tuple[Task | None, Iterator[Exportable]]:
    """A network by its name, with the weights of a checkpoint or random ones, and the task it is for, if any.

    Raises:
        UserError: no such network or task, an ONNX file, or a checkpoint of another network.
    """
    from nasbench.networks import named_network
    from nasbench.registry import options, resolve
    from nasbench.training import load_weights
    from search_spaces import load_space, reference_network

    if source.endswith(".onnx"):
        raise UserError(f"{source}: is a file of a runtime already; export takes a run, or a network by name")
    if Path(source).is_dir():
        raise UserError(f"{source}: no run there (no run.json); `nasbench runs` lists those below ./runs")
    data: Task | None = None
    if task:
        component = resolve("task", task)
        data = component(**options(component, {}, "task"))
    fits = {} if data is None else {"in_channels": data.input_shape[0], "num_classes": data.num_classes}
    head, colon, _ = source.rpartition(":")
    found = named_network(source, load_space(head, **fits) if colon and fits and not head.startswith("suite") else None)
    module, shape = found.build(), found.input_shape
    if fits and found.design is not None and not colon:
        base, _, size = source.partition("@")
        fitted = reference_network(base, resolution=int(size) if size else None, **fits)
        module, shape = fitted.build(), fitted.input_shape
    if weights is not None:
        load_weights(module, weights)
    said = {"network": source, "weights": str(weights) if weights else "random"}
    stem = source.replace(":", "-").replace("@", "-").replace(".", "_")
    return data, iter([Exportable(stem, module.eval(), shape, said)])
