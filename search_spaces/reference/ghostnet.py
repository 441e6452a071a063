"""GhostNet (Han et al., CVPR 2020) and GhostNetV2 (Tang et al., NeurIPS 2022)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.mobilenet_v3_network import GlobalAvgPool
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ACTIVATIONS, ConvBnAct, Residual, SqueezeExcite, conv, initialise

# Kernel, hidden channels, output channels, squeeze-and-excitation, stride (GhostNet, table 1).
ROWS = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)
STEM, FEATURES = 16, 1280
FIRST_WITH_ATTENTION = 2  # block of GhostNetV2, from zero


class Ghost(nn.Module):
    """Half of the channels by a 1x1 convolution, the other half from those by a cheap depthwise one.

    With `attention` (GhostNetV2), the output is gated by a long-range attention computed at half the resolution.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        activation: str = "relu",
        attention: bool = False,
        kernel: int | tuple[int, int] = 3,
    ) -> None:
        super().__init__()
        self.cout = cout
        half = math.ceil(cout / 2)
        self.primary = ConvBnAct(cin, half, activation=activation)
        self.cheap = ConvBnAct(half, half, kernel, groups=half, activation=activation)
        self.attention = (
            nn.Sequential(
                nn.AvgPool2d(2),
                ConvBnAct(cin, cout, activation=""),
                ConvBnAct(cout, cout, (1, 5), groups=cout, activation=""),
                ConvBnAct(cout, cout, (5, 1), groups=cout, activation=""),
                nn.Sigmoid(),
            )
            if attention
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        y = torch.cat([primary, self.cheap(primary)], 1)[:, : self.cout]
        if self.attention is None:
            return y
        # As numbers: exporters that follow shapes would take every later one for unknown.
        return y * F.interpolate(self.attention(x), size=[int(s) for s in y.shape[-2:]])


def _bottleneck(cin: int, hidden: int, cout: int, kernel: int, stride: int, se: bool, attention: bool) -> nn.Module:
    layers: list[nn.Module] = [Ghost(cin, hidden, attention=attention)]
    if stride > 1:
        layers.append(ConvBnAct(hidden, hidden, kernel, stride, groups=hidden, activation=""))
    if se:
        layers.append(SqueezeExcite(hidden, make_divisible(hidden * 0.25, 4)))
    layers.append(Ghost(hidden, cout, activation=""))
    shortcut = (
        nn.Sequential(
            ConvBnAct(cin, cin, kernel, stride, groups=cin, activation=""), ConvBnAct(cin, cout, activation="")
        )
        if stride > 1 or cin != cout
        else None
    )
    return Residual(nn.Sequential(*layers), shortcut)


def ghostnet(input_shape: InputShape, num_classes: int, *, attention: bool = False, width: float = 1.0) -> nn.Module:
    """GhostNet, or with `attention` GhostNetV2."""
    channels = make_divisible(STEM * width, 4)
    layers: list[nn.Module] = [ConvBnAct(input_shape[0], channels, 3, 2)]
    hidden = channels
    for index, (kernel, expanded, out, se, stride) in enumerate(ROWS):
        hidden, cout = make_divisible(expanded * width, 4), make_divisible(out * width, 4)
        attends = attention and index >= FIRST_WITH_ATTENTION
        layers.append(_bottleneck(channels, hidden, cout, kernel, stride, se, attends))
        channels = cout
    head = nn.Sequential(
        ConvBnAct(channels, hidden),
        GlobalAvgPool(),
        conv(hidden, FEATURES),
        ACTIVATIONS["relu"](),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(FEATURES, num_classes),
    )
    network = initialise(nn.Sequential(*layers, head))
    for module in network.modules():
        if isinstance(module, Ghost):  # its fan-out is that of both halves
            for layer in module.primary.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / module.cout))
    return network
