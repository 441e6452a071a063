"""Quantisation-aware training: a network learns with its weights and activations rounded."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Unpack

from hardware_profiles.paths import write_text
from nasbench.stages.base import Candidate, StageContext
from nasbench.stages.training import TrainingOptions, TuningStage, clear
from nasbench.training.evaluation import batches
from nasbench.training.fake_quantisation import FakeQuantised
from search_spaces.errors import UserError


class QuantizationAware(TuningStage):
    """Trains a float network through rounded weights and activations; `quantize` or an int8 `export` comes after it.

    The result is the float network with weights that have learned to be rounded, so any runtime's own quantiser takes
    it: ONNX Runtime's, LiteRT's, ExecuTorch's or OpenVINO's. The float network before this stage is the teacher. The
    history is left in `NAME-qat.json`; a run that was killed continues from its checkpoint.

    Args:
        weight_bits, activation_bits: as the quantiser will have them, 2 to 8.
        distillation_weight: of what the float network says in the loss, 0..1.
        epochs, lr, batch_size, optimizer, weight_decay, label_smoothing: as in `finetune`.
    """

    def __init__(
        self,
        *,
        weight_bits: int = 8,
        activation_bits: int = 8,
        epochs: int = 2,
        lr: float = 0.01,
        distillation_weight: float = 0.5,
        **training: Unpack[TrainingOptions],
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, distillation_weight=distillation_weight, **training)
        for key, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if not 2 <= bits <= 8:
                raise UserError(f"{key} = {bits}: expected 2 to 8")
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with a trained copy of its network.

        Raises:
            UserError: no layer to quantise, or a loss that is no longer finite (the last good state is kept).
        """
        assert candidate.network is not None
        task, shape = context.task, context.input_shape
        teacher, network = self.former(candidate.network, context), copy.deepcopy(candidate.network)
        images = task.split("train").images
        sample = next(batches(task, images[: self.recipe.batch_size], self.recipe.batch_size, shape))
        rounding = FakeQuantised(network, self.weight_bits, self.activation_bits, sample)
        checkpoint = context.directory / f"{candidate.name}-qat.safetensors"
        history = self.tune(rounding, teacher, context, checkpoint)
        write_text(context.directory / f"{candidate.name}-qat.json", json.dumps(history, indent=1) + "\n")
        clear([checkpoint])
        learned = copy.deepcopy(candidate.network)
        learned.load_state_dict(rounding.release().state_dict())
        return replace(candidate, network=learned, metrics={})
