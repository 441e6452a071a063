"""The weight-sharing network of a MobileNetV3 space."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.base import Archs
from search_spaces.errors import UserError
from search_spaces.mobilenet_v3_network import ConvNorm, Head, InvertedResidual, MobileNetV3, SqueezeExcite
from search_spaces.mobilenet_v3_spec import BlockSpec, HeadSpec
from search_spaces.supernet import NormStats, Supernet, dropout, resize

if TYPE_CHECKING:
    from search_spaces.mobilenet_v3 import MobileNetV3Space

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, "relu": torch.relu, "hard_swish": F.hardswish}

# How one normalisation layer treats its input: (layer, input) -> output.
Normalise = Callable[[nn.BatchNorm2d, Tensor], Tensor]


def crop(weight: Tensor, *shape: int) -> Tensor:
    """The part of a shared weight that a smaller layer uses: leading channels, centre of the kernel.

    Centred kernels and leading channels as in once-for-all (Cai et al., 2020), without its kernel transformations. One
    `as_strided` instead of a slice per dimension: its backward fills one full-size gradient, not one per dimension.
    """
    if weight.shape == shape:
        return weight
    strides = weight.stride()
    offset = sum((weight.shape[d] - shape[d]) // 2 * strides[d] for d in range(2, len(shape)))
    return weight.as_strided(shape, strides, weight.storage_offset() + offset)


def shared_weights(space: MobileNetV3Space) -> MobileNetV3:
    """The largest network of a space, freshly initialised; its normalisation layers keep no running statistics."""
    largest = MobileNetV3(space.spec((space.cardinalities - 1).astype(space.dtype)))
    for module in largest.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return largest


class SuperMobileNetV3(Supernet):
    """Every network of a `MobileNetV3Space` in the weights of its largest.

    A subnet uses leading channels, kernel centres and each stage's leading blocks. Parameters that take no part in a
    subnet get no gradient from it. `largest` holds the parameters under the names that they have in a stand-alone
    network, so `extract` is a copy by name.
    """

    def __init__(self, space: MobileNetV3Space) -> None:
        super().__init__()
        self.space = space
        self.largest = shared_weights(space)
        self._norm_names: dict[nn.Module, str] = {
            module: name for name, module in self.largest.named_modules() if isinstance(module, nn.BatchNorm2d)
        }

    def forward(
        self, x: Tensor, arch: Archs, stats: NormStats | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        if stats is None:
            return self._run(x, arch, _by_batch, self.training, generator)
        return self._run(x, arch, self._by_stats(stats), False)

    def calibrate(self, arch: Archs, batches: Iterable[Tensor]) -> NormStats:
        """Statistics over batches: weighted mean of means; mean of variances plus variance of means.

        Raises:
            UserError: no images, or a single value per channel, which has no variance.
        """
        pool = _Pool(self._norm_names)
        for batch in batches:
            self._run(batch, arch, pool, False)
        return pool.stats()

    def extract(self, arch: Archs, stats: NormStats) -> MobileNetV3:
        # On the meta device nothing is initialised, so that torch's random state stays as it is.
        with torch.device("meta"):
            network = MobileNetV3(self.space.spec(arch))
        network = network.to_empty(device=next(self.parameters()).device).eval()
        shared = dict(self.largest.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(crop(shared[name], *parameter.shape))
            for name, module in network.named_modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.copy_(stats.mean[name])  # type: ignore[union-attr]
                    module.running_var.copy_(stats.var[name])  # type: ignore[union-attr]
                    module.num_batches_tracked.zero_()  # type: ignore[union-attr]
        return network

    def _run(
        self,
        x: Tensor,
        arch: Archs,
        normalise: Normalise,
        training: bool,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        spec = self.space.spec(arch)
        x = resize(x, spec.resolution).contiguous(memory_format=torch.channels_last)
        x = _conv_norm(self.largest.stem, x, spec.stem, 3, spec.stem_stride, False, "hard_swish", normalise)
        for stage, blocks in zip(self.largest.stages, spec.stages, strict=True):
            for module, block in zip(stage.children(), blocks, strict=False):
                assert isinstance(module, InvertedResidual)
                x = _block(module, x, block, normalise)
        rate = spec.head.dropout if training else 0.0
        return _head(self.largest.head, x, spec.head, normalise, lambda y: dropout(y, rate, generator) if rate else y)

    def _by_stats(self, stats: NormStats) -> Normalise:
        def normalise(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
            name, channels = self._norm_names[layer], x.shape[1]
            weight, bias = crop(layer.weight, channels), crop(layer.bias, channels)
            return F.batch_norm(x, stats.mean[name], stats.var[name], weight, bias, False, 0.0, layer.eps)

        return normalise


def _by_batch(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    channels = x.shape[1]
    return F.batch_norm(
        x, None, None, crop(layer.weight, channels), crop(layer.bias, channels), training=True, eps=layer.eps
    )


class _Pool:
    """Normalises by the batch and keeps the sums from which pooled statistics follow."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        self._names = names
        self._weight: dict[str, int] = {}
        self._sum: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}

    def __call__(self, layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
        channels, values = x.shape[1], x.numel() // x.shape[1]
        if values < 2:
            raise UserError("calibration: a batch of one image leaves one value per channel; give two images or more")
        # Running buffers with momentum 1 receive the batch's own statistics at no extra pass over the data.
        mean, var = x.new_zeros(channels), x.new_zeros(channels)
        weight, bias = crop(layer.weight, channels), crop(layer.bias, channels)
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=layer.eps)
        mean, var = mean.double(), var.double() * ((values - 1) / values)  # torch reports the unbiased variance
        name = self._names[layer]
        self._weight[name] = self._weight.get(name, 0) + values
        self._sum[name] = self._sum.get(name, 0.0) + values * mean
        self._square[name] = self._square.get(name, 0.0) + values * (var + mean * mean)
        return y

    def stats(self) -> NormStats:
        """Pooled over everything seen."""
        if not self._weight:
            raise UserError("calibration: no images given")
        mean = {name: total / self._weight[name] for name, total in self._sum.items()}
        var = {name: (self._square[name] / self._weight[name] - mean[name] ** 2).clamp_min(0.0) for name in mean}
        return NormStats({k: v.float() for k, v in mean.items()}, {k: v.float() for k, v in var.items()})


