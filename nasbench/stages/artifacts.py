"""Runtime artifacts: running them on images, and the manifest that says what they take and give."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor

from hardware_profiles.meter import Artifact
from hardware_profiles.paths import write_text
from nasbench.tasks.base import SplitName, Task
from nasbench.training.evaluation import batches
from nasbench.training.workers import in_parts
from search_spaces.errors import UserError


def run_artifact(artifact: Artifact, task: Task, images: Tensor) -> NDArray[np.float32]:
    """Logits `(n, classes)` float32 of stored images `(n, c, h, w)`, by ONNX Runtime in the artifact's own batch size.

    Images are shared out to as many threads as torch has, each of which runs whole inferences.

    Raises:
        UserError: a file that ONNX Runtime cannot read or run, or of another format.
    """
    if artifact.format != "onnx":
        raise UserError(f"{artifact.path}: format {artifact.format!r}, only ONNX files can be run here")
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


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def evaluate_artifact(artifact: Artifact, task: Task, split_name: SplitName) -> float:
    """The task's accuracy (0..1) of a runtime artifact on a whole split.

    Raises:
        UserError: a file that ONNX Runtime cannot read or run.
    """
    split = task.split(split_name)
    return task.accuracy(torch.from_numpy(run_artifact(artifact, task, split.images)), split.labels)


def write_manifest(artifact: Artifact, task: Task, extra: dict[str, Any]) -> Path:
    """Write `NAME.json` beside an artifact: what it takes, what it gives, and what made it; returns its path.

    Raises:
        UserError: the directory cannot be written.
    """
    path = artifact.path.with_suffix(".json")
    manifest = {
        "file": artifact.path.name,
        "sha256": hashlib.sha256(artifact.path.read_bytes()).hexdigest(),
        "format": artifact.format,
        "precision": artifact.precision,
        "task": task.name,
        "classes": list(task.class_names),
        "input_shape": list(artifact.input_shape),
        "preprocessing": task.preprocessing() | {"resize": "bilinear, after normalisation"},
        "output": "logits, one per class",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("nasbench-hw", "torch", "onnx", "onnxruntime")},
    }
    write_text(path, json.dumps(manifest | extra, indent=2) + "\n")
    return path
