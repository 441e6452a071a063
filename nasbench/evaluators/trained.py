"""Accuracy of architectures that are each trained from scratch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Unpack

import numpy as np
import torch

from nasbench.archive import arch_text
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.tasks.base import Task
from nasbench.training.checkpoint import load_weights, save_weights
from nasbench.training.evaluation import evaluate_network
from nasbench.training.network import train_network
from nasbench.training.recipe import Recipe, RecipeOptions
from search_spaces import Archs, SearchSpace, UserError

if TYPE_CHECKING:
    from torch import nn

_FOLDER = "trained"


class TrainEvaluator(Evaluator):
    """Builds each architecture, trains it on the training split, and judges it on the validation split.

    The fidelity `epochs` stops the training of a row early. Training goes on from there when the same architecture is
    asked for with more epochs, as successive halving does, to the weights of a training that was never stopped: the
    schedule is always that of all epochs. A training that was killed goes on from its checkpoint. Initialisation, order
    and augmentation come from `seed` alone, so that a value depends on nothing but the architecture. A row whose
    training breaks down is `FAILED`.

    Args:
        space: that the architectures come from.
        task: gives training and validation images.
        directory: of the run; checkpoints lie in `trained/`, of finished networks their weights. None keeps none.
        epochs: of full fidelity.
        seed: of initialisation and training.
        batch_size, lr, optimizer, momentum, weight_decay, warmup, clip_norm, label_smoothing, schedule, ema,
            precision, accumulate, device: as in `nasbench.training.train_network`.

    Example:
        [evaluator]
        name = "train"
        epochs = 12
        samples = 0
    """

    metrics = ("accuracy",)
    fidelities = ("epochs",)
    options_of: ClassVar[type[Any]] = Recipe

    def __init__(
        self,
        space: SearchSpace,
        task: Task,
        directory: Path | None,
        *,
        device: str = "auto",
        seed: int = 0,
        **recipe: Unpack[RecipeOptions],
    ) -> None:
        try:
            self.recipe = Recipe(**recipe)  # told now, not by the first row
        except UserError as error:
            raise UserError(f"evaluator.{error}") from error
        if self.recipe.epochs < 1:
            raise UserError(f"evaluator.epochs = {self.recipe.epochs}: expected 1 or more")
        self.space = space
        self.task = task
        self.folder = directory / _FOLDER if directory else None
        self.epochs = self.recipe.epochs
        self.device = device
        self.seed = seed

    @classmethod
    def check_fidelity(cls, options: Mapping[str, Any], name: str, values: Sequence[float]) -> None:
        full = options["epochs"]
        if wrong := [value for value in values if not (float(value).is_integer() and 1 <= value < full)]:
            raise UserError(
                f"the strategy asks for {', '.join(f'{v:g}' for v in values)} epochs and for all, which are "
                f"evaluator.epochs = {full}: those before must be whole numbers from 1 to {full - 1}, not {wrong[0]:g}"
            )

    def evaluate(self, proposals: Proposals) -> Evaluation:
        n = len(proposals)
        values, seconds = np.full((n, 1), np.nan), np.zeros(n)
        status = np.full(n, Status.OK, dtype=np.uint8)
        messages: dict[int, str] = {}
        for row, arch in enumerate(self.space.canonical(proposals.archs)):
            start = time.perf_counter()
            try:
                values[row] = self._accuracy(arch, int(proposals.fidelity_of(row).get("epochs", self.epochs)))
            except (UserError, RuntimeError, ValueError, ArithmeticError) as error:
                status[row] = Status.FAILED
                messages[row] = f"{type(error).__name__}: {error}"
            seconds[row] = time.perf_counter() - start
        return Evaluation(values, status, seconds=seconds, messages=messages)

    def extract(self, arch: Archs) -> nn.Module:
        """The network of one architecture `(K,)`, trained at full fidelity; from its weights where these are kept."""
        return self._trained(self.space.canonical(arch[None])[0], self.epochs)

    def _accuracy(self, arch: Archs, epochs: int) -> float:
        if not 1 <= epochs <= self.epochs:
            raise ValueError(f"fidelity epochs = {epochs}: expected 1..{self.epochs}, the evaluator's own")
        network = self._trained(arch, epochs)
        return evaluate_network(network, self.task, "val", self._shape(network))

    def _shape(self, network: nn.Module) -> tuple[int, int, int]:
        shape: tuple[int, int, int] = getattr(network, "input_shape", self.space.input_shape)
        return shape

    def _trained(self, arch: Archs, epochs: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            network = self.space.build(arch)
        checkpoint = finished = None
        if self.folder is not None:
            name = hashlib.sha256(arch_text(arch).encode()).hexdigest()[:20]
            checkpoint, finished = self.folder / f"{name}-training.safetensors", self.folder / f"{name}.safetensors"
        if finished is not None and finished.is_file() and epochs == self.epochs:
            load_weights(network, finished)
            network.eval()
            return network
        train_network(
            network,
            self.task,
            self._shape(network),
            **asdict(self.recipe),
            device=self.device,
            until=epochs,
            seed=self.seed,
            checkpoint=checkpoint,
        )
        if finished is not None and checkpoint is not None and epochs == self.epochs:
            save_weights(finished, network)
            with suppress(FileNotFoundError):
                checkpoint.unlink()
        return network
