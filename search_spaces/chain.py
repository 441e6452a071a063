"""Chains of chosen blocks: FBNet, ProxylessNAS, and any space in which every layer is one of a list of blocks."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from search_spaces.base import Archs, Choice, Knob, Published
from search_spaces.chain_blocks import (
    BLOCK_TYPES,
    Activation,
    BlockChoice,
    InvertedResidualChoice,
    Odd,
    Positive,
    expanded,
)
from search_spaces.errors import UserError, explain, nearest
from search_spaces.layered import Layer, LayeredSpace
from search_spaces.operators import Shape
from search_spaces.published import PublishedModel

if TYPE_CHECKING:
    from torch import nn


def _choices(value: Any) -> Any:
    """One value is a choice of one."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _ascending(values: tuple[int, ...]) -> tuple[int, ...]:
    if not values or list(values) != sorted(set(values)):
        raise ValueError("must be a number, or a list of choices that rise")
    return values


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or len(set(names)) < len(names):
        raise ValueError("must be distinct names of blocks, at least one; leave it out for all blocks")
    return names


# A number, or the list of numbers to choose from.
Choices = Annotated[tuple[Positive, ...], BeforeValidator(_choices), AfterValidator(_ascending)]
Strides = Annotated[tuple[Literal[1, 2], ...], BeforeValidator(_choices), AfterValidator(_ascending)]


