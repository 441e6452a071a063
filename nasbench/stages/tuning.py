"""Training between the steps of a stage that changes a network: with its own former self as teacher."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.stages.base import StageContext
from nasbench.training import predict_logits, train_network
from nasbench.training.network import Teacher, check_distillation
from nasbench.training.recipe import Recipe
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Tuning:
    """How a network is trained after each step.

    Args:
        epochs: passes over the training images; 0 for none.
        lr, batch_size, weight_decay: of SGD with Nesterov momentum.
        distillation_weight: in the loss, 0..1, of what the network said before the stage; the labels have the rest.
    """

    epochs: int
    lr: float
    batch_size: int
    weight_decay: float
    distillation_weight: float

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UserError(f"epochs = {self.epochs}: expected 0 or more")
        if self.epochs:
            Recipe(self.epochs, self.batch_size, self.lr, weight_decay=self.weight_decay)  # refuses what is wrong
        check_distillation(self.distillation_weight, 1.0)

    def teacher(self, network: nn.Module, context: StageContext) -> Teacher | Tensor | None:
        """What the network says of the training images; asked once where they never change."""
        if not self.epochs or not self.distillation_weight:
            return None
        task, shape = context.task, context.input_shape
        if not task.augments:
            return predict_logits(network.eval(), task, task.split("train").images, shape)
        from nasbench.training.evaluation import fit_size

        return lambda x: network(fit_size(x, shape))

    def train(
        self, network: nn.Module, teacher: Teacher | Tensor | None, context: StageContext, seed: int, checkpoint: Path
    ) -> None:
        """Train in place, going on from the checkpoint if there is one; it is left for `clear`.

        Raises:
            UserError: a loss that is no longer finite.
        """
        if not self.epochs:
            return
        train_network(
            network,
            context.task,
            context.input_shape,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            weight_decay=self.weight_decay,
            label_smoothing=0.0,
            teacher=teacher,
            distillation_weight=self.distillation_weight,
            seed=seed,
            checkpoint=checkpoint,
        )


def clear(files: Iterable[Path]) -> None:
    """Delete what a stage kept to continue from; the runner keeps its result."""
    for file in files:
        file.unlink(missing_ok=True)


def cubic_share(step: int, steps: int) -> float:
    """How much of the way is gone after `step` of `steps`: fast at first, then slower (Zhu and Gupta 2017, eq. 1)."""
    return 1.0 - (1.0 - step / steps) ** 3
