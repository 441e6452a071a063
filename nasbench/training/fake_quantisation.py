"""Training with rounding in the loop, by torch's own fake quantisers (Jacob et al., CVPR 2018).

Every convolution and linear layer reads its input and its weights as integers would hold them; gradients pass through
the rounding. Weights are symmetric with one scale per output channel, activations affine with one range per tensor, as
the runtimes' quantisers take them. Normalisation stays apart: with symmetric scales per channel, folding it afterwards
only multiplies them, so what was learned survives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    disable_observer,
)
from torch.nn.utils import parametrize

from search_spaces.errors import UserError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class FakeQuantised(nn.Module):
    """A network whose layers round their weights and inputs; `release` gives the float network with what it learned.

    Args:
        network: changed in place until `release`.
        weight_bits, activation_bits: 2 to 8.
        sample: a batch `(n, *input_shape)` that first ranges are taken from.

    Raises:
        UserError: bits out of range, or no layer that could be quantised.
    """

    def __init__(self, network: nn.Module, weight_bits: int, activation_bits: int, sample: Tensor) -> None:
        super().__init__()
        for key, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
            if not 2 <= bits <= 8:
                raise UserError(f"{key} = {bits}: expected 2 to 8")
        layers = {name: m for name, m in network.named_modules() if isinstance(m, LAYERS)}
        if not layers:
            raise UserError(f"{type(network).__name__}: has no convolution or linear layer to quantise")
        self.network = network
        self.inputs = nn.ModuleDict()
        self._hooks: list[Any] = []
        for name, layer in layers.items():
            high = 2 ** (weight_bits - 1) - 1
            weights = FakeQuantize.with_args(
                observer=MovingAveragePerChannelMinMaxObserver,
                averaging_constant=1.0,  # of the weights as they are, not as they were
                quant_min=-high,
                quant_max=high,
                dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )()
            parametrize.register_parametrization(layer, "weight", weights)
            rounded = FakeQuantize.with_args(
                observer=MovingAverageMinMaxObserver,
                quant_min=0,
                quant_max=2**activation_bits - 1,
                dtype=torch.quint8,
                qscheme=torch.per_tensor_affine,
            )()
            self.inputs[name.replace(".", "/")] = rounded
            self._hooks.append(layer.register_forward_pre_hook(_rounding(rounded)))
        mode = network.training
        network.eval()  # a first pass moves no statistics
        with torch.no_grad():
            self(sample)
        network.train(mode)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        return logits

    def freeze(self) -> None:
        """Take no more ranges, as for evaluation."""
        self.apply(disable_observer)

    def release(self) -> nn.Module:
        """The network with its trained float weights, rounding no more."""
        for hook in self._hooks:
            hook.remove()
        for layer in self.network.modules():
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        return self.network


def _rounding(rounded: nn.Module) -> Any:
    def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(inputs[0]), *inputs[1:])

    return hook
