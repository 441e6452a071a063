"""The factorized hierarchical search space of MnasNet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from search_spaces.base import Archs, Choice, Knob, Published
from search_spaces.emitter import strided
from search_spaces.errors import UserError, explain
from search_spaces.layered import Layer, LayeredSpace
from search_spaces.mnasnet_spec import (
    HeadSpec,
    LayerSpec,
    Skip,
    StemSpec,
    head_workload,
    layer_workload,
    stem_workload,
)
from search_spaces.mobilenet_v3_table import Positive, ascending
from search_spaces.published import PublishedModel

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.operators import Workload

# What a block decides beside its depth.
_PER_BLOCK = ("op", "kernel", "squeeze", "skip", "filters")


class SearchedBlock(BaseModel):
    """One block: equal layers of which the first may stride.

    Args:
        width: output channels at filter ratio 1.
        stride: of the first layer.
        depths: choices of the number of layers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Positive
    stride: Literal[1, 2] = 1
    depths: tuple[Positive, ...] = (1,)

    @field_validator("depths")
    @classmethod
    def _ascending(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return ascending(values)


class ReferenceArchitecture(PublishedModel):
    """A named architecture, one value per block, and what is published of it (see `Published`).

    Args:
        ops, kernels, squeezes, depths: of every block.
        skips, filters: the same; `identity` and 1 everywhere where left out.
    """

    ops: tuple[str, ...]
    kernels: tuple[int, ...]
    squeezes: tuple[float, ...]
    depths: tuple[int, ...]
    skips: tuple[str, ...] = ()
    filters: tuple[float, ...] = ()


class Table(BaseModel):
    """All that an `MnasNetSpace` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    stages: Annotated[tuple[SearchedBlock, ...], Field(min_length=1)]
    resolutions: tuple[Positive, ...]
    ops: tuple[str, ...]
    kernels: tuple[Positive, ...]
    squeezes: tuple[Annotated[float, Field(ge=0, le=1)], ...]
    skips: tuple[Skip, ...]
    filters: tuple[Annotated[float, Field(gt=0)], ...]
    widths: tuple[Positive, ...]
    stem_width: Positive
    stem_stride: Literal[1, 2]
    first_width: Positive
    last_width: Positive
    final_width: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]
    references: dict[str, ReferenceArchitecture]

    @field_validator("resolutions", "ops", "kernels", "squeezes", "skips", "filters")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if not values or len(set(values)) != len(values):
            raise ValueError("choices must be at least one, and distinct")
        return values

    @field_validator("ops")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for op in values:
            if not re.fullmatch(r"conv|separable|mbconv[1-9]\d*", op):
                raise ValueError(f"an operation is conv, separable, or mbconv with its expansion (mbconv6), got {op!r}")
        return values

    @field_validator("kernels")
    @classmethod
    def _odd(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if any(k % 2 == 0 for k in values):
            raise ValueError(f"kernels must be odd, got {values}")
        return values


class MnasNetSpace(LayeredSpace):
    """Blocks that each choose their operation, kernel, squeeze-and-excitation, skip, width and number of layers.

    The factorized hierarchical space of Tan et al. (CVPR 2019, section 4.1): the blocks are those of MobileNetV2
    (Sandler et al., CVPR 2018); all layers of a block are equal, blocks are free of each other. The paper counts 432
    choices per block and five blocks: here four operations (regular convolution, depthwise-separable, inverted residual
    of expansion 3 or 6), two kernels, two squeeze ratios, three skips, three widths and three depths. MobileNetV2's
    blocks of a single layer, the first and the last, are no choice: separable 3x3 and inverted residual 3x3 of
    expansion 6, as in all networks that the paper found.

    Where the paper is silent: a skip is left out where the layer changes the number of channels, and the identity also
    where it strides; `pool` is a 3x3 average; widths are rounded to the nearest multiple of 8. Inner channels of
    squeeze-and-excitation are a share of the layer's input, as in the authors' code. All knobs are always active, and
    isomorphic networks are not merged: so does the paper count.

    In the supernet, regular convolutions, separable ones and inverted residuals have weights of their own; all else
    shares leading channels, kernel centres and a block's leading layers.

    Knobs, only where there is a choice: `resolution`, then for every block `stage<i>.op`, `.kernel`, `.squeeze`,
    `.skip`, `.filters`, `.depth`.

    Args:
        in_channels, num_classes: of the task.
        stages: the searched blocks, `SearchedBlock` objects or mappings with the same keys.
        resolutions: choices of the input's edge in pixels; images are resized.
        ops: choices of the operation: `conv`, `separable`, `mbconv3`, `mbconv6`, ...
        kernels: choices of its kernel; odd.
        squeezes: choices of the share of squeeze-and-excitation; 0 for none.
        skips: choices among `none`, `identity` and `pool`.
        filters: choices of a block's width, relative to the table's.
        widths: instead of the stages' widths, one per stage.
        stem_width, stem_stride: of the first convolution.
        first_width, last_width: of the first and the last layer.
        final_width: channels of the last 1x1 convolution.
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
        stages: Sequence[SearchedBlock | Mapping[str, Any]],
        resolutions: Sequence[int] = (224,),
        ops: Sequence[str] = ("conv", "separable", "mbconv3", "mbconv6"),
        kernels: Sequence[int] = (3, 5),
        squeezes: Sequence[float] = (0, 0.25),
        skips: Sequence[str] = ("none", "pool", "identity"),
        filters: Sequence[float] = (0.75, 1.0, 1.25),
        widths: Sequence[int] = (),
        stem_width: int = 32,
        stem_stride: int = 2,
        first_width: int = 16,
        last_width: int = 320,
        final_width: int = 1280,
        dropout: float = 0.0,
        references: Mapping[str, Any] | None = None,
        name: str = "mnasnet",
    ) -> None:
        self.name = name
        try:
            self.table = Table.model_validate(
                {
                    "in_channels": in_channels,
                    "num_classes": num_classes,
                    "stages": stages,
                    "resolutions": resolutions,
                    "ops": ops,
                    "kernels": kernels,
                    "squeezes": squeezes,
                    "skips": skips,
                    "filters": filters,
                    "widths": widths,
                    "stem_width": stem_width,
                    "stem_stride": stem_stride,
                    "first_width": first_width,
                    "last_width": last_width,
                    "final_width": final_width,
                    "dropout": dropout,
                    "references": references or {},
                }
            )
        except ValidationError as error:
            raise UserError(explain(error, name, SearchedBlock.model_fields)) from error
        if widths and len(widths) != len(self.table.stages):
            raise UserError(f"{name}: widths: needs one per stage, {len(self.table.stages)}, got {list(widths)}")
        self._widths = self.table.widths or tuple(stage.width for stage in self.table.stages)
        self._places = [(s, b) for s, stage in enumerate(self.table.stages) for b in range(stage.depths[-1])]
        self._names = [f"stage{s}_layer{b}" for s, b in self._places]
        self._decisions = self._all_decisions()
        self._knobs = tuple(Knob(n, v) for n, v in self._decisions.items() if len(v) > 1) or (
            Knob("resolution", self.table.resolutions),
        )
        self._references = {key: self._reference(key, r) for key, r in self.table.references.items()}

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        largest = max(self.table.resolutions)
        return self.table.in_channels, largest, largest

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The stem with the first layer, every layer of every block, the last layer with the head."""
        names = {knob.name for knob in self.knobs}
        image = tuple({"resolution"} & names)
        found = [Layer("stem", image)]
        for (s, b), name in zip(self._places, self._names, strict=True):
            before = () if b else (f"stage{s - 1}.filters",)
            knobs = (*image, *before, *(f"stage{s}.{what}" for what in _PER_BLOCK))
            depth = f"stage{s}.depth" if b >= self.table.stages[s].depths[0] else ""
            found.append(Layer(name, tuple(k for k in knobs if k in names), depth=depth, place=b if depth else 0))
        last = (*image, f"stage{len(self.table.stages) - 1}.filters")
        return *found, Layer("head", tuple(k for k in last if k in names))

    def module(self, layer: Layer, choices: Mapping[str, Choice]) -> nn.Module:
        from search_spaces import mnasnet_network as network

        spec = self.spec(layer, choices)
        if isinstance(spec, LayerSpec):
            return network.Block(spec)
        return network.Stem(spec) if isinstance(spec, StemSpec) else network.Head(spec)

    def owners(self, position: int) -> list[int]:
        """Per operation the block with the largest choice of everything else."""
        layer = self.layers[position]
        chosen = []
        for name in layer.knobs:
            choices = self._decisions[name]
            if name.endswith(".op"):
                chosen.append(range(len(choices)))
            else:  # a skip has no weights
                largest = 0 if name.endswith(".skip") else choices.index(max(choices))
                chosen.append(range(largest, largest + 1))
        return [self.block_of(position, choice) for choice in product(*chosen)]

    def initialise(self, network: nn.Module) -> None:
        from search_spaces.mnasnet_network import initialise

        initialise(network)

    def spec(self, layer: Layer, choices: Mapping[str, Choice]) -> StemSpec | LayerSpec | HeadSpec:
        """One of `layers` with the given choices of its knobs, as plain data."""
        table = self.table
        if layer.name == "stem":
            first = layer_spec("separable", table.stem_width, table.first_width, 3, 1, 0, "none")
            return StemSpec(table.in_channels, table.stem_width, table.stem_stride, first)
        if layer.name == "head":
            cin = self._channels(len(table.stages) - 1, choices)
            last = layer_spec("mbconv6", cin, table.last_width, 3, 1, 0, "none")
            return HeadSpec(last, table.final_width, table.num_classes, table.dropout)
        s, b = self._places[self._names.index(layer.name)]
        op, kernel, squeeze, skip, _ = (self._choice(f"stage{s}.{what}", choices) for what in _PER_BLOCK)
        cout = self._channels(s, choices)
        cin, stride = (cout, 1) if b else (self._channels(s - 1, choices), table.stages[s].stride)
        return layer_spec(op, cin, cout, kernel, stride, squeeze, skip)

    @property
    def references(self) -> dict[str, Archs]:
        """The two ends, and those of the table."""
        return super().references | self._references

    @property
    def published(self) -> dict[str, Published]:
        return {name: reference.published for name, reference in self.table.references.items()}

    def _all_decisions(self) -> dict[str, tuple[Any, ...]]:
        """Every decision with its choices, those of one choice too."""
        table = self.table
        found: dict[str, tuple[Any, ...]] = {"resolution": table.resolutions}
        for s, stage in enumerate(table.stages):
            offered = (table.ops, table.kernels, table.squeezes, table.skips, table.filters)
            found |= {f"stage{s}.{what}": values for what, values in zip(_PER_BLOCK, offered, strict=True)}
            found[f"stage{s}.depth"] = stage.depths
        return found

    def _channels(self, stage: int, choices: Mapping[str, Choice]) -> int:
        """Output channels of a block; block -1 is the first layer."""
        if stage < 0:
            return self.table.first_width
        ratio = self._choice(f"stage{stage}.filters", choices)
        return max(8, int(self._widths[stage] * ratio + 4) // 8 * 8)

    def _choice(self, name: str, choices: Mapping[str, Choice]) -> Any:
        """What is chosen, or the only choice of what is no knob."""
        return choices[name] if name in choices else self._decisions[name][0]

    def _trace(self, layer: Layer, choices: Mapping[str, Choice]) -> Workload:
        """Written instead of traced, which takes a thirtieth of the time; there are thousands."""
        table, spec = self.table, self.spec(layer, choices)
        size = self._choice("resolution", choices)
        if isinstance(spec, StemSpec):
            return stem_workload(spec, size)
        s, b = (len(table.stages), 0) if layer.name == "head" else self._places[self._names.index(layer.name)]
        size = strided(size, table.stem_stride)
        for stage in table.stages[: s + (b > 0)]:
            size = strided(size, stage.stride)
        return layer_workload(spec, size) if isinstance(spec, LayerSpec) else head_workload(spec, size)

    def _reference(self, name: str, reference: ReferenceArchitecture) -> Archs:
        """Its row, at the last resolution."""
        where, count = f"{self.name}: references.{name}", len(self.table.stages)
        wanted: dict[str, Any] = {"resolution": self.table.resolutions[-1]}
        for what, values, choices in (
            ("op", reference.ops, self.table.ops),
            ("kernel", reference.kernels, self.table.kernels),
            ("squeeze", reference.squeezes, self.table.squeezes),
            ("skip", reference.skips or ("identity",) * count, self.table.skips),
            ("filters", reference.filters or (1.0,) * count, self.table.filters),
            ("depth", reference.depths, None),
        ):
            if len(values) != count:
                raise UserError(f"{where}: {what}: needs one per stage, {count}, got {len(values)}")
            for s, value in enumerate(values):
                offered = self.table.stages[s].depths if choices is None else choices
                if value not in offered:
                    raise UserError(f"{where}: {what}: stage {s} offers {offered}, got {value!r}")
                wanted[f"stage{s}.{what}"] = value
        return self.encode({knob.name: wanted[knob.name] for knob in self.knobs})


def layer_spec(op: str, cin: int, cout: int, kernel: int, stride: int, squeeze: float, skip: Skip) -> LayerSpec:
    """A layer from its choices; a skip that the shapes do not allow is none."""
    if cin != cout or (skip == "identity" and stride > 1):
        skip = "none"
    inner = max(1, int(cin * squeeze)) if squeeze else 0
    if op == "conv":
        return LayerSpec("conv", cin, cout, cout, kernel, stride, inner, skip)
    if op == "separable":
        return LayerSpec("separable", cin, cin, cout, kernel, stride, inner, skip)
    return LayerSpec("mbconv", cin, cin * _expansion(op), cout, kernel, stride, inner, skip)


def _expansion(op: str) -> int:
    return int(op.removeprefix("mbconv")) if op.startswith("mbconv") else 1