class Stage(BaseModel):
    """Layers of equal output width, of which the first may stride. A list in place of a number is a knob.

    Args:
        width: output channels.
        layers: how many; from a list, the leading ones of the most.
        stride: of the first.
        choices: names of the blocks offered; all of them by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Choices
    layers: Choices = (1,)
    stride: Strides = (1,)
    choices: Annotated[tuple[str, ...], AfterValidator(_distinct)] = ()


class ReferenceArchitecture(PublishedModel):
    """A named architecture, and what is published of it.

    Args:
        choices: one per knob, in their order: where blocks alone are chosen, one name per layer that has a choice.
        macs, params, source, options: see `Published`.
    """

    choices: tuple[Choice, ...]


class ChainTable(BaseModel):
    """All that a `ChainSpace` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    dimensions: Literal[1, 2]
    resolution: Choices
    widths: tuple[Positive, ...]
    stem_width: Positive
    stem_kernel: Odd
    stem_stride: Literal[1, 2]
    final_width: Annotated[int, Field(ge=0)]
    activation: Activation
    dropout: Annotated[float, Field(ge=0, lt=1)]
    blocks: Annotated[dict[str, BlockChoice], BeforeValidator(expanded), Field(min_length=1)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    references: dict[str, ReferenceArchitecture]


class ChainSpace(LayeredSpace):
    """A stem, stages of layers each of which is one block of a list, a last 1x1 convolution, pooling and a classifier.

    The macro-architecture of FBNet (Wu et al., CVPR 2019) and ProxylessNAS (Cai et al., ICLR 2019), where widths,
    strides and the number of layers are given, and every layer chooses its own block; a block `skip` makes a network
    shallower. Here a list in place of a stage's width, number of layers or stride, or of the resolution, makes that a
    knob, too. Networks that differ only in which of a stage's layers is skipped are not merged: so do the papers count.

    Knobs: `resolution`, per stage `stage<s>.stride`, `stage<s>.width`, `stage<s>.depth`, and `layer<i>` for every layer
    with a choice of blocks, counted from zero over all layers there can be. A space without any choice keeps its first
    layer's knob.

    With `dimensions = 1` the input is a window of a signal: `resolution` is its length, images have the shape
    `(channels, 1, length)`, and all kernels and strides act along the length alone.

    In a supernet every block has weights of its own in every layer; widths share leading channels.

    Args:
        in_channels, num_classes: of the task.
        blocks: name -> block, `InvertedResidualChoice` and the like or mappings with the same keys and `type`. A list
            in place of a value stands for one block per combination of values.
        stages: `Stage` objects or mappings.
        dimensions: of the input besides channels: 2 for images, 1 for signals.
        resolution: height and width of the input in pixels, or length in samples.
        widths: instead of the stages' widths, one per stage.
        stem_width, stem_kernel, stem_stride: of the first convolution.
        final_width: channels of the last 1x1 convolution; 0 for none.
        activation: of the whole network, but for blocks that name their own.
        dropout: probability before the classifier.
        references: name -> `ReferenceArchitecture` or a mapping.
        name: what the space is called in messages.

    Raises:
        UserError: a key or value that makes no sense, named with what would be right.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        blocks: Mapping[str, Any],
        stages: Sequence[Stage | Mapping[str, Any]],
        dimensions: Literal[1, 2] = 2,
        resolution: int | Sequence[int] = 224,
        widths: Sequence[int] = (),
        stem_width: int = 16,
        stem_kernel: int = 3,
        stem_stride: int = 2,
        final_width: int = 1280,
        activation: str = "relu",
        dropout: float = 0.0,
        references: Mapping[str, Any] | None = None,
        name: str = "chain",
    ) -> None:
        self.name = name
        try:
            self.table = ChainTable.model_validate(
                {
                    "in_channels": in_channels,
                    "num_classes": num_classes,
                    "dimensions": dimensions,
                    "resolution": resolution,
                    "widths": widths,
                    "stem_width": stem_width,
                    "stem_kernel": stem_kernel,
                    "stem_stride": stem_stride,
                    "final_width": final_width,
                    "activation": activation,
                    "dropout": dropout,
                    "blocks": blocks,
                    "stages": stages,
                    "references": references or {},
                }
            )
        except ValidationError as error:
            known = {*Stage.model_fields, *(k for b in BLOCK_TYPES for k in b.model_fields)}
            raise UserError(explain(error, name, known)) from error
        if widths and len(widths) != len(self.table.stages):
            raise UserError(f"{name}: widths: needs one per stage, {len(self.table.stages)}, got {list(widths)}")
        given: Sequence[tuple[int, ...]] = [(width,) for width in self.table.widths]
        self._widths = given or [stage.width for stage in self.table.stages]
        self._lay_out()
        self._references = {name: self._reference(name, r) for name, r in self.table.references.items()}

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._layers

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self._image(self.table.resolution[-1])

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @property
    def references(self) -> dict[str, Archs]:
        """Those of the table, or the two ends where it has none: the least and the most of everything."""
        return dict(self._references) or self._ends

    @property
    def published(self) -> dict[str, Published]:
        return {name: reference.published for name, reference in self.table.references.items()}

    def image_shape(self, choices: Mapping[str, Choice]) -> tuple[int, int, int]:
        return self._image(int(choices.get("resolution", self.table.resolution[-1])))

    def module(self, layer: Layer, choices: Mapping[str, Choice]) -> nn.Module:
        from search_spaces.chain_network import head, make_block, stem

        if layer.name == "stem":
            return stem(self.table)
        if layer.name == "head":
            return head(self.table, self._width(len(self.table.stages) - 1, choices))
        block, cin, cout, stride = self._shape(layer, choices)
        choice = self.table.blocks[block]
        return make_block(
            choice, cin, cout, stride, choice.activation or self.table.activation, self.table.dimensions == 1
        )

    def input_of(self, layer: Layer, choices: Mapping[str, Choice]) -> Shape:
        if layer.name == "stem":
            return self.image_shape(choices)
        stages = len(self.table.stages)
        stage, first = self._place.get(layer.name, (stages, True))
        channels = self._width(stage - first, choices)
        _, height, width = self.image_shape(choices)
        for stride in (self.table.stem_stride, *(self._stride(s, choices) for s in range(stage + (not first)))):
            height, width = -(-height // stride), -(-width // stride)
        return channels, height, width

    def alike(self, layer: Layer, choices: Mapping[str, Choice]) -> Hashable:
        made = self._shape(layer, choices) if layer.name in self._place else layer.name
        return made, self.input_of(layer, choices)

    def offered(self, layer: Layer) -> tuple[str, ...]:
        """The names of the blocks that a layer may be."""
        return self._offered[layer.name]

    def _image(self, size: int) -> tuple[int, int, int]:
        return self.table.in_channels, size if self.table.dimensions == 2 else 1, size

    def _width(self, stage: int, choices: Mapping[str, Choice]) -> int:
        """Output channels of a stage; of the stem before the first."""
        if stage < 0:
            return self.table.stem_width
        return int(choices.get(f"stage{stage}.width", self._widths[stage][0]))

    def _stride(self, stage: int, choices: Mapping[str, Choice]) -> int:
        return int(choices.get(f"stage{stage}.stride", self.table.stages[stage].stride[0]))

    def _shape(self, layer: Layer, choices: Mapping[str, Choice]) -> tuple[str, int, int, int]:
        """A layer's block, channels in and out, and stride."""
        stage, first = self._place[layer.name]
        block = str(choices.get(layer.name, self._offered[layer.name][0]))
        cout = self._width(stage, choices)
        return (block, self._width(stage - 1, choices), cout, self._stride(stage, choices)) if first else (
            block, cout, cout, 1)  # fmt: skip

    @cached_property
    def _ends(self) -> dict[str, Archs]:
        """Stages and input at their least and most; then each layer's block by multiply-accumulates and parameters."""
        ends = {}
        for name, most in (("smallest", False), ("largest", True)):
            row = np.array(
                [(len(k.choices) - 1) * (most != k.name.endswith(".stride")) for k in self.knobs], dtype=self.dtype
            )
            index = {k.name: i for i, k in enumerate(self.knobs)}
            for position, layer in enumerate(self.layers):
                if layer.paths:
                    costs = []
                    for choice in range(len(self.offered(layer))):
                        row[index[layer.name]] = choice
                        block = self.catalog[self.block_of(position, [int(row[index[n]]) for n in layer.knobs])]
                        costs.append((block.workload.macs, block.workload.params))
                    row[index[layer.name]] = costs.index(max(costs) if most else min(costs))
            ends[name] = self.canonical(row[None])[0]
        return ends

    def _lay_out(self) -> None:
        """Knobs and layers from the table."""
        table = self.table
        self._place: dict[str, tuple[int, bool]] = {}  # layer -> stage, and whether it is its first
        self._offered: dict[str, tuple[str, ...]] = {}
        knobs: list[Knob] = []

        def knob(name: str, choices: tuple[Choice, ...]) -> tuple[str, ...]:
            """Its name where there is something to choose."""
            if len(choices) > 1:
                knobs.append(Knob(name, choices))
                return (name,)
            return ()

        size = knob("resolution", table.resolution)  # all that a layer's input size depends on
        layers = [Layer("stem", size)]
        before: tuple[str, ...] = ()  # the width that a stage begins with
        for s, stage in enumerate(table.stages):
            for name in stage.choices:
                if name not in table.blocks:
                    raise UserError(
                        f"{self.name}: stages.{s}.choices: no block {name!r}. {nearest(name, table.blocks)}"
                    )
            strides = knob(f"stage{s}.stride", stage.stride)
            width = knob(f"stage{s}.width", self._widths[s])
            depth = knob(f"stage{s}.depth", stage.layers)
            for i in range(stage.layers[-1]):
                name = f"layer{len(self._place)}"
                self._place[name] = s, i == 0
                self._offered[name] = offered = self._fitting(s, i)
                own = knob(name, offered)
                shape = (*size, *strides, *before, *width) if i == 0 else (*size, *strides, *width)
                least = i if depth and i >= stage.layers[0] else 0
                layers.append(Layer(name, (*shape, *own), own, depth[0] if least else "", least))
            size, before = (*size, *strides), width
        layers.append(Layer("head", (*size, *before)))
        if not knobs:
            knobs.append(Knob("layer0", self._offered["layer0"]))
        self._knobs, self._layers = tuple(knobs), tuple(layers)

    def _fitting(self, s: int, i: int) -> tuple[str, ...]:
        """The blocks offered in layer `i` of stage `s`: those that fit, whatever the widths and the stride are."""
        table, stage = self.table, self.table.stages[s]
        widths = self._widths[s]
        if i == 0:
            shapes = list(product(self._widths[s - 1] if s else (table.stem_width,), widths, stage.stride))
        else:
            shapes = [(width, width, 1) for width in widths]
        names = stage.choices or tuple(table.blocks)
        offered = tuple(n for n in names if all(table.blocks[n].fits(*shape) for shape in shapes))
        cin, cout, stride = shapes[0]
        where = f"{self.name}: stages.{s}, layer {i} ({cin} to {cout} channels, stride {stride})"
        if not offered:
            raise UserError(f"{where}: none of the blocks fits: {', '.join(names)}; a skip needs project = true")
        for name in offered:
            for cin, cout, _ in shapes:
                block = table.blocks[name]
                groups = getattr(block, "groups", 1)
                hidden = block.hidden(cin) if isinstance(block, InvertedResidualChoice) else cin
                if cin % groups or hidden % groups or cout % groups:
                    raise UserError(
                        f"{where}: blocks.{name}.groups: {groups} does not divide {cin}, {hidden} and {cout} channels"
                    )
        return offered

    def _reference(self, name: str, reference: ReferenceArchitecture) -> Archs:
        where = f"{self.name}: references.{name}.choices"
        if len(reference.choices) != len(self.knobs):
            raise UserError(f"{where}: needs one choice per knob ({', '.join(k.name for k in self.knobs)}), "
                            f"{len(self.knobs)}, got {len(reference.choices)}")  # fmt: skip
        try:
            return self.encode({k.name: c for k, c in zip(self.knobs, reference.choices, strict=True)})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
