"""Networks of a joint space, judged by the files that they would be."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hardware_profiles import Artifact, Meter, OnnxConverter, Target, converter_for, load_target
from hardware_profiles.measuring import measure_alone
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.supernet import SupernetEvaluator
from nasbench.joint.space import JointSpace
from nasbench.pruning.importance import channel_scores, recalibrate
from nasbench.stages.artifacts import run_artifact
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.stages.quantize import Quantize
from nasbench.tasks.base import Split, Task
from search_spaces import UserError
from search_spaces.base import Archs
from search_spaces.supernet import Supernet

if TYPE_CHECKING:
    from torch import nn


class JointEvaluator(Evaluator):
    """Validation accuracy, latency and size of the ONNX file of each architecture of a `JointSpace`.

    The whole network is taken from the supernet, its inner channels are ranked by their weights and the least taken
    out, statistics are taken anew, and it is written as fp32 or quantised as the stage `quantize` does it. The files of
    a batch are measured together, so that passes over them are interleaved. One predictor per metric learns from all of
    them, with widths and bits among its inputs: what fp32 networks teach of an architecture counts for its int8 form.

    Args:
        space: a `JointSpace`.
        task: gives the images.
        supernet: trained, of that space.
        targets: of the experiment; the first, which reads ONNX, is measured.
        meter_for: what measures on it.
        calibration_images: training images for the statistics.
        quantisation_images: training images for the ranges of activations.
        validation_images: 0 for all.
        seed: of the choice of images.

    Raises:
        UserError: another kind of space, one whose networks cannot be pruned as it says, or a first target that takes
            other files than ONNX.
    """

    metrics = ("accuracy", "latency_ms", "file_bytes")
    fidelities = ()
    preferred_batch = 8

    def __init__(
        self,
        space: JointSpace,
        task: Task,
        supernet: Supernet,
        targets: Mapping[str, Target],
        meter_for: Callable[[Target], Meter],
        *,
        calibration_images: int = 256,
        quantisation_images: int = 64,
        validation_images: int = 0,
        seed: int = 0,
    ) -> None:
        if not isinstance(space, JointSpace):
            raise UserError(f"evaluator.name = 'joint': needs space.name = 'joint', got space {space.name!r}")
        space.build(space.references["smallest"])  # told now, not after the supernet was trained
        self.target = next(iter(targets.values()))
        if converter_for(self.target).format != "onnx":
            raise UserError(f"evaluator.name = 'joint': measures ONNX files, {self.target.name} takes others")
        self.whole = SupernetEvaluator(
            space, task, supernet, calibration_images=calibration_images, validation_images=validation_images, seed=seed
        )
        self.space, self.task, self.network, self.seed = space, task, supernet, seed
        self.meter = meter_for(self.target)
        self.stage = Quantize(images=quantisation_images)

    @classmethod
    def alone(cls, options: Mapping[str, Any], targets: Mapping[str, Target]) -> bool:
        return next(iter(targets.values())).profile.local

    def evaluate(self, proposals: Proposals) -> Evaluation:
        n, start = len(proposals), time.perf_counter()
        values = np.full((n, len(self.metrics)), np.nan)
        messages: dict[int, str] = {}
        files: dict[int, Artifact] = {}
        with tempfile.TemporaryDirectory() as folder:
            for row, arch in enumerate(self.space.canonical(proposals.archs)):
                try:
                    files[row] = self._file(arch, Path(folder) / str(row))
                    values[row, 0] = self._accuracy(files[row])
                    values[row, 2] = files[row].file_bytes
                except (UserError, RuntimeError, ValueError) as error:
                    messages[row] = f"{type(error).__name__}: {error}"
            taken = measure_alone(self.meter, list(files.values()), self.target)
        for row, measurement in zip(files, taken, strict=True):
            if measurement.error:
                messages[row] = measurement.error
            else:
                values[row, 1] = measurement.latency_ms
        failed = np.isnan(values).any(axis=1)
        values[failed] = np.nan
        status = np.where(failed, Status.FAILED, Status.OK).astype(np.uint8)
        seconds = np.full(n, (time.perf_counter() - start) / max(n, 1))
        return Evaluation(values, status, seconds=seconds, messages=messages)

    def extract(self, arch: Archs) -> nn.Module:
        """The float network of one architecture `(K,)`, pruned, with statistics of its own."""
        whole = self.whole.extract(arch)
        shape = getattr(whole, "input_shape", self.space.input_shape)
        empty = Split(self.whole.calibration[:0], torch.empty(0, dtype=torch.long))  # weights rank themselves
        network = self.space.pruned(
            whole, arch, lambda net, groups: channel_scores(net, groups, "l1", self.task, empty, shape)[0]
        )
        labels = torch.zeros(len(self.whole.calibration), dtype=torch.long)
        recalibrate(network, self.task, Split(self.whole.calibration, labels), shape)
        return network.eval()

    def _file(self, arch: Archs, folder: Path) -> Artifact:
        folder.mkdir()
        network = self.extract(arch)
        shape = getattr(network, "input_shape", self.space.input_shape)
        if self.space.bits_of(arch[None])[0] == 32:
            return OnnxConverter().convert(network, load_target("host:fp32"), shape, folder / "fp32.onnx")
        context = StageContext(self.task, self.space, folder, self.seed, input_shape=shape)
        made = self.stage.run(Candidate("network", arch, Form.FLOAT, network=network), context).artifact
        assert made is not None
        return replace(made, name=folder.name)

    def _accuracy(self, artifact: Artifact) -> float:
        logits = torch.from_numpy(run_artifact(artifact, self.task, self.whole.validation.images))
        return float(self.task.accuracy(logits, self.whole.validation.labels))
