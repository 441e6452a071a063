"""Builds the tables of YOLO detectors, as deployed: training branches re-parameterised, raw heads without decoding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import Branches, ConvBnAct, Residual, conv, initialise, max_pool
from search_spaces.reference.yolo_tables import Table

ANCHORS = 3  # per pixel, of heads with anchors
Block = Callable[[int, int, str], nn.Module]


def yolo(
    input_shape: InputShape,
    num_classes: int,
    *,
    table: Table,
    depth: float = 1.0,
    width: float = 1.0,
    max_channels: int | None = None,
) -> nn.Module:
    """A detector at a depth and a width multiplier.

    Args:
        max_channels: at width 1; wider layers are narrowed to it.
    """
    return initialise(Yolo(input_shape[0], num_classes, table, depth, width, max_channels))


class Yolo(nn.Module):
    """Layers that read any earlier ones, and a head on some of their outputs."""

    def __init__(
        self, in_channels: int, num_classes: int, table: Table, depth: float, width: float, max_channels: int | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.sources: list[tuple[int, ...]] = []
        self.outputs = table.outputs
        made: list[int] = []  # output channels per layer
        for index, layer in enumerate(table.layers):
            sources = tuple(index + s if s < 0 else s for s in layer.sources)
            cins = [made[s] if s >= 0 else in_channels for s in sources]
            cout = sum(cins)
            if layer.channels:
                cout = math.ceil(min(layer.channels, max_channels or layer.channels) * width / 8) * 8
            repeats = max(round(layer.repeats * depth), 1) if layer.repeats > 1 else 1
            self.layers.append(_KINDS[layer.kind](sum(cins), cout, repeats, table.activation, *layer.options))
            self.sources.append(sources)
            made.append(cout)
        channels = [made[i] for i in table.outputs]
        head = _HEADS[table.head]
        self.heads = nn.ModuleList(head(c, channels, num_classes, table.bins, table.head_activation) for c in channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Per map, from fine to coarse: boxes and classes `(batch, channels, height, width)`."""
        made: dict[int, Tensor] = {-1: x}
        for index, (layer, sources) in enumerate(zip(self.layers, self.sources, strict=True)):
            inputs = [made[s] for s in sources]
            made[index] = layer(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 1))
        return [head(made[i]) for i, head in zip(self.outputs, self.heads, strict=True)]


def _depthwise(cin: int, kernel: int, activation: str, stride: int = 1) -> ConvBnAct:
    return ConvBnAct(cin, cin, kernel, stride, groups=cin, activation=activation)


class Bottleneck(nn.Module):
    """Two convolutions, the second 3x3, with a shortcut where asked for and possible."""

    def __init__(
        self, cin: int, cout: int, activation: str, shortcut: bool = True, share: float = 1.0, kernel: int = 3
    ) -> None:
        super().__init__()
        hidden = int(cout * share)
        self.body = nn.Sequential(
            ConvBnAct(cin, hidden, kernel, activation=activation), ConvBnAct(hidden, cout, 3, activation=activation)
        )
        self.shortcut = shortcut and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.shortcut else self.body(x)


