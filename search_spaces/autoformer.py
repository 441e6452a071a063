"""Vision transformers as a search space: AutoFormer (Chen et al., ICCV 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from search_spaces.autoformer_spec import LayerSpec, NetworkSpec
from search_spaces.base import Archs, Block, Catalog, Knob, Published, SearchSpace
from search_spaces.errors import UserError, explain
from search_spaces.mobilenet_v3_table import Positive, ascending
from search_spaces.published import PublishedModel

if TYPE_CHECKING:
    from search_spaces.autoformer_mixture import MixtureAutoFormer
    from search_spaces.autoformer_network import AutoFormer
    from search_spaces.autoformer_supernet import SuperAutoFormer
    from search_spaces.operators import Workload

# Columns of an architecture; then heads and ratio of each layer in turn.
_WIDTH, _DEPTH, _FIRST = 0, 1, 2
# What a layer consists of, in the order of its knobs and of its blocks.
_PARTS = ("attention", "mlp")

Rate = Annotated[float, Field(ge=0, lt=1)]


class Reference(PublishedModel):
    """A named architecture, layer by layer, and what is published of it."""

    width: Positive
    heads: tuple[Positive, ...]
    ratios: tuple[float, ...]

    @model_validator(mode="after")
    def _equally_long(self) -> Reference:
        if len(self.heads) != len(self.ratios):
            raise ValueError(f"heads and ratios need one value per layer, got {len(self.heads)} and {len(self.ratios)}")
        return self


class Table(BaseModel):
    """All that an `AutoFormerSpace` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    resolution: Positive
    patch: Positive
    widths: tuple[Positive, ...]
    depths: tuple[Positive, ...]
    heads: tuple[Positive, ...]
    ratios: tuple[Annotated[float, Field(gt=0)], ...]
    head_width: Positive
    max_relative_position: Positive
    dropout: Rate
    drop_path: Rate
    references: dict[str, Reference]

    @field_validator("widths", "depths", "heads", "ratios")
    @classmethod
    def _choices(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return ascending(values)

    @model_validator(mode="after")
    def _whole_patches(self) -> Table:
        if self.resolution % self.patch:
            raise ValueError(f"resolution must be a multiple of patch = {self.patch}, got {self.resolution}")
        return self


class AutoFormerSpace(SearchSpace):
    """Vision transformers with searchable width, depth, and heads and MLP ratio of every layer.

    Patches and a class token with learned absolute positions; pre-normalised layers of self-attention with learned
    two-dimensional relative positions on keys and values and of a perceptron with GELU; normalisation, the mean over
    the patches, and the classifier. Queries, keys and values have `head_width` channels per head whatever the width,
    so that heads can be searched by layer. A subnet of the supernet uses the leading channels of every weight ("weight
    entanglement").

    Knobs, in this order: `width`, `depth`, then `layer<i>.heads` and `layer<i>.ratio` for each layer.

    Args:
        in_channels, num_classes: of the task.
        widths: choices of the embedding dimension.
        depths: choices of the number of layers.
        heads: choices of the number of heads of every layer.
        ratios: choices of the hidden width of every layer's perceptron, as a multiple of the width, rounded down.
        resolution: height and width of the input in pixels, a multiple of `patch`.
        patch: edge of a patch in pixels.
        head_width: channels of queries, keys and values per head.
        max_relative_position: distance in patches from which relative positions are told apart no longer.
        dropout: at the largest width; smaller networks drop proportionally less, as in the family's own code.
        drop_path: of the last of the most layers, from zero in the first (stochastic depth).
        references: name -> `Reference` or a mapping; those with choices that this space does not offer are left out.
        name: what the space is called in messages.

    Raises:
        UserError: a key or value that makes no sense, named with what would be right.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        ratios: Sequence[float],
        resolution: int = 224,
        patch: int = 16,
        head_width: int = 64,
        max_relative_position: int = 14,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        references: Mapping[str, Any] | None = None,
        name: str = "autoformer",
    ) -> None:
        self.name = name
        try:
            self.table = Table.model_validate(
                {
                    "in_channels": in_channels,
                    "num_classes": num_classes,
                    "resolution": resolution,
                    "patch": patch,
                    "widths": widths,
                    "depths": depths,
                    "heads": heads,
                    "ratios": ratios,
                    "head_width": head_width,
                    "max_relative_position": max_relative_position,
                    "dropout": dropout,
                    "drop_path": drop_path,
                    "references": references or {},
                }
            )
        except ValidationError as error:
            raise UserError(explain(error, name, {*Table.model_fields, *Reference.model_fields})) from error
        table = self.table
        knobs = [Knob("width", table.widths), Knob("depth", table.depths)]
        for layer in range(table.depths[-1]):
            knobs += [Knob(f"layer{layer}.heads", table.heads), Knob(f"layer{layer}.ratio", table.ratios)]
        self._knobs = tuple(knobs)
        per_width = [1, *(len(table.heads), len(table.ratios)) * table.depths[-1], 1]
        self._first_id = np.array([0, *accumulate(len(table.widths) * blocks for blocks in per_width)])
        self._layer_of_knob = np.array([-1, -1, *(layer for layer in range(table.depths[-1]) for _ in range(2))])
        self._traced: dict[tuple[str, int, int], Workload] = {}
        self._references = {
            key: self.encode(choices)
            for key, reference in table.references.items()
            if (choices := self._offered(reference)) is not None
        }

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.table.in_channels, self.table.resolution, self.table.resolution

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @cached_property
    def size(self) -> int:
        """The exact number of distinct canonical architectures."""
        per_layer = len(self.table.heads) * len(self.table.ratios)
        return len(self.table.widths) * sum(per_layer**depth for depth in self.table.depths)

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        return self._layer_of_knob < self._depths(archs)

    @property
    def references(self) -> dict[str, Archs]:
        """The two ends, and those of the table."""
        return {**super().references, **self._references}

    @property
    def published(self) -> dict[str, Published]:
        return {name: self.table.references[name].published for name in self._references}

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(int(self._first_id[-1]), self._make_block)

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """Positions: the embedding, attention and perceptron of every layer, the head."""
        archs = np.asarray(archs)
        ids = np.empty((len(archs), len(self._first_id) - 1), dtype=np.int32)
        width = archs[:, _WIDTH, None].astype(np.int32)
        ids[:, [0, -1]] = width
        ids[:, 1:-1] = width * self.cardinalities[_FIRST:] + archs[:, _FIRST:]
        ids += self._first_id[:-1].astype(np.int32)
        ids[:, 1:-1][self._layer_of_knob[_FIRST:] >= self._depths(archs)] = -1
        return ids

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        least = self.table.depths[0]
        own = [
            (_WIDTH, knob) if layer < least else (_WIDTH, _DEPTH, knob)
            for knob, layer in enumerate(self._layer_of_knob.tolist())
            if layer >= 0
        ]
        return (_WIDTH,), *own, (_WIDTH,)

    def spec(self, arch: Archs) -> NetworkSpec:
        """The network that architecture `(K,)` stands for, as plain data."""
        table, arch = self.table, np.asarray(arch)
        width = table.widths[arch[_WIDTH]]
        last = max(table.depths[-1] - 1, 1)
        layers = tuple(
            LayerSpec(
                heads=table.heads[arch[_FIRST + 2 * i]],
                hidden=self.hidden(width, table.ratios[arch[_FIRST + 2 * i + 1]]),
                drop_path=table.drop_path * i / last,
            )
            for i in range(table.depths[arch[_DEPTH]])
        )
        return NetworkSpec(
            in_channels=table.in_channels,
            resolution=table.resolution,
            patch=table.patch,
            width=width,
            layers=layers,
            head_width=table.head_width,
            reach=table.max_relative_position,
            classes=table.num_classes,
            dropout=table.dropout * width / table.widths[-1],
        )

    @staticmethod
    def hidden(width: int, ratio: float) -> int:
        """Hidden width of a perceptron."""
        return int(width * ratio)

    def build(self, arch: Archs) -> AutoFormer:
        from search_spaces.autoformer_network import AutoFormer

        return AutoFormer(self.spec(arch))

    def supernet(self) -> SuperAutoFormer:
        from search_spaces.autoformer_supernet import SuperAutoFormer

        return SuperAutoFormer(self)

    def mixture_supernet(self) -> MixtureAutoFormer:
        from search_spaces.autoformer_mixture import MixtureAutoFormer

        return MixtureAutoFormer(self)

    def _depths(self, archs: Archs) -> NDArray[np.int64]:
        """Layers of each architecture, `(n, 1)`."""
        return np.asarray(self.table.depths)[np.asarray(archs)[:, _DEPTH, None]]

    def _offered(self, reference: Reference) -> dict[str, int | float | str] | None:
        """A reference by knobs, None where this space does not offer one of its choices."""
        choices: dict[str, int | float | str] = {"width": reference.width, "depth": len(reference.heads)}
        for i, (heads, ratio) in enumerate(zip(reference.heads, reference.ratios, strict=True)):
            choices |= {f"layer{i}.heads": heads, f"layer{i}.ratio": ratio}
        by_name = {knob.name: knob.choices for knob in self.knobs}
        return choices if all(value in by_name.get(key, ()) for key, value in choices.items()) else None

    def _make_block(self, index: int) -> Block:
        position = int(np.searchsorted(self._first_id, index, side="right")) - 1
        rest = index - int(self._first_id[position])
        if position in (0, len(self._first_id) - 2):
            kind = "embedding" if position == 0 else "head"
            return Block(kind, self._trace(kind, rest, 0))
        width, choice = divmod(rest, int(self.cardinalities[position + 1]))
        layer, part = divmod(position - 1, len(_PARTS))
        return Block(f"layer{layer}.{_PARTS[part]}", self._trace(_PARTS[part], width, choice))

    def _trace(self, kind: str, width: int, choice: int) -> Workload:
        """Operators of one block with the choices of the given indices; equal blocks of several layers are one."""
        from search_spaces.autoformer_network import trace_block

        key = kind, width, choice
        if key not in self._traced:
            arch = np.zeros(len(self.knobs), dtype=self.dtype)
            arch[_WIDTH] = width
            if kind in _PARTS:
                arch[_FIRST + _PARTS.index(kind)] = choice
            self._traced[key] = trace_block(self.spec(arch), kind)
        return self._traced[key]
