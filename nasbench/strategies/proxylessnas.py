"""Gradient search with binary gates: one path trains, two compete."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nasbench.strategies.gradient import GradientSearch, Sample


class ProxylessNAS(GradientSearch):
    """ProxylessNAS (Cai et al., ICLR 2019): paths are switched by binary gates, of which one per knob is open.

    A step of the weights runs one path, drawn by its probability. A step of the logits draws two paths per knob, opens
    one of them by their relative probability and computes both: the loss's gradient by the gates, which needs what both
    paths give, stands for that by the pair's probabilities (section 3.2.1, eq. 4). Afterwards the pair's logits are
    shifted, so that the step changes the balance within it, and not that with the paths that were not drawn.

    The latency in the loss is the expected one, as in the paper's section 3.3, by its logarithm, so that one weight
    does in any unit.

    Knobs that several layers see (widths, resolutions, depths) double what a step of the logits computes, each.
    """

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        weights, run = [], []
        for vector in logits:
            pair = _draw(vector, temperature, 2, generator)
            share = F.softmax(vector[pair] / temperature, dim=0)
            open_gate = torch.multinomial(share.detach(), 1, generator=generator)
            gates = F.one_hot(open_gate[0], len(pair)).to(share.dtype) + (share - share.detach())
            weights.append(torch.zeros_like(vector).index_put((pair,), gates))
            run.append(torch.zeros_like(vector, dtype=torch.bool).index_fill(0, pair, True))
        return Sample(weights, run)

    def sample_for_weights(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        return Sample([F.one_hot(_draw(v, temperature, 1, generator)[0], len(v)).to(v.dtype) for v in logits])

    def stepped(self, logits: Sequence[Tensor], before: Sequence[Tensor], sample: Sample) -> None:
        for vector, old, pair in zip(logits, before, sample.run or (), strict=True):
            vector[pair] -= vector[pair].logsumexp(0) - old[pair].logsumexp(0)


def _draw(logits: Tensor, temperature: float, count: int, generator: torch.Generator) -> Tensor:
    """Distinct choices, each by its probability; fewer where fewer have a chance."""
    probabilities = F.softmax(logits.detach() / temperature, dim=0)
    count = min(count, int((probabilities > 0).sum()))
    return torch.multinomial(probabilities, count, generator=generator)
