"""Layers of the MnasNet family as plain data, and the operators that they consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from search_spaces.emitter import Emitter
from search_spaces.operators import Workload

Skip = Literal["none", "identity", "pool"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of a block.

    Args:
        kind: `conv`, `separable` (depthwise, then 1x1) or `mbconv` (1x1 to `hidden` channels, depthwise, 1x1).
        cin, hidden, cout: channels of the input, of the depthwise convolution (of `conv`: the output), of the output.
        kernel, stride: of the convolution that is not 1x1.
        squeeze: inner channels of squeeze-and-excitation after that convolution, 0 for none.
        skip: what is added to the output: nothing, the input, or the input's 3x3 average.
    """

    kind: Literal["conv", "separable", "mbconv"]
    cin: int
    hidden: int
    cout: int
    kernel: int
    stride: int
    squeeze: int
    skip: Skip


@dataclass(frozen=True, slots=True)
class StemSpec:
    """A 3x3 convolution to `width` channels and the first layer."""

    cin: int
    width: int
    stride: int
    layer: LayerSpec


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """The last layer, a 1x1 convolution to `final` channels, pooling and classifier."""

    layer: LayerSpec
    final: int
    classes: int
    dropout: float


def _layer(emit: Emitter, spec: LayerSpec) -> None:
    source = emit.last
    if spec.kind == "conv":
        emit.conv(spec.cout, spec.kernel, spec.stride)
    else:
        if spec.kind == "mbconv":
            emit.conv(spec.hidden)
            emit.norm("relu")
        emit.conv(spec.hidden, spec.kernel, spec.stride, depthwise=True)
    emit.norm("relu")
    if spec.squeeze:
        emit.gates(spec.squeeze, "sigmoid")
    if spec.kind != "conv":
        emit.conv(spec.cout)
        emit.norm()
    if spec.skip != "none":
        result, emit.last = emit.last, source
        if spec.skip == "pool":
            emit.pool("avg_pool2d", 3, spec.stride, padded=True)
        shortcut, emit.last = emit.last, result
        emit.same("add", shortcut)


def stem_workload(spec: StemSpec, resolution: int) -> Workload:
    """Operators of the stem and the first layer."""
    emit = Emitter(spec.cin, resolution)
    emit.conv(spec.width, 3, spec.stride)
    emit.norm("relu")
    _layer(emit, spec.layer)
    return emit.build()


def layer_workload(spec: LayerSpec, size: int) -> Workload:
    """Operators of one layer whose input is `size` pixels wide and high."""
    emit = Emitter(spec.cin, size)
    _layer(emit, spec)
    return emit.build()


def head_workload(spec: HeadSpec, size: int) -> Workload:
    """Operators of the last layer and the head on a `size` x `size` map."""
    emit = Emitter(spec.layer.cin, size)
    _layer(emit, spec.layer)
    emit.conv(spec.final)
    emit.norm("relu")
    emit.global_pool()
    emit.linear(spec.classes, bias=True)
    return emit.build()
