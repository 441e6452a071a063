"""Layers of the MnasNet family, as plain static modules."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from search_spaces.mnasnet_spec import HeadSpec, LayerSpec, StemSpec
from search_spaces.mobilenet_v3_network import RESIDUAL_SCALE, ConvNorm, GlobalAvgPool, SqueezeExcite
from search_spaces.reference import blocks


class Block(nn.Module):
    """A convolution, a separable one or an inverted residual, gated and around a skip as its spec says.

    Its parts are below the name of its kind, so that in a supernet each kind has weights of its own.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        plain, hidden = spec.kind == "conv", spec.hidden
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if plain:
            parts["conv"] = ConvNorm(spec.cin, hidden, spec.kernel, spec.stride, activation="relu")
        if spec.kind == "mbconv":
            parts["expand"] = ConvNorm(spec.cin, hidden, activation="relu")
        if not plain:
            parts["depthwise"] = ConvNorm(hidden, hidden, spec.kernel, spec.stride, groups=hidden, activation="relu")
        if spec.squeeze:
            parts["se"] = SqueezeExcite(hidden, spec.squeeze, nn.Sigmoid())
        if not plain:
            parts["project"] = ConvNorm(hidden, spec.cout)
        self.kind = spec.kind
        self.add_module(spec.kind, nn.Sequential(parts))
        skips = {"none": None, "identity": nn.Identity(), "pool": blocks.average_pool(3, spec.stride)}
        self.skip = skips[spec.skip]

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule(self.kind)(x)
        return y if self.skip is None else y + self.skip(x)


class Stem(nn.Sequential):
    """A 3x3 convolution and the first layer."""

    def __init__(self, spec: StemSpec) -> None:
        super().__init__()
        self.conv = ConvNorm(spec.cin, spec.width, 3, spec.stride, activation="relu")
        self.layer = Block(spec.layer)


class Head(nn.Sequential):
    """The last layer, a 1x1 convolution, global pooling, classifier."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.layer = Block(spec.layer)
        self.final = ConvNorm(spec.layer.cout, spec.final, activation="relu")
        self.pool = GlobalAvgPool()
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.final, spec.classes)


def initialise(network: nn.Module) -> None:
    """He initialisation, and small residual branches by the scale of their last normalisation."""
    blocks.initialise(network)
    for module in network.modules():
        if isinstance(module, Block) and module.skip is not None:
            norms = [m for m in module.get_submodule(module.kind).modules() if isinstance(m, nn.BatchNorm2d)]
            nn.init.constant_(norms[-1].weight, RESIDUAL_SCALE)
