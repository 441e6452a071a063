"""Measured networks: the verification of a front, and the post-search stages with every result measured anew."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles import Artifact, Target, converter_for, load_target
from hardware_profiles.measuring import measure_alone
from nasbench.plan import Plan
from nasbench.progress import Reporter
from nasbench.run import Run
from nasbench.stages.artifacts import evaluate_artifact
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.stages.structure import load_network, save_network
from nasbench.starts import Start
from nasbench.training.loop import BrokeDown
from predictors import Calibration, Predictor, calibrate, predictor_for
from predictors.calibration import kept_calibration
from predictors.choice import COUNTS
from search_spaces import UserError, Workload, read_onnx, trace

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.supernet import Supernet

# Variants of each network that a latency model for pruning is fitted to.
VARIANTS = 12

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
    measured = measure_alone(plan.meter_for(target), list(artifacts.values()), target)
    for name, result in zip(artifacts, measured, strict=True):
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
    """The input shape that a network was made for: its own word, else the space's; of one from elsewhere the task's."""
    other = plan.task.input_shape if plan.config.networks else plan.space.input_shape
    shape: tuple[int, int, int] = getattr(network, "input_shape", other)
    return shape


@dataclass
class _Progress:
    """What the stages have made of the networks so far, by name, and by name and step.

    Args:
        candidates: each network as its next stage gets it.
        artifacts: the ONNX file of every step, or whatever file the stage wrote.
        float_networks: what every file was converted from; none for what stages made of files.
        done: networks that take part in no later stage.
    """

    candidates: dict[str, Candidate] = field(default_factory=dict)
    artifacts: dict[tuple[str, int], Artifact] = field(default_factory=dict)
    float_networks: dict[tuple[str, int], nn.Module] = field(default_factory=dict)
    accuracies: dict[str, dict[int, float]] = field(default_factory=dict)
    history: dict[tuple[str, int], Candidate] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def before(self, name: str) -> Candidate:
        """A network as its next stage gets it; what an earlier stage had to tell is told."""
        return replace(self.candidates[name], notes=())

    def put(self, step: int, candidate: Candidate, artifact: Artifact, accuracy: float | None) -> None:
        """What a step gave."""
        name = candidate.name
        self.candidates[name] = self.history[name, step] = candidate
        self.artifacts[name, step] = artifact
        if candidate.form is Form.FLOAT and candidate.network is not None:
            self.float_networks[name, step] = candidate.network
        if accuracy is not None and np.isfinite(accuracy):
            self.accuracies.setdefault(name, {})[step] = accuracy

    def last_good(self, name: str, step: int, fall: float) -> int | None:
        """Where the accuracy after `step` is more than `fall` below the best before: the step to go back to."""
        known = {s: a for s, a in self.accuracies.get(name, {}).items() if s < step}
        now = self.accuracies.get(name, {}).get(step)
        if now is None or not known or now >= max(known.values()) - fall:
            return None
        return max(s for s, a in known.items() if a >= max(known.values()) - fall)


def run_stages(
    plan: Plan,
    run: Run,
    starts: Mapping[str, Start],
    supernet: Supernet | None,
    report: Reporter,
    first: str = "search",
) -> None:
    """Take networks through the stages; after each, accuracy, size, memory and latency are measured, and recorded.

    Step 0 is the network as it was found or given. Every step of every network becomes a file, and it is the file that
    is measured. A network whose training breaks down, whose accuracy falls by more than its stage allows, or that a
    stage cannot take while it takes others (a budget out of reach), keeps its last good form and takes part in no later
    stage. What an earlier process recorded is not done again.

    Args:
        first: what step 0 is called.

    Raises:
        UserError: a stage that can take none of all networks.
    """
    if not plan.stages and not any(s.trained for s in starts.values()):
        return  # freshly initialised networks are nobody's result
    at = _Progress()
    predictor = _predictors(plan, run, at, report)
    failed = _failed(run)
    for step, (stage_name, stage) in enumerate([(first, None), *plan.stages]):
        title = f"stage {stage_name}" if stage else "take networks"
        with report.phase(title) as phase, run.phase(title, "networks") as done:
            progress = phase.progress("networks")
            finished = _finished(run, step)
            refused: dict[str, UserError] = {}
            for index, (name, start) in enumerate(starts.items()):
                progress(index + 1, len(starts))
                if (name, step) in failed:
                    at.done.add(name)
                if name in at.done:
                    continue
                folder = run.directory("stages") / name
                folder.mkdir(exist_ok=True)
                weights, row = folder / f"{step}-{stage_name}.safetensors", finished.get(name)
                if row is not None and (run.path / row["file"]).is_file():
                    at.put(step, *_restore(run, name, start, row, weights))
                else:
                    context = StageContext(
                        task=plan.task,
                        space=plan.space,
                        directory=folder,
                        seed=plan.config.seed + index,
                        supernet=supernet,
                        input_shape=_shape(at.artifacts.get((name, step - 1))),
                        predictor=predictor,
                        fresh=start.fresh,
                    )
                    try:
                        candidate = _first(name, start) if stage is None else stage.run(at.before(name), context)
                    except BrokeDown as error:
                        run.archive.record_event(name, step, stage_name, "failed", step - 1, str(error))
                        at.done.add(name)
                        continue
                    except UserError as error:
                        if stage is None:
                            raise
                        refused[name] = error
                        continue
                    _record(plan, run, at, step, stage_name, candidate, start, folder, weights)
                    done[0] += 1
                _judge(plan, run, at, step, name)
            if refused and len(refused) == len(starts):
                raise next(iter(refused.values()))  # what no network can do is a mistake in the configuration
            for name, refusal in refused.items():
                run.archive.record_event(name, step, stage_name, "failed", step - 1, str(refusal))
                at.done.add(name)
            _measure_all(plan, run, at)
    _test_once(plan, run, at.artifacts, report)


def _first(name: str, start: Start) -> Candidate:
    """The network before the first stage."""
    if start.artifact is not None:
        return Candidate(name, start.arch, Form.ARTIFACT, artifact=start.artifact)
    assert start.take is not None
    return Candidate(name, start.arch, Form.FLOAT, network=start.take())


def _record(
    plan: Plan,
    run: Run,
    at: _Progress,
    step: int,
    stage_name: str,
    candidate: Candidate,
    start: Start,
    folder: Path,
    weights: Path,
) -> None:
    """Write a step's files, and commit what can be said of them without timing."""
    name = candidate.name
    artifact = _artifact(plan, candidate, folder / f"{step}-{stage_name}.onnx")
    if artifact.path.is_relative_to(run.path):
        file = str(artifact.path.relative_to(run.path))
    else:
        file = str(artifact.path.resolve())  # a file of the user's stays where it is
    if candidate.network is not None and candidate.form is Form.FLOAT:
        assert start.fresh is not None
        save_network(weights, candidate.network, start.fresh())
    figures = _figures(plan, candidate, artifact, step > 0 or start.trained)
    for note in candidate.notes:
        run.archive.record_event(name, step, stage_name, "note", step, note)
    run.archive.record_stage(name, step, stage_name, candidate.form.value, file, figures)
    at.put(step, candidate, artifact, figures.get("accuracy"))


