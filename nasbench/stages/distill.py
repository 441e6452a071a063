"""Distillation: a network is trained to say, and to see, what a teacher does."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from torch import nn

from hardware_profiles.paths import write_text
from nasbench.stages.base import Candidate, StageContext
from nasbench.stages.teachers import SUPERNET, make_teacher
from nasbench.stages.training import TrainingOptions, TrainingStage, clear
from nasbench.training import Recipe, evaluate_network
from nasbench.training.distillation import Imitation
from nasbench.training.network import check_distillation
from search_spaces.errors import UserError


class Distill(TrainingStage):
    """Trains a float network on labels and what a teacher says (logits), sees (features) and attends to.

    The loss is `(1 - logits_weight)` times the labels' and `logits_weight` times the teacher's at `temperature` (Hinton
    et al. 2015), and, where their weights are above 0, a FitNets term with learned 1x1 projections, and attention
    transfer: over feature maps, and over attention itself where both are transformers. `NAME-distill.json` tells the
    history and the teacher's accuracy. A run that was killed continues from its checkpoint.

    Args:
        teacher: `supernet` (its largest network), a reference network (`resnet18@32`), or `module:function` of your
            own, called with `(input_shape, num_classes)`; a list of them is an ensemble.
        teacher_weights: checkpoint of the teacher, or a list as long as that of teachers.
        teacher_epochs, teacher_lr: to train a reference network without weights, on labels.
        logits_weight: of the teacher's outputs against the labels, 0..1.
        temperature: softens both outputs.
        feature_weight: of the squared difference of features, relative to the teacher's; 0 leaves it out.
        attention_weight: of the squared distance of attention maps of unit length; 0 leaves it out.
        layers: pairs of layers to compare, (of the network, of the teacher); by default the last at each resolution.
        epochs, lr, batch_size, optimizer, weight_decay, label_smoothing: as in `finetune`.
    """

    def __init__(
        self,
        *,
        teacher: str | list[str] = SUPERNET,
        teacher_weights: str | list[str] = "",
        teacher_epochs: int = 0,
        teacher_lr: float = 0.1,
        logits_weight: float = 0.7,
        temperature: float = 4.0,
        feature_weight: float = 0.0,
        attention_weight: float = 0.0,
        layers: Sequence[tuple[str, str]] = (),
        epochs: int = 5,
        lr: float = 0.05,
        **training: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, **training)
        check_distillation(logits_weight, temperature)
        for key, value in (("feature_weight", feature_weight), ("attention_weight", attention_weight)):
            if not 0 <= value < float("inf"):
                raise UserError(f"{key} = {value}: expected 0 or more")
        if not (logits_weight or feature_weight or attention_weight):
            raise UserError("logits_weight, feature_weight and attention_weight are all 0: nothing is distilled")
        self.teachers = [teacher] if isinstance(teacher, str) else list(teacher)
        self.teacher_weights = [teacher_weights] if isinstance(teacher_weights, str) else list(teacher_weights)
        self.teacher_weights = self.teacher_weights if any(self.teacher_weights) else []
        if not self.teachers:
            raise UserError("teacher = []: expected at least one")
        if self.teacher_weights and len(self.teacher_weights) != len(self.teachers):
            raise UserError(f"teacher_weights: {len(self.teacher_weights)} files for {len(self.teachers)} teachers")
        if len(self.teachers) > 1 and (feature_weight or attention_weight):
            raise UserError("feature_weight, attention_weight: an ensemble teaches by its logits alone")
        Recipe(epochs=teacher_epochs, batch_size=self.recipe.batch_size, lr=teacher_lr)
        self.teacher_training = {"epochs": teacher_epochs, "lr": teacher_lr, "batch_size": self.recipe.batch_size}
        self.logits_weight = logits_weight
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.attention_weight = attention_weight
        self.layers = [(s, t) for s, t in layers]
        self._made: tuple[StageContext, nn.Module, tuple[int, ...], float] | None = None

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with a trained copy of its network.

        Raises:
            UserError: a teacher that there is not or that is untrained, layers that cannot be compared, or a loss that
                is no longer finite (the last good state is kept).
        """
        network = copy.deepcopy(candidate.network)
        assert network is not None
        task, shape = context.task, context.input_shape
        teacher, teacher_shape, accuracy = self._teacher(context)
        imitation = Imitation(
            network,
            teacher,
            feature_weight=self.feature_weight,
            attention_weight=self.attention_weight,
            layers=self.layers,
            sample=task.prepare(task.split("train").images[:2]),
            student_shape=shape,
            teacher_shape=teacher_shape,
        )
        checkpoint = context.directory / f"{candidate.name}-distill.safetensors"
        history = self.train(
            imitation,
            context,
            checkpoint,
            teacher=imitation.ask,
            distillation_weight=self.logits_weight,
            temperature=self.temperature,
            auxiliary=imitation.loss if self.feature_weight or self.attention_weight else None,
        )
        said = {"teacher": self.teachers, "teacher_accuracy": accuracy, "layers": imitation.pairs, "history": history}
        write_text(context.directory / f"{candidate.name}-distill.json", json.dumps(said, indent=1) + "\n")
        clear([checkpoint])
        return replace(candidate, network=imitation.release(), metrics={})

    def _teacher(self, context: StageContext) -> tuple[nn.Module, tuple[int, ...], float]:
        """Made once for all candidates of a task and supernet."""
        if self._made is not None:
            before, network, shape, accuracy = self._made
            if before.task is context.task and before.supernet is context.supernet:
                return network, shape, accuracy
        network, shape = make_teacher(self.teachers, self.teacher_weights, self.teacher_training, context)
        accuracy = evaluate_network(network, context.task, "val", shape)
        self._made = context, network, shape, accuracy
        return network, shape, accuracy
