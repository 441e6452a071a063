"""SqueezeNet (Iandola et al., 2016): fire modules squeeze by 1x1 and expand by 1x1 and 3x3 side by side."""

from __future__ import annotations

from torch import nn

from search_spaces.mobilenet_v3_network import GlobalAvgPool
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import Branches, conv, initialise

FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


def _conv(cin: int, cout: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, kernel), nn.ReLU())


def squeezenet(
    input_shape: InputShape, num_classes: int, *, stem: int, stem_kernel: int, pools: tuple[int, ...]
) -> nn.Module:
    """A stem of `stem` channels and eight fire modules; max pooling before the modules whose index is in `pools`."""
    layers: list[nn.Module] = [nn.Conv2d(input_shape[0], stem, stem_kernel, 2), nn.ReLU()]
    channels = stem
    for i, (squeeze, expand) in enumerate(FIRES):
        if i in pools:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        layers += [_conv(channels, squeeze, 1), Branches(_conv(squeeze, expand, 1), _conv(squeeze, expand, 3))]
        channels = 2 * expand
    head = [nn.Dropout(0.5), conv(channels, num_classes), nn.ReLU(), GlobalAvgPool(), nn.Flatten()]
    return initialise(nn.Sequential(*layers, *head))
