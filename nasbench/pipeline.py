"""Measured networks: the verification of a front, and the post-search stages with every result measured anew."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles import Artifact, Target, converter_for, load_target
from nasbench.evaluators.base import Evaluator
from nasbench.plan import Plan
from nasbench.progress import Reporter
from nasbench.run import Run
from nasbench.stages.artifacts import evaluate_artifact
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.training import load_weights, save_weights
from search_spaces import UserError, read_onnx

if TYPE_CHECKING:
    from torch import nn

Arch = np.ndarray[Any, np.dtype[Any]]


def measure(
    plan: Plan, run: Run, target: Target, archs: Mapping[str, Arch], step: str, report: Reporter
) -> dict[str, float]:
    """Latency in ms of freshly built networks on a target that can be measured, by name; recorded ones are kept."""
    known = _recorded(run, target, step)
    missing = {name: arch for name, arch in archs.items() if name not in known}
    if missing:
        title = f"measure on {target.name}"
        with (
            report.phase(title) as phase,
            run.phase(title, "measurements") as done,
            tempfile.TemporaryDirectory(dir=run.path) as folder,
        ):
            converter, progress = converter_for(target), phase.progress("networks converted")
            artifacts: dict[str, Artifact] = {}
            for name, arch in missing.items():
                network = plan.space.build(arch)
                path = Path(folder) / f"{name}.{converter.format}"
                artifacts[name] = converter.convert(network, target, input_shape(network, plan), path)
                progress(len(artifacts), len(missing))
            known |= measure_artifacts(plan, run, target, artifacts, step)
            done[0] = len(missing)
    return {name: known[name] for name in archs}


def measure_artifacts(
    plan: Plan, run: Run, target: Target, artifacts: Mapping[str, Artifact], step: str
) -> dict[str, float]:
    """Measure all artifacts in interleaved passes and record them; latency in ms by name, NaN where it failed."""
    latencies: dict[str, float] = {}
    for name, result in zip(artifacts, plan.meter_for(target).measure(list(artifacts.values()), target), strict=True):
        latencies[name] = result.latency_ms
        note = "; ".join(n for n in ("throttled" if result.throttled else "", result.note, result.error) if n)
        good = not result.error
        figures = {
            "latency_ms": result.latency_ms if good else None,
            "median_ms": result.median_ms if good else None,
            "spread": result.spread if good else None,
            "note": note,
        }
        run.archive.record_measurement(name, target.name, step, figures, result.samples_ms, asdict(result.protocol))
    return latencies


def _recorded(run: Run, target: Target, step: str) -> dict[str, float]:
    rows = run.archive.measurements()
    rows = rows[(rows["target"] == target.name) & (rows["step"] == step)]
    return dict(zip(rows["network"], rows["latency_ms"].astype(float), strict=True))


def input_shape(network: nn.Module, plan: Plan) -> tuple[int, int, int]:
    """The input shape that a network was made for: its own word, else the space's."""
    shape: tuple[int, int, int] = getattr(network, "input_shape", plan.space.input_shape)
    return shape


def run_stages(plan: Plan, run: Run, chosen: Mapping[str, Arch], source: Evaluator | None, report: Reporter) -> None:
    """Take networks through the stages; after each, accuracy, size, memory and latency are measured, and recorded.

    Step 0 is the network as the search left it. Every step of every network becomes an ONNX artifact, and it is the
    artifact that is measured. What an earlier process recorded is not done again.

    Args:
        source: the evaluator whose supernet gives the networks their weights; None for freshly initialised ones.
    """
    supernet = None if source is None else getattr(source, "network", None)
    if source is None and not plan.stages:
        return  # freshly initialised networks are nobody's result
    candidates: dict[str, Candidate] = {}
    artifacts: dict[tuple[str, int], Artifact] = {}
    for step, (stage_name, stage) in enumerate([("search", None), *plan.stages]):
        title = f"stage {stage_name}" if stage else "take networks"
        with report.phase(title) as phase, run.phase(title, "networks") as done:
            progress = phase.progress("networks")
            finished = _finished(run, step)
            for index, (name, arch) in enumerate(chosen.items()):
                folder = run.directory("stages") / name
                folder.mkdir(exist_ok=True)
                weights, row = folder / f"{step}-{stage_name}.safetensors", finished.get(name)
                if row is not None and (run.path / row["file"]).is_file():
                    candidate, artifact = _restore(plan, run, name, arch, row, weights)
                else:
                    before = candidates.get(name)
                    if stage is None or before is None:
                        candidate = Candidate(name, arch, Form.FLOAT, network=_take(plan, arch, source, index))
                    else:
                        context = StageContext(
                            task=plan.task,
                            space=plan.space,
                            directory=folder,
                            seed=plan.config.seed + index,
                            supernet=supernet,
                            input_shape=artifacts[name, step - 1].input_shape,  # type: ignore[arg-type]
                        )
                        candidate = stage.run(before, context)
                    artifact = _artifact(plan, candidate, folder / f"{step}-{stage_name}.onnx")
                    if candidate.network is not None:
                        save_weights(weights, candidate.network)
                    file = str(artifact.path.relative_to(run.path))
                    untrained = source is None and step == 0
                    metrics = _figures(plan, artifact, untrained)
                    run.archive.record_stage(name, step, stage_name, candidate.form.value, file, metrics)
                    done[0] += 1
                candidates[name], artifacts[name, step] = candidate, artifact
                progress(index + 1, len(chosen))
            _measure_all(plan, run, artifacts)
    _test_once(plan, run, artifacts, report)


