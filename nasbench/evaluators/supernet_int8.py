"""Accuracy of architectures before and after int8 quantisation, with the weights of a trained supernet."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from nasbench.evaluators.base import Evaluation, Proposals, Status
from nasbench.evaluators.supernet import SupernetEvaluator
from nasbench.stages.artifacts import run_artifact
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.stages.quantize import Quantize
from nasbench.tasks.base import Task
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs
from search_spaces.supernet import Supernet


class QuantisedSupernetEvaluator(SupernetEvaluator):
    """As `SupernetEvaluator`, and `accuracy_int8`: of the same network after static post-training quantisation.

    The network is extracted, converted to ONNX, quantised as the stage `quantize` does it by default, and judged on the
    same validation images. That takes seconds a network: with `evaluator.samples` a predictor learns it from a sample.
    Networks that cannot be quantised are `FAILED`.

    Args:
        quantisation_images: training images that the ranges of activations are taken from.
        calibration_images, validation_images, batch_size, seed: see `SupernetEvaluator`.
    """

    metrics = ("accuracy", "accuracy_int8")

    def __init__(
        self,
        space: SearchSpace,
        task: Task,
        supernet: Supernet,
        *,
        quantisation_images: int = 128,
        calibration_images: int = 500,
        validation_images: int = 0,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(
            space,
            task,
            supernet,
            calibration_images=calibration_images,
            validation_images=validation_images,
            batch_size=batch_size,
            seed=seed,
        )
        self.stage = Quantize(images=quantisation_images)
        self.seed = seed

    def evaluate(self, proposals: Proposals) -> Evaluation:
        found = super().evaluate(proposals)
        values = np.column_stack([found.values[:, 0], np.full(len(proposals), np.nan)])
        status, messages = found.status.copy(), dict(found.messages)
        seconds = np.zeros(len(proposals)) if found.seconds is None else found.seconds.copy()
        images = proposals.fidelity.get("images")
        for row in np.flatnonzero(status == Status.OK).tolist():
            start = time.perf_counter()
            count = None if images is None or np.isnan(images[row]) else int(images[row])
            try:
                values[row, 1] = self._quantised(proposals.archs[row], count)
            except (UserError, RuntimeError, ValueError) as error:
                status[row], values[row] = Status.FAILED, np.nan
                messages[row] = f"quantised: {type(error).__name__}: {error}"
            seconds[row] += time.perf_counter() - start
        return Evaluation(values, status, seconds=seconds, messages=messages)

    def _quantised(self, arch: Archs, images: int | None) -> float:
        """Accuracy on the validation images, or the first so many, of the network after quantisation."""
        network = self.extract(arch)
        shape = getattr(network, "input_shape", self.space.input_shape)
        with tempfile.TemporaryDirectory() as folder:
            context = StageContext(self.task, self.space, Path(folder), self.seed, input_shape=shape)
            candidate = self.stage.run(Candidate("network", arch, Form.FLOAT, network=network), context)
            assert candidate.artifact is not None
            logits = run_artifact(candidate.artifact, self.task, self.validation.images[:images])
        return float(self.task.accuracy(torch.from_numpy(logits), self.validation.labels[:images]))
