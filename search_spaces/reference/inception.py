"""The Inception family (Szegedy et al., CVPR 2015, CVPR 2016, AAAI 2017), from nested tables.

In a table a tuple is a sequence and a list is a set of branches whose outputs are concatenated; they nest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, Union

from torch import Tensor, nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import (
    Branches,
    ConvBnAct,
    Padding,
    average_pool,
    classifier,
    conv,
    initialise,
    max_pool,
)


class C(NamedTuple):
    """A convolution with normalisation and ReLU."""

    cout: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padding: Padding = "same"


class Pool(NamedTuple):
    """Pooling: `max` or `average`."""

    kind: str
    kernel: int = 3
    stride: int = 1
    padding: Padding = "same"
    ceil: bool = False


class Add(NamedTuple):
    """Residual block of Inception-ResNet: `times` in a row, `scale` on the branch."""

    branches: Layers
    scale: float
    times: int = 1
    relu: bool = True


# Branches are a `Sequence` to mypy, since a list of tuples is no list of layers to it.
Layers: TypeAlias = Union[C, Pool, Add, Sequence["Layers"]]  # noqa: UP007
Convolution = Callable[[int, C], nn.Module]


def _normalised(cin: int, c: C) -> nn.Module:
    return ConvBnAct(cin, c.cout, c.kernel, c.stride, padding=c.padding)


def _biased(cin: int, c: C) -> nn.Module:
    return nn.Sequential(conv(cin, c.cout, c.kernel, c.stride, padding=c.padding), nn.ReLU())


class ScaledResidual(nn.Module):
    """`x + scale * project(body(x))`, and ReLU except at the end of the network."""

    def __init__(self, channels: int, body: nn.Module, inner: int, scale: float, relu: bool) -> None:
        super().__init__()
        self.body = body
        self.project = conv(inner, channels)
        self.scale = scale
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.body(x))
        return self.activation(x + (y if self.scale == 1 else self.scale * y))


def assemble(cin: int, layers: Layers, make: Convolution = _normalised) -> tuple[nn.Module, int]:
    """The module that a table describes, and its output channels."""
    if isinstance(layers, C):
        return make(cin, layers), layers.cout
    if isinstance(layers, Pool):
        if layers.kind == "average":
            return average_pool(layers.kernel, layers.stride), cin
        return max_pool(layers.kernel, layers.stride, layers.padding, layers.ceil), cin
    if isinstance(layers, Add):
        blocks = []
        for _ in range(layers.times):
            body, inner = assemble(cin, layers.branches, make)
            blocks.append(ScaledResidual(cin, body, inner, layers.scale, layers.relu))
        return nn.Sequential(*blocks), cin
    if isinstance(layers, list):
        parts = [assemble(cin, branch, make) for branch in layers]
        return Branches(*(module for module, _ in parts)), sum(channels for _, channels in parts)
    modules = []
    for layer in layers:
        module, cin = assemble(cin, layer, make)
        modules.append(module)
    return nn.Sequential(*modules), cin


AVERAGE = Pool("average")
REDUCE = Pool("max", 3, 2, "valid")
_H, _V = (1, 7), (7, 1)
_SPLIT_384: Layers = [C(384, (1, 3)), C(384, (3, 1))]
_SPLIT_256: Layers = [C(256, (1, 3)), C(256, (3, 1))]


def _mixed_v1(a: int, b: tuple[int, int], c: tuple[int, int], d: int, large: int) -> Layers:
    return [C(a), (C(b[0]), C(b[1], 3)), (C(c[0]), C(c[1], large)), (Pool("max"), C(d))]


def v1(large: int, last_pool: int) -> Layers:
    """GoogLeNet's table. `large` is the kernel of the third branch, `last_pool` that of the last max pooling."""
    pool = Pool("max", 3, 2, "valid", True)
    return (
        C(64, 7, 2), pool, C(64), C(192, 3), pool,
        _mixed_v1(64, (96, 128), (16, 32), 32, large),
        _mixed_v1(128, (128, 192), (32, 96), 64, large),
        pool,
        _mixed_v1(192, (96, 208), (16, 48), 64, large),
        _mixed_v1(160, (112, 224), (24, 64), 64, large),
        _mixed_v1(128, (128, 256), (24, 64), 64, large),
        _mixed_v1(112, (144, 288), (32, 64), 64, large),
        _mixed_v1(256, (160, 320), (32, 128), 128, large),
        Pool("max", last_pool, 2, "valid", True),
        _mixed_v1(256, (160, 320), (32, 128), 128, large),
        _mixed_v1(384, (192, 384), (48, 128), 128, large),
    )  # fmt: skip


def _mixed_v2(a: int, b: tuple[int, int], c: tuple[int, int], d: int, pool: Pool = AVERAGE) -> Layers:
    return [C(a), (C(b[0]), C(b[1], 3)), (C(c[0]), C(c[1], 3), C(c[1], 3)), (pool, C(d))]


def _reduce_v2(b: tuple[int, int], c: tuple[int, int]) -> Layers:
    return [(C(b[0]), C(b[1], 3, 2)), (C(c[0]), C(c[1], 3), C(c[1], 3, 2)), Pool("max", 3, 2)]