def _take(plan: Plan, arch: Arch, source: Evaluator | None, index: int) -> nn.Module:
    """The network of an architecture as the evaluator judged it, or freshly initialised from the run's seed."""
    import torch

    if source is not None and hasattr(source, "extract"):
        network: nn.Module = source.extract(arch)
        return network
    with torch.random.fork_rng():
        torch.manual_seed(plan.config.seed + index)
        return plan.space.build(arch)


def _artifact(plan: Plan, candidate: Candidate, path: Path) -> Artifact:
    if candidate.artifact is not None:
        return candidate.artifact
    if candidate.network is None:
        raise UserError(f"stage result {candidate.name!r} holds neither a network nor an artifact")
    host = load_target("host")
    return converter_for(host).convert(candidate.network, host, input_shape(candidate.network, plan), path)


def _figures(plan: Plan, artifact: Artifact, untrained: bool) -> dict[str, float]:
    """What can be said of an artifact without timing it."""
    workload = read_onnx(artifact.path)
    figures: dict[str, float] = {
        "file_bytes": artifact.file_bytes,
        "peak_memory_bytes": workload.peak_memory_bytes,
        "params": workload.params,
        "macs": workload.macs,
    }
    if not untrained:
        figures["accuracy"] = evaluate_artifact(artifact, plan.task, "val")
    return figures


def _finished(run: Run, step: int) -> dict[str, Any]:
    rows = run.archive.stages()
    return {row["network"]: row for _, row in rows[rows["step"] == step].iterrows()}


def _restore(plan: Plan, run: Run, name: str, arch: Arch, row: Any, weights: Path) -> tuple[Candidate, Artifact]:
    """A candidate as an earlier process left it."""
    form = Form(row["form"])
    workload = read_onnx(run.path / row["file"])
    # A quantised file still takes and gives fp32; its tensors inside are int8.
    precision = "int8" if min(t.itemsize for t in workload.tensors) == 1 else "fp32"
    artifact = Artifact(run.path / row["file"], "onnx", precision, workload.tensors[workload.inputs[0]].shape)
    if form is Form.ARTIFACT:
        return Candidate(name, arch, form, artifact=artifact), artifact
    network = plan.space.build(arch)
    load_weights(network, weights)
    return Candidate(name, arch, form, network=network), artifact


def _measure_all(plan: Plan, run: Run, artifacts: Mapping[tuple[str, int], Artifact]) -> None:
    """Measure every artifact so far in interleaved passes, so that ratios between steps are fair.

    Nothing is measured where every artifact has its latency from an earlier process.
    """
    rows = run.archive.stages()
    for target in (t for t in plan.targets.values() if plan.measurable(t)):
        if converter_for(target).format != "onnx":  # stages give ONNX files
            continue
        key = f"latency_ms@{target.name}"
        if key in rows and rows[key].notna().all():
            continue
        named = {f"{name}/{step}": artifact for (name, step), artifact in artifacts.items()}
        for label, latency in measure_artifacts(plan, run, target, named, "stages").items():
            name, _, step = label.rpartition("/")
            run.archive.add_metrics(name, int(step), {key: latency})


def _test_once(plan: Plan, run: Run, artifacts: Mapping[tuple[str, int], Artifact], report: Reporter) -> None:
    """Accuracy on the test split, once per artifact of the run; nothing is chosen by it."""
    rows = run.archive.stages()
    tested = set()
    if "test_accuracy" in rows:
        known = rows[rows["test_accuracy"].notna()]
        tested = set(zip(known["network"], known["step"], strict=True))
    untrained = set()
    if "accuracy" in rows:
        unknown = rows[rows["accuracy"].isna()]
        untrained = set(zip(unknown["network"], unknown["step"], strict=True))
    todo = {key: a for key, a in artifacts.items() if key not in tested and key not in untrained}
    if todo:
        with report.phase("test") as phase, run.phase("test", "networks") as done:
            progress = phase.progress("networks")
            for (name, step), artifact in todo.items():
                accuracy = evaluate_artifact(artifact, plan.task, "test")
                run.archive.add_metrics(name, step, {"test_accuracy": accuracy})
                done[0] += 1
                progress(done[0], len(todo))
