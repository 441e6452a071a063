"""What mixture supernets of elastic spaces share: one network, the largest, with its decisions mixed by masks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from search_spaces.base import SearchSpace
from search_spaces.errors import UserError
from search_spaces.supernet import MixtureSupernet, check_weights, resize


class MaskedMixture(MixtureSupernet):
    """All networks of a space at once in the weights of the largest, each decision mixed where that costs least.

    Widths by weighted masks over leading channels (as in FBNetV2, Wan et al., CVPR 2020), depths by the weighted sum of
    a stage's outputs, resolutions by the weighted sum of logits. Time and memory are those of the largest network, once
    per resolution. A resolution whose weight is zero is not computed, and so gets no gradient either, unless `run`
    marks it. A subclass writes `at_resolution`, and adds its masks when it is made.

    Args:
        space: whose knobs the weights are of.
        resolutions: choices of its knob `resolution`, or the only one.
    """

    def __init__(self, space: SearchSpace, resolutions: Sequence[int]) -> None:
        super().__init__()
        self.space = space
        self._resolutions = tuple(resolutions)
        self._knob = {knob.name: index for index, knob in enumerate(space.knobs)}
        self.register_buffer("_one", torch.ones(1), persistent=False)

    @abstractmethod
    def at_resolution(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Logits for images of one of the resolutions."""

    def forward(self, x: Tensor, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Tensor:
        check_weights(self.space, weights)
        shares = self.weight(weights, "resolution")
        asked = torch.zeros_like(shares, dtype=torch.bool) if run is None else self.weight(run, "resolution").bool()
        mixed = [
            weight * self.at_resolution(resize(x, resolution).contiguous(memory_format=torch.channels_last), weights)
            for weight, wanted, resolution in zip(shares, asked, self._resolutions, strict=True)
            if weight != 0 or wanted
        ]
        if not mixed:
            raise UserError("mixture supernet: all resolutions have weight zero")
        return torch.stack(mixed).sum(0)

    def weight(self, weights: Sequence[Tensor], name: str) -> Tensor:
        """The weights of a decision's choices; a single one where it is no knob."""
        index = self._knob.get(name)
        return self.get_buffer("_one") if index is None else weights[index]

    def add_mask(self, name: str, channels: Sequence[Sequence[int]]) -> None:
        """Keep masks of leading channels, for counts that depend on two decisions (rows, columns)."""
        counts = torch.tensor(channels)
        mask = torch.arange(int(counts.max())) < counts[..., None]
        self.register_buffer(f"_{name}", mask.float(), persistent=False)

    def mask(self, name: str, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """The mask `(channels, 1, 1)` by the weights of both decisions."""
        columns = self.get_buffer("_one") if columns is None else columns
        return torch.einsum("r,c,rcn->n", rows, columns, self.get_buffer(f"_{name}"))[:, None, None]


def mix(outputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    total = outputs[0] * weights[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + output * weight
    return total
