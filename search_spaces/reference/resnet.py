"""ResNet (He et al., CVPR 2016) and its pre-activated form, ResNet V2 (He et al., ECCV 2016)."""

from __future__ import annotations

from torch import Tensor, nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, Residual, classifier, conv, initialise, max_pool

STAGES = (64, 128, 256, 512)


def _shortcut(cin: int, cout: int, stride: int, bias: bool = False) -> nn.Module | None:
    return ConvBnAct(cin, cout, 1, stride, activation="", bias=bias) if stride > 1 or cin != cout else None


def basic(cin: int, planes: int, stride: int) -> tuple[nn.Module, int]:
    """Two 3x3 convolutions; the block and its output channels."""
    body = nn.Sequential(ConvBnAct(cin, planes, 3, stride), ConvBnAct(planes, planes, 3, activation=""))
    return Residual(body, _shortcut(cin, planes, stride), "relu"), planes


def bottleneck(cin: int, planes: int, stride: int) -> tuple[nn.Module, int]:
    """1x1, 3x3 with the stride, and 1x1 to four times the channels."""
    body = nn.Sequential(
        ConvBnAct(cin, planes), ConvBnAct(planes, planes, 3, stride), ConvBnAct(planes, 4 * planes, activation="")
    )
    return Residual(body, _shortcut(cin, 4 * planes, stride), "relu"), 4 * planes


def bottleneck_v1(cin: int, planes: int, stride: int) -> tuple[nn.Module, int]:
    """As first published: the stride is on the first 1x1 convolution. With biases, as Keras has them."""
    body = nn.Sequential(
        ConvBnAct(cin, planes, 1, stride, bias=True),
        ConvBnAct(planes, planes, 3, bias=True),
        ConvBnAct(planes, 4 * planes, activation="", bias=True),
    )
    return Residual(body, _shortcut(cin, 4 * planes, stride, bias=True), "relu"), 4 * planes


BLOCKS = {"basic": basic, "bottleneck": bottleneck, "bottleneck_v1": bottleneck_v1}


def stages(block: str, depths: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    """The four stages of residual blocks, and the channels that they end with."""
    layers: list[nn.Module] = []
    channels = STAGES[0]
    for i, (planes, depth) in enumerate(zip(STAGES, depths, strict=True)):
        for j in range(depth):
            layer, channels = BLOCKS[block](channels, planes, 2 if i > 0 and j == 0 else 1)
            layers.append(layer)
    return layers, channels


def backbone(in_channels: int, block: str, depths: tuple[int, ...]) -> tuple[list[nn.Module], int]:
    """Stem and stages, down to a 32nd of the resolution."""
    layers, channels = stages(block, depths)
    stem = ConvBnAct(in_channels, STAGES[0], 7, 2, bias=block == "bottleneck_v1")
    return [stem, max_pool(3, 2), *layers], channels


def resnet(input_shape: InputShape, num_classes: int, *, block: str, depths: tuple[int, ...]) -> nn.Module:
    """Stem, four stages of `depths` blocks, classifier."""
    layers, channels = backbone(input_shape[0], block, depths)
    return initialise(nn.Sequential(*layers, classifier(channels, num_classes)))


class PreActivated(nn.Module):
    """Bottleneck of ResNet V2 as Keras has it: normalised first; the stride is on the last block of a stage."""

    def __init__(self, cin: int, planes: int, stride: int, project: bool) -> None:
        super().__init__()
        self.project = project
        self.activate = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU())
        self.body = nn.Sequential(
            ConvBnAct(cin, planes), ConvBnAct(planes, planes, 3, stride), conv(planes, 4 * planes)
        )
        self.shortcut: nn.Module = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        if project:
            self.shortcut = conv(cin, 4 * planes, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activate(x)
        return self.body(y) + self.shortcut(y if self.project else x)


def resnet_v2(input_shape: InputShape, num_classes: int, *, depths: tuple[int, ...]) -> nn.Module:
    """Stem without normalisation, four stages of `depths` pre-activated bottlenecks, classifier."""
    layers: list[nn.Module] = [conv(input_shape[0], STAGES[0], 7, 2), max_pool(3, 2)]
    channels = STAGES[0]
    for planes, depth in zip(STAGES, depths, strict=True):
        for j in range(depth):
            stride = 2 if j == depth - 1 and planes != STAGES[-1] else 1
            layers.append(PreActivated(channels, planes, stride, project=j == 0))
            channels = 4 * planes
    return initialise(nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), classifier(channels, num_classes)))
