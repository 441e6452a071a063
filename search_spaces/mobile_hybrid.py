"""Convolutions, then attention: networks like MobileViT as a search space."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from search_spaces.base import Archs, Choice, Knob, Published
from search_spaces.chain_blocks import Activation
from search_spaces.emitter import strided
from search_spaces.errors import UserError, explain
from search_spaces.layered import Layer, LayeredSpace
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.mobilenet_v3_table import Positive, ascending
from search_spaces.operators import Shape, Workload, WorkloadBuilder
from search_spaces.published import PublishedModel

if TYPE_CHECKING:
    from torch import nn

Widths = Annotated[tuple[Positive, ...], AfterValidator(ascending)]
Ratios = Annotated[tuple[Annotated[float, Field(gt=0)], ...], AfterValidator(ascending)]


class Stage(BaseModel):
    """Inverted residuals, and with `token_widths` a MobileViT block after them.

    Args:
        widths: choices of the output channels.
        stride: of the first inverted residual.
        depths: choices of the number of inverted residuals.
        kernels, expansions: choices of each inverted residual.
        token_widths: choices of the width of the tokens; none for a stage of convolutions alone.
        layers: choices of the number of transformer layers.
        ratios: choices of the hidden width of the transformers' perceptrons, as a multiple of the tokens'.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widths: Widths
    stride: Literal[1, 2] = 1
    depths: Widths = (1,)
    kernels: Widths = (3,)
    expansions: Ratios = (4,)
    token_widths: tuple[Positive, ...] = ()
    layers: Widths = (2,)
    ratios: Ratios = (2,)

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if any(k % 2 == 0 for k in self.kernels):
            raise ValueError(f"kernels must be odd, got {self.kernels}")
        if self.token_widths:
            ascending(self.token_widths)
        elif {"layers", "ratios"} & self.model_fields_set:
            raise ValueError("layers and ratios are of the attention: give token_widths too")
        return self


class ReferenceArchitecture(PublishedModel):
    """A named architecture, equal kernels, expansions and ratios everywhere, and what is published of it.

    Args:
        widths, depths: one per stage.
        token_widths, layers: one per stage with attention.
        macs, params, source, options: see `Published`.
    """

    resolution: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    token_widths: tuple[int, ...]
    layers: tuple[int, ...]
    final_width: int
    kernel: int = 3
    expansion: float = 4
    ratio: float = 2


