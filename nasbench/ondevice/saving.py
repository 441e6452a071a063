"""Layers that keep no more for their gradients than the trained values need.

Plain autograd keeps the input of every convolution and normalisation that a gradient flows through, even where only a
bias trains. These give the same outputs and gradients from less: see `memory` for how much.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad as conv2d_gradients

from nasbench.ondevice.memory import Update, channels, layer_updates
from search_spaces import UserError

_BITS = 2 ** torch.arange(8, dtype=torch.uint8)


def memory_saving(network: nn.Module, updates: Mapping[str, Update]) -> nn.Module:
    """A copy of a network that trains only what `updates` names, and keeps only what that needs.

    Convolutions, batch normalisation (frozen: its running statistics are used and stay), ReLU, ReLU6, hard sigmoid,
    leaky ReLU, dropout and average pooling become layers that save; what else the network has stays as it is.
    Parameters that do not train have `requires_grad` False, and partly trained ones are split, so that an optimiser
    over those that require gradients holds state for the trained values alone. `merged` turns the copy into a plain
    network again.

    Args:
        updates: by dotted name of a module, for all within it that no longer name covers; `""` for the whole network.

    Raises:
        UserError: a name that the network does not have, or a part of a grouped convolution.
    """
    known = {name for name, _ in network.named_modules()}
    for name in updates:
        if name not in known:
            raise UserError(f"updates: the network has no module {name!r}")
    out = copy.deepcopy(network)
    for parameter in out.parameters():
        parameter.requires_grad_(False)
    for name, module in list(out.named_modules()):
        (update,) = layer_updates([name], updates)
        lean = _lean(module, update, name)
        if lean is not module and name:
            parent, _, attribute = name.rpartition(".")
            setattr(out.get_submodule(parent), attribute, lean)
        elif lean is module:
            _unfreeze(module, update)
    return out


def merged(network: nn.Module) -> nn.Module:
    """A plain copy of a memory-saving network, with what was learned in the places of the original's parameters."""
    out = copy.deepcopy(network)
    for name, module in list(out.named_modules()):
        if isinstance(module, _Lean) and name:
            parent, _, attribute = name.rpartition(".")
            setattr(out.get_submodule(parent), attribute, module.plain())
    for parameter in out.parameters():
        parameter.requires_grad_(True)
    return out


def _unfreeze(module: nn.Module, update: Update) -> None:
    """Let a plain layer's own parameters train, as an update says."""
    for name, parameter in module.named_parameters(recurse=False):
        parameter.requires_grad_(update.bias if name == "bias" else update.weights > 0)


def _lean(module: nn.Module, update: Update, name: str) -> nn.Module:
    """The saving layer that takes a module's place; the module itself where there is none."""
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        if 0 < update.weights < 1 and module.groups not in (1, module.in_channels):
            raise UserError(f"updates: {name!r} is a grouped convolution; all of its weights train, or none")
        return LeanConv2d(module, update)
    if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
        return LeanNorm(module, update)
    if type(module) in _SLOPES:
        return LeanActivation(module)
    if type(module) is nn.Dropout and not module.inplace:
        return LeanDropout(module)
    if isinstance(module, nn.AvgPool2d) and module.divisor_override is None:
        return LeanPool(module)
    return LeanAverage(module) if averages(module) else module


def averages(module: nn.Module) -> bool:
    """Whether a module takes the mean of each channel over all pixels."""
    from search_spaces.mobilenet_v3_network import GlobalAvgPool

    return isinstance(module, GlobalAvgPool) or (
        isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    )


