"""Zeros in weight matrices: unstructured, or N of every M along the input, which sparse tensor cores take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor, nn

from search_spaces.errors import UserError

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def prunable_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers by their layer's name; a weight that layers share counts once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in network.named_modules():
        if isinstance(module, LAYERS) and id(module.weight) not in seen:
            found[name] = module.weight.detach()
            seen.add(id(module.weight))
    return found


def magnitude_masks(weights: Mapping[str, Tensor], sparsity: float, *, everywhere: bool) -> dict[str, Tensor]:
    """Masks that keep the weights of largest magnitude (Han et al., NIPS 2015).

    Args:
        sparsity: share of zeros.
        everywhere: one threshold for all layers; else each layer has that share.
    """
    if everywhere:
        magnitudes = torch.cat([w.abs().flatten() for w in weights.values()])
        kept = _largest(magnitudes, sparsity)
        parts = torch.split(kept, [w.numel() for w in weights.values()])
        return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}
    return {name: _largest(w.abs().flatten(), sparsity).view_as(w) for name, w in weights.items()}


def _largest(magnitudes: Tensor, sparsity: float) -> Tensor:
    """Marks all but the share `sparsity` of smallest values."""
    mask = torch.ones_like(magnitudes, dtype=torch.bool)
    count = round(sparsity * magnitudes.numel())
    mask[torch.argsort(magnitudes, stable=True)[:count]] = False
    return mask


def n_of_m_masks(weights: Mapping[str, Tensor], n: int, m: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Masks that keep the `n` largest of every `m` weights along the input channels (Mishra et al. 2021; Zhou et al.,
    ICLR 2021), and the layers whose input channels are no multiple of `m`, with the reason."""
    masks, without = {}, {}
    for name, weight in weights.items():
        channels = weight.shape[1]
        if channels % m:
            without[name] = f"its {channels} input channels per group are no multiple of {m}"
            continue
        grouped = weight.abs().movedim(1, -1).reshape(-1, m)
        order = torch.argsort(grouped, dim=1, descending=True, stable=True)
        mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order[:, :n], True)
        shape = weight.movedim(1, -1).shape
        masks[name] = mask.view(shape).movedim(-1, 1).contiguous()
    return masks, without


class _Masked(nn.Module):
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@contextmanager
def held(network: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Zeros of the masks, which training inside does not fill; afterwards they are plain zeros in plain weights."""
    for name, mask in masks.items():
        module = network.get_submodule(name)
        parametrize.register_parametrization(module, "weight", _Masked(mask.to(module.weight.dtype)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in masks:
            parametrize.remove_parametrizations(network.get_submodule(name), "weight")


def sparsity_of(network: nn.Module) -> float:
    """Share of zeros among the weights of convolutions and linear layers."""
    weights = prunable_weights(network).values()
    total = sum(w.numel() for w in weights)
    return sum(int((w == 0).sum()) for w in weights) / total if total else 0.0


def check_n_of_m(pattern: str) -> tuple[int, int]:
    """`"2:4"` as numbers.

    Raises:
        UserError: it is no pattern, or keeps nothing or everything.
    """
    n, colon, m = pattern.partition(":")
    if not colon or not (n.isdigit() and m.isdigit()) or not 0 < int(n) < int(m):
        raise UserError(f"pattern = {pattern!r}: expected N:M with 0 < N < M, such as '2:4'")
    return int(n), int(m)
