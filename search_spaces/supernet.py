"""The contract of weight-sharing networks: the architecture is an argument, normalisation statistics are a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.base import Archs, SearchSpace
from search_spaces.errors import UserError


def dropout(x: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Zeros a share `rate` of the values and scales up the rest, drawing from a generator of the caller's."""
    kept = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device) >= rate
    return x * kept / (1 - rate)


@dataclass(frozen=True)
class NormStats:
    """Mean and variance of every normalisation layer of one subnet, by layer name; each a float32 vector.

    They belong to one architecture and one state of the weights, and are passed along, never stored in the supernet.
    """

    mean: dict[str, Tensor]
    var: dict[str, Tensor]


def resize(images: Tensor, resolution: int) -> Tensor:
    """Images `(batch, channels, height, width)` at `resolution` pixels, bilinear; unchanged where they fit already."""
    return fit(images, (images.shape[1], resolution, resolution))


def fit(images: Tensor, shape: Sequence[int]) -> Tensor:
    """Images `(batch, channels, height, width)` at the size of `(channels, height, width)`, bilinear.

    Unchanged where they fit already. Windows of signals, of height 1, are resampled along their length.
    """
    size = tuple(shape[1:])
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", align_corners=False)


class Supernet(nn.Module, ABC):
    """One network that contains every architecture of a space.

    Called as `supernet(x, arch)` it normalises with the batch's own statistics (training); as
    `supernet(x, arch, stats)` with the given ones (evaluation). The result depends on the arguments and the weights
    alone: nothing of a call remains, and normalisation layers keep no running statistics.
    """

    @abstractmethod
    def forward(
        self, x: Tensor, arch: Archs, stats: NormStats | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Logits `(batch, classes)` of architecture `(K,)` for images `(batch, channels, height, width)`.

        The images are resized to the architecture's resolution where the space has one. In training mode and without
        `stats`, what dropout draws comes from `generator`, or from torch's default one.
        """

    @abstractmethod
    def calibrate(self, arch: Archs, batches: Iterable[Tensor]) -> NormStats:
        """Statistics of architecture `(K,)` over batches of images, pooled over all of them (see `calibrate`)."""

    @abstractmethod
    def extract(self, arch: Archs, stats: NormStats) -> nn.Module:
        """A plain stand-alone module with copied weights whose `eval()` output equals `self(x, arch, stats)`."""


def calibrate(supernet: Supernet, arch: Archs, images: Tensor | Iterable[Tensor]) -> NormStats:
    """Normalisation statistics of one subnet over training images (one batch, or an iterable of batches).

    Each layer's mean and variance are pooled over all images, with every batch normalised by its own statistics on the
    way, as in once-for-all (Cai et al., ICLR 2020) and single-path one-shot (Guo et al., ECCV 2020).
    """
    with torch.no_grad():
        return supernet.calibrate(arch, [images] if isinstance(images, Tensor) else images)


class MixtureSupernet(nn.Module, ABC):
    """A network whose paths are weighted, for gradient search.

    `weights` holds one vector per knob, as long as the knob's choices. The weights belong to the search, not to the
    module. With one-hot weights the output equals that of the subnet. Where choices are paths apart, one of weight zero
    is not computed, and gets no gradient, so that time and memory are those of the paths that run.
    """

    @abstractmethod
    def forward(self, x: Tensor, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Tensor:
        """Logits `(batch, classes)`, differentiable in `x`, the parameters and `weights`; batch statistics.

        Args:
            weights: one vector per knob, each with the sum one.
            run: one boolean vector per knob: choices that are computed even at weight zero, for the sake of their
                weights' gradients.
        """


def check_weights(space: SearchSpace, weights: Sequence[Tensor]) -> None:
    """Raise a UserError unless there is one weight vector per knob, as long as its choices."""
    expected = [(len(knob.choices),) for knob in space.knobs]
    given = [tuple(weight.shape) for weight in weights]
    if given != expected:
        raise UserError(f"mixture supernet: one weight vector per knob is needed, shapes {expected}, got {given}")
