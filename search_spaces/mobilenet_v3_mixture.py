"""The network of all weighted paths of a MobileNetV3 space, for gradient search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces.errors import UserError
from search_spaces.mobilenet_v3_network import InvertedResidual
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.mobilenet_v3_supernet import shared_weights
from search_spaces.supernet import MixtureSupernet, check_weights, resize

if TYPE_CHECKING:
    from search_spaces.mobilenet_v3 import MobileNetV3Space


class MixtureMobileNetV3(MixtureSupernet):
    """All networks of a `MobileNetV3Space` at once, in the weights of the largest and under the supernet's names.

    Each decision is mixed where that costs least: kernels in the weight, since a convolution is linear in it,
    expansions and widths by weighted masks over leading channels (as in FBNetV2, Wan et al., CVPR 2020), depths by the
    weighted sum of a stage's outputs, resolutions by the weighted sum of logits. Time and memory are those of the
    largest network, once per resolution. A resolution whose weight is zero is not computed, and so gets no gradient
    either, unless `run` marks it.
    """

    def __init__(self, space: MobileNetV3Space) -> None:
        super().__init__()
        self.space = space
        self.largest = shared_weights(space)
        self._knob = {knob.name: index for index, knob in enumerate(space.knobs)}
        table = space.table

        widths = [(s, b, stage) for s, stage in enumerate(table.stages) for b in range(stage.depths[-1])]
        self._add_mask("stem", [[make_divisible(table.stem_width * w)] for w in table.widths])
        for s, b, stage in widths:
            choices = range(max(len(stage.expansions), 1))
            specs = [[space.block_spec(s, b, w, 0, e) for e in choices] for w in table.widths]
            self._add_mask(f"{s}_{b}_hidden", [[spec.hidden for spec in row] for row in specs])
            self._add_mask(f"{s}_{b}_squeeze", [[spec.squeeze for spec in row] for row in specs])
            self._add_mask(f"{s}_{b}_out", [[row[0].cout] for row in specs])
            kernel = stage.kernels[-1]
            reach = (torch.arange(kernel) - kernel // 2).abs()
            square = torch.maximum(reach[:, None], reach)
            inside = torch.stack([square <= k // 2 for k in stage.kernels]).float()
            self.register_buffer(f"_{s}_{b}_kernel", inside, persistent=False)
        heads = [space.head_spec(w) for w in table.widths]
        self._add_mask("final", [[head.final] for head in heads])
        self._add_mask("features", [[head.features] for head in heads])

    def forward(self, x: Tensor, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Tensor:
        check_weights(self.space, weights)
        shares = self._weight(weights, "resolution")
        asked = torch.zeros_like(shares, dtype=torch.bool) if run is None else self._weight(run, "resolution").bool()
        mixed = [
            weight * self._at_resolution(resize(x, resolution), weights)
            for weight, wanted, resolution in zip(shares, asked, self.space.table.resolutions, strict=True)
            if weight != 0 or wanted
        ]
        if not mixed:
            raise UserError("mixture supernet: all resolutions have weight zero")
        return torch.stack(mixed).sum(0)

    def _at_resolution(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        width, one = self._weight(weights, "width"), x.new_ones(1)
        x = self.largest.stem(x.contiguous(memory_format=torch.channels_last)) * self._mask("stem", width, one)
        for s, (stage, blocks) in enumerate(zip(self.space.table.stages, self.largest.stages, strict=True)):
            depth = self._weight(weights, f"stage{s}.depth")
            outputs = []
            for b, block in enumerate(blocks.children()):
                assert isinstance(block, InvertedResidual)
                x = self._block(block, x, s, b, weights)
                if b + 1 in stage.depths:
                    outputs.append(x)
            x = outputs[0] * depth[0]
            for weight, output in zip(depth[1:], outputs[1:], strict=True):
                x = x + output * weight
        head = self.largest.head
        x = head.final(x) * self._mask("final", width, one)
        x = head.activation(head.features(head.pool(x).flatten(1)))
        x = x * self._mask("features", width, one).flatten()
        return head.classifier(head.dropout(x))

    def _block(self, block: InvertedResidual, x: Tensor, s: int, b: int, weights: Sequence[Tensor]) -> Tensor:
        width = self._weight(weights, "width")
        expansion = self._weight(weights, f"stage{s}.block{b}.expansion")
        kernel = self._weight(weights, f"stage{s}.block{b}.kernel")
        y = x if block.expand is None else block.expand(x)
        conv = block.depthwise.conv
        window = torch.einsum("k,kij->ij", kernel, self.get_buffer(f"_{s}_{b}_kernel"))
        y = F.conv2d(y, conv.weight * window, None, conv.stride, conv.padding, 1, conv.groups)
        # Channels do not meet before this point, so that one mask here is enough.
        y = block.depthwise.activation(block.depthwise.norm(y)) * self._mask(f"{s}_{b}_hidden", width, expansion)
        if block.se is not None:
            se = block.se
            inner = se.activation(se.reduce(se.pool(y))) * self._mask(f"{s}_{b}_squeeze", width, expansion)
            y = y * se.gate(se.expand(inner))
        y = block.project(y) * self._mask(f"{s}_{b}_out", width, x.new_ones(1))
        return y + x if block.residual else y

    def _add_mask(self, name: str, channels: list[list[int]]) -> None:
        """Keep leading-channel masks `(widths, expansions, channels)` for the given channel counts."""
        counts = torch.tensor(channels)
        mask = torch.arange(int(counts.max())) < counts[..., None]
        self.register_buffer(f"_{name}", mask.float(), persistent=False)

    def _mask(self, name: str, width: Tensor, expansion: Tensor) -> Tensor:
        return torch.einsum("w,e,wec->c", width, expansion, self.get_buffer(f"_{name}"))[:, None, None]

    def _weight(self, weights: Sequence[Tensor], knob: str) -> Tensor:
        index = self._knob.get(knob)
        return self.get_buffer("_stem").new_ones(1) if index is None else weights[index]
