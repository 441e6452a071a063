"""The once-for-all ResNet50 family as a search space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from search_spaces.base import Archs, Block, Published
from search_spaces.emitter import strided
from search_spaces.errors import UserError, explain
from search_spaces.layout import LaidOutSpace, Layout, Position
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.mobilenet_v3_table import Positive, ascending
from search_spaces.published import PublishedModel
from search_spaces.resnet_spec import (
    BottleneckSpec,
    NetworkSpec,
    StemSpec,
    bottleneck_workload,
    head_workload,
    stem_workload,
)

if TYPE_CHECKING:
    from search_spaces.resnet_mixture import MixtureResNet
    from search_spaces.resnet_network import ResNet
    from search_spaces.resnet_supernet import SuperResNet

Share = Annotated[float, Field(gt=0)]


class Stage(BaseModel):
    """Bottleneck blocks of equal output width, of which the first may stride.

    Args:
        width: output channels at width multiplier 1.
        depths: choices of the number of blocks.
        stride: of the first block.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: Positive
    depths: tuple[Positive, ...] = (2,)
    stride: Literal[1, 2] = 1

    @field_validator("depths")
    @classmethod
    def _choices(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        return ascending(values)


class ReferenceArchitecture(PublishedModel):
    """A named architecture, one width multiplier and one expansion everywhere, and what is published of it.

    Args:
        stem_depth: convolutions of the stem.
        depths: blocks of each stage.
        width, expansion: at every place.
        macs, params, source, options: see `Published`.
    """

    stem_depth: int
    depths: tuple[int, ...]
    width: float
    expansion: float


class Table(BaseModel):
    """All that a `ResNetSpace` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    resolutions: tuple[Positive, ...]
    widths: tuple[Share, ...]
    expansions: tuple[Share, ...]
    stem_width: Positive
    stem_depths: tuple[Literal[2, 3], ...]
    stem_stride: Literal[1, 2]
    stem_pool: bool
    dropout: Annotated[float, Field(ge=0, lt=1)]
    references: dict[str, ReferenceArchitecture]

    @field_validator("resolutions", "widths", "expansions", "stem_depths")
    @classmethod
    def _choices(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return ascending(values)


class ResNetSpace(LaidOutSpace):
    """ResNet50D with searchable stem, depths, widths, expansions and input resolution.

    The second family of once-for-all (Cai et al., ICLR 2020; `OFAResNets` of mit-han-lab/once-for-all): a stem of two
    or three 3x3 convolutions, the middle one around a shortcut, max pooling; stages of bottlenecks with pooled
    projection shortcuts as in ResNet-D (He et al., CVPR 2019); pooling and a classifier. Every stage has its own width
    multiplier, as have the stem's inner and outer convolutions, and every block its own expansion: the width of its 3x3
    convolution as a share of its output's. Channels are rounded to multiples of 8.

    Knobs, in this order and only where there is a choice: `resolution`, `stem.depth`, `stem.inner_width`,
    `stem.width`, `stage<i>.width`, `stage<i>.depth`, `stage<i>.block<j>.expansion`.

    Args:
        in_channels, num_classes: of the task.
        stages: the stage table, `Stage` objects or mappings with the same keys.
        resolutions: choices of the input's edge in pixels; images are resized.
        widths: choices of every width multiplier.
        expansions: choices of every block.
        stem_width: channels of the stem at width multiplier 1.
        stem_depths: choices of its number of convolutions, 2 or 3.
        stem_stride: of its first convolution.
        stem_pool: whether max pooling halves the map after the stem; off for small images.
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
        stages: Sequence[Stage | Mapping[str, Any]],
        resolutions: Sequence[int] = (224,),
        widths: Sequence[float] = (1.0,),
        expansions: Sequence[float] = (0.25,),
        stem_width: int = 64,
        stem_depths: Sequence[int] = (2, 3),
        stem_stride: int = 2,
        stem_pool: bool = True,
        dropout: float = 0.0,
        references: Mapping[str, Any] | None = None,
        name: str = "resnet",
    ) -> None:
        self.name = name
        try:
            self.table = Table.model_validate(
                {
                    "in_channels": in_channels,
                    "num_classes": num_classes,
                    "stages": stages,
                    "resolutions": resolutions,
                    "widths": widths,
                    "expansions": expansions,
                    "stem_width": stem_width,
                    "stem_depths": stem_depths,
                    "stem_stride": stem_stride,
                    "stem_pool": stem_pool,
                    "dropout": dropout,
                    "references": references or {},
                }
            )
        except ValidationError as error:
            raise UserError(explain(error, name, Stage.model_fields)) from error
        self._places = [(s, b) for s, stage in enumerate(self.table.stages) for b in range(stage.depths[-1])]
        self._layout = self._lay_out()
        self._references = {key: self._reference(key, r) for key, r in self.table.references.items()}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.table.in_channels, self.table.resolutions[-1], self.table.resolutions[-1]

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @cached_property
    def size(self) -> int:
        """The exact number of distinct canonical architectures."""
        table = self.table
        widths = len(table.widths) ** (2 + len(table.stages))
        blocks = prod(sum(len(table.expansions) ** depth for depth in stage.depths) for stage in table.stages)
        return len(table.resolutions) * len(table.stem_depths) * widths * blocks

    @property
    def references(self) -> dict[str, Archs]:
        """The two ends, and those of the table."""
        return super().references | self._references

    @property
    def published(self) -> dict[str, Published]:
        return {name: reference.published for name, reference in self.table.references.items()}

    def spec(self, arch: Archs) -> NetworkSpec:
        """The network that architecture `(K,)` stands for, as plain data."""
        table, row = self.table, np.asarray(arch)
        chosen = {knob.name: int(choice) for knob, choice in zip(self.knobs, row, strict=True)}
        stages = tuple(
            tuple(self.block_spec(s, b, chosen) for b in range(stage.depths[chosen.get(f"stage{s}.depth", 0)]))
            for s, stage in enumerate(table.stages)
        )
        return NetworkSpec(
            resolution=table.resolutions[chosen.get("resolution", 0)],
            stem=self.stem_spec(chosen),
            stages=stages,
            classes=table.num_classes,
            dropout=table.dropout,
        )

    def build(self, arch: Archs) -> ResNet:
        from search_spaces.resnet_network import ResNet

        return ResNet(self.spec(arch))

    def supernet(self) -> SuperResNet:
        from search_spaces.resnet_supernet import SuperResNet

        return SuperResNet(self)

    def mixture_supernet(self) -> MixtureResNet:
        from search_spaces.resnet_mixture import MixtureResNet

        return MixtureResNet(self)

    def _lay_out(self) -> Layout:
        table = self.table
        stages = range(len(table.stages))
        choices: dict[str, tuple[Any, ...]] = {
            "resolution": table.resolutions,
            "stem.depth": table.stem_depths,
            "stem.inner_width": table.widths,
            "stem.width": table.widths,
            **{f"stage{s}.width": table.widths for s in stages},
            **{f"stage{s}.depth": table.stages[s].depths for s in stages},
            **{f"stage{s}.block{b}.expansion": table.expansions for s, b in self._places},
        }
        positions = [Position(("resolution", "stem.depth", "stem.inner_width", "stem.width"))]
        for s, b in self._places:
            before = () if b else (self._width_name(s - 1),)
            positions.append(
                Position(
                    ("resolution", *before, f"stage{s}.width"),
                    own=(f"stage{s}.block{b}.expansion",),
                    depth=f"stage{s}.depth",
                    least=sum(depth <= b for depth in table.stages[s].depths),
                )
            )
        return Layout(choices, [*positions, Position(("resolution", self._width_name(len(table.stages) - 1)))])

    @staticmethod
    def _width_name(stage: int) -> str:
        """The decision on the width of a stage's output; stage -1 is the stem."""
        return "stem.width" if stage < 0 else f"stage{stage}.width"

    def _channels(self, stage: int, chosen: Mapping[str, int]) -> int:
        width = self.table.stem_width if stage < 0 else self.table.stages[stage].width
        return make_divisible(width * self.table.widths[chosen.get(self._width_name(stage), 0)])

    def stem_spec(self, chosen: Mapping[str, int]) -> StemSpec:
        """The stem with the given choices (decision -> index); the first of what is not given."""
        table = self.table
        inner = make_divisible(table.stem_width * table.widths[chosen.get("stem.inner_width", 0)])
        return StemSpec(
            cin=table.in_channels,
            inner=make_divisible(inner // 2),
            cout=self._channels(-1, chosen),
            depth=table.stem_depths[chosen.get("stem.depth", 0)],
            stride=table.stem_stride,
            pool=table.stem_pool,
        )

    def block_spec(self, s: int, b: int, chosen: Mapping[str, int]) -> BottleneckSpec:
        """Block `b` of stage `s` with the given choices (decision -> index); the first of what is not given."""
        cout = self._channels(s, chosen)
        expansion = self.table.expansions[chosen.get(f"stage{s}.block{b}.expansion", 0)]
        return BottleneckSpec(
            cin=cout if b else self._channels(s - 1, chosen),
            hidden=make_divisible(round(cout * expansion)),
            cout=cout,
            stride=1 if b else self.table.stages[s].stride,
            project=b == 0,
        )

    def _make_block(self, index: int) -> Block:
        position, chosen = self._layout.locate(index)
        table = self.table
        size = table.resolutions[chosen.get("resolution", 0)]
        if position == 0:
            return Block("stem", stem_workload(self.stem_spec(chosen), size))
        size = strided(strided(size, table.stem_stride), 2 if table.stem_pool else 1)
        s, b = self._places[position - 1] if position <= len(self._places) else (len(table.stages), 0)
        for stage in table.stages[: s + (b > 0)]:
            size = strided(size, stage.stride)
        if s == len(table.stages):
            return Block("head", head_workload(self._channels(s - 1, chosen), table.num_classes, size))
        return Block(f"stage{s}.block{b}", bottleneck_workload(self.block_spec(s, b, chosen), size))

    def _reference(self, name: str, reference: ReferenceArchitecture) -> Archs:
        """Its row, at the largest resolution."""
        where = f"{self.name}: references.{name}"
        if len(reference.depths) != len(self.table.stages):
            raise UserError(f"{where}.depths: needs one per stage, {len(self.table.stages)}, got {reference.depths}")
        wanted: dict[str, Any] = {
            "stem.depth": reference.stem_depth,
            "stem.inner_width": reference.width,
            **{self._width_name(s): reference.width for s in range(-1, len(self.table.stages))},
            **{f"stage{s}.depth": depth for s, depth in enumerate(reference.depths)},
            **{f"stage{s}.block{b}.expansion": reference.expansion for s, b in self._places if b < reference.depths[s]},
        }
        offered: list[tuple[str, Any, tuple[Any, ...]]] = [
            ("stem_depth", reference.stem_depth, self.table.stem_depths),
            ("width", reference.width, self.table.widths),
            ("expansion", reference.expansion, self.table.expansions),
            *(("depths", d, stage.depths) for d, stage in zip(reference.depths, self.table.stages, strict=True)),
        ]
        for what, value, choices in offered:
            if value not in choices:
                raise UserError(f"{where}.{what}: the space offers {choices}, got {value}")
        knobs = {knob.name: knob for knob in self.knobs}
        if "resolution" in knobs:
            wanted["resolution"] = knobs["resolution"].choices[-1]
        return self.encode({key: value for key, value in wanted.items() if key in knobs})
