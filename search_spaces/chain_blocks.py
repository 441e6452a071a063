"""The blocks that the layers of a chain choose from, as validated tables."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from search_spaces.mobilenet_v3_spec import make_divisible


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("must be a whole number")
    return value


Positive = Annotated[int, Field(ge=1), BeforeValidator(_number)]


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


Odd = Annotated[Positive, AfterValidator(_odd)]
Activation = Literal["gelu", "hard_swish", "leaky_relu", "relu", "relu6", "silu"]


class _Choice(BaseModel):
    """One block that a layer may be. `activation` is the table's unless given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    activation: Activation | None = None

    def fits(self, cin: int, cout: int, stride: int) -> bool:
        """Whether a layer of this shape may be this block."""
        return True


class _Kernel(_Choice):
    kernel: Odd = 3


class InvertedResidualChoice(_Kernel):
    """1x1 to `expansion` times the channels, depthwise, gates, 1x1 (Sandler et al., CVPR 2018).

    Args:
        expansion: of the input channels; 1 leaves the first convolution out, unless `widen`.
        widen: keep the first convolution at expansion 1, as FBNet does.
        groups: of both 1x1 convolutions, with a shuffle of channels between them.
        squeeze: inner channels of squeeze-and-excitation as a share of the widened ones; 0 for none.
    """

    type: Literal["inverted_residual"]
    expansion: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6
    widen: bool = False
    groups: Positive = 1
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0

    def hidden(self, cin: int) -> int:
        """Channels of the depthwise convolution."""
        return cin if self.expansion == 1 else make_divisible(cin * self.expansion)


class SeparableChoice(_Kernel):
    """Depthwise, then 1x1 convolution (MobileNet, Howard et al., 2017).

    Args:
        squeeze: inner channels of squeeze-and-excitation between the two, as a share; 0 for none.
    """

    type: Literal["separable"]
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0


class ConvChoice(_Kernel):
    """Convolution, normalisation, activation."""

    type: Literal["conv"]
    groups: Positive = 1


class BottleneckChoice(_Kernel):
    """1x1 to `reduction` of the output channels, convolution, 1x1, around a shortcut (He et al., CVPR 2016).

    Args:
        squeeze: inner channels of squeeze-and-excitation before the sum, as a share; 0 for none (Hu et al., CVPR 2018).
    """

    type: Literal["bottleneck"]
    reduction: Annotated[float, Field(gt=0, le=1)] = 0.25
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0


class FireChoice(_Choice):
    """1x1 to `squeeze` of the output channels, then 1x1 and 3x3 side by side (SqueezeNet, Iandola et al., 2016)."""

    type: Literal["fire"]
    squeeze: Annotated[float, Field(gt=0, le=1)] = 0.125


class GhostChoice(_Kernel):
    """Two ghost modules around a strided depthwise convolution (GhostNet, Han et al., CVPR 2020)."""

    type: Literal["ghost"]
    expansion: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2
    squeeze: Annotated[float, Field(ge=0, le=1)] = 0.0


class ShuffleChoice(_Kernel):
    """The unit of ShuffleNetV2 (Ma et al., ECCV 2018): half of the channels pass, half are convolved, then shuffled.

    Where the shape changes, both halves are made from all channels. Needs even numbers of channels.
    """

    type: Literal["shuffle"]

    def fits(self, cin: int, cout: int, stride: int) -> bool:
        return cout % 2 == 0


class AttentionChoice(_Kernel):
    """Self-attention over all pixels, then a feed-forward part, each around a shortcut (Vaswani et al., NeurIPS 2017).

    Projections are 1x1 convolutions with batch normalisation, as in LeViT (Graham et al., ICCV 2021), so that the block
    stands in a chain of convolutions like any other. Where the shape changes, a depthwise and a 1x1 convolution come
    first. Positions are not encoded: convolutions before it tell them.

    Args:
        head_width: channels of one head; there are as many heads as fit, at least one.
        expansion: of the feed-forward part; 0 for none.
        kernel: of the depthwise convolution where the shape changes.
    """

    type: Literal["attention"]
    head_width: Positive = 16
    expansion: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2


class SqueezeExciteChoice(_Choice):
    """Squeeze-and-excitation alone (Hu et al., CVPR 2018); offered where a layer keeps the shape."""

    type: Literal["squeeze_excite"]
    squeeze: Annotated[float, Field(gt=0, le=1)] = 0.25

    def fits(self, cin: int, cout: int, stride: int) -> bool:
        return stride == 1 and cin == cout


class SkipChoice(_Choice):
    """The identity. Where it cannot be, a layer that changes the shape, it is not offered.

    Args:
        project: offer it there too, as a 1x1 convolution with normalisation and activation.
    """

    type: Literal["skip"]
    project: bool = False

    def fits(self, cin: int, cout: int, stride: int) -> bool:
        return self.project or (stride == 1 and cin == cout)


BLOCK_TYPES: tuple[type[_Choice], ...] = (
    AttentionChoice, BottleneckChoice, ConvChoice, FireChoice, GhostChoice, InvertedResidualChoice, SeparableChoice,
    ShuffleChoice, SkipChoice, SqueezeExciteChoice,
)  # fmt: skip

BlockChoice = Annotated[
    AttentionChoice
    | BottleneckChoice
    | ConvChoice
    | FireChoice
    | GhostChoice
    | InvertedResidualChoice
    | SeparableChoice
    | ShuffleChoice
    | SkipChoice
    | SqueezeExciteChoice,
    Field(discriminator="type"),
]


def expanded(blocks: Any) -> Any:
    """A table of blocks with one block per combination of values where keys have lists.

    `mb` with `kernel = [3, 5]` is `mb_kernel3` and `mb_kernel5`. What is no table is left for others to judge.

    Raises:
        ValueError: an empty list, or two blocks of one name.
    """
    if not isinstance(blocks, Mapping):
        return blocks
    result: dict[str, Any] = {}
    for name, block in blocks.items():
        lists = {k: v for k, v in block.items() if isinstance(v, list | tuple)} if isinstance(block, Mapping) else {}
        if empty := [key for key, values in lists.items() if not values]:
            raise ValueError(f"blocks.{name}.{empty[0]}: a list of choices needs at least one")
        for values in product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            full = "_".join([name, *(f"{key}{value}" for key, value in chosen.items())])
            if full in result:
                raise ValueError(f"two blocks are called {full!r}; rename blocks.{name}, or list each value once")
            result[full] = {**block, **chosen} if lists else block
    return result
