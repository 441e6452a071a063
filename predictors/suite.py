"""Networks to calibrate with where no space is given: made up, of every kind of building block, cheap and dear.

One network shows a runtime a few kinds of blocks at sizes of its own; together they show it what published families
are made of, at more widths than those have. So an operator model of them predicts families that it never saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from search_spaces import UserError, Workload

if TYPE_CHECKING:
    from torch import nn

# A layer of a recipe: the name of a block and its arguments.
Layer = tuple[str, tuple[tuple[str, Any], ...]]

MACS = (3e5, 1.5e9)
RESOLUTIONS = (20, 320)
MOST_PARAMS = 7e7
TRIALS = 20
ACTIVATIONS = ("relu", "relu6", "hard_swish", "silu", "gelu")
MEDLEY = "medley"
_FOLDS = 8  # families that medleys are shared out among
_GOLDEN = 0.618034  # of all steps around a circle, multiples of it leave the most even gaps


class CalibrationNetwork(Protocol):
    """What calibration needs of a network; `search_spaces.ReferenceNetwork` is one.

    `name` identifies it; networks of one `family` are left out together in cross-validation.
    """

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def input_shape(self) -> tuple[int, ...]: ...
    def build(self) -> nn.Module: ...
    def workload(self) -> Workload: ...


@dataclass(frozen=True)
class MadeUpNetwork:
    """A network from a recipe: layers, global pooling (of maps) and a classifier; or it returns maps or boxes."""

    name: str
    family: str
    input_shape: tuple[int, ...]
    layers: tuple[Layer, ...]
    classes: int

    def build(self) -> nn.Module:
        """A fresh, initialised module that takes `(batch, *input_shape)`."""
        import torch

        return self._make().to(memory_format=torch.channels_last)

    def workload(self) -> Workload:
        """Its operators; computed once per process."""
        return _workload(self)

    def _make(self) -> Any:
        from predictors.suite_blocks import network

        return network(self.input_shape, self.layers, self.classes)


@lru_cache(maxsize=1024)
def _workload(network: MadeUpNetwork) -> Workload:
    import torch

    from search_spaces.tracing import trace

    with torch.device("meta"):
        module = network._make()
    return trace(module, network.input_shape)


def calibration_suite(n: int = 96, seed: int = 0) -> list[MadeUpNetwork]:
    """`n` different networks, spread over the logarithm of their MACs: of every theme one, and of many half medleys.

    A larger suite of the same seed begins with the smaller one.

    Args:
        n: at least one per theme, `len(THEMES)`.
        seed: of their sizes.

    Raises:
        UserError: too few.
    """
    if n < len(THEMES):
        raise UserError(f"a calibration suite has {len(THEMES)} themes, so at least as many networks; got {n}")
    others = [theme for theme in THEMES if theme != MEDLEY]
    turns = chain.from_iterable((MEDLEY, other) for other in cycle(others))
    made: list[MadeUpNetwork] = []
    counts: Counter[str] = Counter()
    for theme in islice(chain(THEMES, turns), n):
        number, i = list(THEMES).index(theme), counts[theme]
        counts[theme] += 1
        share = (np.random.default_rng([seed, number]).random() + i * _GOLDEN) % 1  # even however many there are
        macs = MACS[0] * (MACS[1] / MACS[0]) ** share
        made.append(_drawn(theme, i, THEMES[theme], macs, np.random.default_rng([seed, number, i])))
    return made


def _drawn(
    theme: str, index: int, recipe: Callable[[_Dice], Iterator[Layer]], macs: float, rng: np.random.Generator
) -> MadeUpNetwork:
    """One network of about `macs`, by its resolution, as far as that goes; not larger than a file should be."""
    family = f"{theme}-{index % _FOLDS}" if theme == MEDLEY else theme
    for _ in range(TRIALS):
        dice = _Dice(rng, scale=float((macs / 1e8) ** 0.25))
        layers = tuple(recipe(dice))
        channels, classes = int(rng.choice([3, 3, 3, 1])), int(rng.choice([10, 100, 1000]))
        network = MadeUpNetwork(f"{theme}-{index}", family, (channels, 96, 96), layers, classes)
        workload = network.workload()
        size = 96 * np.sqrt(macs / max(1, workload.macs))
        step = int(rng.choice([1, 16, 32]))
        size = int(np.clip(round(size / step) * step, *RESOLUTIONS))
        network = replace(network, input_shape=(channels, size, size))
        if workload.params <= MOST_PARAMS:
            break
    return network


class _Dice:
    """Draws sizes for one network, whose stages grow wider as published ones do."""

    def __init__(self, rng: np.random.Generator, scale: float) -> None:
        self.rng = rng
        self.width = np.exp(rng.uniform(np.log(12), np.log(48))) * np.clip(scale, 0.3, 2.0)
        self.growth = rng.uniform(1.4, 2.3)
        self.stages = self.count(3, 5)
        self.deepest = self.count(1, 18)

    def channels(self, stage: float, share: float = 1.0) -> int:
        """Of a stage, or a share of them; mostly a multiple of 8 or 16."""
        value = share * self.width * self.growth**stage * np.exp(self.rng.normal(0, 0.25))
        step = self.rng.choice([1, 4, 8, 8, 8, 16, 16, 16, 32])
        return int(max(step, 4, round(value / step) * step))

    def one(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def each(self) -> Iterator[tuple[int, int, int]]:
        """(stage, block in it, stride) of every block; most stages halve the resolution."""
        for stage in range(1, self.stages + 1):
            stride = self.one(1, 2, 2, 2, 2)
            for block in range(self.count(1, self.deepest)):
                yield stage, block, stride if block == 0 else 1


def _layer(kind: str, **arguments: Any) -> Layer:
    return kind, tuple(arguments.items())


def _stem(d: _Dice) -> Iterator[Layer]:
    """What most networks begin with."""
    kernel = d.one(3, 3, 3, 5, 7)
    act = d.one("relu", "hard_swish", "silu")
    yield _layer("conv", out=d.channels(0), kernel=kernel, stride=d.one(1, 2, 2, 2), act=act)
    if kernel == 7 or d.chance(0.2):
        yield _layer("max_pool", kernel=d.one(2, 3), stride=2)


def _top(d: _Dice) -> Iterator[Layer]:
    """What many end with: a wide pointwise convolution."""
    if d.chance(0.5):
        yield _layer("conv", out=d.channels(d.stages + 1), kernel=1, act=d.one("relu", "relu6", "hard_swish", "silu"))


def _plain(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    norm = d.chance(0.6)
    for stage, block, stride in d.each():
        if stride == 2:
            yield _layer("max_pool", kernel=d.one(2, 3), stride=2)
        if block == 0:
            out = d.channels(stage, 2.0)
        yield _layer("conv", out=out, kernel=d.one(3, 3, 3, 5), norm=norm)
    if d.chance(0.5):
        yield _layer("flatten", pool=d.one(1, 3, 6))
        yield _layer("dense", out=d.one(512, 1024, 2048, 4096), act="relu")


def _vectors(d: _Dice) -> Iterator[Layer]:
    yield _layer("conv", out=d.channels(0), kernel=5, stride=4)
    yield _layer("flatten", pool=d.one(2, 4, 6))
    for _ in range(d.count(1, 3)):
        yield _layer("dense", out=d.one(128, 256, 512, 1024, 1500, 2048, 4096), act=d.one("relu", "gelu", "sigmoid"))


def _residual(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    act = d.one("relu", "relu", "relu", "silu")
    for stage, block, stride in d.each():
        if block == 0:
            out = d.channels(stage, 1.5)
        yield _layer("residual", out=out, stride=stride, act=act)


def _bottleneck(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    groups = d.one(1, 1, 1, 4)
    for stage, block, stride in d.each():
        if block == 0:
            out = 4 * d.channels(stage)
        yield _layer("bottleneck", out=out, stride=stride, groups=groups)


def _pointwise(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage, _, stride in d.each():
        yield _layer("conv", out=d.channels(stage, 2.0), kernel=1, stride=stride, act=d.one(*ACTIVATIONS, ""))


def _separable(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    act, kernel = d.one("relu", "relu6"), d.one(3, 3, 3, 5, 7)
    for stage, block, stride in d.each():
        if block == 0:
            out = d.channels(stage, 2.0)
        yield _layer("separable", out=out, kernel=kernel, stride=stride, act=act)


def _preactivated(d: _Dice) -> Iterator[Layer]:
    """As Inceptions and Xceptions are: a first depthwise convolution of several outputs per channel, and ReLUs that no
    convolution takes in, since a shortcut reads the same."""
    kernel, times = d.one(3, 5, 7), d.one(1, 4, 8, 16)
    yield _layer("separable", out=d.channels(0), kernel=kernel, stride=2, act="relu", times=times)
    for stage, block, stride in d.each():
        if block == 0:
            out = d.channels(stage, 1.5)
        yield _layer("preactivated", out=out, kernel=d.one(3, 3, 5), stride=stride, times=d.one(1, 1, 1, 2))


def _inverted(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    gate = d.one("hard_sigmoid", "sigmoid")
    for stage, block, stride in d.each():
        if block == 0:
            out, act, se, kernel = (
                d.channels(stage, 0.8),
                d.one("relu", "relu6", "hard_swish", "silu"),
                d.chance(0.5),
                d.one(3, 5, 7),
            )
        yield _layer(
            "inverted", out=out, kernel=kernel, stride=stride, expansion=d.one(2, 3, 4, 6), act=act,
            gate=gate if se else "",
        )  # fmt: skip
    yield from _top(d)


def _gated(d: _Dice) -> Iterator[Layer]:
    """As mobile search spaces are: small, deep, and all with gates and smooth activations."""
    yield _layer("conv", out=d.channels(0), kernel=3, stride=d.one(1, 2), act="hard_swish")
    act, gate = d.one("hard_swish", "hard_swish", "silu"), d.one("hard_sigmoid", "hard_sigmoid", "sigmoid")
    for stage, block, stride in d.each():
        if block == 0:
            out = d.channels(stage, 0.8)
        yield _layer(
            "inverted", out=out, kernel=d.one(3, 5, 7), stride=stride, expansion=d.one(2, 3, 4, 6), act=act, gate=gate,
        )  # fmt: skip
    yield from _top(d)


def _leaky(d: _Dice) -> Iterator[Layer]:
    """As small detectors are: leaky ReLUs, which not every kernel of a convolution takes in."""
    act = "leaky_relu"
    yield _layer("conv", out=d.channels(0), kernel=3, stride=d.one(1, 2), act=act)
    for stage, block, stride in d.each():
        kind = d.one("conv", "residual", "split_bottlenecks")
        if block == 0 or kind == "conv":
            yield _layer("conv", out=d.channels(stage), kernel=d.one(1, 3, 3), stride=stride, act=act)
        elif kind == "residual":
            yield _layer("residual", out=d.channels(stage), stride=stride, act=act)
        else:
            yield _layer("split_bottlenecks", act=act)


def _fused(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    act = d.one("relu", "relu6", "silu", "hard_swish")
    for stage, block, stride in d.each():
        if block == 0:
            out = d.channels(stage, 0.7)
        yield _layer("fused", out=out, stride=stride, expansion=d.one(2, 4, 6), act=act)


def _dense_blocks(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    growth, bottleneck = d.one(8, 12, 16, 24, 32, 32, 48), d.chance(0.7)
    for stage in range(1, min(d.stages, 4) + 1):
        for _ in range(d.count(2, 16)):
            yield _layer("growing", growth=growth, bottleneck=bottleneck)
        yield _layer("transition", out=d.channels(stage, 1.5))


def _branches(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage, _, stride in d.each():
        if stride == 2:
            yield _layer("max_pool", kernel=3, stride=2)
        yield _layer(
            "inception", ones=d.channels(stage, 0.6), threes=d.channels(stage), fives=d.channels(stage, 0.4),
            pool=d.channels(stage, 0.4), long=d.one("", "7", "3"), reduce=d.channels(stage, 0.6),
        )  # fmt: skip


def _fire(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage, _, stride in d.each():
        if stride == 2:
            yield _layer("max_pool", kernel=3, stride=2)
        yield _layer("fire", squeeze=d.channels(stage, 0.3), expand=d.channels(stage, 1.2))


def _grouped(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    groups = d.one(2, 3, 4, 8, 8)
    for stage, block, stride in d.each():
        if block == 0:
            out = groups * 4 * max(1, round(d.channels(stage, 4.0) / groups / 4))
        yield _layer("shuffled", out=out, groups=groups, stride=stride)


def _splits(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage, block, stride in d.each():
        if block == 0:
            yield _layer("separable", out=2 * (d.channels(stage, 2.0) // 2), kernel=3, stride=stride, act="relu")
        else:
            yield _layer(d.one("split_unit", "split_unit", "split_bottlenecks"))
    yield from _top(d)


def _ghosts(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage, _, stride in d.each():
        out = 2 * max(4, d.channels(stage, 1.5) // 2)
        yield _layer("ghost", out=out, kernel=d.one(3, 5), stride=stride)


def _decoder(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage in range(1, min(d.stages, 3) + 1):
        yield _layer("conv", out=d.channels(stage), kernel=3, stride=2, act="silu")
    for _ in range(d.count(1, 2)):
        yield _layer(
            "hourglass", out=d.channels(d.stages), up=d.one("nearest", "bilinear", "transposed"), kernel=d.one(3, 3, 1),
        )  # fmt: skip
    if d.chance(0.4):
        yield _layer("pyramid", out=d.channels(d.stages), dilation=d.one(2, 4))
    yield _layer("pooled_pyramid")
    if d.chance(0.5):
        # Back to about the input's size, as segmenters do, whose last factor need not be whole.
        yield _layer("enlarged", out=d.one(4, 19, 21, 32), factor=d.one(3.7, 4, 7.8, 8, 8.3))


def _upward(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    depth = d.count(1, 3)
    for stage in range(1, depth + 1):
        yield _layer("conv", out=d.channels(stage), kernel=3, stride=2)
    for stage in range(depth, 0, -1):
        yield _layer("grown", out=d.channels(stage - 1), kernel=d.one(2, 3, 4))
        if d.chance(0.5):
            yield _layer("conv", out=d.channels(stage - 1), kernel=3)
    if d.chance(0.5):
        yield _layer("map", out=d.one(1, 2, 21, 64))
    else:
        yield _layer("enlarged", out=d.one(2, 8, 19, 21), factor=d.one(1.9, 2, 3.7, 4))


def _detector(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    act = d.one("relu", "relu6", "hard_swish")
    for stage, block, stride in d.each():
        if block == 0:
            out = d.channels(stage)
        yield _layer("separable", out=out, kernel=3, stride=stride, act=act)
    yield _layer(
        "detector", width=2 * d.channels(2), maps=d.count(2, 6), anchors=d.one(3, 6), outputs=d.one(4, 21, 91),
        kernel=d.one(1, 1, 3),
    )  # fmt: skip


def _attention(d: _Dice) -> Iterator[Layer]:
    heads, size = d.one(2, 3, 4, 6, 8), d.one(16, 32, 64)
    yield _layer("patches", out=heads * size, patch=d.one(8, 16, 16))
    for _ in range(d.count(2, 12)):
        yield _layer("encoder", heads=heads, expansion=d.one(2, 4), act=d.one("gelu", "gelu", "silu"))


def _mixed_attention(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for stage in range(1, min(d.stages, 3) + 1):
        yield _layer(
            "inverted", out=d.channels(stage), kernel=3, stride=2, expansion=d.one(2, 4), act="silu", gate="",
        )  # fmt: skip
        if stage > 1:
            yield _layer("mobile_attention", width=d.one(64, 96, 144, 192, 240), depth=d.count(1, 4), patch=2)


def _medley(d: _Dice) -> Iterator[Layer]:
    """Blocks of all themes in any order, which tells apart what kinds of kernels cost that come together elsewhere."""
    yield from _stem(d)
    for stage, _, stride in d.each():
        kind, act = d.one(*_MIXED), d.one("relu", "relu", *ACTIVATIONS)
        out = d.channels(stage)
        if stride == 2 and kind in _UNSTRIDED:
            yield _layer(d.one("max_pool", "avg_pool"), kernel=d.one(2, 3), stride=2)
        if kind == "conv":
            yield _layer("conv", out=out, kernel=d.one(1, 1, 3, 5), stride=stride, act=d.one(act, ""))
        elif kind == "residual":
            yield _layer("residual", out=out, stride=stride, act=act)
        elif kind == "bottleneck":
            yield _layer("bottleneck", out=4 * out, stride=stride, groups=d.one(1, 1, 4))
        elif kind == "separable":
            yield _layer("separable", out=2 * out, kernel=d.one(3, 3, 5, 7), stride=stride, act=act)
        elif kind == "inverted":
            gate = d.one("", "", "hard_sigmoid", "sigmoid")
            yield _layer(
                "inverted", out=out, kernel=d.one(3, 3, 5, 7), stride=stride, expansion=d.one(2, 3, 4, 6), act=act,
                gate=gate,
            )  # fmt: skip
        elif kind == "fused":
            yield _layer("fused", out=out, stride=stride, expansion=d.one(2, 4), act=act)
        elif kind == "ghost":
            yield _layer("ghost", out=2 * out, kernel=d.one(3, 5), stride=stride)
        elif kind == "shuffled":
            groups = d.one(2, 3, 4, 8)
            yield _layer("shuffled", out=groups * 4 * max(1, round(out / groups / 2)), groups=groups, stride=stride)
        elif kind == "inception":
            yield _layer(
                "inception", ones=d.channels(stage, 0.4), threes=d.channels(stage, 0.6), fives=d.channels(stage, 0.3),
                pool=d.channels(stage, 0.3), long=d.one("", "7", "3"), reduce=d.channels(stage, 0.4),
            )  # fmt: skip
        elif kind == "fire":
            yield _layer("fire", squeeze=d.channels(stage, 0.3), expand=out)
        elif kind == "growing":
            yield _layer("growing", growth=d.one(8, 16, 32), bottleneck=d.chance(0.5))
        elif kind == "transition":
            yield _layer("transition", out=out)
        elif kind == "hourglass":
            up = d.one("nearest", "bilinear", "transposed")
            yield _layer("hourglass", out=out, up=up, kernel=d.one(1, 3))
        elif kind == "grown":
            yield _layer("grown", out=out, kernel=d.one(2, 3, 4))
            yield _layer(d.one("max_pool", "avg_pool"), kernel=2, stride=2)
        elif kind == "pool":
            yield _layer(d.one("max_pool", "avg_pool"), kernel=3, stride=1)
        else:
            yield _layer(kind)
    yield from _top(d)


_UNSTRIDED = (
    "inception", "fire", "growing", "split_unit", "split_bottlenecks", "pooled_pyramid", "hourglass", "grown", "pool",
)  # fmt: skip
_MIXED = (
    "conv", "conv", "residual", "bottleneck", "separable", "inverted", "inverted", "fused", "ghost", "shuffled",
    "transition", *_UNSTRIDED,
)  # fmt: skip

# Every theme, and the maker of its recipes.
THEMES: dict[str, Callable[[_Dice], Iterator[Layer]]] = {
    "plain": _plain,
    "vectors": _vectors,
    "residual": _residual,
    "bottleneck": _bottleneck,
    "pointwise": _pointwise,
    "separable": _separable,
    "inverted": _inverted,
    "fused": _fused,
    "dense": _dense_blocks,
    "branches": _branches,
    "fire": _fire,
    "grouped": _grouped,
    "splits": _splits,
    "ghost": _ghosts,
    "decoder": _decoder,
    "upward": _upward,
    "attention": _attention,
    "mixed_attention": _mixed_attention,
    MEDLEY: _medley,
    "gated": _gated,
    "leaky": _leaky,
    "preactivated": _preactivated,
    "detector": _detector,
}
