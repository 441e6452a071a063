"""Export of a trained network: a checked file of a real runtime, with a manifest that says what it is.

    target and format -> operators held against the device -> conversion (int8 calibrated on training images)
        -> the file run on validation images and compared -> timed where it can run -> file and manifest put in place

Nothing is left behind where any step fails.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from hardware_profiles import Artifact, Target, check_workload, converter_for, load_profile, load_target, meter_for
from hardware_profiles.conversion import TOLERANCE, evaluating
from hardware_profiles.host import HOST_RUNTIMES
from hardware_profiles.measuring import measure_alone
from hardware_profiles.passes import LocalMeter
from search_spaces import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nasbench.tasks.base import Task

Format = Literal["onnx", "litert", "executorch", "openvino"]
# Format for people -> runtime of the host's operating points, and the suffix of its files.
RUNTIME = {"onnx": "onnxruntime", "litert": "litert", "executorch": "executorch", "openvino": "openvino"}
SUFFIX = {"onnx": "onnx", "litert": "tflite", "executorch": "pte", "openvino": "xml"}
Fallback = Literal["refuse", "allow"]
# Fewer images than this give ranges that the next image leaves.
LEAST_CALIBRATION_IMAGES = 16
NOISE_IMAGES = 200


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Args:
        artifact: the file.
        manifest: what lies beside it, as values.
        manifest_path: where.
    """

    artifact: Artifact
    manifest: dict[str, Any]
    manifest_path: Path


def host_target(format: str, precision: str) -> Target:
    """This machine with the runtime of a format, in any precision that the format has.

    Raises:
        UserError: an unknown format or precision.
    """
    if format not in get_args(Format):
        raise UserError(f"format = {format!r}: unknown. {nearest(format, get_args(Format))}")
    host = load_profile("host")
    prefix = next(prefix for prefix, runtime in HOST_RUNTIMES.items() if runtime == RUNTIME[format])
    name = f"{prefix}{precision}"
    if name not in host.operating_points and precision == "fp16":
        # A file that other devices compute with; this machine's processor does so in fp32.
        point = host.operating_points[f"{prefix}fp32"].model_copy(update={"precision": "fp16"})
        host = host.model_copy(update={"operating_points": {**host.operating_points, name: point}})
    if name not in host.operating_points:
        raise UserError(f"precision = {precision!r}: expected fp32, fp16 or int8")
    return Target(host, name)


def export_target(format: str | None = None, target: str = "", precision: str = "") -> Target:
    """What to export for: a device where one is named, else this machine's runtime of the format.

    Args:
        format: the target's own where None; ONNX without a target.
        target: `device` or `device:operating-point`.
        precision: the target's own where empty; fp32 without a target.

    Raises:
        UserError: a target that takes files of another format, or does not compute in that precision.
    """
    if not target:
        return host_target(format or "onnx", precision or "fp32")
    if format is not None and format not in get_args(Format):
        raise UserError(f"format = {format!r}: unknown. {nearest(format, get_args(Format))}")
    found = load_target(target)
    if precision and precision != found.precision:
        rules = found.constraints
        if rules.precisions and precision not in rules.precisions:
            raise UserError(
                f"precision = {precision!r}: {found.profile.name} computes in {', '.join(rules.precisions)} only "
                f"({rules.source})"
            )
        if ":" in target:
            raise UserError(f"precision = {precision!r}: {found.name} computes in {found.precision}")
        found = found.profile.target(precision)
    suffix = converter_for(found).format
    if format is not None and SUFFIX[format] != suffix:
        right = next((name for name, s in SUFFIX.items() if s == suffix), suffix)
        raise UserError(f"format = {format!r}: {found.name} runs {right} files ({suffix}); leave --format out")
    return found


def format_of(artifact: Artifact) -> Format:
    """The format of a file by the name that users give it.

    Raises:
        UserError: a file of none.
    """
    for name in get_args(Format):
        if SUFFIX[name] == artifact.format:
            found: Format = name
            return found
    raise UserError(f"{artifact.label}: format {artifact.format!r}, expected {', '.join(SUFFIX.values())}")


