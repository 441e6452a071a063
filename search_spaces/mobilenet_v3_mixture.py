"""The network of all weighted paths of a MobileNetV3 space, for gradient search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.masked_mixture import MaskedMixture, mix
from search_spaces.mobilenet_v3_network import InvertedResidual
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.mobilenet_v3_supernet import shared_weights

if TYPE_CHECKING:
    from search_spaces.mobilenet_v3 import MobileNetV3Space


class MixtureMobileNetV3(MaskedMixture):
    """All networks of a `MobileNetV3Space` at once, under the supernet's names; see `MaskedMixture`.

    Kernels are mixed in the weight, since a convolution is linear in it.
    """

    space: MobileNetV3Space

    def __init__(self, space: MobileNetV3Space) -> None:
        super().__init__(space, space.table.resolutions)
        self.largest = shared_weights(space)
        table = space.table

        widths = [(s, b, stage) for s, stage in enumerate(table.stages) for b in range(stage.depths[-1])]
        self.add_mask("stem", [[make_divisible(table.stem_width * w)] for w in table.widths])
        for s, b, stage in widths:
            choices = range(max(len(stage.expansions), 1))
            specs = [[space.block_spec(s, b, w, 0, e) for e in choices] for w in table.widths]
            self.add_mask(f"{s}_{b}_hidden", [[spec.hidden for spec in row] for row in specs])
            self.add_mask(f"{s}_{b}_squeeze", [[spec.squeeze for spec in row] for row in specs])
            self.add_mask(f"{s}_{b}_out", [[row[0].cout] for row in specs])
            kernel = stage.kernels[-1]
            reach = (torch.arange(kernel) - kernel // 2).abs()
            square = torch.maximum(reach[:, None], reach)
            inside = torch.stack([square <= k // 2 for k in stage.kernels]).float()
            self.register_buffer(f"_{s}_{b}_kernel", inside, persistent=False)
        heads = [space.head_spec(w) for w in table.widths]
        self.add_mask("final", [[head.final] for head in heads])
        self.add_mask("features", [[head.features] for head in heads])

    def at_resolution(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        width = self.weight(weights, "width")
        x = self.largest.stem(x) * self.mask("stem", width)
        for s, (stage, blocks) in enumerate(zip(self.space.table.stages, self.largest.stages, strict=True)):
            outputs = []
            for b, block in enumerate(blocks.children()):
                assert isinstance(block, InvertedResidual)
                x = self._block(block, x, s, b, weights)
                if b + 1 in stage.depths:
                    outputs.append(x)
            x = mix(outputs, self.weight(weights, f"stage{s}.depth"))
        head = self.largest.head
        x = head.final(x) * self.mask("final", width)
        x = head.activation(head.features(head.pool(x).flatten(1)))
        x = x * self.mask("features", width).flatten()
        return head.classifier(head.dropout(x))

    def _block(self, block: InvertedResidual, x: Tensor, s: int, b: int, weights: Sequence[Tensor]) -> Tensor:
        width = self.weight(weights, "width")
        expansion = self.weight(weights, f"stage{s}.block{b}.expansion")
        kernel = self.weight(weights, f"stage{s}.block{b}.kernel")
        y = x if block.expand is None else block.expand(x)
        conv = block.depthwise.conv
        window = torch.einsum("k,kij->ij", kernel, self.get_buffer(f"_{s}_{b}_kernel"))
        y = F.conv2d(y, conv.weight * window, None, conv.stride, conv.padding, 1, conv.groups)
        # Channels do not meet before this point, so that one mask here is enough.
        y = block.depthwise.activation(block.depthwise.norm(y)) * self.mask(f"{s}_{b}_hidden", width, expansion)
        if block.se is not None:
            se = block.se
            inner = se.activation(se.reduce(se.pool(y))) * self.mask(f"{s}_{b}_squeeze", width, expansion)
            y = y * se.gate(se.expand(inner))
        y = block.project(y) * self.mask(f"{s}_{b}_out", width)
        return y + x if block.residual else y