class SplitStack(nn.Module):
    """Half of the channels passes blocks one after the other; every result is joined (C2f)."""

    def __init__(self, cin: int, cout: int, blocks: int, activation: str, share: float, make: Block) -> None:
        super().__init__()
        half = int(cout * share)
        self.enter = ConvBnAct(cin, 2 * half, activation=activation)
        self.blocks = nn.ModuleList(make(half, half, activation) for _ in range(blocks))
        self.leave = ConvBnAct((2 + blocks) * half, cout, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Csp(nn.Module):
    """A stack and a 1x1 branch beside it, joined by a 1x1 convolution (C3)."""

    def __init__(
        self, cin: int, cout: int, activation: str, stack: Callable[[int], nn.Module], share: float = 0.5
    ) -> None:
        super().__init__()
        hidden = int(cout * share)
        self.branches = Branches(
            nn.Sequential(ConvBnAct(cin, hidden, activation=activation), stack(hidden)),
            ConvBnAct(cin, hidden, activation=activation),
        )
        self.leave = ConvBnAct(2 * hidden, cout, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.branches(x))


def _nested(cin: int, cout: int, activation: str, blocks: int = 2) -> nn.Module:
    """C3 of bottlenecks (C3k)."""
    return Csp(
        cin,
        cout,
        activation,
        lambda hidden: nn.Sequential(*(Bottleneck(hidden, hidden, activation) for _ in range(blocks))),
    )


def _compact_inverted(channels: int, activation: str, shortcut: bool, large: bool) -> nn.Module:
    """Depthwise and pointwise convolutions in turn (CIB); the large kernel is 7x7, re-parameterised."""
    body = nn.Sequential(
        _depthwise(channels, 3, activation),
        ConvBnAct(channels, 2 * channels, activation=activation),
        _depthwise(2 * channels, 7 if large else 3, activation),
        ConvBnAct(2 * channels, channels, activation=activation),
        _depthwise(channels, 3, activation),
    )
    return Residual(body) if shortcut else body


class Pooled(nn.Module):
    """The input and three max poolings one after the other, joined between two 1x1 convolutions (SPPF, SPPELAN)."""

    def __init__(self, cin: int, hidden: int, cout: int, activation: str, kernel: int = 5) -> None:
        super().__init__()
        self.enter = ConvBnAct(cin, hidden, activation=activation)
        self.pool = max_pool(kernel, 1)
        self.leave = ConvBnAct(4 * hidden, cout, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Attention(nn.Module):
    """Self-attention over pixels with keys of half the head's width, and a depthwise convolution of the values."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 64
        self.value = channels // self.heads
        self.key = self.value // 2
        self.qkv = ConvBnAct(channels, channels + 2 * self.key * self.heads, activation="")
        self.out = ConvBnAct(channels, channels, activation="")
        self.positions = _depthwise(channels, 3, "")

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(2).unflatten(1, (self.heads, -1))
        q, k, v = qkv.split([self.key, self.key, self.value], 2)
        weights = (q.transpose(-2, -1) @ k * self.key**-0.5).softmax(-1)
        y = (v @ weights.transpose(-2, -1)).flatten(1, 2).unflatten(2, x.shape[-2:])
        return self.out(y + self.positions(v.flatten(1, 2).unflatten(2, x.shape[-2:])))


class HalfAttention(nn.Module):
    """Half of the channels passes attention and a two-layer perceptron, the other half passes (PSA, C2PSA)."""

    def __init__(self, channels: int, blocks: int, activation: str) -> None:
        super().__init__()
        half = channels // 2
        self.enter = ConvBnAct(channels, 2 * half, activation=activation)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(Attention(half)),
                    Residual(
                        nn.Sequential(
                            ConvBnAct(half, 2 * half, activation=activation), ConvBnAct(2 * half, half, activation="")
                        )
                    ),
                )
                for _ in range(blocks)
            )
        )
        self.leave = ConvBnAct(2 * half, channels, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        kept, seen = self.enter(x).chunk(2, 1)
        return self.leave(torch.cat([kept, self.blocks(seen)], 1))


class Elan(nn.Module):
    """Split, two nested stages one after the other, all joined (RepNCSPELAN4; without nested blocks, ELAN1)."""

    def __init__(self, cin: int, cout: int, activation: str, hidden: int, inner: int, blocks: int) -> None:
        super().__init__()

        def stage(channels: int) -> nn.Module:
            last = ConvBnAct(inner, inner, 3, activation=activation)
            if blocks:
                return nn.Sequential(_nested(channels, inner, activation, blocks), last)
            return ConvBnAct(channels, inner, 3, activation=activation)

        self.enter = ConvBnAct(cin, hidden, activation=activation)
        self.stages = nn.ModuleList([stage(hidden // 2), stage(inner)])
        self.leave = ConvBnAct(hidden + 2 * inner, cout, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for stage in self.stages:
            parts.append(stage(parts[-1]))
        return self.leave(torch.cat(parts, 1))


class Scaled(nn.Module):
    """`body(x)` and the input times a learned number (BottleRep)."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.scale * x


def _conv(cin: int, cout: int, n: int, act: str, kernel: int, stride: int) -> nn.Module:
    return ConvBnAct(cin, cout, kernel, stride, activation=act)


def _c2f(cin: int, cout: int, n: int, act: str, shortcut: bool) -> nn.Module:
    return SplitStack(cin, cout, n, act, 0.5, lambda i, o, a: Bottleneck(i, o, a, shortcut))


def _c3k2(cin: int, cout: int, n: int, act: str, nested: bool, share: float) -> nn.Module:
    make: Block = _nested if nested else lambda i, o, a: Bottleneck(i, o, a, share=0.5)
    return SplitStack(cin, cout, n, act, share, make)


def _c2fcib(cin: int, cout: int, n: int, act: str, large: bool) -> nn.Module:
    return SplitStack(cin, cout, n, act, 0.5, lambda i, o, a: _compact_inverted(o, a, True, large))


def _sppf(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return Pooled(cin, cin // 2, cout, act)


def _sppelan(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return Pooled(cin, cout // 2, cout, act)


def _attention(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return HalfAttention(cout, n, act)


def _scdown(cin: int, cout: int, n: int, act: str, kernel: int, stride: int) -> nn.Module:
    return nn.Sequential(ConvBnAct(cin, cout, activation=act), _depthwise(cout, kernel, "", stride))


def _aconv(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2, 1), ConvBnAct(cin, cout, 3, 2, activation=act))


def _elan(cin: int, cout: int, n: int, act: str, hidden: int, inner: int, blocks: int) -> nn.Module:
    return Elan(cin, cout, act, hidden, inner, blocks)


def _repeat(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return nn.Sequential(*(ConvBnAct(cout if i else cin, cout, 3, activation=act) for i in range(n)))


def _bepc3(cin: int, cout: int, n: int, act: str) -> nn.Module:
    def stack(hidden: int) -> nn.Module:
        return nn.Sequential(*(Scaled(_repeat(hidden, hidden, 2, act)) for _ in range(max(n // 2, 1))))

    return Csp(cin, cout, act, stack, 2 / 3)


def _csp(cin: int, cout: int, n: int, act: str, shortcut: bool) -> nn.Module:
    def stack(hidden: int) -> nn.Module:
        return nn.Sequential(*(Bottleneck(hidden, hidden, act, shortcut, kernel=1) for _ in range(n)))

    return Csp(cin, cout, act, stack)


def _focus(cin: int, cout: int, n: int, act: str, kernel: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), ConvBnAct(4 * cin, cout, kernel, activation=act))


def _spp(cin: int, cout: int, n: int, act: str, kernels: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(
        ConvBnAct(cin, cin // 2, activation=act),
        Branches(nn.Identity(), *(max_pool(kernel, 1) for kernel in kernels)),
        ConvBnAct((1 + len(kernels)) * (cin // 2), cout, activation=act),
    )


def _upsample(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return nn.Upsample(scale_factor=2)


def _transpose(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return nn.ConvTranspose2d(cin, cout, 2, 2)


def _concat(cin: int, cout: int, n: int, act: str) -> nn.Module:
    return nn.Identity()


def _max_pool(cin: int, cout: int, n: int, act: str, kernel: int, stride: int) -> nn.Module:
    return max_pool(kernel, stride)


# Kind of a layer -> function of input channels, output channels, repeats, activation and the layer's options.
_KINDS: dict[str, Callable[..., nn.Module]] = {
    "aconv": _aconv,
    "bepc3": _bepc3,
    "c2f": _c2f,
    "c2fcib": _c2fcib,
    "c2psa": _attention,
    "c3k2": _c3k2,
    "concat": _concat,
    "conv": _conv,
    "csp": _csp,
    "elan": _elan,
    "focus": _focus,
    "max_pool": _max_pool,
    "psa": _attention,
    "repeat": _repeat,
    "scdown": _scdown,
    "spp": _spp,
    "sppelan": _sppelan,
    "sppf": _sppf,
    "transpose": _transpose,
    "upsample": _upsample,
}


def _decoupled(cin: int, channels: list[int], classes: int, bins: int, act: str) -> nn.Module:
    """Boxes and classes by two 3x3 convolutions and a 1x1 each."""
    box, score = max(16, channels[0] // 4, 4 * bins), max(channels[0], min(classes, 100))
    return Branches(_two_convs(cin, box, 4 * bins, act), _two_convs(cin, score, classes, act))


def _two_convs(cin: int, hidden: int, cout: int, act: str) -> nn.Module:
    return nn.Sequential(
        ConvBnAct(cin, hidden, 3, activation=act), ConvBnAct(hidden, hidden, 3, activation=act), conv(hidden, cout)
    )


def _light(cin: int, channels: list[int], classes: int, bins: int, act: str) -> nn.Module:
    """As `_decoupled`, with depthwise separable convolutions for the classes."""
    box, score = max(16, channels[0] // 4, 4 * bins), max(channels[0], min(classes, 100))
    separable = nn.Sequential(
        _depthwise(cin, 3, act),
        ConvBnAct(cin, score, activation=act),
        _depthwise(score, 3, act),
        ConvBnAct(score, score, activation=act),
        conv(score, classes),
    )
    return Branches(_two_convs(cin, box, 4 * bins, act), separable)


def _plain(cin: int, channels: list[int], classes: int, bins: int, act: str) -> nn.Module:
    """A shared 1x1 convolution, then a 3x3 and a 1x1 for boxes and for classes."""

    def branch(cout: int) -> nn.Module:
        return nn.Sequential(ConvBnAct(cin, cin, 3, activation=act), conv(cin, cout))

    return nn.Sequential(ConvBnAct(cin, cin, activation=act), Branches(branch(4 * bins), branch(classes)))


def _objectness(cin: int, channels: list[int], classes: int, bins: int, act: str) -> nn.Module:
    """A 1x1 convolution to the finest map's channels, then two 3x3 each for classes and for boxes and objectness."""
    hidden = channels[0]

    def twice() -> nn.Module:
        return nn.Sequential(*(ConvBnAct(hidden, hidden, 3, activation=act) for _ in range(2)))

    boxes = nn.Sequential(twice(), Branches(conv(hidden, 4 * bins), conv(hidden, 1)))
    scores = nn.Sequential(twice(), conv(hidden, classes))
    return nn.Sequential(ConvBnAct(cin, hidden, activation=act), Branches(boxes, scores))


def _anchors(cin: int, channels: list[int], classes: int, bins: int, act: str) -> nn.Module:
    """Box, objectness and classes of each anchor by one 1x1 convolution."""
    return conv(cin, ANCHORS * (5 + classes))


_HEADS: dict[str, Callable[[int, list[int], int, int, str], nn.Module]] = {
    "anchors": _anchors,
    "decoupled": _decoupled,
    "light": _light,
    "objectness": _objectness,
    "plain": _plain,
}
