"""Chains of chosen blocks: FBNet, ProxylessNAS, and any space in which every layer is one of a list of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from search_spaces.base import Archs, Block, Catalog, Knob, Published, SearchSpace
from search_spaces.errors import UserError, explain, nearest
from search_spaces.mobilenet_v3_spec import make_divisible

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.chain_network import Chain
    from search_spaces.operators import Workload

Positive = Annotated[int, Field(ge=1)]
Activation = Literal["gelu", "hard_swish", "leaky_relu", "relu", "relu6", "silu"]


class _Choice(BaseModel):
    """One block that a layer may be. `activation` is the table's unless given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation: Activation | None = None

    def fits(self, cin: int, cout: int, stride: int) -> bool:
        """Whether a layer of this shape may be this block."""
        return True


class _Kernel(_Choice):
    kernel: Positive = 3

    @model_validator(mode="after")
    def _odd(self) -> _Kernel:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self


class InvertedResidualChoice(_Kernel):
    """1x1 to `expansion` times the channels, depthwise, gates, 1x1 (Sandler et al., CVPR 2018).

    Args:
        expansion: of the input channels; 1 leaves the first convolution out, unless `widen`.
        widen: keep the first convolution at expansion 1, as FBNet does.
        groups: of both 1x1 convolutions, with a shuffle of channels between them.
        squeeze: inner channels of squeeze-and-excitation as a share of the widened ones; 0 for none.
    """

    type: Literal["inverted_residual"]
    expansion: Annotated[float, Field(gt=0)] = 6
    widen: bool = False
    groups: Positive = 1
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0

    def hidden(self, cin: int) -> int:
        """Channels of the depthwise convolution."""
        return cin if self.expansion == 1 else make_divisible(cin * self.expansion)


class SeparableChoice(_Kernel):
    """Depthwise, then 1x1 convolution (MobileNet, Howard et al., 2017)."""

    type: Literal["separable"]


class ConvChoice(_Kernel):
    """Convolution, normalisation, activation."""

    type: Literal["conv"]
    groups: Positive = 1


class BottleneckChoice(_Kernel):
    """1x1 to `reduction` of the output channels, convolution, 1x1, around a shortcut (He et al., CVPR 2016)."""

    type: Literal["bottleneck"]
    reduction: Annotated[float, Field(gt=0, le=1)] = 0.25


class FireChoice(_Choice):
    """1x1 to `squeeze` of the output channels, then 1x1 and 3x3 side by side (SqueezeNet, Iandola et al., 2016)."""

    type: Literal["fire"]
    squeeze: Annotated[float, Field(gt=0, le=1)] = 0.125


class GhostChoice(_Kernel):
    """Two ghost modules around a strided depthwise convolution (GhostNet, Han et al., CVPR 2020)."""

    type: Literal["ghost"]
    expansion: Annotated[float, Field(gt=0)] = 2
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0


class SkipChoice(_Choice):
    """The identity. Where it cannot be, a layer that changes the shape, it is not offered.

    Args:
        project: offer it there too, as a 1x1 convolution with normalisation and activation.
    """

    type: Literal["skip"]
    project: bool = False

    def fits(self, cin: int, cout: int, stride: int) -> bool:
        return self.project or (stride == 1 and cin == cout)


BlockChoice = Annotated[
    InvertedResidualChoice | SeparableChoice | ConvChoice | BottleneckChoice | FireChoice | GhostChoice | SkipChoice,
    Field(discriminator="type"),
]


class Stage(BaseModel):
    """Layers of equal output width, of which the first may stride.

    Args:
        width: output channels.
        layers: how many.
        stride: of the first.
        choices: names of the blocks offered; all of them by default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Positive
    layers: Positive = 1
    stride: Literal[1, 2] = 1
    choices: tuple[str, ...] = ()


class ReferenceArchitecture(BaseModel):
    """A named architecture, one block's name per layer that has a choice, and what is published of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[str, ...]
    macs: int | str | None = None
    params: int | str | None = None
    source: str = ""
    options: dict[str, Any] = {}


