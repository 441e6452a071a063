"""The weight-sharing network of a ResNet space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.base import Archs
from search_spaces.mobilenet_v3_network import ConvNorm
from search_spaces.resnet_network import Bottleneck, ResNet
from search_spaces.resnet_spec import BottleneckSpec
from search_spaces.shared_layers import Drop, Normalise, WeightSharingSupernet, conv2d, linear
from search_spaces.supernet import resize

if TYPE_CHECKING:
    from search_spaces.resnet import ResNetSpace


class SuperResNet(WeightSharingSupernet):
    """Every network of a `ResNetSpace` in the weights of its largest: leading channels, each stage's leading blocks."""

    space: ResNetSpace
    largest: ResNet

    def __init__(self, space: ResNetSpace) -> None:
        super().__init__(space, space.build((space.cardinalities - 1).astype(space.dtype)))

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        spec = self.space.spec(arch)
        x = resize(x, spec.resolution).contiguous(memory_format=torch.channels_last)
        stem = self.largest.stem
        x = torch.relu(_conv_norm(stem.first, x, spec.stem.inner, normalise))
        if stem.middle is not None and spec.stem.depth == 3:
            x = torch.relu(_conv_norm(stem.middle, x, spec.stem.inner, normalise)) + x
        x = stem.pool(torch.relu(_conv_norm(stem.last, x, spec.stem.cout, normalise)))
        for stage, blocks in zip(self.largest.stages, spec.stages, strict=True):
            for module, block in zip(stage.children(), blocks, strict=False):
                assert isinstance(module, Bottleneck)
                x = _block(module, x, block, normalise)
        x = drop(F.avg_pool2d(x, x.shape[-2:]).flatten(1), spec.dropout)
        return linear(self.largest.head.classifier, x, spec.classes)


def _conv_norm(layer: ConvNorm, x: Tensor, cout: int, normalise: Normalise) -> Tensor:
    return normalise(layer.norm, conv2d(layer.conv, x, cout))


def _block(module: Bottleneck, x: Tensor, spec: BottleneckSpec, normalise: Normalise) -> Tensor:
    y = torch.relu(_conv_norm(module.reduce, x, spec.hidden, normalise))
    y = torch.relu(_conv_norm(module.spatial, y, spec.hidden, normalise))
    y = _conv_norm(module.expand, y, spec.cout, normalise)
    if module.shortcut is not None:
        x = _conv_norm(module.shortcut.project, module.shortcut.pool(x), spec.cout, normalise)
    return torch.relu(y + x)