class _Lean(nn.Module):
    """A saving layer in the place of a plain one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def plain(self) -> nn.Module:
        """The plain layer, with what was learned."""
        return self.layer


class LeanConv2d(_Lean):
    """A convolution of which the weights of some input channels train, the bias, both, or nothing.

    It keeps these channels of its input. Which ones: those whose weights have the largest norm.
    """

    layer: nn.Conv2d

    def __init__(self, conv: nn.Conv2d, update: Update) -> None:
        super().__init__(conv)
        conv.weight.requires_grad_(update.weights == 1)
        if conv.bias is not None:
            conv.bias.requires_grad_(update.bias)
        self.part: nn.Parameter | None = None
        if 0 < update.weights < 1:
            axis = 0 if conv.groups > 1 else 1  # where the weights of an input channel lie
            norms = conv.weight.detach().flatten(2).norm(dim=2).sum(1 - axis)
            rows = norms.topk(channels(update.weights, conv.in_channels)).indices.sort().values
            self.register_buffer("rows", rows)
            self.axis = axis
            self.part = nn.Parameter(conv.weight.detach().index_select(axis, rows).clone())

    def forward(self, x: Tensor) -> Tensor:
        conv = self.layer
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        if self.part is not None:
            return _run(_PartConv, x, conv.weight, self.part, conv.bias, self.rows, self.axis, geometry)
        if conv.weight.requires_grad:
            return conv(x)
        return _run(_FrozenConv, x, conv.weight, conv.bias, geometry)

    def plain(self) -> nn.Module:
        if self.part is not None:
            with torch.no_grad():
                self.layer.weight.index_copy_(self.axis, self.rows, self.part)  # type: ignore[arg-type]
        return self.layer


class LeanNorm(_Lean):
    """Batch normalisation by its running statistics, which stay: a scale and a shift per channel."""

    layer: nn.BatchNorm2d

    def __init__(self, norm: nn.BatchNorm2d, update: Update) -> None:
        super().__init__(norm)
        if norm.affine:
            norm.weight.requires_grad_(update.weights > 0)
            norm.bias.requires_grad_(update.bias)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.layer
        assert norm.running_var is not None
        assert norm.running_mean is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.affine:
            scale = scale * norm.weight
            shift = norm.bias - norm.running_mean * scale
        else:
            shift = -norm.running_mean * scale
        if scale.requires_grad:
            return torch.addcmul(_channels(shift), x, _channels(scale))
        return _run(_Affine, x, scale, shift)

    def train(self, mode: bool = True) -> LeanNorm:
        super().train(mode)
        self.layer.eval()
        return self

    def plain(self) -> nn.Module:
        return self.layer.train(self.training)


class LeanActivation(_Lean):
    """A non-linearity of two slopes that keeps a bit an element."""

    def forward(self, x: Tensor) -> Tensor:
        function, low, high, slopes = _SLOPES[type(self.layer)](self.layer)
        return _run(_TwoSlopes, x, function, low, high, slopes)


class LeanDropout(_Lean):
    """Dropout that keeps a bit an element."""

    layer: nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        p = self.layer.p
        if not self.training or p == 0:
            return x
        kept = torch.rand_like(x) >= p
        return _run(_Masked, x, kept, 1 / (1 - p) if p < 1 else 0.0)


class LeanPool(_Lean):
    """Average pooling that keeps the shape alone."""

    layer: nn.AvgPool2d

    def forward(self, x: Tensor) -> Tensor:
        pool = self.layer
        options = (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.count_include_pad)
        return _run(_Pool, x, tuple(_pair(o) if not isinstance(o, bool) else o for o in options))


class LeanAverage(_Lean):
    """Global average pooling that keeps the shape alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


_INF = float("inf")
# Function, the interval with the first slope, and the slopes within it and outside.
_SLOPES: dict[type[nn.Module], Any] = {
    nn.ReLU: lambda m: (F.relu, 0.0, _INF, (1.0, 0.0)),
    nn.ReLU6: lambda m: (F.relu6, 0.0, 6.0, (1.0, 0.0)),
    nn.Hardsigmoid: lambda m: (F.hardsigmoid, -3.0, 3.0, (1 / 6, 0.0)),
    nn.LeakyReLU: lambda m: (lambda x: F.leaky_relu(x, m.negative_slope), 0.0, _INF, (1.0, m.negative_slope)),
}