def check_operators(network: nn.Module, input_shape: tuple[int, ...], target: Target, fallback: str) -> list[str]:
    """Hold every operator of a network against what a target runs, naming the layer.

    Returns:
        What will be left to the host's CPU, one sentence each, where `fallback` allows it.

    Raises:
        UserError: an operator that the target refuses, or would leave to the CPU where that is not allowed.
    """
    from search_spaces import trace_layers

    rules = target.constraints
    if not (rules.operators or rules.unsupported_operators or rules.limits or rules.max_rank):
        return []
    workload, layers = trace_layers(network, input_shape)
    findings = check_workload(workload, target)
    named = [f"layer {layers[f.index] or type(network).__name__!r}, {f}" for f in findings]
    refused = [text for text, f in zip(named, findings, strict=True) if f.otherwise == "refused"]
    left = [text for text, f in zip(named, findings, strict=True) if f.otherwise != "refused"]
    stops = refused or (left if fallback == "refuse" else [])
    if stops:
        more = f" (and {len(stops) - 1} more operators)" if len(stops) > 1 else ""
        hint = "" if refused else "; allow it with fallback = 'allow'"
        raise UserError(f"{type(network).__name__} cannot be exported for {target.name}: {stops[0]}{more}{hint}")
    return left


def calibration_images(task: Task, input_shape: tuple[int, ...], count: int, seed: int) -> np.ndarray[Any, Any]:
    """`count` prepared training images `(n, c, h, w)` float32 at the network's size.

    Raises:
        UserError: too few to take ranges from, or more than there are.
    """
    from nasbench.training.evaluation import batches, fixed_subset

    split = task.split("train")
    if count < LEAST_CALIBRATION_IMAGES:
        raise UserError(
            f"calibration images = {count}: too few for ranges, expected {LEAST_CALIBRATION_IMAGES} or more"
        )
    if count > len(split):
        raise UserError(f"calibration images = {count}: the training split of {task.name} has {len(split)}")
    images = fixed_subset(split, count, seed).images
    return np.concatenate([x.contiguous().numpy() for x in batches(task, images, 250, input_shape)])


