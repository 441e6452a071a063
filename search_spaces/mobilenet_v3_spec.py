"""One concrete network of the MobileNetV3 family as plain data, and the operators that it consists of.

`NetworkSpec` is the single source of truth: the stand-alone network, the supernet's forward pass and the operators
that predictors see are all made from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from search_spaces.emitter import Emitter
from search_spaces.operators import Workload


def make_divisible(value: float, divisor: int = 8) -> int:
    """`value` rounded to a multiple of `divisor`, at least one of it and never more than 10 % down.

    As in the reference implementations of MobileNet (tensorflow/models `_make_divisible`) and of once-for-all.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One inverted-residual block.

    Args:
        cin, hidden, cout: channels of the input, between the depthwise convolution and the projection, of the output.
        expand: whether a 1x1 convolution widens the input to `hidden`; without it `hidden == cin`.
        kernel, stride: of the depthwise convolution.
        activation: `relu` or `hard_swish`.
        squeeze: inner channels of the squeeze-and-excitation unit, 0 for none.
        residual: whether the input is added to the output.
    """

    cin: int
    hidden: int
    cout: int
    expand: bool
    kernel: int
    stride: int
    activation: str
    squeeze: int
    residual: bool


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Final 1x1 convolution to `final` channels, global pooling, linear layer to `features`, classifier."""

    cin: int
    final: int
    features: int
    feature_bias: bool
    classes: int
    dropout: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """One network: `stages` holds the blocks that are present, stage by stage."""

    resolution: int
    in_channels: int
    stem: int
    stem_stride: int
    stages: tuple[tuple[BlockSpec, ...], ...]
    head: HeadSpec

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""
        return self.in_channels, self.resolution, self.resolution


def stem_workload(in_channels: int, resolution: int, width: int, stride: int) -> Workload:
    """Operators of the stem: 3x3 convolution, normalisation, hard-swish."""
    emit = Emitter(in_channels, resolution)
    emit.conv(width, 3, stride)
    emit.norm("hard_swish")
    return emit.build()


def block_workload(spec: BlockSpec, size: int) -> Workload:
    """Operators of one block whose input is `size` pixels wide and high."""
    emit = Emitter(spec.cin, size)
    source = emit.last
    if spec.expand:
        emit.conv(spec.hidden)
        emit.norm(spec.activation)
    emit.conv(spec.hidden, spec.kernel, spec.stride, depthwise=True)
    emit.norm(spec.activation)
    if spec.squeeze:
        emit.gates(spec.squeeze)
    emit.conv(spec.cout)
    emit.norm()
    if spec.residual:
        emit.same("add", source)
    return emit.build()


def head_workload(spec: HeadSpec, size: int) -> Workload:
    """Operators of the head on a `size` x `size` map."""
    emit = Emitter(spec.cin, size)
    emit.conv(spec.final)
    emit.norm("hard_swish")
    emit.global_pool()
    emit.linear(spec.features, spec.feature_bias)
    emit.same("hard_swish")
    emit.linear(spec.classes, bias=True)
    return emit.build()
