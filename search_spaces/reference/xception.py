"""Xception (Chollet, CVPR 2017): residual blocks of separable convolutions."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, Residual, classifier, conv, initialise, max_pool

MIDDLE, MIDDLE_BLOCKS = 728, 8


def _separable(cin: int, cout: int) -> list[nn.Module]:
    return [conv(cin, cin, 3, groups=cin, bias=False), conv(cin, cout, bias=False), nn.BatchNorm2d(cout)]


def _block(channels: tuple[int, ...], pool: bool, first_relu: bool = True) -> nn.Module:
    """ReLU and separable convolution between all neighbours in `channels`; max pooling at the end where told."""
    body: list[nn.Module] = []
    for cin, cout in pairwise(channels):
        body += [nn.ReLU(), *_separable(cin, cout)]
    body = body if first_relu else body[1:]
    if not pool:
        return Residual(nn.Sequential(*body))
    return Residual(nn.Sequential(*body, max_pool(3, 2)), ConvBnAct(channels[0], channels[-1], 1, 2, activation=""))


def xception(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Entry, middle and exit flow, classifier."""
    layers = [
        ConvBnAct(input_shape[0], 32, 3, 2, padding="valid"), ConvBnAct(32, 64, 3, padding="valid"),
        _block((64, 128, 128), True, first_relu=False), _block((128, 256, 256), True),
        _block((256, MIDDLE, MIDDLE), True),
        *(_block((MIDDLE,) * 4, False) for _ in range(MIDDLE_BLOCKS)),
        _block((MIDDLE, MIDDLE, 1024), True),
        *_separable(1024, 1536), nn.ReLU(), *_separable(1536, 2048), nn.ReLU(),
    ]  # fmt: skip
    return initialise(nn.Sequential(*layers, classifier(2048, num_classes)))
