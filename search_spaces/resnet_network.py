"""Stand-alone networks of the ResNet family, as plain static modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from search_spaces.mobilenet_v3_network import RESIDUAL_SCALE, ConvNorm, GlobalAvgPool
from search_spaces.reference.blocks import initialise
from search_spaces.resnet_spec import BottleneckSpec, NetworkSpec, StemSpec


class Stem(nn.Module):
    """Two or three 3x3 convolutions, the second of three around a shortcut, and max pooling."""

    def __init__(self, spec: StemSpec) -> None:
        super().__init__()
        self.first = ConvNorm(spec.cin, spec.inner, 3, spec.stride, activation="relu")
        self.middle = ConvNorm(spec.inner, spec.inner, 3, activation="relu") if spec.depth == 3 else None
        self.last = ConvNorm(spec.inner, spec.cout, 3, activation="relu")
        self.pool = nn.MaxPool2d(3, 2, 1) if spec.pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.middle is not None:
            x = self.middle(x) + x
        return self.pool(self.last(x))


class Shortcut(nn.Module):
    """Average pooling where there is a stride, then a 1x1 convolution (ResNet-D, He et al., CVPR 2019)."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.project = ConvNorm(cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.pool(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution around a shortcut, then ReLU."""

    def __init__(self, spec: BottleneckSpec) -> None:
        super().__init__()
        self.reduce = ConvNorm(spec.cin, spec.hidden, activation="relu")
        self.spatial = ConvNorm(spec.hidden, spec.hidden, 3, spec.stride, activation="relu")
        self.expand = ConvNorm(spec.hidden, spec.cout)
        self.shortcut = Shortcut(spec.cin, spec.cout, spec.stride) if spec.project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.spatial(self.reduce(x)))
        return torch.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Head(nn.Module):
    """Global pooling and the classifier."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.pool = GlobalAvgPool()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pool(x).flatten(1)))


class ResNet(nn.Module):
    """One network of the family: `stem`, `stages[i][j]`, `head`.

    Takes images `(batch, channels, resolution, resolution)` of its own `input_shape`, gives logits `(batch, classes)`.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.input_shape = spec.input_shape
        self.stem = Stem(spec.stem)
        self.stages = nn.Sequential(*(nn.Sequential(*map(Bottleneck, blocks)) for blocks in spec.stages))
        self.head = Head(spec.stages[-1][-1].cout, spec.classes, spec.dropout)
        initialise(self)
        for module in self.modules():
            if isinstance(module, Bottleneck) and module.shortcut is None:
                nn.init.constant_(module.expand.norm.weight, RESIDUAL_SCALE)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))
