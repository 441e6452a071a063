"""Writes the operators of convolutional blocks one after the other, without making modules: what spaces count with."""

from __future__ import annotations

from search_spaces.operators import Tensor, Workload, WorkloadBuilder


def strided(size: int, stride: int) -> int:
    """Edge of a map after a convolution with an odd kernel, padding of half the kernel, and `stride`."""
    return (size - 1) // stride + 1


class Emitter:
    """Follows the tensor written last, `last`; set it to continue from another one.

    Args:
        channels, size: of the input map.
    """

    def __init__(self, channels: int, size: int) -> None:
        self.builder = WorkloadBuilder()
        self.last = self.builder.input(Tensor((channels, size, size)))

    def conv(self, cout: int, kernel: int = 1, stride: int = 1, depthwise: bool = False, bias: bool = False) -> None:
        """A convolution without activation."""
        cin, size, _ = self.builder.tensors[self.last].shape
        size = strided(size, stride)
        self.last = self.builder.add(
            "depthwise_conv2d" if depthwise else "conv2d",
            [self.last],
            (cout, size, size),
            kernel=(kernel, kernel),
            stride=(stride, stride),
            groups=cin if depthwise else 1,
            params=cout * (1 if depthwise else cin) * kernel**2 + (cout if bias else 0),
        )

    def same(self, kind: str, *others: int, params: int = 0) -> None:
        """An operator whose result has the shape of the tensor written last."""
        shape = self.builder.tensors[self.last].shape
        self.last = self.builder.add(kind, [self.last, *others], shape, params=params)

    def norm(self, activation: str = "") -> None:
        """Batch normalisation, and an activation where one is named."""
        self.same("batch_norm", params=2 * self.builder.tensors[self.last].shape[0])
        if activation:
            self.same(activation)

    def gates(self, squeeze: int, kind: str = "hard_sigmoid") -> None:
        """Squeeze-and-excitation with `squeeze` inner channels."""
        gated = self.last
        channels = self.builder.tensors[gated].shape[0]
        self.global_pool()
        self.conv(squeeze, bias=True)
        self.same("relu")
        self.conv(channels, bias=True)
        self.same(kind)
        gate, self.last = self.last, gated
        self.same("mul", gate)

    def pool(self, kind: str, kernel: int, stride: int, padded: bool) -> None:
        """`max_pool2d` or `avg_pool2d` to `ceil(size / stride)` pixels, padded by half the kernel or not at all."""
        channels, size, _ = self.builder.tensors[self.last].shape
        if kind == "avg_pool2d" and kernel == size and not padded:
            self.global_pool()
            return
        out = strided(size, stride)
        self.last = self.builder.add(
            kind, [self.last], (channels, out, out), kernel=(kernel, kernel), stride=(stride, stride)
        )

    def global_pool(self) -> None:
        """Global average pooling to `(channels, 1, 1)`."""
        channels = self.builder.tensors[self.last].shape[0]
        self.last = self.builder.add("global_avg_pool", [self.last], (channels, 1, 1))

    def linear(self, cout: int, bias: bool) -> None:
        """A fully connected layer on a vector, or on a pooled map seen as one."""
        source = self.builder.tensors[self.last]
        self.last = self.builder.add(
            "linear", [self.last], (cout,), params=cout * source.size + (cout if bias else 0),
            inputs=[Tensor((source.size,), source.itemsize)],
        )  # fmt: skip

    def build(self) -> Workload:
        """What was written."""
        return self.builder.build([self.last])
