"""Networks of a chain space, as plain static modules, and the blocks that its layers choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from search_spaces.chain import (
    BlockChoice,
    BottleneckChoice,
    ConvChoice,
    FireChoice,
    GhostChoice,
    InvertedResidualChoice,
    SeparableChoice,
)
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.reference.blocks import (
    Branches,
    ConvBnAct,
    InvertedResidual,
    Residual,
    SqueezeExcite,
    classifier,
    initialise,
)
from search_spaces.reference.ghostnet import Ghost

if TYPE_CHECKING:
    from search_spaces.chain import ChainSpace


def make_block(block: BlockChoice, cin: int, cout: int, stride: int, activation: str) -> nn.Module:
    """A fresh module of a chosen block between `cin` and `cout` channels."""
    same = stride == 1 and cin == cout
    if isinstance(block, InvertedResidualChoice):
        hidden = block.hidden(cin)
        gates = SqueezeExcite(hidden, make_divisible(hidden * block.squeeze)) if block.squeeze else None
        expand = block.widen or block.expansion != 1
        return InvertedResidual(
            cin, hidden, cout, block.kernel, stride, activation=activation, se=gates, expand=expand, groups=block.groups
        )
    if isinstance(block, SeparableChoice):
        depthwise = ConvBnAct(cin, cin, block.kernel, stride, groups=cin, activation=activation)
        return nn.Sequential(depthwise, ConvBnAct(cin, cout, activation=activation))
    if isinstance(block, ConvChoice):
        return ConvBnAct(cin, cout, block.kernel, stride, groups=block.groups, activation=activation)
    if isinstance(block, BottleneckChoice):
        inner = make_divisible(cout * block.reduction)
        body = nn.Sequential(
            ConvBnAct(cin, inner, activation=activation),
            ConvBnAct(inner, inner, block.kernel, stride, activation=activation),
            ConvBnAct(inner, cout, activation=""),
        )
        return Residual(body, None if same else ConvBnAct(cin, cout, 1, stride, activation=""), activation)
    if isinstance(block, FireChoice):
        inner = make_divisible(cout * block.squeeze)
        wide = cout // 2
        return nn.Sequential(
            ConvBnAct(cin, inner, 1, stride, activation=activation),
            Branches(
                ConvBnAct(inner, cout - wide, activation=activation), ConvBnAct(inner, wide, 3, activation=activation)
            ),
        )
    if isinstance(block, GhostChoice):
        return _ghost(block, cin, cout, stride, activation)
    return nn.Identity() if same else ConvBnAct(cin, cout, 1, stride, activation=activation)


def _ghost(block: GhostChoice, cin: int, cout: int, stride: int, activation: str) -> nn.Module:
    hidden = make_divisible(cin * block.expansion)
    body: list[nn.Module] = [Ghost(cin, hidden, activation=activation)]
    if stride > 1:
        body.append(ConvBnAct(hidden, hidden, block.kernel, stride, groups=hidden, activation=""))
    if block.squeeze:
        body.append(SqueezeExcite(hidden, make_divisible(hidden * block.squeeze)))
    body.append(Ghost(hidden, cout, activation=""))
    if stride == 1 and cin == cout:
        return Residual(nn.Sequential(*body))
    shortcut = nn.Sequential(
        ConvBnAct(cin, cin, block.kernel, stride, groups=cin, activation=""), ConvBnAct(cin, cout, activation="")
    )
    return Residual(nn.Sequential(*body), shortcut)


def stem(space: ChainSpace) -> nn.Module:
    """The first convolution."""
    table = space.table
    return ConvBnAct(table.in_channels, table.stem_width, 3, table.stem_stride, activation=table.activation)


def head(space: ChainSpace) -> nn.Module:
    """The last convolution where there is one, pooling, classifier."""
    table, channels = space.table, space.layers[-1].cout
    final = [ConvBnAct(channels, table.final_width, activation=table.activation)] if table.final_width else []
    return nn.Sequential(*final, *classifier(table.final_width or channels, table.num_classes, table.dropout))


class Chain(nn.Module):
    """One network of a chain space: `stem`, `layers[i]`, `head`.

    Takes images `(batch, channels, resolution, resolution)` of its `input_shape`, gives logits `(batch, classes)`.

    Args:
        space: gives everything but the choices.
        names: the block of every layer.
    """

    def __init__(self, space: ChainSpace, names: Sequence[str]) -> None:
        super().__init__()
        self.input_shape = space.input_shape
        self.stem = stem(space)
        self.layers = nn.Sequential(*(space.layer_module(i, name) for i, name in enumerate(names)))
        self.head = head(space)
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))
