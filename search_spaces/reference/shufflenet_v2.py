"""ShuffleNetV2 (Ma et al., ECCV 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from search_spaces.errors import UserError
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import Branches, ChannelShuffle, ConvBnAct, classifier, initialise, max_pool

STEM, REPEATS = 24, (4, 8, 4)
# Width multiplier: channels of the three stages and of the final convolution (table 5).
CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


Size = int | tuple[int, int]


class SplitUnit(nn.Module):
    """One half of the channels passes, the other is convolved; then both are interleaved (figure 3 (c))."""

    def __init__(self, channels: int, kernel: Size = 3, *, activation: str = "relu") -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(
            ConvBnAct(half, half, activation=activation),
            ConvBnAct(half, half, kernel, groups=half, activation=""),
            ConvBnAct(half, half, activation=activation),
        )
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, convolved = x.chunk(2, 1)
        return self.shuffle(torch.cat([kept, self.body(convolved)], 1))


def down_unit(cin: int, cout: int, kernel: Size = 3, stride: Size = 2, *, activation: str = "relu") -> nn.Module:
    """Both branches see all channels and halve the map (figure 3 (d))."""
    half = cout // 2
    return nn.Sequential(
        Branches(
            nn.Sequential(
                ConvBnAct(cin, cin, kernel, stride, groups=cin, activation=""),
                ConvBnAct(cin, cout - half, activation=activation),
            ),
            nn.Sequential(
                ConvBnAct(cin, half, activation=activation),
                ConvBnAct(half, half, kernel, stride, groups=half, activation=""),
                ConvBnAct(half, half, activation=activation),
            ),
        ),
        ChannelShuffle(2),
    )


def shufflenet_v2(input_shape: InputShape, num_classes: int, *, width: float = 1.0) -> nn.Module:
    """Stem, three stages, final convolution, classifier.

    Raises:
        UserError: a width that the paper has no channels for.
    """
    if width not in CHANNELS:
        raise UserError(f"shufflenet_v2: its widths are {', '.join(map(str, CHANNELS))}, got {width}")
    *stages, final = CHANNELS[width]
    layers: list[nn.Module] = [ConvBnAct(input_shape[0], STEM, 3, 2), max_pool(3, 2)]
    channels = STEM
    for cout, repeats in zip(stages, REPEATS, strict=True):
        layers += [down_unit(channels, cout), *(SplitUnit(cout) for _ in range(repeats - 1))]
        channels = cout
    return initialise(nn.Sequential(*layers, ConvBnAct(channels, final), classifier(final, num_classes)))