class Table(BaseModel):
    """All that a `MobileHybridSpace` is configured with, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    in_channels: Positive
    num_classes: Positive
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    resolutions: Widths
    stem_width: Positive
    stem_stride: Literal[1, 2]
    final_widths: Widths
    heads: Positive
    patch: Positive
    activation: Activation
    dropout: Annotated[float, Field(ge=0, lt=1)]
    references: dict[str, ReferenceArchitecture]

    @model_validator(mode="after")
    def _whole_heads(self) -> Table:
        for s, stage in enumerate(self.stages):
            for width in stage.token_widths:
                if width % self.heads:
                    raise ValueError(f"stages.{s}.token_widths: heads = {self.heads} does not divide {width}")
        return self


@dataclass(frozen=True)
class _Place:
    """What a layer is: inverted residual `block` of a stage, or its attention (-1)."""

    stage: int
    block: int


class MobileHybridSpace(LayeredSpace):
    """Stages of inverted residuals of which the later ones end in attention, with everything of them searchable.

    The family of MobileViT (Mehta and Rastegari, ICLR 2022), whose three networks it can contain: a 3x3 stem, inverted
    residuals, MobileViT blocks (local features by convolution, transformers over the pixels of equal place in patches,
    fused with what came in), a 1x1 convolution, pooling, classifier. Knobs as in NASViT (Gong et al., ICLR 2022):
    resolution, widths, depths, kernels and expansions in the convolutional part; width of the tokens, number of layers
    and ratio of the perceptrons in the attention.

    In the supernet all choices share leading channels, kernel centres and leading layers. Batch normalisation in the
    convolutions has statistics per subnet; layer normalisation in the attention needs none. The number of heads is one
    for all, so that queries, keys and values are divided among the heads by the subnet's own width.

    Knobs, only where there is a choice: `resolution`, per stage `stage<i>.width`, `stage<i>.depth`,
    `stage<i>.block<j>.kernel`, `stage<i>.block<j>.expansion`, `stage<i>.token_width`, `stage<i>.layers`,
    `stage<i>.ratio`, and `final_width`.

    Args:
        in_channels, num_classes: of the task.
        stages: `Stage` objects or mappings with the same keys.
        resolutions: choices of the input's edge in pixels. Multiples of the patch times all strides (64 by default)
            spare attention from resizing its maps.
        stem_width, stem_stride: of the first convolution.
        final_widths: choices of the channels of the last 1x1 convolution.
        heads: of every attention.
        patch: edge of the attention's patches in pixels.
        activation: of the convolutions outside MobileViT blocks.
        dropout: probability before the classifier.
        references: name -> `ReferenceArchitecture` or a mapping; those with choices that this space does not offer are
            left out.
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
        resolutions: Sequence[int] = (256,),
        stem_width: int = 16,
        stem_stride: int = 2,
        final_widths: Sequence[int] = (640,),
        heads: int = 4,
        patch: int = 2,
        activation: str = "silu",
        dropout: float = 0.1,
        references: Mapping[str, Any] | None = None,
        name: str = "mobile_hybrid",
    ) -> None:
        self.name = name
        try:
            self.table = Table.model_validate(
                {
                    "in_channels": in_channels,
                    "num_classes": num_classes,
                    "stages": stages,
                    "resolutions": resolutions,
                    "stem_width": stem_width,
                    "stem_stride": stem_stride,
                    "final_widths": final_widths,
                    "heads": heads,
                    "patch": patch,
                    "activation": activation,
                    "dropout": dropout,
                    "references": references or {},
                }
            )
        except ValidationError as error:
            known = {*Table.model_fields, *Stage.model_fields, *ReferenceArchitecture.model_fields}
            raise UserError(explain(error, name, known)) from error
        self._lay_out()
        self._references = {
            key: self.encode(choices)
            for key, reference in self.table.references.items()
            if (choices := self._offered(key, reference)) is not None
        }

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self._layers

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.table.in_channels, self.table.resolutions[-1], self.table.resolutions[-1]

    @property
    def num_classes(self) -> int:
        return self.table.num_classes

    @property
    def references(self) -> dict[str, Archs]:
        """The two ends, and those of the table."""
        return {**super().references, **self._references}

    @property
    def published(self) -> dict[str, Published]:
        return {name: self.table.references[name].published for name in self._references}

    def image_shape(self, choices: Mapping[str, Choice]) -> tuple[int, int, int]:
        size = int(self._choice("resolution", choices))
        return self.table.in_channels, size, size

    def module(self, layer: Layer, choices: Mapping[str, Choice]) -> nn.Module:
        from torch import nn

        from search_spaces.reference.blocks import ConvBnAct, InvertedResidual, classifier
        from search_spaces.reference.transformers import MobileVitBlock, SplitAttention

        table, act = self.table, self.table.activation
        if layer.name == "stem":
            return ConvBnAct(table.in_channels, table.stem_width, 3, table.stem_stride, activation=act)
        if layer.name == "head":
            final = int(self._choice("final_width", choices))
            convolution = ConvBnAct(self._width(len(table.stages) - 1, choices), final, activation=act)
            return nn.Sequential(convolution, *classifier(final, table.num_classes, table.dropout))
        place = self._places[layer.name]
        prefix, stage = f"stage{place.stage}", table.stages[place.stage]
        cout = self._width(place.stage, choices)
        if place.block < 0:
            return MobileVitBlock(
                cout,
                int(self._choice(f"{prefix}.token_width", choices)),
                int(self._choice(f"{prefix}.layers", choices)),
                table.heads,
                table.patch,
                float(self._choice(f"{prefix}.ratio", choices)),
                SplitAttention,
            )
        cin = cout if place.block else self._width(place.stage - 1, choices)
        own = f"{prefix}.block{place.block}"
        return InvertedResidual(
            cin,
            make_divisible(cin * float(self._choice(f"{own}.expansion", choices))),
            cout,
            int(self._choice(f"{own}.kernel", choices)),
            1 if place.block else stage.stride,
            activation=act,
            expand=True,
        )

    def input_of(self, layer: Layer, choices: Mapping[str, Choice]) -> Shape:
        if layer.name == "stem":
            return self.image_shape(choices)
        place = self._places.get(layer.name, _Place(len(self.table.stages), 0))
        inside = place.block != 0
        _, size, _ = self.image_shape(choices)
        size = strided(size, self.table.stem_stride)
        for stage in self.table.stages[: place.stage + inside]:
            size = strided(size, stage.stride)
        return self._width(place.stage if inside else place.stage - 1, choices), size, size

    def alike(self, layer: Layer, choices: Mapping[str, Choice]) -> Hashable:
        """The later inverted residuals of a stage are equal in all but their names."""
        place = self._places.get(layer.name)
        if place is None or place.block <= 0:
            return super().alike(layer, choices)
        return place.stage, *choices.values()

    def _trace(self, layer: Layer, choices: Mapping[str, Choice]) -> Workload:
        """Attention is traced with one transformer layer, which is repeated: a third of the time to bind the space."""
        place = self._places.get(layer.name)
        if place is None or place.block >= 0:
            return super()._trace(layer, choices)
        depth = f"stage{place.stage}.layers"
        single = {**choices, depth: 1}
        key = self.alike(layer, single)
        if key not in self._traced:
            self._traced[key] = super()._trace(layer, single)
        return _repeated(self._traced[key], int(self._choice(depth, choices)))

    def _choice(self, name: str, choices: Mapping[str, Choice]) -> Choice:
        """What was chosen, or the one choice there is."""
        return choices.get(name, self._all[name][0])

    def _width(self, stage: int, choices: Mapping[str, Choice]) -> int:
        """Output channels of a stage; of the stem before the first."""
        return self.table.stem_width if stage < 0 else int(self._choice(f"stage{stage}.width", choices))

    def _lay_out(self) -> None:
        """Knobs and layers from the table."""
        table = self.table
        self._all: dict[str, tuple[Choice, ...]] = {"resolution": table.resolutions}
        self._places: dict[str, _Place] = {}
        layers: list[tuple[str, list[str], str, int]] = [("stem", ["resolution"], "", 0)]
        before = ["resolution"]  # what the input of a stage depends on
        for s, stage in enumerate(table.stages):
            prefix = f"stage{s}"
            width, depth = f"{prefix}.width", f"{prefix}.depth"
            self._all |= {width: stage.widths, depth: stage.depths}
            for b in range(stage.depths[-1]):
                own = [f"{prefix}.block{b}.kernel", f"{prefix}.block{b}.expansion"]
                self._all |= dict(zip(own, (stage.kernels, stage.expansions), strict=True))
                self._places[f"stage{s}_block{b}"] = _Place(s, b)
                knobs = [*before, width, *own] if b == 0 else ["resolution", width, *own]
                least = b if b >= stage.depths[0] else 0
                layers.append((f"stage{s}_block{b}", knobs, depth if least else "", least))
            if stage.token_widths:
                own = [f"{prefix}.token_width", f"{prefix}.layers", f"{prefix}.ratio"]
                self._all |= dict(zip(own, (stage.token_widths, stage.layers, stage.ratios), strict=True))
                self._places[f"stage{s}_attention"] = _Place(s, -1)
                layers.append((f"stage{s}_attention", ["resolution", width, *own], "", 0))
            before = ["resolution", width]
        self._all["final_width"] = table.final_widths
        layers.append(("head", [*before, "final_width"], "", 0))
        names = [name for name, choices in self._all.items() if len(choices) > 1] or ["resolution"]
        self._knobs = tuple(Knob(name, self._all[name]) for name in names)
        self._layers = tuple(
            Layer(name, tuple(k for k in knobs if k in names), (), depth, least) for name, knobs, depth, least in layers
        )

    def _offered(self, name: str, reference: ReferenceArchitecture) -> dict[str, Choice] | None:
        """A reference by knobs, None where this space does not offer one of its choices."""
        stages = self.table.stages
        attention = [s for s, stage in enumerate(stages) if stage.token_widths]
        for key, given, count in (
            ("widths", reference.widths, len(stages)),
            ("depths", reference.depths, len(stages)),
            ("token_widths", reference.token_widths, len(attention)),
            ("layers", reference.layers, len(attention)),
        ):
            if len(given) != count:
                raise UserError(f"{self.name}: references.{name}.{key}: needs {count} values, got {len(given)}")
        wanted: dict[str, Choice] = {"resolution": reference.resolution, "final_width": reference.final_width}
        for s, (width, depth) in enumerate(zip(reference.widths, reference.depths, strict=True)):
            wanted |= {f"stage{s}.width": width, f"stage{s}.depth": depth}
            for b in range(depth):
                own = {"kernel": reference.kernel, "expansion": reference.expansion}
                wanted |= {f"stage{s}.block{b}.{what}": value for what, value in own.items()}
        for s, width, depth in zip(attention, reference.token_widths, reference.layers, strict=True):
            wanted |= {f"stage{s}.token_width": width, f"stage{s}.layers": depth, f"stage{s}.ratio": reference.ratio}
        if any(value not in self._all.get(key, ()) for key, value in wanted.items()):
            return None
        return {knob.name: wanted[knob.name] for knob in self._knobs if knob.name in wanted}


def _repeated(block: Workload, times: int) -> Workload:
    """A MobileViT block of one transformer layer with so many of them.

    The layer lies between the first and the last layer normalisation, reads what was written just before it, and writes
    what is read just after it.
    """
    norms = [i for i, op in enumerate(block.operators) if op.kind == "layer_norm"]
    first, last = norms[0], norms[-1]
    order = [*range(first), *(i for _ in range(times) for i in range(first, last)), *range(last, len(block.operators))]
    builder = WorkloadBuilder()
    index = {t: builder.input(block.tensors[t]) for t in block.inputs}
    before, after = block.reads[first][0], block.writes[last - 1]
    for place, i in enumerate(order):
        again = i == first and place > first
        if again:
            index[before] = index[after]  # which is in its place already
        op = replace(block.operators[i], moved=()) if again else block.operators[i]
        index[block.writes[i]] = builder.put(op, [index[t] for t in block.reads[i]])
    return builder.build([index[t] for t in block.outputs])
