"""Stand-alone networks of the MnasNet family, as plain static modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from search_spaces.mnasnet_spec import HeadSpec, LayerSpec, NetworkSpec
from search_spaces.mobilenet_v3_network import RESIDUAL_SCALE, ConvNorm, GlobalAvgPool, SqueezeExcite
from search_spaces.reference.blocks import average_pool, initialise


class Layer(nn.Module):
    """A convolution, a separable one or an inverted residual, gated and around a skip as its spec says."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        plain = spec.kind == "conv"
        self.conv = ConvNorm(spec.cin, spec.cout, spec.kernel, spec.stride, activation="relu") if plain else None
        self.expand = ConvNorm(spec.cin, spec.hidden, activation="relu") if spec.kind == "mbconv" else None
        self.depthwise = (
            None
            if plain
            else ConvNorm(spec.hidden, spec.hidden, spec.kernel, spec.stride, groups=spec.hidden, activation="relu")
        )
        self.se = SqueezeExcite(spec.hidden, spec.squeeze, nn.Sigmoid()) if spec.squeeze else None
        self.project = None if plain else ConvNorm(spec.hidden, spec.cout)
        self.skip = {"none": None, "identity": nn.Identity(), "pool": average_pool(3, spec.stride)}[spec.skip]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for part in (self.conv, self.expand, self.depthwise, self.se, self.project):
            if part is not None:
                y = part(y)
        return y if self.skip is None else y + self.skip(x)

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The normalisation after which a skip is added."""
        last = self.project or self.conv
        assert last is not None
        return last.norm


class Head(nn.Module):
    """The last layer, a 1x1 convolution, global pooling, classifier."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.layer = Layer(spec.layer)
        self.final = ConvNorm(spec.layer.cout, spec.final, activation="relu")
        self.pool = GlobalAvgPool()
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.final, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.pool(self.final(self.layer(x))).flatten(1)))


class MnasNet(nn.Module):
    """One network of the family: `stem`, `first`, `stages[i][j]`, `head`.

    Takes images `(batch, channels, resolution, resolution)` of its own `input_shape`, gives logits `(batch, classes)`.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.input_shape = spec.input_shape
        self.stem = ConvNorm(spec.in_channels, spec.stem, 3, spec.stem_stride, activation="relu")
        self.first = Layer(spec.first)
        self.stages = nn.Sequential(*(nn.Sequential(*map(Layer, layers)) for layers in spec.blocks))
        self.head = Head(spec.head)
        begin(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.first(self.stem(x))))


def begin(network: nn.Module) -> None:
    """He initialisation, small residual branches, and the memory format in which convolutions are fastest."""
    initialise(network)
    for module in network.modules():
        if isinstance(module, Layer) and module.skip is not None:
            nn.init.constant_(module.last_norm.weight, RESIDUAL_SCALE)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