V2: Layers = (
    Pool("max", 3, 2), C(64), C(192, 3), Pool("max", 3, 2),
    _mixed_v2(64, (64, 64), (64, 96), 32),
    _mixed_v2(64, (64, 96), (64, 96), 64),
    _reduce_v2((128, 160), (64, 96)),
    _mixed_v2(224, (64, 96), (96, 128), 128),
    _mixed_v2(192, (96, 128), (96, 128), 128),
    _mixed_v2(160, (128, 160), (128, 160), 96),
    _mixed_v2(96, (128, 192), (160, 192), 96),
    _reduce_v2((128, 192), (192, 256)),
    _mixed_v2(352, (192, 320), (160, 224), 128),
    _mixed_v2(352, (192, 320), (192, 224), 128, Pool("max")),
)  # fmt: skip

_STEM: Layers = (
    C(32, 3, 2, "valid"), C(32, 3, 1, "valid"), C(64, 3), REDUCE, C(80), C(192, 3, 1, "valid"), REDUCE,
)  # fmt: skip


def _mixed_5(d: int) -> Layers:
    return [C(64), (C(48), C(64, 5)), (C(64), C(96, 3), C(96, 3)), (AVERAGE, C(d))]


def _mixed_6(c: int) -> Layers:
    return [
        C(192), (C(c), C(c, _H), C(192, _V)), (C(c), C(c, _V), C(c, _H), C(c, _V), C(192, _H)), (AVERAGE, C(192)),
    ]  # fmt: skip


_MIXED_7: Layers = [C(320), (C(384), _SPLIT_384), (C(448), C(384, 3), _SPLIT_384), (AVERAGE, C(192))]

V3: Layers = (
    _STEM,
    *(_mixed_5(d) for d in (32, 64, 64)),
    [C(384, 3, 2, "valid"), (C(64), C(96, 3), C(96, 3, 2, "valid")), REDUCE],
    *(_mixed_6(c) for c in (128, 160, 160, 192)),
    [(C(192), C(320, 3, 2, "valid")), (C(192), C(192, _H), C(192, _V), C(192, 3, 2, "valid")), REDUCE],
    *(_MIXED_7,) * 2,
)

_A: Layers = [C(96), (C(64), C(96, 3)), (C(64), C(96, 3), C(96, 3)), (AVERAGE, C(96))]
_B: Layers = [
    C(384), (C(192), C(224, _H), C(256, _V)), (C(192), C(192, _V), C(224, _H), C(224, _V), C(256, _H)),
    (AVERAGE, C(128)),
]  # fmt: skip
_C: Layers = [C(256), (C(384), _SPLIT_256), (C(384), C(448, (3, 1)), C(512, (1, 3)), _SPLIT_256), (AVERAGE, C(256))]
_REDUCTION_B: Layers = [
    (C(192), C(192, 3, 2, "valid")), (C(256), C(256, _H), C(320, _V), C(320, 3, 2, "valid")), REDUCE,
]  # fmt: skip
_MIXED_4A: Layers = [
    (C(64), C(96, 3, 1, "valid")), (C(64), C(64, _H), C(64, _V), C(96, 3, 1, "valid")),
]  # fmt: skip

V4: Layers = (
    C(32, 3, 2, "valid"), C(32, 3, 1, "valid"), C(64, 3),
    [REDUCE, C(96, 3, 2, "valid")],
    _MIXED_4A,
    [C(192, 3, 2, "valid"), REDUCE],
    *(_A,) * 4,
    [C(384, 3, 2, "valid"), (C(192), C(224, 3), C(256, 3, 2, "valid")), REDUCE],
    *(_B,) * 7,
    _REDUCTION_B,
    *(_C,) * 3,
)  # fmt: skip

RESNET_V2: Layers = (
    _STEM,
    [C(96), (C(48), C(64, 5)), (C(64), C(96, 3), C(96, 3)), (AVERAGE, C(64))],
    Add([C(32), (C(32), C(32, 3)), (C(32), C(48, 3), C(64, 3))], 0.17, 10),
    [C(384, 3, 2, "valid"), (C(256), C(256, 3), C(384, 3, 2, "valid")), REDUCE],
    Add([C(192), (C(128), C(160, _H), C(192, _V))], 0.1, 20),
    [
        (C(256), C(384, 3, 2, "valid")), (C(256), C(288, 3, 2, "valid")),
        (C(256), C(288, 3), C(320, 3, 2, "valid")), REDUCE,
    ],
    Add([C(192), (C(192), C(224, (1, 3)), C(256, (3, 1)))], 0.2, 9),
    Add([C(192), (C(192), C(224, (1, 3)), C(256, (3, 1)))], 1.0, 1, relu=False),
    C(1536),
)  # fmt: skip

TABLES: dict[str, Layers] = {
    "v1": v1(large=3, last_pool=2),
    "v1_caffe": v1(large=5, last_pool=3),
    "v2": V2,
    "v3": V3,
    "v4": V4,
    "resnet_v2": RESNET_V2,
}


def inception(input_shape: InputShape, num_classes: int, *, table: str, dropout: float, norm: bool = True) -> nn.Module:
    """The network of a table, with a linear classifier and without auxiliary ones."""
    body, channels = assemble(input_shape[0], TABLES[table], _normalised if norm else _biased)
    return initialise(nn.Sequential(body, classifier(channels, num_classes, dropout)))


def inception_v2(input_shape: InputShape, num_classes: int, *, dropout: float) -> nn.Module:
    """Inception v2 of TF-slim: its 7x7 stem is separable, with eight filters per input channel, and not normalised."""
    channels = input_shape[0]
    depthwise = conv(channels, 8 * channels, 7, 2, groups=channels, bias=False)
    stem = (depthwise, conv(8 * channels, 64), nn.ReLU())
    body, channels = assemble(64, V2)
    return initialise(nn.Sequential(*stem, body, classifier(channels, num_classes, dropout)))
