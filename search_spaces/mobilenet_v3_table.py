"""The configuration of a MobileNetV3 space, and where its knobs and blocks lie in arrays."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from search_spaces.base import Archs, Knob

Positive = Annotated[int, Field(ge=1)]


def _ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or any(a >= b for a, b in pairwise(values)):
        raise ValueError("choices must be at least one, distinct and in ascending order")
    return values


class Stage(BaseModel):
    """One row of the stage table: blocks of equal output width, of which the first may stride.

    Args:
        width: output channels at width multiplier 1.
        stride: of the first block, 1 or 2.
        depths: choices of the number of blocks.
        kernels: choices of every block's depthwise kernel; odd.
        expansions: choices of every block's hidden width, as a multiple of its input channels. `[1]`: no expansion
            convolution, as in the family's first block.
        hidden: instead of `expansions`, the hidden width of each block at width multiplier 1.
        se: squeeze-and-excitation after the depthwise convolution.
        activation: `relu` or `hard_swish`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Positive
    stride: Literal[1, 2] = 1
    depths: tuple[Positive, ...] = (1,)
    kernels: tuple[Positive, ...] = (3,)
    expansions: tuple[int | float, ...] = ()
    hidden: tuple[Positive, ...] = ()
    se: bool = False
    activation: Literal["relu", "hard_swish"] = "relu"

    @field_validator("depths", "kernels")
    @classmethod
    def _choices(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return _ascending(values)

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if any(k % 2 == 0 for k in self.kernels):
            raise ValueError(f"kernels must be odd, got {self.kernels}")
        if bool(self.expansions) == bool(self.hidden):
            raise ValueError("give either expansions (choices) or hidden (one width per block)")
        if self.expansions and self.expansions != (1,) and min(_ascending(self.expansions)) <= 1:
            raise ValueError(f"expansions must be [1] alone or all above 1, got {self.expansions}")
        if self.hidden and len(self.hidden) != self.depths[-1]:
            raise ValueError(f"hidden needs one width per block: {self.depths[-1]}, got {len(self.hidden)}")
        return self


class ReferenceArchitecture(BaseModel):
    """A named architecture of the space, and what is published of it (see `Published`).

    Args:
        kernels, expansions: one list per stage, of its blocks; without `expansions` where the table gives `hidden`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernels: tuple[tuple[Positive, ...], ...]
    expansions: tuple[tuple[int | float, ...], ...] = ()
    macs: int | str | None = None
    params: int | str | None = None
    source: str = ""
    options: dict[str, Any] = {}


class Table(BaseModel):
    """All that a `MobileNetV3Space` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    resolutions: tuple[Positive, ...]
    widths: tuple[Annotated[float, Field(gt=0)], ...]
    stem_width: Positive
    stem_stride: Literal[1, 2]
    final_width: Positive
    feature_width: Positive
    feature_bias: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    kernel_transform: bool
    references: dict[str, ReferenceArchitecture]

    @field_validator("resolutions", "widths")
    @classmethod
    def _choices(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _ascending(values)


class Layout:
    """Where knobs and blocks of a table lie in the arrays.

    Args:
        knobs: as in the space.
        places: `(stage, block)` of every block position.
        depth_knob, least_depth: `(K,)` a knob is active where knob `depth_knob` is at least `least_depth`.
        block_knobs: per position (stem, blocks, head) the knobs that its id depends on, most significant first.
        position_knobs: the same with the depth knob that decides whether the block is present at all.
        first_id: `(P + 1,)` the first id of each position, and the number of ids.
        radix: `(K, 2 P)` weights of each knob in each position's id, then the depth knob of each position.
        least_block_depth: `(P,)` index of the depth choice from which a position is present.
    """

    def __init__(self, table: Table) -> None:
        depth_of = {f"stage{s}.depth": stage.depths for s, stage in enumerate(table.stages)}
        self.places = [(s, b) for s, stage in enumerate(table.stages) for b in range(stage.depths[-1])]
        kernels = {f"stage{s}.block{b}.kernel": table.stages[s].kernels for s, b in self.places}
        expansions = {f"stage{s}.block{b}.expansion": table.stages[s].expansions for s, b in self.places}
        choices: dict[str, tuple[Any, ...]] = {
            "resolution": table.resolutions, "width": table.widths, **depth_of, **kernels, **expansions,
        }  # fmt: skip
        names = [name for name, values in choices.items() if len(values) > 1] or ["resolution"]
        self.knobs = tuple(Knob(name, choices[name]) for name in names)
        self._column = {name: i for i, name in enumerate(names)}

        least = [sum(depth <= b for depth in table.stages[s].depths) for s, b in self.places]
        self.depth_knob = np.arange(len(names))
        self.least_depth = np.zeros(len(names), dtype=np.uint8)
        shared = [self._column[name] for name in ("resolution", "width") if name in self._column]
        own = []
        for (s, b), depth in zip(self.places, least, strict=True):
            columns = [self._column.get(f"stage{s}.block{b}.{knob}", -1) for knob in ("kernel", "expansion")]
            own.append([c for c in columns if c >= 0])
            if depth:
                self.depth_knob[own[-1]] = self._column[f"stage{s}.depth"]
                self.least_depth[own[-1]] = depth
        self.block_knobs = tuple(tuple(shared + knobs) for knobs in ([], *own, []))

        positions = len(self.places) + 2
        counts = [prod(len(self.knobs[k].choices) for k in knobs) for knobs in self.block_knobs]
        first_id = np.concatenate([[0], np.cumsum(counts)])
        # A float product runs in BLAS and is exact below 2^24 (2^53).
        exact = np.float32 if first_id[-1] < 2**24 else np.float64
        self.first_id = first_id.astype(exact)
        self.radix = np.zeros((len(names), 2 * positions), dtype=exact)
        for position, knobs in enumerate(self.block_knobs):
            weight = 1
            for knob in reversed(knobs):
                self.radix[knob, position] = weight
                weight *= len(self.knobs[knob].choices)
        self.least_block_depth = np.array([0, *least, 0], dtype=exact)
        self.position_knobs = list(self.block_knobs)
        for position, ((s, _), depth) in enumerate(zip(self.places, least, strict=True), start=1):
            if depth:
                self.radix[self._column[f"stage{s}.depth"], positions + position] = 1
                self.position_knobs[position] += (self._column[f"stage{s}.depth"],)

    def column(self, name: str) -> int | None:
        """Column of the named decision, None where it is no knob."""
        return self._column.get(name)

    def choice(self, name: str, arch: Archs) -> int:
        """Index of the choice that `arch` makes for the named decision, 0 where it is no knob."""
        column = self.column(name)
        return 0 if column is None else int(arch[column])
