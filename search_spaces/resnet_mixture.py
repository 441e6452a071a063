"""The network of all weighted paths of a ResNet space, for gradient search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from search_spaces.masked_mixture import MaskedMixture, mix
from search_spaces.resnet_network import Bottleneck
from search_spaces.shared_layers import stateless

if TYPE_CHECKING:
    from search_spaces.resnet import ResNetSpace


class MixtureResNet(MaskedMixture):
    """All networks of a `ResNetSpace` at once, under the supernet's names; see `MaskedMixture`.

    Every convolution meets all channels before it, so that masks follow each of them.
    """

    space: ResNetSpace

    def __init__(self, space: ResNetSpace) -> None:
        super().__init__(space, space.table.resolutions)
        self.largest = stateless(space.build((space.cardinalities - 1).astype(space.dtype)))
        widths, expansions = range(len(space.table.widths)), range(len(space.table.expansions))
        stems = [space.stem_spec({"stem.inner_width": w, "stem.width": w}) for w in widths]
        self.add_mask("inner", [[stem.inner] for stem in stems])
        self.add_mask("stem", [[stem.cout] for stem in stems])
        for s in range(len(space.table.stages)):
            choices = [[{f"stage{s}.width": w, f"stage{s}.block0.expansion": e} for e in expansions] for w in widths]
            specs = [[space.block_spec(s, 0, choice) for choice in row] for row in choices]
            self.add_mask(f"{s}_hidden", [[spec.hidden for spec in row] for row in specs])
            self.add_mask(f"{s}_out", [[row[0].cout] for row in specs])

    def at_resolution(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        stem, table = self.largest.stem, self.space.table
        inner = self.mask("inner", self.weight(weights, "stem.inner_width"))
        x = stem.first(x) * inner
        if stem.middle is not None:
            deep = stem.middle(x) * inner + x
            x = mix([x, deep][-len(table.stem_depths) :], self.weight(weights, "stem.depth"))
        x = stem.pool(stem.last(x) * self.mask("stem", self.weight(weights, "stem.width")))
        for s, (stage, blocks) in enumerate(zip(table.stages, self.largest.stages, strict=True)):
            outputs = []
            for b, block in enumerate(blocks.children()):
                assert isinstance(block, Bottleneck)
                x = self._block(block, x, s, self.weight(weights, f"stage{s}.block{b}.expansion"), weights)
                if b + 1 in stage.depths:
                    outputs.append(x)
            x = mix(outputs, self.weight(weights, f"stage{s}.depth"))
        return self.largest.head(x)

    def _block(self, block: Bottleneck, x: Tensor, s: int, expansion: Tensor, weights: Sequence[Tensor]) -> Tensor:
        width = self.weight(weights, f"stage{s}.width")
        hidden, out = self.mask(f"{s}_hidden", width, expansion), self.mask(f"{s}_out", width)
        y = block.expand(block.spatial(block.reduce(x) * hidden) * hidden) * out
        return torch.relu(y + (x if block.shortcut is None else block.shortcut(x) * out))
