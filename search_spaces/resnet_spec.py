"""One network of the ResNet family as plain data, and the operators that it consists of."""

from __future__ import annotations

from dataclasses import dataclass

from search_spaces.emitter import Emitter
from search_spaces.operators import Workload


@dataclass(frozen=True, slots=True)
class StemSpec:
    """Two or three 3x3 convolutions, the second of three around a shortcut, and max pooling where `pool`.

    Args:
        cin, inner, cout: channels of the image, between the convolutions, of the last one.
        depth: number of convolutions.
        stride: of the first.
        pool: whether 3x3 max pooling with stride 2 follows.
    """

    cin: int
    inner: int
    cout: int
    depth: int
    stride: int
    pool: bool


@dataclass(frozen=True, slots=True)
class BottleneckSpec:
    """1x1 to `hidden` channels, 3x3 with the stride, 1x1 to `cout`, around a shortcut.

    Args:
        project: whether the shortcut is average pooling (where there is a stride) and a 1x1 convolution; else it is
            the identity.
    """

    cin: int
    hidden: int
    cout: int
    stride: int
    project: bool


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """One network: `stages` holds the blocks that are present, stage by stage."""

    resolution: int
    stem: StemSpec
    stages: tuple[tuple[BottleneckSpec, ...], ...]
    classes: int
    dropout: float

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`."""
        return self.stem.cin, self.resolution, self.resolution


def stem_workload(spec: StemSpec, resolution: int) -> Workload:
    """Operators of the stem."""
    emit = Emitter(spec.cin, resolution)
    emit.conv(spec.inner, 3, spec.stride)
    emit.norm("relu")
    if spec.depth == 3:
        source = emit.last
        emit.conv(spec.inner, 3)
        emit.norm("relu")
        emit.same("add", source)
    emit.conv(spec.cout, 3)
    emit.norm("relu")
    if spec.pool:
        emit.pool("max_pool2d", 3, 2, padded=True)
    return emit.build()


def bottleneck_workload(spec: BottleneckSpec, size: int) -> Workload:
    """Operators of one block whose input is `size` pixels wide and high."""
    emit = Emitter(spec.cin, size)
    source = emit.last
    emit.conv(spec.hidden)
    emit.norm("relu")
    emit.conv(spec.hidden, 3, spec.stride)
    emit.norm("relu")
    emit.conv(spec.cout)
    emit.norm()
    result, emit.last = emit.last, source
    if spec.project:
        if spec.stride > 1:
            emit.pool("avg_pool2d", spec.stride, spec.stride, padded=False)
        emit.conv(spec.cout)
        emit.norm()
    shortcut, emit.last = emit.last, result
    emit.same("add", shortcut)
    emit.same("relu")
    return emit.build()


def head_workload(channels: int, classes: int, size: int) -> Workload:
    """Operators of pooling and classifier on a `size` x `size` map."""
    emit = Emitter(channels, size)
    emit.global_pool()
    emit.linear(classes, bias=True)
    return emit.build()
