"""Gradient search with Gumbel-softmax path weights, soft and hard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nasbench.strategies.gradient import GradientSearch, Sample


class GumbelSearch(GradientSearch):
    """FBNet's search (Wu et al., CVPR 2019): Gumbel-softmax samples of all paths, ever sharper.

    The temperature falls from epoch to epoch, so that the mixture becomes a choice. All paths run.
    """

    default_temperature = (5.0, 0.5)

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        return Sample([gumbel_softmax(vector, temperature, generator) for vector in logits])


class GDAS(GradientSearch):
    """GDAS (Dong and Yang, CVPR 2019): one path a step, drawn by the Gumbel-max trick; gradients go straight through.

    Forward, the weights are one-hot; backward, they are the Gumbel-softmax that they come from (Jang et al., 2017), in
    which the path that ran has a gradient. One path per knob runs.
    """

    default_temperature = (10.0, 0.1)

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        soft = [gumbel_softmax(vector, temperature, generator) for vector in logits]
        # The bracket is zero to the bit: a path that was not drawn has weight zero, and is not run.
        return Sample([F.one_hot(s.argmax(), len(s)).to(s.dtype) + (s - s.detach()) for s in soft])


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A differentiable sample `(choices,)` of near-one-hot weights (Jang et al., ICLR 2017, eq. 2)."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return F.softmax((logits + noise) / temperature, dim=0)
