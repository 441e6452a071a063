"""MobileOne (Vasu et al., CVPR 2023) as it is deployed: every block re-parameterised to one convolution with bias."""

from __future__ import annotations

from torch import nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import classifier, conv, initialise

STEM = 64
# Channels at width multiplier 1 and blocks of the four stages.
STAGES = ((64, 2), (128, 8), (256, 10), (512, 1))


def mobileone(input_shape: InputShape, num_classes: int, *, widths: tuple[float, ...]) -> nn.Module:
    """Stem, four stages of depthwise and pointwise convolutions with a width multiplier each, classifier."""
    channels = min(STEM, int(STEM * widths[0]))
    layers: list[nn.Module] = [conv(input_shape[0], channels, 3, 2), nn.ReLU()]
    for (base, blocks), width in zip(STAGES, widths, strict=True):
        cout = int(base * width)
        for i in range(blocks):
            layers += [conv(channels, channels, 3, 1 if i else 2, groups=channels), nn.ReLU()]
            layers += [conv(channels, cout), nn.ReLU()]
            channels = cout
    return initialise(nn.Sequential(*layers, classifier(channels, num_classes)))
