"""The configuration of a MobileNetV3 space, and its knobs and block positions."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from search_spaces.layout import Layout, Position
from search_spaces.published import PublishedModel

Positive = Annotated[int, Field(ge=1)]


def ascending(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The choices as they are. Raises ValueError where there are none, or one is not above the one before it."""
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
        return ascending(values)

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if any(k % 2 == 0 for k in self.kernels):
            raise ValueError(f"kernels must be odd, got {self.kernels}")
        if bool(self.expansions) == bool(self.hidden):
            raise ValueError("give either expansions (choices) or hidden (one width per block)")
        if self.expansions and self.expansions != (1,) and min(ascending(self.expansions)) <= 1:
            raise ValueError(f"expansions must be [1] alone or all above 1, got {self.expansions}")
        if self.hidden and len(self.hidden) != self.depths[-1]:
            raise ValueError(f"hidden needs one width per block: {self.depths[-1]}, got {len(self.hidden)}")
        return self


class ReferenceArchitecture(PublishedModel):
    """A named architecture of the space, and what is published of it (see `Published`).

    Args:
        kernels, expansions: one list per stage, of its blocks; without `expansions` where the table gives `hidden`.
    """

    kernels: tuple[tuple[Positive, ...], ...]
    expansions: tuple[tuple[int | float, ...], ...] = ()


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
        return ascending(values)


def block_places(table: Table) -> list[tuple[int, int]]:
    """`(stage, block)` of every block that a network of the table can have."""
    return [(s, b) for s, stage in enumerate(table.stages) for b in range(stage.depths[-1])]


def lay_out(table: Table) -> Layout:
    """Knobs and block positions: the stem, every block of every stage, the head."""
    places = block_places(table)
    choices: dict[str, tuple[Any, ...]] = {
        "resolution": table.resolutions,
        "width": table.widths,
        **{f"stage{s}.depth": stage.depths for s, stage in enumerate(table.stages)},
        **{f"stage{s}.block{b}.kernel": table.stages[s].kernels for s, b in places},
        **{f"stage{s}.block{b}.expansion": table.stages[s].expansions for s, b in places},
    }
    shared = ("resolution", "width")
    blocks = [
        Position(
            shared,
            own=(f"stage{s}.block{b}.kernel", f"stage{s}.block{b}.expansion"),
            depth=f"stage{s}.depth",
            least=sum(depth <= b for depth in table.stages[s].depths),
        )
        for s, b in places
    ]
    return Layout(choices, [Position(shared), *blocks, Position(shared)])
