"""Networks of layered spaces, as plain static modules."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn


class LayeredNetwork(nn.Sequential):
    """One network of a layered space: the layers that it has, by name.

    Takes images `(batch, *input_shape)`, gives logits `(batch, classes)`.
    """

    def __init__(self, layers: OrderedDict[str, nn.Module], input_shape: tuple[int, int, int] = (0, 0, 0)) -> None:
        super().__init__(layers)
        self.input_shape = input_shape
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
