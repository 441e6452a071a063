"""The weight-sharing network of an MnasNet space."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.base import Archs
from search_spaces.mnasnet_network import Head, Layer, begin
from search_spaces.mnasnet_spec import LayerSpec
from search_spaces.mobilenet_v3_network import ConvNorm
from search_spaces.mobilenet_v3_supernet import gates
from search_spaces.shared_layers import Drop, Normalise, WeightSharingSupernet, conv2d, linear
from search_spaces.supernet import resize

if TYPE_CHECKING:
    from search_spaces.mnasnet import MnasNetSpace


class SharedLayers(nn.Module):
    """All layers of a space, once per kind of operation: `stages[i][j]["mbconv"]`; the rest as in a network."""

    def __init__(self, space: MnasNetSpace) -> None:
        super().__init__()
        spec = space.spec((space.cardinalities - 1).astype(space.dtype))
        widest = max(range(len(space.table.filters)), key=space.table.filters.__getitem__)
        self.stem = ConvNorm(spec.in_channels, spec.stem, 3, spec.stem_stride, activation="relu")
        self.first = Layer(spec.first)
        self.stages = nn.ModuleList(
            nn.ModuleList(self._kinds(space, s, layer) for layer in range(stage.depths[-1]))
            for s, stage in enumerate(space.table.stages)
        )
        self.head = Head(space.head_spec({f"stage{len(space.table.stages) - 1}.filters": widest}))
        begin(self)

    @staticmethod
    def _kinds(space: MnasNetSpace, stage: int, layer: int) -> nn.ModuleDict:
        return nn.ModuleDict({kind: Layer(spec) for kind, spec in space.shared_layer_specs(stage, layer).items()})


class SuperMnasNet(WeightSharingSupernet):
    """Every network of an `MnasNetSpace`: layers share weights per kind of operation.

    Inverted residuals of all expansions share one set of weights, and so do kernels (their centres), widths (leading
    channels) and squeeze ratios; a block uses its leading layers. Regular and separable convolutions have their own.
    """

    space: MnasNetSpace
    largest: SharedLayers

    def __init__(self, space: MnasNetSpace) -> None:
        super().__init__(space, SharedLayers(space))

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        spec, shared = self.space.spec(arch), self.largest
        x = resize(x, spec.resolution).contiguous(memory_format=torch.channels_last)
        x = torch.relu(_conv_norm(shared.stem, x, spec.stem, normalise))
        x = _layer(shared.first, x, spec.first, normalise)
        for stage, layers in zip(shared.stages, spec.blocks, strict=True):
            for kinds, layer in zip(stage.children(), layers, strict=False):
                module = kinds.get_submodule(layer.kind)
                assert isinstance(module, Layer)
                x = _layer(module, x, layer, normalise)
        x = _layer(shared.head.layer, x, spec.head.layer, normalise)
        x = torch.relu(_conv_norm(shared.head.final, x, spec.head.final, normalise))
        x = drop(F.avg_pool2d(x, x.shape[-2:]).flatten(1), spec.head.dropout)
        return linear(shared.head.classifier, x, spec.head.classes)

    def shared_name(self, name: str, arch: Archs) -> str:
        place = re.match(r"stages\.(\d+)\.(\d+)\.", name)
        if place is None:
            return name
        kind = self.space.spec(arch).blocks[int(place[1])][int(place[2])].kind
        return f"{place[0]}{kind}.{name[place.end() :]}"


def _conv_norm(layer: ConvNorm, x: Tensor, cout: int, normalise: Normalise, kernel: int | None = None) -> Tensor:
    return normalise(layer.norm, conv2d(layer.conv, x, cout, kernel))


def _layer(module: Layer, x: Tensor, spec: LayerSpec, normalise: Normalise) -> Tensor:
    y = x
    if module.expand is not None:
        y = torch.relu(_conv_norm(module.expand, y, spec.hidden, normalise))
    filtering = module.conv or module.depthwise
    assert filtering is not None
    y = torch.relu(_conv_norm(filtering, y, spec.hidden, normalise, spec.kernel))
    if module.se is not None and spec.squeeze:
        y = y * gates(module.se, y, spec.squeeze)
    if module.project is not None:
        y = _conv_norm(module.project, y, spec.cout, normalise)
    if spec.skip == "none":
        return y
    return y + (x if spec.skip == "identity" else F.avg_pool2d(x, 3, spec.stride, 1, count_include_pad=False))
