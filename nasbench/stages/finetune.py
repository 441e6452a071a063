"""Fine-tuning: a network with inherited weights is trained further on its own, with the supernet as its teacher."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

from hardware_profiles.paths import write_text
from nasbench.stages.base import Candidate, StageContext
from nasbench.stages.training import TrainingOptions, TrainingStage, clear
from nasbench.training import predict_logits, sandwich_ends, subnet_teacher
from nasbench.training.network import Teacher, check_distillation

if TYPE_CHECKING:
    from torch import Tensor

    from search_spaces.supernet import Supernet


class FineTune(TrainingStage):
    """Trains a float network on the task's training images.

    Where the run has a supernet, its largest architecture, with calibrated statistics, is the teacher. The training
    history is left in `NAME-finetune.json`. A run that was killed continues from its checkpoint.

    Args:
        epochs: passes over the training images.
        lr: peak learning rate.
        batch_size: images a step.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        weight_decay: on matrices and kernels.
        label_smoothing: share of the target that is uniform.
        distillation_weight: of the teacher in the loss, 0..1; the labels have the rest.
        temperature: softens the outputs of teacher and network.
    """

    def __init__(
        self,
        *,
        epochs: int = 3,
        lr: float = 0.1,
        distillation_weight: float = 0.5,
        temperature: float = 1.0,
        **training: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **training)
        check_distillation(distillation_weight, temperature)
        self.distillation_weight = distillation_weight
        self.temperature = temperature
        self._asked: tuple[Supernet, Tensor] | None = None

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with a trained copy of its network.

        Raises:
            UserError: a loss that is no longer finite, or a checkpoint that cannot be read.
        """
        network = copy.deepcopy(candidate.network)
        assert network is not None
        checkpoint = context.directory / f"{candidate.name}-finetune.safetensors"
        history = self.train(
            network,
            context,
            checkpoint,
            teacher=self._teacher(context),
            distillation_weight=self.distillation_weight,
            temperature=self.temperature,
        )
        write_text(context.directory / f"{candidate.name}-finetune.json", json.dumps(history, indent=1) + "\n")
        # The runner keeps the network; a second fine-tuning of it must not take this one's state for its own.
        clear([checkpoint])
        return replace(candidate, network=network, metrics={})

    def _teacher(self, context: StageContext) -> Teacher | Tensor | None:
        """The largest architecture of the run's supernet; what it says of images that never change is asked once."""
        if context.supernet is None or not self.distillation_weight:
            return None
        if self._asked is not None and self._asked[0] is context.supernet:
            return self._asked[1]
        _, largest = sandwich_ends(context.space)
        teacher = subnet_teacher(context.supernet, largest, context.task)
        if context.task.augments:
            return teacher
        self._asked = context.supernet, predict_logits(teacher, context.task, context.task.split("train").images)
        return self._asked[1]
