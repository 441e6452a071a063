"""The network of all weighted paths of an AutoFormer space, for gradient search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.autoformer_network import Attention, AutoFormer, Perceptron, layer_norm
from search_spaces.supernet import MixtureSupernet, check_weights, resize

if TYPE_CHECKING:
    from search_spaces.autoformer import AutoFormerSpace


class MixtureAutoFormer(MixtureSupernet):
    """All networks of an `AutoFormerSpace` at once, in the weights of the largest and under the supernet's names.

    Widths, heads and ratios are mixed by weighted masks over leading channels (as in FBNetV2, Wan et al., CVPR 2020),
    depths by the weighted sum of the layers' outputs. Layer normalisation depends on the width in its mean and variance
    too, so its results are mixed. Time and memory are those of the largest network, whatever the weights. Nothing is
    dropped at random.
    """

    def __init__(self, space: AutoFormerSpace) -> None:
        super().__init__()
        self.space = space
        self.largest: AutoFormer = space.build((space.cardinalities - 1).astype(space.dtype))
        table = space.table
        self._add_mask("width", table.widths)
        self._add_mask("heads", [heads * table.head_width for heads in table.heads])
        self._add_mask("hidden", [space.hidden(width, ratio) for width in table.widths for ratio in table.ratios])

    def forward(self, x: Tensor, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Tensor:
        check_weights(self.space, weights)
        width, depth, *layers = weights
        depths = self.space.table.depths
        channels = width @ self._mask("width")
        x = resize(x, self.space.table.resolution)
        x = self.largest.embedding(x, self.space.table.widths[-1]) * channels
        mixed = []
        for index, modules in enumerate(self.largest.layers):
            assert isinstance(modules, nn.ModuleDict)
            attention, mlp = modules["attention"], modules["mlp"]
            assert isinstance(attention, Attention)
            assert isinstance(mlp, Perceptron)
            heads, ratio = layers[2 * index : 2 * index + 2]
            y = attention.gather(self._norm(attention.norm, x, width), self.space.table.heads[-1])
            x = x + attention.project(y * (heads @ self._mask("heads"))) * channels
            y = F.gelu(mlp.widen(self._norm(mlp.norm, x, width)))
            x = x + mlp.project(y * (torch.outer(width, ratio).flatten() @ self._mask("hidden"))) * channels
            if index + 1 in depths:
                mixed.append(depth[depths.index(index + 1)] * x)
        head = self.largest.head
        return head.classify(self._norm(head.norm, torch.stack(mixed).sum(0), width))

    def _norm(self, layer: nn.LayerNorm, x: Tensor, width: Tensor) -> Tensor:
        full = x.shape[-1]
        parts = [
            F.pad(layer_norm(layer, x[:, :channels]), (0, full - channels)) * weight
            for channels, weight in zip(self.space.table.widths, width, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def _add_mask(self, name: str, counts: Sequence[int]) -> None:
        """Keep one row per choice that marks its leading channels."""
        mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
        self.register_buffer(f"_{name}", mask.float(), persistent=False)

    def _mask(self, name: str) -> Tensor:
        return self.get_buffer(f"_{name}")
