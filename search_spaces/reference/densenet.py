"""DenseNet (Huang et al., CVPR 2017): every layer adds `growth` channels to all that came before."""

from __future__ import annotations

from torch import nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import BnActConv, Branches, ConvBnAct, classifier, initialise, max_pool


def backbone(in_channels: int, growth: int, stem: int, depths: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    """Stem and dense blocks, halved in channels and resolution between them; and the channels at the end."""
    layers: list[nn.Module] = [ConvBnAct(in_channels, stem, 7, 2), max_pool(3, 2)]
    channels = stem
    for i, depth in enumerate(depths):
        if i > 0:
            layers += [BnActConv(channels, channels // 2), nn.AvgPool2d(2, 2)]
            channels //= 2
        for _ in range(depth):
            layer = nn.Sequential(BnActConv(channels, 4 * growth), BnActConv(4 * growth, growth, 3))
            layers.append(Branches(nn.Identity(), layer))
            channels += growth
    return [*layers, nn.BatchNorm2d(channels), nn.ReLU()], channels


def densenet(
    input_shape: InputShape, num_classes: int, *, growth: int, stem: int, depths: tuple[int, ...]
) -> nn.Module:
    """Dense blocks of `depths` layers, classifier."""
    layers, channels = backbone(input_shape[0], growth, stem, depths)
    return initialise(nn.Sequential(*layers, classifier(channels, num_classes)))
