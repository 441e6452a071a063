"""The weight-sharing network of a MobileNetV3 space."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.base import Archs
from search_spaces.mobilenet_v3_network import ConvNorm, Head, InvertedResidual, MobileNetV3, SqueezeExcite
from search_spaces.mobilenet_v3_spec import BlockSpec, HeadSpec
from search_spaces.shared_layers import Drop, Normalise, WeightSharingSupernet, bias, conv2d, crop, linear, stateless
from search_spaces.supernet import resize

if TYPE_CHECKING:
    from search_spaces.mobilenet_v3 import MobileNetV3Space

# Of what a normalisation has just made, and nobody else reads: overwritten, unless the gradient will ask for it.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "relu": torch.relu_,
    "hard_swish": lambda x: F.hardswish(x, inplace=not x.requires_grad),
}


def shared_weights(space: MobileNetV3Space) -> MobileNetV3:
    """The largest network of a space, freshly initialised; its normalisation layers keep no running statistics."""
    return stateless(space.build((space.cardinalities - 1).astype(space.dtype)))


class KernelTransforms(nn.Module):
    """Makes a layer's smaller kernels from its largest: once-for-all's kernel transformation matrices (section 3.2).

    From one size to the next smaller, the centre of every channel's kernel, seen as a vector, is multiplied by a matrix
    that all channels of the layer share. The matrices begin as identities, where kernels are plain centres.

    Args:
        kernels: the sizes, ascending.
    """

    def __init__(self, kernels: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(reversed(kernels))
        for large, small in pairwise(self.sizes):
            self.register_parameter(f"{large}to{small}", nn.Parameter(torch.eye(small**2)))

    def forward(self, weight: Tensor, channels: int, kernel: int) -> Tensor:
        """The weight `(channels, 1, kernel, kernel)` from the shared one."""
        weight = crop(weight, channels, 1, *weight.shape[2:])
        for large, small in pairwise(self.sizes):
            if large <= kernel:
                break
            centre = crop(weight, channels, 1, small, small).flatten(1)
            weight = F.linear(centre, self.get_parameter(f"{large}to{small}")).view(channels, 1, small, small)
        return weight


class SuperMobileNetV3(WeightSharingSupernet):
    """Every network of a `MobileNetV3Space` in the weights of its largest.

    A subnet uses leading channels, kernel centres and each stage's leading blocks. Where the space has
    `kernel_transform`, smaller kernels are learned transforms of the centres, held in `transforms`.
    """

    space: MobileNetV3Space
    largest: MobileNetV3

    def __init__(self, space: MobileNetV3Space) -> None:
        super().__init__(space, shared_weights(space))
        self.transforms = nn.ModuleDict()
        if space.table.kernel_transform:
            for s, stage in enumerate(space.table.stages):
                for b in range(stage.depths[-1] if len(stage.kernels) > 1 else 0):
                    self.transforms[f"{s}_{b}"] = KernelTransforms(stage.kernels)

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        spec = self.space.spec(arch)
        x = resize(x, spec.resolution).contiguous(memory_format=torch.channels_last)
        x = _conv_norm(self.largest.stem, x, spec.stem, "hard_swish", normalise)
        for s, (stage, blocks) in enumerate(zip(self.largest.stages, spec.stages, strict=True)):
            for b, (module, block) in enumerate(zip(stage.children(), blocks, strict=False)):
                assert isinstance(module, InvertedResidual)
                x = _block(module, x, block, normalise, self._depthwise(module, s, b, block.hidden, block.kernel))
        return _head(self.largest.head, x, spec.head, normalise, drop)

    def shared_part(self, name: str, shape: tuple[int, ...], arch: Archs) -> Tensor:
        place = re.fullmatch(r"stages\.(\d+)\.(\d+)\.depthwise\.conv\.weight", name)
        if place is None:
            return super().shared_part(name, shape, arch)
        s, b = map(int, place.groups())
        module = self.largest.get_submodule(f"stages.{s}.{b}")
        assert isinstance(module, InvertedResidual)
        return self._depthwise(module, s, b, shape[0], shape[-1])

    def _depthwise(self, module: InvertedResidual, s: int, b: int, channels: int, kernel: int) -> Tensor:
        """The depthwise weight of one block."""
        weight = module.depthwise.conv.weight
        if f"{s}_{b}" in self.transforms:
            return self.transforms[f"{s}_{b}"](weight, channels, kernel)
        return crop(weight, channels, 1, kernel, kernel)


def _conv_norm(
    layer: ConvNorm, x: Tensor, cout: int, activation: str, normalise: Normalise, weight: Tensor | None = None
) -> Tensor:
    kernel = None if weight is None else weight.shape[-1]
    return ACTIVATIONS[activation](normalise(layer.norm, conv2d(layer.conv, x, cout, kernel, weight=weight)))


def _block(module: InvertedResidual, x: Tensor, spec: BlockSpec, normalise: Normalise, depthwise: Tensor) -> Tensor:
    y = x
    if module.expand is not None:
        y = _conv_norm(module.expand, y, spec.hidden, spec.activation, normalise)
    y = _conv_norm(module.depthwise, y, spec.hidden, spec.activation, normalise, depthwise)
    if module.se is not None:
        y = y * gates(module.se, y, spec.squeeze)
    y = _conv_norm(module.project, y, spec.cout, "", normalise)
    return y + x if spec.residual else y


def gates(se: SqueezeExcite, x: Tensor, squeeze: int) -> Tensor:
    """Squeeze-and-excitation gates `(batch, channels, 1, 1)` with `squeeze` inner channels.

    The convolutions see single pixels; as matrix products they take a third of the time.
    """
    channels = x.shape[1]
    y = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    reduce, expand = crop(se.reduce.weight, squeeze, channels, 1, 1), crop(se.expand.weight, channels, squeeze, 1, 1)
    y = torch.relu(F.linear(y, reduce.flatten(1), bias(se.reduce, squeeze)))
    return se.gate(F.linear(y, expand.flatten(1), bias(se.expand, channels)))[..., None, None]


def _head(module: Head, x: Tensor, spec: HeadSpec, normalise: Normalise, drop: Drop) -> Tensor:
    x = _conv_norm(module.final, x, spec.final, "hard_swish", normalise)
    x = F.avg_pool2d(x, x.shape[-2:]).flatten(1)
    x = F.hardswish(linear(module.features, x, spec.features))
    return linear(module.classifier, drop(x, spec.dropout), spec.classes)
