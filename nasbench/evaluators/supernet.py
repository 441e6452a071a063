"""Accuracy of architectures with the weights of a trained supernet."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.tasks.base import Split, Task
from nasbench.training.evaluation import batches, fixed_subset, subnet_accuracy
from nasbench.training.precision import device_of
from nasbench.training.workers import workers
from search_spaces import Archs, SearchSpace, UserError
from search_spaces.supernet import Supernet, calibrate

if TYPE_CHECKING:
    from torch import nn


class SupernetEvaluator(Evaluator):
    """Accuracy on validation images, with normalisation statistics calibrated for each architecture.

    The images are chosen once, from `seed`: a value depends on the architecture and the supernet's weights alone, not
    on the order or the company in which it is asked for. A row whose evaluation raises, or whose logits are not finite,
    is `FAILED`. The fidelity `images` sets the number of validation images of a row. What was judged once is not judged
    again, as long as the supernet's weights stay as they are.

    Args:
        space: that the architectures come from.
        task: gives training images for calibration and validation images to judge by.
        supernet: trained.
        calibration_images: training images for the statistics; 0 for all.
        validation_images: 0 for all.
        batch_size: images at a time.
        seed: of the choice of images.
    """

    metrics: tuple[str, ...] = ("accuracy",)
    fidelities = ("images",)

    def __init__(
        self,
        space: SearchSpace,
        task: Task,
        supernet: Supernet,
        *,
        calibration_images: int = 500,
        validation_images: int = 0,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        for key, value, least in (
            ("calibration_images", calibration_images, 0),
            ("validation_images", validation_images, 0),
            ("batch_size", batch_size, 2),
        ):
            if value < least:
                raise UserError(f"evaluator.{key} = {value}: expected {least} or more")
        self.space = space
        self.task = task
        self.network = supernet
        self.batch_size = batch_size
        self.preferred_batch = torch.get_num_threads()
        self.calibration = fixed_subset(task.split("train"), calibration_images, seed).images
        self.validation = fixed_subset(task.split("val"), validation_images, seed)
        self._known: dict[tuple[bytes, int], float] = {}  # by architecture and number of validation images
        self._weights: list[int] = []

    def evaluate(self, proposals: Proposals) -> Evaluation:
        n = len(proposals)
        values, seconds = np.full((n, 1), np.nan), np.zeros(n)
        status = np.full(n, Status.OK, dtype=np.uint8)
        messages: dict[int, str] = {}
        archs = self.space.canonical(proposals.archs)
        weights = [parameter._version for parameter in self.network.parameters()]  # counts changes in place
        if weights != self._weights:
            self._known, self._weights = {}, weights

        def evaluate_row(row: int) -> None:
            validation = self.validation
            start = time.perf_counter()
            try:
                if "images" in (fidelity := proposals.fidelity_of(row)):
                    count = int(fidelity["images"])
                    validation = Split(validation.images[:count], validation.labels[:count])
                key = archs[row].tobytes(), len(validation)
                accuracy = self._known.get(key)
                if accuracy is None:
                    accuracy = subnet_accuracy(
                        self.network, archs[row], self.task, self.calibration, validation, self.batch_size
                    )
                if math.isnan(accuracy):
                    raise FloatingPointError("the logits are not finite")
                values[row] = self._known[key] = accuracy
            except (UserError, RuntimeError, ValueError, ArithmeticError) as error:
                status[row] = Status.FAILED
                messages[row] = f"{type(error).__name__}: {error}"
            seconds[row] = time.perf_counter() - start

        with workers(n) as executor:
            list(executor.map(evaluate_row, range(n)))
        return Evaluation(values, status, seconds=seconds, messages=messages)

    def extract(self, arch: Archs) -> nn.Module:
        """The stand-alone network of one architecture `(K,)` with the statistics that it is judged with."""
        device = device_of(self.network)
        stats = calibrate(self.network, arch, batches(self.task, self.calibration, self.batch_size, device=device))
        return self.network.extract(arch, stats).cpu()
