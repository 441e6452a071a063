"""The once-for-all MobileNetV3 family as a search space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from search_spaces.base import Archs, Block, Choice, Published
from search_spaces.emitter import strided
from search_spaces.errors import UserError, explain
from search_spaces.layout import LaidOutSpace
from search_spaces.mobilenet_v3_spec import (
    BlockSpec,
    HeadSpec,
    NetworkSpec,
    block_workload,
    head_workload,
    make_divisible,
    stem_workload,
)
from search_spaces.mobilenet_v3_table import ReferenceArchitecture, Stage, Table, block_places, lay_out

if TYPE_CHECKING:
    from search_spaces.mobilenet_v3_mixture import MixtureMobileNetV3
    from search_spaces.mobilenet_v3_network import MobileNetV3
    from search_spaces.mobilenet_v3_supernet import SuperMobileNetV3


class MobileNetV3Space(LaidOutSpace):
    """MobileNetV3 with searchable depths, kernels, expansions, width and input resolution.

    The family of once-for-all (Cai et al., ICLR 2020) on the network of Howard et al. (ICCV 2019): a 3x3 stem, stages
    of inverted residuals with squeeze-and-excitation and hard-swish as the table says, a 1x1 convolution, pooling, a
    feature layer and the classifier. Channels are rounded to multiples of 8 as in both reference implementations.

    Knobs, in this order and only where there is a choice: `resolution`, `width`, `stage<i>.depth`,
    `stage<i>.block<j>.kernel`, `stage<i>.block<j>.expansion`, counted from zero as in the networks' module names. A
    space without any choice keeps `resolution` as its only knob.

    Args:
        in_channels, num_classes: of the task.
        stages: the stage table, `Stage` objects or mappings with the same keys.
        resolutions: choices of the input's edge in pixels; images are resized.
        widths: choices of the width multiplier of all channels but the classifier's.
        stem_width, stem_stride: of the first convolution.
        final_width: channels of the last 1x1 convolution.
        feature_width: width of the feature layer before the classifier.
        feature_bias: whether that layer has a bias, as in torchvision's MobileNetV3; once-for-all's has none.
        dropout: probability before the classifier.
        kernel_transform: whether the supernet's smaller kernels are learned transforms of the larger ones.
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
        stem_width: int = 16,
        stem_stride: int = 2,
        final_width: int = 960,
        feature_width: int = 1280,
        feature_bias: bool = True,
        dropout: float = 0.0,
        kernel_transform: bool = False,
        references: Mapping[str, Any] | None = None,
        name: str = "mobilenet_v3",
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
                    "stem_width": stem_width,
                    "stem_stride": stem_stride,
                    "final_width": final_width,
                    "feature_width": feature_width,
                    "feature_bias": feature_bias,
                    "dropout": dropout,
                    "kernel_transform": kernel_transform,
                    "references": references or {},
                }
            )
        except ValidationError as error:
            raise UserError(explain(error, name, Stage.model_fields)) from error
        self._layout = lay_out(self.table)
        self._places = block_places(self.table)
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
        per_stage = (
            sum((len(stage.kernels) * max(len(stage.expansions), 1)) ** depth for depth in stage.depths)
            for stage in self.table.stages
        )
        return len(self.table.resolutions) * len(self.table.widths) * prod(per_stage)

    @property
    def references(self) -> dict[str, Archs]:
        """The two ends, what a person would try first (at full resolution the middle choice of every other knob, at
        each width multiplier: `uniform-x0.75`), and those of the table."""
        middle = ((self.cardinalities - 1) // 2).astype(self.dtype)
        found = super().references
        for index, width in enumerate(self.table.widths):
            for name, choice in (("width", index), ("resolution", len(self.table.resolutions) - 1)):
                if (column := self._layout.column(name)) is not None:
                    middle[column] = choice
            found[f"uniform-x{width:g}"] = self.canonical(middle[None])[0]
        return (found if self.size > 1 else {"largest": found["largest"]}) | self._references

    @property
    def published(self) -> dict[str, Published]:
        return {name: reference.published for name, reference in self.table.references.items()}

    def from_lists(
        self,
        kernels: NDArray[Any],
        expansions: NDArray[Any],
        depths: NDArray[Any],
        resolutions: NDArray[Any] | None = None,
    ) -> Archs:
        """Canonical architectures `(n, K)` from once-for-all's own description (`ks`, `e`, `d`, `r`).

        Stages without any choice are left out, as once-for-all leaves out the first block.

        Args:
            kernels, expansions: `(n, B)` of all blocks that the remaining stages can have; those beyond a stage's depth
                do not matter.
            depths: `(n, S)` number of blocks of each remaining stage.
            resolutions: `(n,)` pixels; the largest of the space where left out.

        Raises:
            UserError: a wrong shape, or a value that a knob does not offer; row, knob and value are named.
        """
        stages = [s for s, t in enumerate(self.table.stages) if len(t.depths) * len(t.kernels) * len(t.expansions) > 1]
        places = [(s, b) for s, b in self._places if s in stages]
        given: dict[str, NDArray[Any]] = {}
        for what, values, count in (
            ("kernels", kernels, len(places)), ("expansions", expansions, len(places)), ("depths", depths, len(stages)),
        ):  # fmt: skip
            if np.ndim(values) != 2 or np.shape(values) != (len(depths), count):
                raise UserError(f"{self.name}: {what}: needs shape ({len(depths)}, {count}), got {np.shape(values)}")
        for i, s in enumerate(stages):
            given[f"stage{s}.depth"] = np.asarray(depths)[:, i]
        for i, (s, b) in enumerate(places):
            given[f"stage{s}.block{b}.kernel"] = np.asarray(kernels)[:, i]
            given[f"stage{s}.block{b}.expansion"] = np.asarray(expansions)[:, i]
        n = len(depths)
        given["resolution"] = np.broadcast_to(self.table.resolutions[-1] if resolutions is None else resolutions, (n,))
        given["width"] = np.broadcast_to(self.table.widths[-1], (n,))
        archs = np.zeros((n, len(self.knobs)), dtype=self.dtype)
        offered = np.ones(archs.shape, dtype=bool)
        for column, knob in enumerate(self.knobs):
            choices, values = np.array(knob.choices), given[knob.name]
            archs[:, column] = np.minimum(np.searchsorted(choices, values), len(choices) - 1)
            offered[:, column] = choices[archs[:, column]] == values
        bad = np.argwhere(~offered & self.active(archs))
        if len(bad):
            row, column = bad[0]
            knob = self.knobs[column]
            raise UserError(
                f"{self.name}: row {row}, knob {knob.name!r}: no choice {given[knob.name][row]}; it has {knob.choices}"
            )
        return self.canonical(archs)

    def spec(self, arch: Archs) -> NetworkSpec:
        """The network that architecture `(K,)` stands for, as plain data."""
        layout, arch = self._layout, np.asarray(arch)
        width = self.table.widths[layout.choice("width", arch)]
        stages = tuple(
            tuple(
                self.block_spec(s, b, width, layout.choice(f"stage{s}.block{b}.kernel", arch),
                                layout.choice(f"stage{s}.block{b}.expansion", arch))
                for b in range(stage.depths[layout.choice(f"stage{s}.depth", arch)])
            )
            for s, stage in enumerate(self.table.stages)
        )  # fmt: skip
        return NetworkSpec(
            resolution=self.table.resolutions[layout.choice("resolution", arch)],
            in_channels=self.table.in_channels,
            stem=make_divisible(self.table.stem_width * width),
            stem_stride=self.table.stem_stride,
            stages=stages,
            head=self.head_spec(width),
        )

    def block_spec(self, stage_index: int, block: int, width: float, kernel: int, expansion: int) -> BlockSpec:
        """Block `block` of a stage at one width multiplier, with the choices of the given indices."""
        stages, stage = self.table.stages, self.table.stages[stage_index]
        before = stages[stage_index - 1].width if stage_index else self.table.stem_width
        base_cin = stage.width if block else before
        cin = make_divisible(base_cin * width)
        if stage.hidden:
            expand = stage.hidden[block] != base_cin
            hidden = make_divisible(stage.hidden[block] * width) if expand else cin
        else:
            expand = stage.expansions != (1,)
            hidden = make_divisible(round(cin * stage.expansions[expansion])) if expand else cin
        stride = 1 if block else stage.stride
        return BlockSpec(
            cin=cin,
            hidden=hidden,
            cout=make_divisible(stage.width * width),
            expand=expand,
            kernel=stage.kernels[kernel],
            stride=stride,
            activation=stage.activation,
            squeeze=make_divisible(hidden // 4) if stage.se else 0,
            residual=stride == 1 and base_cin == stage.width,
        )

    def head_spec(self, width: float) -> HeadSpec:
        """The head at one width multiplier."""
        table = self.table
        return HeadSpec(
            cin=make_divisible(table.stages[-1].width * width),
            final=make_divisible(table.final_width * width),
            features=make_divisible(table.feature_width * width),
            feature_bias=table.feature_bias,
            classes=table.num_classes,
            dropout=table.dropout,
        )

    def build(self, arch: Archs) -> MobileNetV3:
        from search_spaces.mobilenet_v3_network import MobileNetV3

        return MobileNetV3(self.spec(arch))

    def supernet(self) -> SuperMobileNetV3:
        from search_spaces.mobilenet_v3_supernet import SuperMobileNetV3

        return SuperMobileNetV3(self)

    def mixture_supernet(self) -> MixtureMobileNetV3:
        if self.table.kernel_transform:
            raise UserError(f"{self.name}: kernel_transform: mixture supernets have none, use false")
        from search_spaces.mobilenet_v3_mixture import MixtureMobileNetV3

        return MixtureMobileNetV3(self)

    def _reference(self, name: str, reference: ReferenceArchitecture) -> Archs:
        """Its row; the largest choice of knobs that it does not name."""
        where = f"{self.name}: references.{name}"
        stages, kernels, expansions = self.table.stages, reference.kernels, reference.expansions
        expansions = expansions or tuple((1,) * len(blocks) for blocks in kernels)
        if len(kernels) != len(stages) or [*map(len, kernels)] != [*map(len, expansions)]:
            raise UserError(
                f"{where}: kernels and expansions need one list per stage ({len(stages)}), of equal lengths"
            )
        wanted: dict[str, Choice] = {}
        for s, stage in enumerate(stages):
            wanted[f"stage{s}.depth"] = len(kernels[s])
            for b, (kernel, expansion) in enumerate(zip(kernels[s], expansions[s], strict=True)):
                wanted |= {f"stage{s}.block{b}.kernel": kernel, f"stage{s}.block{b}.expansion": expansion}
            for what, value, choices in (
                ("depth", [len(kernels[s])], stage.depths),
                ("kernel", kernels[s], stage.kernels),
                ("expansion", expansions[s], stage.expansions or (1,)),
            ):
                if set(value) - set(choices):
                    raise UserError(f"{where}: stage {s} offers {what} {choices}, got {', '.join(map(str, value))}")
        own = {knob.name: wanted.get(knob.name, knob.choices[-1]) for knob in self.knobs}
        beyond = {knob.name for knob in self.knobs if ".block" in knob.name} - set(wanted)
        return self.encode({key: choice for key, choice in own.items() if key not in beyond})

    def _make_block(self, index: int) -> Block:
        table = self.table
        position, chosen = self._layout.locate(index)
        width, size = table.widths[chosen.get("width", 0)], table.resolutions[chosen.get("resolution", 0)]
        if position == 0:
            stem = make_divisible(table.stem_width * width)
            return Block("stem", stem_workload(table.in_channels, size, stem, table.stem_stride))
        size = strided(size, table.stem_stride)
        if position > len(self._places):
            for stage in table.stages:
                size = strided(size, stage.stride)
            return Block("head", head_workload(self.head_spec(width), size))
        s, b = self._places[position - 1]
        for stage in table.stages[: s + (b > 0)]:
            size = strided(size, stage.stride)
        name = f"stage{s}.block{b}"
        spec = self.block_spec(s, b, width, chosen.get(f"{name}.kernel", 0), chosen.get(f"{name}.expansion", 0))
        return Block(name, block_workload(spec, size))
