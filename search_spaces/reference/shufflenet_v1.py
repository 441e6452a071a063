"""ShuffleNet V1 (Zhang et al., CVPR 2018): grouped 1x1 convolutions with shuffled channels."""

from __future__ import annotations

from torch import nn

from search_spaces.mobilenet_v3_network import GlobalAvgPool
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import Branches, ChannelShuffle, ConvBnAct, Residual, initialise, max_pool

# Channels of the first stage by number of groups (table 1 of the paper); each stage doubles them.
CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
DEPTHS = (4, 8, 4)


class _Main(nn.Sequential):
    """Grouped 1x1 convolution, shuffle, depthwise 3x3, grouped 1x1 convolution."""

    def __init__(self, cin: int, middle: int, cout: int, stride: int, groups: int, first: bool) -> None:
        super().__init__(
            ConvBnAct(cin, middle, groups=1 if first else groups),
            ChannelShuffle(groups) if groups > 1 else nn.Identity(),
            ConvBnAct(middle, middle, 3, stride, groups=middle, activation=""),
            ConvBnAct(middle, cout, groups=groups, activation=""),
        )


def shufflenet_v1(input_shape: InputShape, num_classes: int, *, groups: int, width: float = 1.0) -> nn.Module:
    """Three stages; a stage's first unit halves the map and concatenates the pooled input."""
    step = 4 * groups
    stem = 24 * (int(width) if width >= 1 else width)
    channels = -(-round(stem) // groups) * groups
    layers: list[nn.Module] = [ConvBnAct(input_shape[0], channels, 3, 2), max_pool(3, 2)]
    for i, depth in enumerate(DEPTHS):
        cout = max(step, round(CHANNELS[groups] * width * 2**i / step) * step)
        main = _Main(channels, cout // 4, cout - channels, 2, groups, first=i == 0)
        layers.append(Branches(nn.AvgPool2d(3, 2, 1), nn.Sequential(main, nn.ReLU())))
        layers += [
            Residual(_Main(cout, cout // 4, cout, 1, groups, first=False), activation="relu") for _ in range(depth - 1)
        ]
        channels = cout
    head = (GlobalAvgPool(), nn.Flatten(), nn.Linear(channels, num_classes, bias=False))
    return initialise(nn.Sequential(*layers, *head))