def export_network(
    network: nn.Module,
    input_shape: tuple[int, ...],
    path: Path,
    target: Target,
    *,
    task: Task | None = None,
    images: int = 200,
    calibration: int = 256,
    tolerance: float | None = None,
    fallback: str = "refuse",
    measure: bool = True,
    seed: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a float network as the file of a target's runtime, with its manifest beside it.

    Args:
        input_shape: `(channels, height, width)`.
        path: of the file; the manifest is `path` with the suffix `.json`.
        task: whose validation images the file is compared on, and whose training images give int8 ranges; without one,
            seeded noise does for both, and the manifest says so.
        images: to compare on; 0 for all of the validation split.
        calibration: training images for int8 ranges.
        tolerance: largest difference of an output: for fp32 and fp16 of any value, relative to the network's largest;
            for int8 root mean square, relative to the network's own. None: `hardware_profiles.conversion.TOLERANCE`.
        fallback: whether an operator that the device leaves to its host's CPU is a reason to refuse.
        measure: time the file where its runtime is here, or have the target's compiler reckon.
        extra: further entries of the manifest.

    Raises:
        UserError: an operator, precision or layer that the target does not run, named; a file that differs from the
            network; images of another shape, or too few.
    """
    import torch

    from nasbench.stages.artifacts import write_manifest

    if tolerance is not None and not tolerance > 0:
        raise UserError(f"tolerance = {tolerance}: expected above 0")
    if fallback not in get_args(Fallback):
        raise UserError(f"fallback = {fallback!r}: expected {' or '.join(get_args(Fallback))}")
    left = check_operators(network, input_shape, target, fallback)
    int8 = target.precision == "int8"
    if target.batch != 1:
        raise UserError(f"{target.name}: infers {target.batch} images at a time; export writes files of batch 1")
    noise = np.random.default_rng(seed).standard_normal((NOISE_IMAGES, *input_shape), dtype=np.float32)
    given = calibration_images(task, input_shape, calibration, seed) if int8 and task is not None else None
    with _workplace(path) as folder, evaluating(network):
        draft = converter_for(target).convert(network, target, input_shape, folder / path.name, given)
        check = _compare(network, draft, task, torch.from_numpy(noise), images, tolerance, path, seed)
        entries: dict[str, Any] = {"target": target.name, "check": check, "on_host_cpu": left}
        if int8:
            entries["calibration"] = {"images": 0 if given is None else len(given), "note": draft.note}
        if measure:
            entries["measurements"] = timings(draft, target)
        manifest = write_manifest(draft, task, entries | dict(extra or {}))
        return Exported(replace(draft, path=path), manifest, put_in_place(draft, path))


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A directory beside `path` that is gone afterwards.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def put_in_place(draft: Artifact, path: Path) -> Path:
    """Move a file, what belongs to it and its manifest, last, to where they are wanted; returns the manifest's path."""
    final = path.with_suffix(".json")
    beside = [draft.path.with_suffix(".bin")] if draft.format == "xml" else []
    for made in (*beside, draft.path, draft.path.with_suffix(".json")):
        made.replace(path.parent / (path.stem + made.suffix))
    return final


def _compare(
    network: nn.Module,
    draft: Artifact,
    task: Task | None,
    noise: Tensor,
    count: int,
    tolerance: float | None,
    path: Path,
    seed: int,
) -> dict[str, Any]:
    """How the file's outputs differ from the network's on real images; refuses a file that differs too much."""
    import torch

    from nasbench.stages.artifacts import run_artifact, run_prepared
    from nasbench.training.evaluation import fixed_subset, predict_logits

    accuracies: dict[str, float] = {}
    if task is None:
        inputs = f"{len(noise)} of seeded noise"
        with torch.no_grad():
            expected = np.concatenate([network(x).float().numpy() for x in noise.split(50)])
        found = run_prepared(draft, noise.split(1))
    else:
        split = fixed_subset(task.split("val"), count, seed)
        inputs = f"{len(split)} validation images of {task.name}"
        logits = predict_logits(network, task, split.images, draft.input_shape)
        expected, found = logits.numpy(), run_artifact(draft, task, split.images)
        accuracies = {
            "accuracy_network": task.accuracy(logits, split.labels),
            "accuracy": task.accuracy(torch.from_numpy(found), split.labels),
        }
    error, size = np.abs(found - expected), np.abs(expected)
    largest = float(error.max() / size.max())
    rms = float(np.sqrt(np.square(error).mean() / np.square(expected).mean()))
    limit = TOLERANCE[draft.precision] if tolerance is None else tolerance
    difference = rms if draft.precision == "int8" else largest
    if not difference <= limit:
        raise UserError(
            f"{path.stem}: the exported {draft.format} file differs from the network by {difference:.2g} of its "
            f"output, more than tolerance = {limit:g}; {path} was not written"
        )
    return {
        "inputs": inputs,
        "images": len(expected),
        "largest_relative_difference": largest,
        "rms_relative_difference": rms,
        "same_top1": float((found.argmax(1) == expected.argmax(1)).mean()),
    } | accuracies


def timings(artifact: Artifact, target: Target) -> list[dict[str, Any]]:
    """What a file takes: on this machine where its runtime is here, and by the target's own compiler where it has one.

    A measurement that failed says why instead.
    """
    here = host_target(format_of(artifact), "int8" if artifact.precision == "int8" else "fp32")
    places = [here] if target.profile.local or target.runtime != "vela" else [here, target]
    rows = []
    for place in places:
        meter = meter_for(place)
        if isinstance(meter, LocalMeter):
            x = np.zeros((target.batch, *artifact.input_shape), dtype=np.float32)
            load_ms = 1e3 * _seconds(partial(meter.opened, artifact, here, x))
        (m,) = measure_alone(meter, [artifact], place)
        row: dict[str, Any] = {"target": place.name, "latency_ms": m.latency_ms if not m.error else None}
        if isinstance(meter, LocalMeter):
            row["load_and_first_run_ms"] = load_ms
        row |= {k: v for k in ("cycles", "peak_memory_bytes") if (v := getattr(m, k)) is not None}
        row |= {k: v for k, v in (("note", m.note), ("error", m.error)) if v}
        rows.append(row | {"throttled": m.throttled, "protocol": asdict(m.protocol)})
    return rows


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
