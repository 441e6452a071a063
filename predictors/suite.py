"""Networks to calibrate with where no space is given: made up, of every kind of building block, cheap and dear.

One network shows a runtime a few kinds of blocks at sizes of its own; together they show it what published families
are made of, at more widths than those have. So an operator model of them predicts families that it never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from search_spaces import UserError, Workload

if TYPE_CHECKING:
    from torch import nn

# A layer of a recipe: the name of a block and its arguments.
Layer = tuple[str, tuple[tuple[str, Any], ...]]

MACS = (1.5e6, 2.5e9)
RESOLUTIONS = (24, 288)
ACTIVATIONS = ("relu", "relu6", "hard_swish", "silu", "gelu")


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
    """A network from a recipe: input, layers, global pooling (of maps), and a classifier."""

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
    """`n` different networks, an equal share of every theme, spread evenly over the logarithm of their MACs.

    Args:
        n: at least one per theme, `len(THEMES)`.
        seed: of their sizes.

    Raises:
        UserError: too few.
    """
    if n < len(THEMES):
        raise UserError(f"a calibration suite has {len(THEMES)} themes, so at least as many networks; got {n}")
    made = []
    for theme, recipe in enumerate(THEMES.values()):
        mine = len(range(theme, n, len(THEMES)))
        rng = np.random.default_rng([seed, theme])
        # Strata of each theme, shifted against each other.
        wanted = (np.arange(mine) + rng.random(mine)) / mine
        for i, share in enumerate(wanted):
            made.append(_drawn(list(THEMES)[theme], i, recipe, MACS[0] * (MACS[1] / MACS[0]) ** share, rng))
    return made


def _drawn(
    theme: str, index: int, recipe: Callable[[_Dice], Iterator[Layer]], macs: float, rng: np.random.Generator
) -> MadeUpNetwork:
    """One network of about `macs`, by its resolution, as far as that goes."""
    dice = _Dice(rng, width=float(np.sqrt(macs / 1e8)))
    layers = tuple(recipe(dice))
    channels = int(rng.choice([3, 3, 3, 1]))
    classes = int(rng.choice([10, 100, 1000]))
    trial = MadeUpNetwork(f"{theme}-{index}", theme, (channels, 96, 96), layers, classes)
    size = 96 * np.sqrt(macs / max(1, trial.workload().macs))
    step = int(rng.choice([1, 8, 16]))
    size = int(np.clip(round(size / step) * step, *RESOLUTIONS))
    return replace(trial, input_shape=(channels, size, size))


class _Dice:
    """Draws sizes; `width` scales how wide a network is."""

    def __init__(self, rng: np.random.Generator, width: float) -> None:
        self.rng = rng
        self.width = np.clip(width, 0.3, 2.5)

    def channels(self, low: int = 16, high: int = 160) -> int:
        """Log-uniform, mostly a multiple of 8 or 16."""
        value = np.exp(self.rng.uniform(np.log(low), np.log(high))) * self.width
        step = self.rng.choice([1, 4, 8, 8, 16, 16, 16, 32])
        return int(max(step, 4, round(value / step) * step))

    def one(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)


def _layer(kind: str, **arguments: Any) -> Layer:
    return kind, tuple(arguments.items())


def _stem(d: _Dice) -> Iterator[Layer]:
    """What most networks begin with."""
    kernel = d.one(3, 3, 3, 5, 7)
    yield _layer("conv", out=d.channels(16, 64), kernel=kernel, stride=d.one(1, 2, 2), act=d.one("relu", "hard_swish"))
    if kernel == 7 or d.chance(0.2):
        yield _layer("max_pool", kernel=d.one(2, 3), stride=2)


def _plain(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(1, 3)):
        out = d.channels(24, 256)
        for _ in range(d.count(1, 3)):
            yield _layer("conv", out=out, kernel=d.one(3, 3, 3, 5), norm=d.chance(0.6))
        yield _layer("max_pool", kernel=d.one(2, 3), stride=2)
    if d.chance(0.5):
        yield _layer("flatten", pool=d.one(1, 4, 7))
        yield _layer("dense", out=d.one(256, 512, 1024, 2048), act="relu")


def _residual(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    act = d.one("relu", "relu", "relu", "silu")
    for _ in range(d.count(1, 3)):
        out, stride = d.channels(32, 200), d.one(1, 2)
        for i in range(d.count(1, 3)):
            yield _layer("residual", out=out, stride=stride if i == 0 else 1, act=act)


def _bottleneck(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(1, 3)):
        out, stride = 4 * d.channels(16, 100), d.one(1, 2)
        groups = d.one(1, 1, 1, 4)
        for i in range(d.count(1, 3)):
            yield _layer("bottleneck", out=out, stride=stride if i == 0 else 1, groups=groups)


def _pointwise(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(3, 7)):
        yield _layer("conv", out=d.channels(16, 512), kernel=1, stride=d.one(1, 1, 1, 2), act=d.one(*ACTIVATIONS, ""))


def _separable(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    act = d.one("relu", "relu6")
    kernel = d.one(3, 3, 5, 7)
    for _ in range(d.count(3, 7)):
        yield _layer("separable", out=d.channels(24, 400), kernel=kernel, stride=d.one(1, 1, 2), act=act)


def _inverted(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(2, 4)):
        out, act, se = d.channels(12, 100), d.one("relu", "relu6", "hard_swish", "silu"), d.chance(0.5)
        gate = d.one("hard_sigmoid", "sigmoid")
        stride = d.one(1, 2, 2)
        for i in range(d.count(1, 3)):
            yield _layer(
                "inverted", out=out, kernel=d.one(3, 5, 7), stride=stride if i == 0 else 1, expansion=d.one(2, 3, 4, 6),
                act=act, gate=gate if se else "",
            )  # fmt: skip


def _fused(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(2, 3)):
        out, act, stride = d.channels(16, 64), d.one("relu", "silu", "hard_swish"), d.one(1, 2, 2)
        for i in range(d.count(1, 2)):
            yield _layer("fused", out=out, stride=stride if i == 0 else 1, expansion=d.one(2, 4), act=act)


def _dense_blocks(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(1, 3)):
        growth, bottleneck = d.channels(8, 40), d.chance(0.6)
        for _ in range(d.count(2, 5)):
            yield _layer("growing", growth=growth, bottleneck=bottleneck)
        yield _layer("transition", out=d.channels(24, 200))


def _branches(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(1, 3)):
        yield _layer(
            "inception", ones=d.channels(8, 96), threes=d.channels(8, 128), fives=d.channels(8, 48),
            pool=d.channels(8, 64), long=d.one("", "7", "3"), reduce=d.channels(8, 64),
        )  # fmt: skip
        if d.chance(0.5):
            yield _layer("max_pool", kernel=3, stride=2)


def _fire(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(2, 5)):
        yield _layer("fire", squeeze=d.channels(8, 48), expand=d.channels(16, 160))
        if d.chance(0.3):
            yield _layer("max_pool", kernel=3, stride=2)


def _grouped(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(2, 4)):
        groups = d.one(2, 3, 4, 8)
        out = groups * 4 * max(1, round(d.channels(32, 300) / groups / 4))
        yield _layer("shuffled", out=out, groups=groups, stride=d.one(1, 2))
        if d.chance(0.5):
            yield _layer("split_unit")


def _ghosts(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    for _ in range(d.count(2, 5)):
        yield _layer("ghost", out=2 * max(4, d.channels(16, 160) // 2), kernel=d.one(3, 5), stride=d.one(1, 1, 2))


def _decoder(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    yield _layer("conv", out=d.channels(16, 64), kernel=3, stride=2)
    for _ in range(d.count(1, 2)):
        yield _layer(
            "hourglass", out=d.channels(16, 80), up=d.one("nearest", "bilinear", "transposed"),
            kernel=d.one(3, 3, 1),
        )  # fmt: skip
    if d.chance(0.6):
        yield _layer("pyramid", out=d.channels(16, 96), dilation=d.one(2, 4))


def _attention(d: _Dice) -> Iterator[Layer]:
    heads, size = d.one(2, 3, 4, 6), d.one(16, 32, 64)
    yield _layer("patches", out=heads * size, patch=d.one(8, 16, 16))
    for _ in range(d.count(1, 4)):
        yield _layer("encoder", heads=heads, expansion=d.one(2, 4), act=d.one("gelu", "gelu", "silu"))


def _mixed_attention(d: _Dice) -> Iterator[Layer]:
    yield from _stem(d)
    yield _layer("inverted", out=d.channels(16, 64), kernel=3, stride=2, expansion=2, act="silu", gate="")
    for _ in range(d.count(1, 2)):
        yield _layer("mobile_attention", width=d.one(64, 96, 144, 192), depth=d.count(1, 3), patch=2)


# Every theme, and the maker of its recipes.
THEMES: dict[str, Callable[[_Dice], Iterator[Layer]]] = {
    "plain": _plain,
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
    "ghost": _ghosts,
    "decoder": _decoder,
    "attention": _attention,
    "mixed_attention": _mixed_attention,
}