class ChainTable(BaseModel):
    """All that a `ChainSpace` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    resolution: Positive
    widths: tuple[Positive, ...]
    stem_width: Positive
    stem_stride: Literal[1, 2]
    final_width: Annotated[int, Field(ge=0)]
    activation: Activation
    dropout: Annotated[float, Field(ge=0, lt=1)]
    blocks: Annotated[dict[str, BlockChoice], Field(min_length=1)]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    references: dict[str, ReferenceArchitecture]


class Layer(BaseModel):
    """One layer: its shape and the names of the blocks offered."""

    model_config = ConfigDict(frozen=True)

    cin: int
    cout: int
    stride: int
    size: int
    offered: tuple[str, ...]


class ChainSpace(SearchSpace):
    """A stem, stages of layers each of which is one block of a list, a last 1x1 convolution, pooling and a classifier.

    The macro-architecture of FBNet (Wu et al., CVPR 2019) and ProxylessNAS (Cai et al., ICLR 2019): widths, strides and
    the number of layers are given, and every layer chooses its own block; a block `skip` makes a network shallower.
    All knobs are always active, and networks that differ only in which of a stage's layers is skipped are not merged:
    so do the papers count.

    Knobs: `layer<i>` for every layer with a choice, counted from zero over all layers. A space without any choice keeps
    its first layer's knob.

    Args:
        in_channels, num_classes: of the task.
        blocks: name -> block, `InvertedResidualChoice` and the like or mappings with the same keys and `type`.
        stages: `Stage` objects or mappings.
        resolution: height and width of the input in pixels.
        widths: instead of the stages' widths, one per stage.
        stem_width, stem_stride: of the first 3x3 convolution.
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
        resolution: int = 224,
        widths: Sequence[int] = (),
        stem_width: int = 16,
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
                    "resolution": resolution,
                    "widths": widths,
                    "stem_width": stem_width,
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
        self.layers = tuple(self._lay_out())
        chosen = [i for i, layer in enumerate(self.layers) if len(layer.offered) > 1] or [0]
        self._knobs = tuple(Knob(f"layer{i}", self.layers[i].offered) for i in chosen)
        self._knob_of = {layer: k for k, layer in enumerate(chosen)}
        self._first_id = np.array([0, *accumulate([1, *(len(layer.offered) for layer in self.layers), 1])])
        self._traced: dict[tuple[Any, ...], Workload] = {}
        self._references = {name: self._reference(name, r) for name, r in self.table.references.items()}

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.table.in_channels, self.table.resolution, self.table.resolution

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @property
    def references(self) -> dict[str, Archs]:
        """Those of the table, or the two ends where it has none."""
        return dict(self._references) or super().references

    @property
    def published(self) -> dict[str, Published]:
        return {name: Published(r.macs, r.params, r.source, r.options) for name, r in self.table.references.items()}

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(int(self._first_id[-1]), self._make_block)

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """Positions: the stem, every layer, the head."""
        archs = np.asarray(archs)
        ids = np.broadcast_to(self._first_id[:-1], (len(archs), len(self._first_id) - 1)).astype(np.int32)
        ids[:, [layer + 1 for layer in self._knob_of]] += archs.astype(np.int32)
        return ids

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        own = (self._knob_of.get(i) for i in range(len(self.layers)))
        return (), *(() if k is None else (k,) for k in own), ()

    def chosen(self, arch: Archs) -> list[str]:
        """The block of every layer of one architecture `(K,)`, by name."""
        row = self.check(arch)[0]
        return [layer.offered[int(row[self._knob_of[i]]) if i in self._knob_of else 0]
                for i, layer in enumerate(self.layers)]  # fmt: skip

    def layer_module(self, layer: int, name: str) -> nn.Module:
        """A fresh, uninitialised module of one layer with the named block."""
        from search_spaces.chain_network import make_block

        shape = self.layers[layer]
        block = self.table.blocks[name]
        return make_block(block, shape.cin, shape.cout, shape.stride, block.activation or self.table.activation)

    def build(self, arch: Archs) -> Chain:
        from search_spaces.chain_network import Chain

        return Chain(self, self.chosen(arch))

    def _lay_out(self) -> list[Layer]:
        table = self.table
        size = -(-table.resolution // table.stem_stride)
        channels = table.stem_width
        layers = []
        widths = table.widths or tuple(stage.width for stage in table.stages)
        for s, (stage, width) in enumerate(zip(table.stages, widths, strict=True)):
            for name in stage.choices:
                if name not in table.blocks:
                    raise UserError(
                        f"{self.name}: stages.{s}.choices: no block {name!r}. {nearest(name, table.blocks)}"
                    )
            for i in range(stage.layers):
                stride = stage.stride if i == 0 else 1
                names = stage.choices or tuple(table.blocks)
                offered = tuple(n for n in names if table.blocks[n].fits(channels, width, stride))
                where = f"{self.name}: stages.{s}, layer {i} ({channels} to {width} channels, stride {stride})"
                if not offered:
                    raise UserError(
                        f"{where}: none of the blocks fits: {', '.join(names)}; a skip needs project = true"
                    )
                for n in offered:
                    self._check_groups(table.blocks[n], channels, width, f"{where}: blocks.{n}.groups")
                layers.append(Layer(cin=channels, cout=width, stride=stride, size=size, offered=offered))
                size, channels = -(-size // stride), width
        return layers

    @staticmethod
    def _check_groups(block: _Choice, cin: int, cout: int, where: str) -> None:
        groups = getattr(block, "groups", 1)
        hidden = block.hidden(cin) if isinstance(block, InvertedResidualChoice) else cin
        if cin % groups or hidden % groups or cout % groups:
            raise UserError(f"{where}: {groups} does not divide {cin}, {hidden} and {cout} channels")

    def _reference(self, name: str, reference: ReferenceArchitecture) -> Archs:
        where = f"{self.name}: references.{name}.choices"
        if len(reference.choices) != len(self.knobs):
            raise UserError(f"{where}: needs one block per layer with a choice, {len(self.knobs)}, got "
                            f"{len(reference.choices)}")  # fmt: skip
        try:
            return self.encode({k.name: c for k, c in zip(self.knobs, reference.choices, strict=True)})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _make_block(self, index: int) -> Block:
        position = int(np.searchsorted(self._first_id, index, side="right")) - 1
        table = self.table
        if position == 0:
            return Block("stem", self._trace("stem", table.in_channels, table.resolution))
        last = self.layers[-1]
        if position > len(self.layers):
            return Block("head", self._trace("head", last.cout, -(-last.size // last.stride)))
        layer = self.layers[position - 1]
        name = layer.offered[index - int(self._first_id[position])]
        return Block(f"layer{position - 1}", self._trace(name, layer.cin, layer.size, position - 1))

    def _trace(self, name: str, channels: int, size: int, layer: int | None = None) -> Workload:
        """Operators of a block of the network, from its module; equal layers are traced once."""
        import torch

        from search_spaces.chain_network import head, stem
        from search_spaces.tracing import trace

        shape = None if layer is None else (self.layers[layer].cout, self.layers[layer].stride)
        key = name, channels, size, shape
        if key not in self._traced:
            with torch.device("meta"):
                if layer is not None:
                    module = self.layer_module(layer, name)
                else:
                    module = stem(self) if name == "stem" else head(self)
            self._traced[key] = trace(module, (channels, size, size))
        return self._traced[key]


BLOCK_TYPES: tuple[type[_Choice], ...] = (
    InvertedResidualChoice, SeparableChoice, ConvChoice, BottleneckChoice, FireChoice, GhostChoice, SkipChoice,
)  # fmt: skip
