"""The modules of chain spaces: blocks, stem and head."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.chain_blocks import (
    AttentionChoice,
    BlockChoice,
    BottleneckChoice,
    ConvChoice,
    FireChoice,
    GhostChoice,
    InvertedResidualChoice,
    SeparableChoice,
    ShuffleChoice,
    SqueezeExciteChoice,
)
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.reference.blocks import (
    Branches,
    ConvBnAct,
    InvertedResidual,
    Residual,
    SqueezeExcite,
    classifier,
)
from search_spaces.reference.ghostnet import Ghost
from search_spaces.reference.shufflenet_v2 import SplitUnit, down_unit

if TYPE_CHECKING:
    from search_spaces.chain import ChainTable

Size = int | tuple[int, int]


def make_block(
    block: BlockChoice, cin: int, cout: int, stride: int, activation: str, along_width: bool = False
) -> nn.Module:
    """A fresh module of a chosen block between `cin` and `cout` channels.

    Args:
        along_width: kernels and strides act along the width alone, for maps of height 1.
    """
    same = stride == 1 and cin == cout
    steps = _along(stride) if along_width and stride > 1 else stride
    kernel = _sized(getattr(block, "kernel", 3), along_width)
    layer = partial(ConvBnAct, activation=activation)
    linear = partial(ConvBnAct, activation="")
    if isinstance(block, InvertedResidualChoice):
        hidden = block.hidden(cin)
        gates = _gates(hidden, block.squeeze)[0] if block.squeeze else None
        expand = block.widen or block.expansion != 1
        return InvertedResidual(
            cin, hidden, cout, kernel, steps, activation=activation, se=gates, expand=expand, residual=same,
            groups=block.groups,
        )  # fmt: skip
    if isinstance(block, SeparableChoice):
        return nn.Sequential(layer(cin, cin, kernel, steps, groups=cin), *_gates(cin, block.squeeze), layer(cin, cout))
    if isinstance(block, ConvChoice):
        return layer(cin, cout, kernel, steps, groups=block.groups)
    if isinstance(block, BottleneckChoice):
        inner = make_divisible(cout * block.reduction)
        body = nn.Sequential(
            layer(cin, inner), layer(inner, inner, kernel, steps), linear(inner, cout), *_gates(cout, block.squeeze)
        )
        return Residual(body, None if same else linear(cin, cout, 1, steps), activation)
    if isinstance(block, FireChoice):
        inner, wide = make_divisible(cout * block.squeeze), cout // 2
        return nn.Sequential(
            layer(cin, inner, 1, steps), Branches(layer(inner, cout - wide), layer(inner, wide, kernel))
        )
    if isinstance(block, GhostChoice):
        return _ghost(block, cin, cout, steps, activation, along_width)
    if isinstance(block, ShuffleChoice):
        if same:
            return SplitUnit(cout, kernel, activation=activation)
        return down_unit(cin, cout, kernel, steps, activation=activation)
    if isinstance(block, AttentionChoice):
        first = [] if same else [linear(cin, cin, kernel, steps, groups=cin), linear(cin, cout)]
        parts: list[nn.Module] = [*first, Residual(PixelAttention(cout, block.head_width))]
        if block.expansion:
            hidden = make_divisible(cout * block.expansion)
            parts.append(Residual(nn.Sequential(layer(cout, hidden), linear(hidden, cout))))
        return nn.Sequential(*parts)
    if isinstance(block, SqueezeExciteChoice):
        return _gates(cin, block.squeeze)[0]
    return nn.Identity() if same else layer(cin, cout, 1, steps)


class PixelAttention(nn.Module):
    """Multi-head self-attention in which every pixel of `(batch, channels, height, width)` is a token.

    Queries, keys and values come from 1x1 convolutions of their own, so that leading channels are leading heads.
    """

    def __init__(self, channels: int, head_width: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_width)
        inner = self.heads * head_width
        self.query, self.key, self.value = (ConvBnAct(channels, inner, activation="") for _ in range(3))
        self.out = ConvBnAct(inner, channels, activation="")

    def forward(self, x: Tensor) -> Tensor:
        # (batch, heads * width, height, width) -> (batch, heads, pixels, width)
        q, k, v = (
            made.unflatten(1, (self.heads, -1)).flatten(3).transpose(2, 3)
            for made in (self.query(x), self.key(x), self.value(x))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        return self.out(y.unflatten(2, (int(x.shape[2]), int(x.shape[3]))))


def _ghost(block: GhostChoice, cin: int, cout: int, steps: Size, activation: str, along_width: bool) -> nn.Module:
    hidden = make_divisible(cin * block.expansion)
    kernel, cheap = _sized(block.kernel, along_width), _sized(3, along_width)
    body: list[nn.Module] = [Ghost(cin, hidden, activation=activation, kernel=cheap)]
    if steps != 1:
        body.append(ConvBnAct(hidden, hidden, kernel, steps, groups=hidden, activation=""))
    body += [*_gates(hidden, block.squeeze), Ghost(hidden, cout, activation="", kernel=cheap)]
    if steps == 1 and cin == cout:
        return Residual(nn.Sequential(*body))
    shortcut = nn.Sequential(
        ConvBnAct(cin, cin, kernel, steps, groups=cin, activation=""), ConvBnAct(cin, cout, activation="")
    )
    return Residual(nn.Sequential(*body), shortcut)


def _gates(channels: int, squeeze: float) -> list[nn.Module]:
    """Squeeze-and-excitation with a share `squeeze` of the channels inside; none for zero."""
    return [SqueezeExcite(channels, make_divisible(channels * squeeze))] if squeeze else []


def _along(size: int) -> tuple[int, int]:
    return 1, size


def _sized(kernel: int, along_width: bool) -> Size:
    return _along(kernel) if along_width else kernel


def stem(table: ChainTable) -> nn.Module:
    """The first convolution."""
    flat = table.dimensions == 1
    kernel, stride = _sized(table.stem_kernel, flat), _sized(table.stem_stride, flat)
    return ConvBnAct(table.in_channels, table.stem_width, kernel, stride, activation=table.activation)


def head(table: ChainTable, channels: int) -> nn.Module:
    """The last convolution where there is one, pooling, classifier."""
    final = [ConvBnAct(channels, table.final_width, activation=table.activation)] if table.final_width else []
    return nn.Sequential(*final, *classifier(table.final_width or channels, table.num_classes, table.dropout))
