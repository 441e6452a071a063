"""VGG (Simonyan and Zisserman, ICLR 2015), with or without batch normalisation, and AlexNet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import conv, initialise

STAGES = (64, 128, 256, 512, 512)


class PoolTo(nn.Module):
    """Mean over windows so that a square map of `size` is left; nothing where it is one already."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-2:] == (self.size, self.size) else F.adaptive_avg_pool2d(x, self.size)


def hidden_layers(channels: int, size: int, widths: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    """The map at `size` x `size`, flattened, through hidden linear layers of `widths`: logits."""
    layers: list[nn.Module] = [PoolTo(size), nn.Flatten()]
    features = channels * size * size
    for width in widths:
        layers += [nn.Linear(features, width), nn.ReLU(), nn.Dropout(dropout)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def vgg(input_shape: InputShape, num_classes: int, *, depths: tuple[int, ...], norm: bool = False) -> nn.Module:
    """Stages of `depths` 3x3 convolutions, each halved by max pooling, and two hidden layers of 4096."""
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for width, depth in zip(STAGES, depths, strict=True):
        for _ in range(depth):
            layers += [conv(channels, width, 3), *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return initialise(nn.Sequential(*layers, hidden_layers(channels, 7, (4096, 4096), num_classes, 0.5)))


def alexnet(input_shape: InputShape, num_classes: int) -> nn.Module:
    """Five convolutions in one column (Krizhevsky, arXiv 1404.5997) and two hidden layers of 4096."""
    layers = [
        nn.Conv2d(input_shape[0], 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        conv(64, 192, 5), nn.ReLU(), nn.MaxPool2d(3, 2),
        conv(192, 384, 3), nn.ReLU(), conv(384, 256, 3), nn.ReLU(), conv(256, 256, 3), nn.ReLU(), nn.MaxPool2d(3, 2),
    ]  # fmt: skip
    return initialise(nn.Sequential(*layers, hidden_layers(256, 6, (4096, 4096), num_classes, 0.5)))