def _conv_norm(
    layer: ConvNorm,
    x: Tensor,
    cout: int,
    kernel: int,
    stride: int,
    depthwise: bool,
    activation: str,
    normalise: Normalise,
) -> Tensor:
    cin = x.shape[1]
    weight = crop(layer.conv.weight, cout, 1 if depthwise else cin, kernel, kernel)
    x = F.conv2d(x, weight, None, stride, kernel // 2, 1, cin if depthwise else 1)
    return ACTIVATIONS[activation](normalise(layer.norm, x))


def _block(module: InvertedResidual, x: Tensor, spec: BlockSpec, normalise: Normalise) -> Tensor:
    y = x
    if module.expand is not None:
        y = _conv_norm(module.expand, y, spec.hidden, 1, 1, False, spec.activation, normalise)
    y = _conv_norm(module.depthwise, y, spec.hidden, spec.kernel, spec.stride, True, spec.activation, normalise)
    if module.se is not None:
        y = y * _gates(module.se, y, spec.squeeze)
    y = _conv_norm(module.project, y, spec.cout, 1, 1, False, "", normalise)
    return y + x if spec.residual else y


def _gates(se: SqueezeExcite, x: Tensor, squeeze: int) -> Tensor:
    """Squeeze-and-excitation gates `(batch, channels, 1, 1)` with `squeeze` inner channels.

    The convolutions see single pixels; as matrix products they take a third of the time.
    """
    channels = x.shape[1]
    y = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    reduce, expand = crop(se.reduce.weight, squeeze, channels, 1, 1), crop(se.expand.weight, channels, squeeze, 1, 1)
    y = torch.relu(F.linear(y, reduce.flatten(1), _bias(se.reduce, squeeze)))
    return F.hardsigmoid(F.linear(y, expand.flatten(1), _bias(se.expand, channels)))[..., None, None]


def _bias(layer: nn.Conv2d | nn.Linear, channels: int) -> Tensor | None:
    return None if layer.bias is None else crop(layer.bias, channels)


def _head(module: Head, x: Tensor, spec: HeadSpec, normalise: Normalise, drop: Callable[[Tensor], Tensor]) -> Tensor:
    x = _conv_norm(module.final, x, spec.final, 1, 1, False, "hard_swish", normalise)
    x = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    weight = crop(module.features.weight, spec.features, spec.final)
    x = F.hardswish(F.linear(x, weight, _bias(module.features, spec.features)))
    return F.linear(drop(x), crop(module.classifier.weight, spec.classes, spec.features), module.classifier.bias)