def _judge(plan: Plan, run: Run, at: _Progress, step: int, name: str) -> None:
    """Stop a network whose accuracy has fallen by more than its stage allows."""
    fall = plan.config.stages[step - 1].stop_if_accuracy_falls if step else None
    back = at.last_good(name, step, fall) if fall is not None else None
    if back is None:
        return
    best, now = max(a for s, a in at.accuracies[name].items() if s < step), at.accuracies[name][step]
    message = (
        f"accuracy fell from {best:.4f} to {now:.4f}, by more than stop_if_accuracy_falls = {fall:g}: "
        f"the form of step {back} is kept and no later stage is run"
    )
    run.archive.record_event(name, step, plan.config.stages[step - 1].name, "stopped", back, message)
    at.candidates[name] = at.history[name, back]
    at.done.add(name)


def _shape(artifact: Artifact | None) -> tuple[int, int, int]:
    return artifact.input_shape if artifact is not None else (0, 0, 0)  # type: ignore[return-value]


def _artifact(plan: Plan, candidate: Candidate, path: Path) -> Artifact:
    if candidate.artifact is not None:
        return candidate.artifact
    if candidate.network is None:
        raise UserError(f"stage result {candidate.name!r} holds neither a network nor an artifact")
    host = load_target("host")
    return converter_for(host).convert(candidate.network, host, input_shape(candidate.network, plan), path)


def _workload(plan: Plan, candidate: Candidate, artifact: Artifact) -> Workload | None:
    """The operators of a step's file; None where a format does not tell and there is no network either."""
    if artifact.format == "onnx":
        return read_onnx(artifact.path)
    return trace(candidate.network, artifact.input_shape) if candidate.network is not None else None


def _figures(plan: Plan, candidate: Candidate, artifact: Artifact, trained: bool) -> dict[str, float]:
    """What can be said of an artifact without timing it; energies, and latencies elsewhere, are predicted."""
    figures: dict[str, float] = {"file_bytes": artifact.file_bytes}
    workload = _workload(plan, candidate, artifact)
    if workload is not None:
        figures |= {
            "peak_memory_bytes": workload.peak_memory_bytes,
            "params": workload.params,
            "macs": workload.macs,
        }
        for target in plan.targets.values():
            for metric in ("energy_mj", "latency_ms"):
                if metric == "latency_ms" and plan.measurable(target):
                    continue
                try:
                    estimate = predictor_for(target, metric).predict([workload])
                except UserError:  # nobody states its power, or it was never measured
                    continue
                figures[f"{metric}_predicted@{target.name}"] = float(estimate.mean[0])
    if trained:
        figures["accuracy"] = evaluate_artifact(artifact, plan.task, "val")
    return figures


def _finished(run: Run, step: int) -> dict[str, Any]:
    rows = run.archive.stages()
    return {row["network"]: row for _, row in rows[rows["step"] == step].iterrows()}


