"""Gradient search with the weighted sum of all paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from nasbench.strategies.gradient import GradientOptions, GradientSearch, Sample
from search_spaces import SearchSpace, UserError


class DARTS(GradientSearch):
    """DARTS (Liu et al., ICLR 2019), first order: every knob is the softmax-weighted sum of its choices. All paths run.

    The sum is equation 2 of the paper, the two halves of the images equations 3 and 4. Steps take turns as in its
    algorithm 1: the logits first, by the gradient of the validation loss at the weights as they are (equation 6 with
    xi = 0), then the weights. Nothing is drawn, unless `drop_path` says so. A temperature that falls below one sharpens
    the sum towards a choice.

    Known to fail: identities help a sum of many paths to train, so that long searches end with skips everywhere (Zela
    et al., ICLR 2020; Wang et al., ICLR 2021). Remedies of the literature that are keys here: more `warmup_epochs`, so
    that convolutions are trained before they compete (P-DARTS and others); a higher `weight_decay`, 3e-4 to 8e-2, which
    keeps the validation loss flat (Zela et al.); and `drop_path`.

    Args:
        drop_path: chance of each choice to be left out of a step, the others' weights scaled up: paths learn on their
            own and get an equal chance to learn (DropNAS: Hong et al., IJCAI 2020; 3e-1 and less is usual).
    """

    def __init__(
        self, space: SearchSpace, seed: int = 0, *, drop_path: float = 0.0, **options: Unpack[GradientOptions]
    ) -> None:
        super().__init__(space, seed, **options)
        if not 0 <= drop_path < 1:
            raise UserError(f"strategy.drop_path: must be a chance of 0 or more, below 1, got {drop_path}")
        self.drop_path = drop_path

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        if self.drop_path:
            logits = [self._thinned(vector, generator) for vector in logits]
        return Sample([F.softmax(vector / temperature, dim=0) for vector in logits])

    def _thinned(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Without some of the choices, but never without all."""
        draws = torch.rand(logits.shape, generator=generator)
        draws[~torch.isfinite(logits.detach())] = -1.0
        kept = draws >= min(self.drop_path, float(draws.max()))
        return logits.masked_fill(~kept, -torch.inf)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"drop_path": self.drop_path}
