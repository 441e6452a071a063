"""ResNet (He et al., CVPR 2016): basic and bottleneck blocks, stride on the 3x3 convolution as torchvision has it."""

from __future__ import annotations

from torch import nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, Residual, classifier, initialise, max_pool

STAGES = (64, 128, 256, 512)


def _shortcut(cin: int, cout: int, stride: int) -> nn.Module | None:
    return ConvBnAct(cin, cout, 1, stride, activation="") if stride > 1 or cin != cout else None


def basic(cin: int, planes: int, stride: int) -> tuple[nn.Module, int]:
    """Two 3x3 convolutions; the block and its output channels."""
    body = nn.Sequential(ConvBnAct(cin, planes, 3, stride), ConvBnAct(planes, planes, 3, activation=""))
    return Residual(body, _shortcut(cin, planes, stride), "relu"), planes


def bottleneck(cin: int, planes: int, stride: int) -> tuple[nn.Module, int]:
    """1x1, 3x3, and 1x1 to four times the channels; the block and its output channels."""
    body = nn.Sequential(
        ConvBnAct(cin, planes), ConvBnAct(planes, planes, 3, stride), ConvBnAct(planes, 4 * planes, activation="")
    )
    return Residual(body, _shortcut(cin, 4 * planes, stride), "relu"), 4 * planes


BLOCKS = {"basic": basic, "bottleneck": bottleneck}


def resnet(input_shape: InputShape, num_classes: int, *, block: str, depths: tuple[int, ...]) -> nn.Module:
    """Stem, four stages of `depths` blocks, classifier."""
    layers: list[nn.Module] = [ConvBnAct(input_shape[0], STAGES[0], 7, 2), max_pool(3, 2)]
    channels = STAGES[0]
    for i, (planes, depth) in enumerate(zip(STAGES, depths, strict=True)):
        for j in range(depth):
            layer, channels = BLOCKS[block](channels, planes, 2 if i > 0 and j == 0 else 1)
            layers.append(layer)
    return initialise(nn.Sequential(*layers, classifier(channels, num_classes)))
