"""Gradient search with the weighted sum of all paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nasbench.strategies.gradient import GradientSearch, Sample


class DARTS(GradientSearch):
    """DARTS (Liu et al., ICLR 2019), first order: every knob is the softmax-weighted sum of its choices. All paths run.

    Nothing is drawn. A temperature that falls below one sharpens the sum towards a choice.
    """

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        return Sample([F.softmax(vector / temperature, dim=0) for vector in logits])
