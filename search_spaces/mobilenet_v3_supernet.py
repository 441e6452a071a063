"""The weight-sharing network of a MobileNetV3 space."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.base import Archs
from search_spaces.mobilenet_v3_network import ConvNorm, Head, InvertedResidual, MobileNetV3, SqueezeExcite
from search_spaces.mobilenet_v3_spec import BlockSpec, HeadSpec
from search_spaces.shared_layers import Drop, Normalise, WeightSharingSupernet, bias, conv2d, crop, linear, stateless
from search_spaces.supernet import resize

if TYPE_CHECKING:
    from search_spaces.mobilenet_v3 import MobileNetV3Space

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"": lambda x: x, "relu": torch.relu, "hard_swish": F.hardswish}


def shared_weights(space: MobileNetV3Space) -> MobileNetV3:
    """The largest network of a space, freshly initialised; its normalisation layers keep no running statistics."""
    return stateless(space.build((space.cardinalities - 1).astype(space.dtype)))


class SuperMobileNetV3(WeightSharingSupernet):
    """Every network of a `MobileNetV3Space` in the weights of its largest.

    A subnet uses leading channels, kernel centres and each stage's leading blocks.
    """

    space: MobileNetV3Space
    largest: MobileNetV3

    def __init__(self, space: MobileNetV3Space) -> None:
        super().__init__(space, shared_weights(space))

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        spec = self.space.spec(arch)
        x = resize(x, spec.resolution).contiguous(memory_format=torch.channels_last)
        x = _conv_norm(self.largest.stem, x, spec.stem, "hard_swish", normalise)
        for stage, blocks in zip(self.largest.stages, spec.stages, strict=True):
            for module, block in zip(stage.children(), blocks, strict=False):
                assert isinstance(module, InvertedResidual)
                x = _block(module, x, block, normalise)
        return _head(self.largest.head, x, spec.head, normalise, drop)


def _conv_norm(
    layer: ConvNorm, x: Tensor, cout: int, activation: str, normalise: Normalise, kernel: int | None = None
) -> Tensor:
    return ACTIVATIONS[activation](normalise(layer.norm, conv2d(layer.conv, x, cout, kernel)))


def _block(module: InvertedResidual, x: Tensor, spec: BlockSpec, normalise: Normalise) -> Tensor:
    y = x
    if module.expand is not None:
        y = _conv_norm(module.expand, y, spec.hidden, spec.activation, normalise)
    y = _conv_norm(module.depthwise, y, spec.hidden, spec.activation, normalise, spec.kernel)
    if module.se is not None:
        y = y * _gates(module.se, y, spec.squeeze)
    y = _conv_norm(module.project, y, spec.cout, "", normalise)
    return y + x if spec.residual else y


def _gates(se: SqueezeExcite, x: Tensor, squeeze: int) -> Tensor:
    """Squeeze-and-excitation gates `(batch, channels, 1, 1)` with `squeeze` inner channels.

    The convolutions see single pixels; as matrix products they take a third of the time.
    """
    channels = x.shape[1]
    y = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    reduce, expand = crop(se.reduce.weight, squeeze, channels, 1, 1), crop(se.expand.weight, channels, squeeze, 1, 1)
    y = torch.relu(F.linear(y, reduce.flatten(1), bias(se.reduce, squeeze)))
    return F.hardsigmoid(F.linear(y, expand.flatten(1), bias(se.expand, channels)))[..., None, None]


def _head(module: Head, x: Tensor, spec: HeadSpec, normalise: Normalise, drop: Drop) -> Tensor:
    x = _conv_norm(module.final, x, spec.final, "hard_swish", normalise)
    x = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    x = F.hardswish(linear(module.features, x, spec.features))
    return linear(module.classifier, drop(x, spec.dropout), spec.classes)