def _failed(run: Run) -> set[tuple[str, int]]:
    """Networks, and the steps at which an earlier process saw them fail."""
    events = run.archive.stage_events()
    events = events[events["kind"] == "failed"]
    return set(zip(events["network"], events["step"], strict=True))


def _restore(run: Run, name: str, start: Start, row: Any, weights: Path) -> tuple[Candidate, Artifact, float | None]:
    """A candidate as an earlier process left it."""
    form, path = Form(row["form"]), run.path / row["file"]
    accuracy = row.get("accuracy")
    if path.suffix == ".onnx":
        workload = read_onnx(path)
        # A quantised file still takes and gives fp32; its tensors inside are int8.
        precision = "int8" if min(t.itemsize for t in workload.tensors) == 1 else "fp32"
        artifact = Artifact(path, "onnx", precision, workload.tensors[workload.inputs[0]].shape)
    else:
        artifact = _from_manifest(path)
    if form is Form.ARTIFACT:
        return Candidate(name, start.arch, form, artifact=artifact), artifact, accuracy
    assert start.fresh is not None
    network = load_network(weights, start.fresh()).eval()
    return Candidate(name, start.arch, form, network=network), artifact, accuracy


def _from_manifest(path: Path) -> Artifact:
    """A file whose format tells little, by the manifest that its export left beside it."""
    import json

    manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return Artifact(path, manifest["format"], manifest["precision"], tuple(manifest["input_shape"]))


def _predictors(plan: Plan, run: Run, at: _Progress, report: Reporter) -> Callable[[str, str], Predictor]:
    """What stages ask for costs: by a calibration of this run on narrower versions of its networks where the target is
    at hand, which is measured when first asked for; else by what is known of the target."""

    def predictor(target_name: str, metric: str) -> Predictor:
        target = load_target(target_name)
        if metric in COUNTS:
            return predictor_for(target, metric)
        file = run.directory("calibration") / f"stages-{target.name.replace(':', '-')}.json"
        if file.is_file():
            return predictor_for(target, metric, Calibration.load(file))
        if not (plan.measurable(target) and target.profile.local and metric == "latency_ms"):
            if (kept := kept_calibration(target)) is not None:
                kept.save(file)
            return predictor_for(target, metric, kept)
        from nasbench.pruning.groups import find_channels
        from nasbench.pruning.variants import variants

        with report.phase(f"calibrate {target.name} for pruning") as phase:
            networks = []
            for name, candidate in at.candidates.items():
                if candidate.network is not None:
                    shape = input_shape(candidate.network, plan)
                    channels = find_channels(candidate.network, shape)
                    networks += variants(name, candidate.network, channels, shape, VARIANTS, plan.config.seed)
            with run.phase(f"calibrate {target.name} for pruning", "networks") as done:
                calibration = calibrate(
                    target, networks, cache=run.directory("calibration") / "cache", progress=phase.steps("networks")
                )
                done[0] = len(calibration.rows)
            calibration.save(file)
        return predictor_for(target, metric, calibration)

    return predictor


def _measure_all(plan: Plan, run: Run, at: _Progress) -> None:
    """Measure every step so far on every target that is at hand, in interleaved passes, so that ratios are fair.

    A runtime that does not read a step's file gets the float network that it was made of, converted; where there is
    none, it has no latency. Nothing is measured where every step has its latency from an earlier process.
    """
    rows = run.archive.stages()
    if rows.empty:
        return
    for target in (t for t in plan.targets.values() if plan.measurable(t)):
        key = f"latency_ms@{target.name}"
        runnable = {
            f"{name}/{step}": (name, step) for name, step in at.artifacts if _deployable(at, target, name, step)
        }
        known = rows[rows[key].notna()] if key in rows else rows[:0]
        if set(runnable.values()) <= set(zip(known["network"], known["step"], strict=True)):
            continue
        named: dict[str, Artifact] = {}
        for label, (name, step) in runnable.items():
            try:
                named[label] = _deployed(run, at, target, name, step)
            except UserError as error:
                run.archive.record_event(name, step, target.runtime, f"note {target.name}", step, str(error))
        for label, latency in (measure_artifacts(plan, run, target, named, "stages") if named else {}).items():
            name, step = runnable[label]
            run.archive.add_metrics(name, step, {key: latency})


def _reads(target: Target, format: str) -> bool:
    """Whether a target's runtime runs files of a format as they are."""
    return format == converter_for(target).format or (target.runtime == "openvino" and format == "onnx")


def _deployable(at: _Progress, target: Target, name: str, step: int) -> bool:
    return _reads(target, at.artifacts[name, step].format) or (name, step) in at.float_networks


def _deployed(run: Run, at: _Progress, target: Target, name: str, step: int) -> Artifact:
    """The file of a step that a target runs; converted where the step's own file is another runtime's."""
    artifact = at.artifacts[name, step]
    if _reads(target, artifact.format):
        return artifact
    converter = converter_for(target)
    point = target.name.replace(":", "-")
    path = run.directory("stages") / name / f"{step}-{point}.{converter.format}"
    if path.is_file():
        return Artifact(path, converter.format, target.precision, artifact.input_shape)
    return converter.convert(at.float_networks[name, step], target, artifact.input_shape, path)


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
