"""Layers that share their weights between architectures and keep nothing of a call, and the supernet made of them.

A supernet holds one stand-alone network, the largest, without running statistics. A new one is a subclass of
`WeightSharingSupernet` with one method, `run`: the forward pass of an architecture, written with `conv2d`, `linear` and
the normalisation that it is handed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.base import Archs, SearchSpace
from search_spaces.depthwise import depthwise_conv2d
from search_spaces.errors import UserError
from search_spaces.supernet import NormStats, Supernet, dropout
from search_spaces.synchronised import batch_norm_of_all, processes

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
Network = TypeVar("Network", bound=nn.Module)

# How one normalisation layer treats its input: (layer, input) -> output. Channels are the input's second dimension,
# and the leading ones of the layer's scales and shifts are used.
Normalise = Callable[[BatchNorm, Tensor], Tensor]

# Zeros a share of the values in training, or hands them on: (input, rate) -> output.
Drop = Callable[[Tensor, float], Tensor]


def crop(weight: Tensor, *shape: int) -> Tensor:
    """The part of a shared weight that a smaller layer uses: leading channels, centre of the kernel.

    The first two dimensions of `shape` count from the start, all others are centred, as in once-for-all (Cai et al.,
    ICLR 2020). One `as_strided` instead of a slice per dimension: its backward fills one full-size gradient, not one
    per dimension.
    """
    if weight.shape == shape:
        return weight
    strides = weight.stride()
    offset = sum((weight.shape[d] - shape[d]) // 2 * strides[d] for d in range(2, len(shape)))
    return weight.as_strided(shape, strides, weight.storage_offset() + offset)


def conv2d(
    layer: nn.Conv2d,
    x: Tensor,
    cout: int,
    kernel: int | None = None,
    stride: int | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """`layer` with leading input channels, `cout` leading output channels and the centre of its kernel, "same" padding.

    A depthwise layer stays one, of as many channels as `x`; other groups keep their number, and must be whole.

    Args:
        kernel, stride: the layer's own by default.
        weight: instead of the part of the layer's own weight, in its shape.
    """
    cin = x.shape[1]
    groups = cin if layer.groups == layer.in_channels else layer.groups
    size = layer.kernel_size[0] if kernel is None else kernel
    if weight is None:
        weight = crop(layer.weight, cout, cin // groups, size, size)
    rows, columns = layer.stride if stride is None else (stride, stride)
    if layer.groups == layer.in_channels and layer.bias is None:
        return depthwise_conv2d(x, weight, (rows, columns), (size // 2, size // 2))
    return F.conv2d(x, weight, bias(layer, cout), (rows, columns), size // 2, 1, groups)


def linear(layer: nn.Linear, x: Tensor, cout: int) -> Tensor:
    """`layer` with as many leading inputs as `x` has features and `cout` leading outputs."""
    return F.linear(x, crop(layer.weight, cout, x.shape[-1]), bias(layer, cout))


def bias(layer: nn.Conv2d | nn.Linear, channels: int) -> Tensor | None:
    """The leading part of a layer's bias, None where it has none."""
    return None if layer.bias is None else crop(layer.bias, channels)


def stateless(network: Network) -> Network:
    """The same network, its normalisation layers without running statistics from now on."""
    for module in network.modules():
        if isinstance(module, BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network


def norm_names(network: nn.Module) -> dict[BatchNorm, str]:
    """The name of every normalisation layer, under which `NormStats` keeps its statistics."""
    return {module: name for name, module in network.named_modules() if isinstance(module, BatchNorm)}


def by_batch(layer: BatchNorm, x: Tensor) -> Tensor:
    """Normalise by the batch's own statistics; by those of all batches where several processes train together."""
    weight, shift = _affine(layer, x.shape[1])
    if processes() > 1:
        return batch_norm_of_all(x, weight, shift, layer.eps)
    return F.batch_norm(x, None, None, weight, shift, training=True, eps=layer.eps)


def by_stats(stats: NormStats, names: Mapping[BatchNorm, str]) -> Normalise:
    """Normalise by given statistics; `names` as from `norm_names`."""

    def normalise(layer: BatchNorm, x: Tensor) -> Tensor:
        name = names[layer]
        weight, shift = _affine(layer, x.shape[1])
        return F.batch_norm(x, stats.mean[name], stats.var[name], weight, shift, False, 0.0, layer.eps)

    return normalise


class PooledStatistics:
    """A `Normalise` that normalises by the batch and keeps the sums from which pooled statistics follow.

    Mean: the mean over batches, weighted by their values. Variance: mean of variances plus variance of means.
    """

    def __init__(self, names: Mapping[BatchNorm, str]) -> None:
        self._names = names
        self._weight: dict[str, int] = {}
        self._sum: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}

    def __call__(self, layer: BatchNorm, x: Tensor) -> Tensor:
        channels, values = x.shape[1], x.numel() // x.shape[1]
        if values < 2:
            raise UserError("calibration: a batch of one image leaves one value per channel; give two images or more")
        weight, shift = _affine(layer, channels)
        # Running buffers with momentum 1 receive the batch's own statistics at no extra pass over the data.
        mean, var = layer.weight.new_zeros(channels), layer.weight.new_zeros(channels)
        y = F.batch_norm(x, mean, var, weight, shift, training=True, momentum=1.0, eps=layer.eps)
        mean, var = mean.double(), var.double() * ((values - 1) / values)  # torch reports the unbiased variance
        name = self._names[layer]
        self._weight[name] = self._weight.get(name, 0) + values
        self._sum[name] = self._sum.get(name, 0.0) + values * mean
        self._square[name] = self._square.get(name, 0.0) + values * (var + mean * mean)
        return y

    def stats(self) -> NormStats:
        """Pooled over everything seen."""
        mean = {name: total / self._weight[name] for name, total in self._sum.items()}
        var = {name: (self._square[name] / self._weight[name] - mean[name] ** 2).clamp_min(0.0) for name in mean}
        return NormStats({k: v.float() for k, v in mean.items()}, {k: v.float() for k, v in var.items()})