def _run(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _channels(vector: Tensor) -> Tensor:
    return vector[:, None, None]


class _FrozenConv(torch.autograd.Function):
    """Convolution with a weight that does not train: its gradient needs no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Tensor:
        stride, padding, dilation, groups = geometry
        ctx.save_for_backward(weight)
        ctx.shape, ctx.geometry, ctx.bias = x.shape, geometry, bias is not None
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        of_x = _input_gradient(gradient, weight, ctx.shape, ctx.geometry) if ctx.needs_input_grad[0] else None
        of_bias = gradient.sum((0, 2, 3)) if ctx.bias and ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None


class _PartConv(torch.autograd.Function):
    """Convolution of which the weights of some input channels train: its gradient needs these channels alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, part: Tensor, bias: Tensor | None, rows: Tensor, axis: int, geometry: Any
    ) -> Tensor:
        stride, padding, dilation, groups = geometry
        ctx.save_for_backward(x.index_select(1, rows), weight, part, rows)
        ctx.shape, ctx.geometry, ctx.axis, ctx.bias = x.shape, geometry, axis, bias is not None
        return F.conv2d(x, weight.index_copy(axis, rows, part), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        some, weight, part, rows = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        of_x = None
        if ctx.needs_input_grad[0]:
            whole = weight.index_copy(ctx.axis, rows, part)
            of_x = _input_gradient(gradient, whole, ctx.shape, ctx.geometry)
        # Depthwise, an output channel belongs to each of the trained input channels; else all of them do.
        outputs = gradient.index_select(1, rows) if ctx.axis == 0 else gradient
        groups = len(rows) if ctx.axis == 0 else 1
        of_part = conv2d_gradients.conv2d_weight(some, part.shape, outputs, stride, padding, dilation, groups)
        of_bias = gradient.sum((0, 2, 3)) if ctx.bias and ctx.needs_input_grad[3] else None
        return of_x, None, of_part, of_bias, None, None, None


def _input_gradient(gradient: Tensor, weight: Tensor, shape: Any, geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    return conv2d_gradients.conv2d_input(list(shape), weight, gradient, stride, padding, dilation, groups)


class _Masked(torch.autograd.Function):
    """`x * scale` where a mask is set, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(_packed(mask))
        ctx.scale = scale
        return torch.where(mask, x * scale, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return torch.where(_unpacked(bits, gradient), gradient * ctx.scale, 0.0), None, None


class _Pool(torch.autograd.Function):
    """Average pooling, whose gradient needs its input's shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Any) -> Tensor:
        ctx.like, ctx.options = (x.shape, x.is_contiguous(memory_format=torch.channels_last)), options
        return F.avg_pool2d(x, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shape, channels_last = ctx.like
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.empty(shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout)
        return torch.ops.aten.avg_pool2d_backward(gradient, x, *ctx.options, None), None


class _Affine(torch.autograd.Function):
    """`x * scale + shift` per channel, the scale frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.addcmul(_channels(shift), x, _channels(scale))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        of_x = gradient * _channels(scale) if ctx.needs_input_grad[0] else None
        of_shift = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return of_x, None, of_shift


class _TwoSlopes(torch.autograd.Function):
    """A non-linearity with one slope in an interval and another outside; which of them is kept, a bit an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any, low: float, high: float, slopes: tuple[float, float]) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_packed((x > low) & (x < high)))
            ctx.slopes = slopes
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        inside, outside = ctx.slopes
        mask = _unpacked(bits, gradient)
        slope = torch.where(mask, inside, outside).to(gradient.dtype)
        return gradient * slope, None, None, None, None


def _packed(mask: Tensor) -> Tensor:
    """Booleans as bits, eight a byte, in the order of a contiguous tensor."""
    flat = mask.flatten().to(torch.uint8)
    flat = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat * _BITS.to(flat.device)).sum(1, dtype=torch.uint8)


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """The booleans of `like`'s shape."""
    flat = (bits[:, None] & _BITS.to(bits.device)).ne(0).flatten()[: like.numel()]
    return flat.view(like.shape)
