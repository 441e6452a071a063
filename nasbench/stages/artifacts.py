"""Runtime artifacts: running them on images, and the manifest that says what they take and give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardware_profiles import Target, meter_for
from hardware_profiles.host import host_name
from hardware_profiles.meter import Artifact
from hardware_profiles.passes import LocalMeter
from hardware_profiles.paths import sha256_of, write_text
from nasbench.exporting import format_of, host_target
from nasbench.tasks.base import SplitName, Task
from nasbench.training.evaluation import batches
from nasbench.training.workers import in_parts
from search_spaces.errors import UserError


def run_artifact(artifact: Artifact, task: Task, images: Tensor) -> NDArray[np.float32]:
    """Logits `(n, classes)` float32 of stored images `(n, c, h, w)`, by the file's own runtime and in its batch size.

    ONNX files are shared out to as many threads as torch has, each of which runs whole inferences.

    Raises:
        UserError: a file that its runtime cannot read or run, or a runtime that is not installed.
    """
    if artifact.format != "onnx":
        return run_prepared(artifact, batches(task, images, 1, artifact.input_shape))
    try:
        session = ort.InferenceSession(str(artifact.path), _options(), providers=["CPUExecutionProvider"])
        node = session.get_inputs()[0]
        fixed = node.shape[0] if isinstance(node.shape[0], int) else 0

        def run(part: Tensor) -> list[NDArray[np.float32]]:
            logits = []
            for batch in batches(task, part, fixed or 250, artifact.input_shape):
                x = batch.contiguous().numpy()
                # The last batch of a network with a fixed batch size is filled up with its own last image.
                padded = np.concatenate([x, np.repeat(x[-1:], fixed - len(x), axis=0)]) if len(x) < fixed else x
                logits.append(session.run(None, {node.name: padded})[0][: len(x)])
            return logits

        logits = [batch for part in in_parts(run, images) for batch in part]
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common base of their own
        raise UserError(f"{artifact.path}: ONNX Runtime cannot run it: {str(error).strip().splitlines()[0]}") from error
    return np.concatenate(logits)


def run_prepared(artifact: Artifact, inputs: Iterable[Tensor]) -> NDArray[np.float32]:
    """The first output `(n, ...)` for prepared batches, each in the file's own batch size, by the file's own runtime.

    Raises:
        UserError: a file that its runtime cannot read or run, or a runtime that is not installed.
    """
    target = host_target(format_of(artifact), "fp32")
    meter = meter_for(target)
    assert isinstance(meter, LocalMeter)
    opened = partial(meter.opened, artifact, target)
    session, results = None, []
    for batch in inputs:
        x = batch.contiguous().numpy()
        if session is None:
            session = opened(x)
        session.feed(x)
        results.append(np.array(session.run()[0], dtype=np.float32))
    return np.concatenate(results)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def evaluate_artifact(artifact: Artifact, task: Task, split_name: SplitName) -> float:
    """The task's accuracy (0..1) of a runtime artifact on a whole split.

    Raises:
        UserError: a file that its runtime cannot read or run.
    """
    split = task.split(split_name)
    return task.accuracy(torch.from_numpy(run_artifact(artifact, task, split.images)), split.labels)


def write_manifest(artifact: Artifact, task: Task | None, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write `NAME.json` beside an artifact: what it takes, what it gives, and what made it; returns its values.

    Args:
        task: that it was trained for; None where it was for none, and the manifest says nothing of classes.

    Raises:
        UserError: the directory cannot be written.
    """
    files = [artifact.path, *([artifact.path.with_suffix(".bin")] if artifact.format == "xml" else [])]
    manifest: dict[str, Any] = {
        "file": artifact.path.name,
        "sha256": sha256_of(artifact.path),
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files},
        "format": artifact.format,
        "precision": artifact.precision,
        "input_shape": list(artifact.input_shape),
    }
    if task is not None:
        manifest |= {
            "task": task.name,
            "classes": list(task.class_names),
            "preprocessing": task.preprocessing() | {"resize": "bilinear, after normalisation"},
            "output": "logits, one per class",
        }
    manifest |= {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": host_name(),
        "versions": _versions(host_target(format_of(artifact), "fp32")),
    }
    manifest |= extra
    write_text(artifact.path.with_suffix(".json"), json.dumps(manifest, indent=2) + "\n")
    return manifest


def _versions(target: Target) -> dict[str, str]:
    """Versions of what made and ran the file."""
    tools = {
        "onnxruntime": ("onnx", "onnxruntime"),
        "litert": ("litert-torch", "ai-edge-quantizer", "ai-edge-litert"),
        "executorch": ("executorch", "torchao"),
        "openvino": ("onnx", "openvino", "nncf"),
    }[target.runtime]
    found = {}
    for name in ("nasbench-hw", "torch", *tools):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