class WeightSharingSupernet(Supernet):
    """Every network of a space in parts of the weights of one network, `largest`.

    Parameters that take no part in a subnet get no gradient from it. A subclass writes `run`. `extract` builds the
    architecture's stand-alone network and copies parameters by name, the part of each that `crop` takes; where names
    or parts differ, the subclass says so in `shared_name` and `shared_part`.

    Args:
        space: whose architectures these are; its `build` gives what `extract` returns.
        largest: holds the parameters under the names of a stand-alone network; loses its running statistics.
    """

    def __init__(self, space: SearchSpace, largest: nn.Module) -> None:
        super().__init__()
        self.space = space
        self.largest = stateless(largest)
        self._norm_names = norm_names(self.largest)

    @abstractmethod
    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        """Logits `(batch, classes)` of architecture `(K,)`.

        Args:
            x: images as the caller gave them: resizing them to the architecture's resolution is part of the pass.
            normalise: to be called for every normalisation layer.
            drop: to be called with the rate of every dropout; hands its input on where nothing is to be dropped.
        """

    def shared_name(self, name: str, arch: Archs) -> str:
        """What a parameter or normalisation layer of the stand-alone network is called in `largest`."""
        return name

    def shared_part(self, name: str, shape: tuple[int, ...], arch: Archs) -> Tensor:
        """The value that the stand-alone network's parameter `name` has in this supernet."""
        return crop(self.largest.get_parameter(self.shared_name(name, arch)), *shape)

    def forward(
        self, x: Tensor, arch: Archs, stats: NormStats | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        if stats is not None:
            return self.run(x, arch, by_stats(stats, self._norm_names), _keep)
        return self.run(x, arch, by_batch, partial(_drop, generator=generator) if self.training else _keep)

    def calibrate(self, arch: Archs, batches: Iterable[Tensor]) -> NormStats:
        """Statistics over batches, see `PooledStatistics`.

        Raises:
            UserError: no images, or a single value per channel, which has no variance.
        """
        pool, seen = PooledStatistics(self._norm_names), False
        for batch in batches:
            self.run(batch, arch, pool, _keep)
            seen = True
        if not seen:
            raise UserError("calibration: no images given")
        return pool.stats()

    def extract(self, arch: Archs, stats: NormStats) -> nn.Module:
        # On the meta device nothing is initialised, so that torch's random state stays as it is.
        with torch.device("meta"):
            network = self.space.build(arch)
        network = network.to_empty(device=next(self.parameters()).device).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(self.shared_part(name, tuple(parameter.shape), arch))
            for module, name in norm_names(network).items():
                shared = self.shared_name(name, arch)
                module.running_mean.copy_(stats.mean[shared])  # type: ignore[union-attr]
                module.running_var.copy_(stats.var[shared])  # type: ignore[union-attr]
                module.num_batches_tracked.zero_()  # type: ignore[union-attr]
        return network


def _affine(layer: BatchNorm, channels: int) -> tuple[Tensor, Tensor]:
    return crop(layer.weight, channels), crop(layer.bias, channels)


def _drop(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    return dropout(x, rate, generator) if rate else x


def _keep(x: Tensor, rate: float) -> Tensor:
    return x
