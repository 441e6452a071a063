"""Stages that train: the keys of their training, and training that goes on from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from nasbench.stages.base import Form, Stage, StageContext
from nasbench.training import predict_logits, train_network
from nasbench.training.evaluation import fit_size
from nasbench.training.loop import History
from nasbench.training.network import Teacher, check_distillation
from nasbench.training.recipe import Optimizer, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn


class TrainingOptions(TypedDict, total=False):
    """The keys of `TrainingStage` that have one default for all stages."""

    batch_size: int
    optimizer: Optimizer
    weight_decay: float
    label_smoothing: float


class TrainingStage(Stage):
    """A stage that trains a float network on the task's training images.

    Args:
        epochs: passes over the training images.
        lr: peak learning rate.
        batch_size: images a step.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        weight_decay: on matrices and kernels.
        label_smoothing: share of the target that is uniform.

    Raises:
        UserError: a value out of range.
    """

    accepts = frozenset({Form.FLOAT})
    produces = Form.FLOAT

    def __init__(
        self,
        *,
        epochs: int,
        lr: float,
        batch_size: int = 64,
        optimizer: Optimizer = "sgd",
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
    ) -> None:
        self.recipe = Recipe(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
        )

    def train(
        self,
        network: nn.Module,
        context: StageContext,
        checkpoint: Path,
        *,
        teacher: Teacher | Tensor | None = None,
        distillation_weight: float = 0.0,
        temperature: float = 1.0,
        auxiliary: Callable[[Tensor], Tensor] | None = None,
        seed: int | None = None,
    ) -> History:
        """Train in place, going on from the checkpoint if there is one; it is left for `clear`.

        Args:
            teacher, distillation_weight, temperature, auxiliary: as in `train_network`.
            seed: the context's unless given.

        Raises:
            UserError: a loss that is no longer finite (the last good state is kept), or a checkpoint of something else.
        """
        return train_network(
            network,
            context.task,
            context.input_shape,
            **asdict(self.recipe),
            teacher=teacher,
            distillation_weight=distillation_weight,
            temperature=temperature,
            auxiliary=auxiliary,
            seed=context.seed if seed is None else seed,
            checkpoint=checkpoint,
        )


class TuningOptions(TrainingOptions, total=False):
    """The keys of `TuningStage`."""

    epochs: int
    lr: float
    distillation_weight: float


class TuningStage(TrainingStage):
    """A stage that changes a network and trains it, with its own former self as the teacher.

    Args:
        epochs: of training after each change; 0 trains nothing.
        lr: peak learning rate.
        distillation_weight: in the loss, 0..1, of what the network said before the stage; the labels have the rest.
    """

    def __init__(
        self,
        *,
        epochs: int = 1,
        lr: float = 0.02,
        distillation_weight: float = 0.5,
        **training: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **training)
        check_distillation(distillation_weight, 1.0)
        self.distillation_weight = distillation_weight

    def former(self, network: nn.Module, context: StageContext) -> Teacher | Tensor | None:
        """What the network says of the training images, as a teacher; asked once where they never change."""
        if not self.recipe.epochs or not self.distillation_weight:
            return None
        task, shape = context.task, context.input_shape
        network.eval()
        if not task.augments:
            return predict_logits(network, task, task.split("train").images, shape)
        return lambda x: network(fit_size(x, shape))

    def tune(
        self,
        network: nn.Module,
        teacher: Teacher | Tensor | None,
        context: StageContext,
        checkpoint: Path,
        seed: int | None = None,
    ) -> History:
        """As `train`, by a teacher of `former`; nothing where there are no epochs."""
        if not self.recipe.epochs:
            return []
        weight = self.distillation_weight
        return self.train(network, context, checkpoint, teacher=teacher, distillation_weight=weight, seed=seed)


def clear(files: Iterable[Path]) -> None:
    """Delete what a stage kept to continue from; the runner keeps its result."""
    for file in files:
        file.unlink(missing_ok=True)


def cubic_share(step: int, steps: int) -> float:
    """How much of the way is gone after `step` of `steps`: fast at first, then slower (Zhu and Gupta 2017, eq. 1)."""
    return 1.0 - (1.0 - step / steps) ** 3
