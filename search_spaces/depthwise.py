"""Depthwise convolution whose weight gradient is fast for wide kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The widest kernel for which oneDNN has a vectorised depthwise weight gradient. Beyond it torch's processor builds take
# a plain loop, many times slower (`python -m benchmarks.depthwise`).
WIDEST = 3
# Bytes of input worked on at a time. A padded copy of so much stays in the cache, and in memory that malloc keeps.
_PART = 1 << 22

Pair = tuple[int, int]


def depthwise_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """`F.conv2d(x, weight, None, stride, padding, groups=channels)`, with a faster gradient of the weight.

    On processors, in float32 and for kernels wider than three the gradient is computed in strips (`weight_gradient`),
    and cannot be differentiated once more; everywhere else this is `F.conv2d` itself.

    Args:
        x: `(batch, channels, height, width)`, at its best in channels-last memory format.
        weight: `(channels, 1, rows, columns)`.
        stride, padding: of rows and columns.
    """
    if (
        weight.shape[3] > WIDEST
        and len(weight) == x.shape[1]
        and weight.requires_grad
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    ):
        result: Tensor = _Depthwise.apply(x, weight, stride, padding)
        return result
    return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])


@contextmanager
def fast_depthwise(network: nn.Module) -> Iterator[None]:
    """Within it the depthwise `nn.Conv2d` of a network train by `depthwise_conv2d`; the network itself stays plain."""
    changed = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _simple(module):
            # An attribute of the instance stands before the method of its class.
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What `conv(x)` gives, with the faster gradient where it applies."""
    return _forward(conv, x) if _simple(conv) else conv._conv_forward(x, conv.weight, conv.bias)


def _simple(conv: nn.Conv2d) -> bool:
    """Whether a convolution is depthwise and all that `depthwise_conv2d` offers is all that it needs."""
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size[1] > WIDEST
        and conv.dilation == (1, 1)
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and max(conv.stride) <= 2
        and "forward" not in vars(conv)
    )


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    assert not isinstance(conv.padding, str)
    return depthwise_conv2d(x, conv.weight, _pair(conv.stride), _pair(conv.padding))


def _pair(sizes: Sequence[int]) -> Pair:
    rows, columns = sizes
    return rows, columns


def weight_gradient(x: Tensor, grad: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Gradient of a depthwise convolution's weight, `(channels, 1, *kernel)`.

    The columns of a kernel are independent of each other: a strip of two or three of them has the weight gradient of a
    narrow convolution over the columns of the input that it sees. Exact up to the order of the sums.

    Args:
        x: input `(batch, channels, height, width)`.
        grad: of the output, `(batch, channels, out height, out width)`.
        kernel, stride, padding: of rows and columns.
    """
    images = max(1, _PART // (x[0].numel() * x.element_size()))
    total = _in_strips(x[:images], grad[:images], kernel, stride, padding)
    for first in range(images, len(x), images):
        part = slice(first, first + images)
        total += _in_strips(x[part], grad[part], kernel, stride, padding)
    return total


def _in_strips(x: Tensor, grad: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    rows, columns = kernel
    channels, height, width = x.shape[1:]
    below = (grad.shape[2] - 1) * stride[0] + rows - padding[0] - height
    # oneDNN's vectorised gradient pads rows itself only where the image is no lower than the kernel.
    by_itself = stride[0] == 1 and height >= rows
    gradients = []
    for first, count in _strips(columns):
        left = padding[1] - first
        right = (grad.shape[3] - 1) * stride[1] + count - left - width
        if max(-left, -right) >= width:  # it sees nothing but padding
            gradients.append(grad.new_zeros(channels, 1, rows, count))
            continue
        seen = F.pad(x, (left, right) if by_itself else (left, right, padding[0], below))
        shape = grad.new_empty(1).expand(channels, 1, rows, count)  # nothing but the shape of the weight is read
        gradients.append(_backward(grad, seen, shape, stride, (padding[0] if by_itself else 0, 0), of=1))
    return torch.cat(gradients, 3)


def _strips(columns: int) -> list[tuple[int, int]]:
    """First column and width of each strip: as few as can be, none of one column.

    oneDNN's vectorised gradient also wants a kernel that is no narrower than the stride, which is two at most.
    """
    count = -(-columns // WIDEST)
    edges = [columns * i // count for i in range(count + 1)]
    return [(a, b - a) for a, b in pairwise(edges)]


def _backward(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, of: int) -> Tensor:
    """Autograd's gradient of a depthwise convolution with respect to its input (`of` 0) or its weight (1)."""
    mask = [of == 0, of == 1, False]
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], x.shape[1], mask
    )
    result: Tensor = gradients[of]
    return result


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _backward(grad, x, weight, ctx.stride, ctx.padding, of=0)
        if ctx.needs_input_grad[1]:
            grad_weight = weight_gradient(x, grad, _pair(weight.shape[2:]), ctx.stride, ctx.padding)
        return grad_x, grad_weight, None, None
