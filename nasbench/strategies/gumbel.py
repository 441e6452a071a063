"""Gradient search with Gumbel-softmax path weights, soft and hard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nasbench.objectives import Objective
from nasbench.strategies.gradient import GradientSearch, Sample
from nasbench.strategies.path_costs import PathCosts, ProductCosts
from predictors.base import BoundPredictor


class GumbelSearch(GradientSearch):
    """Gumbel-softmax samples of all paths (Jang et al., ICLR 2017), ever sharper.

    The temperature falls from epoch to epoch, so that the mixture becomes a choice. All paths run. Epochs train the
    weights, then the logits. `FBNet` is this with the paper's loss; here costs are added as everywhere else.
    """

    default_temperature = (5.0, 0.5)
    alternate = "epoch"

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        return Sample([gumbel_softmax(vector, temperature, generator) for vector in logits])


class FBNet(GumbelSearch):
    """FBNet's search (Wu et al., CVPR 2019): Gumbel-softmax path weights, and latency as a factor of the loss.

    The loss is cross-entropy times alpha log(latency)^beta with alpha 0.2, and beta, here `cost_weight`, 0.6. Latency
    is that of the sampled path weights, by any predictor instead of the paper's table (one that is a sum over blocks is
    such a table). The temperature falls geometrically from 5 to what is left after the paper's 90 epochs, 5 exp(-0.045
    * 90). Costs with a limit, which the paper does not have, are added as in other methods.
    """

    default_temperature = (5.0, 0.087)
    default_cost_weight = 0.6

    def make_costs(self, costs: Mapping[str, BoundPredictor], objectives: Sequence[Objective]) -> PathCosts:
        return ProductCosts(costs, objectives, cost_weight=self.cost_weight, limit_weight=self.limit_weight)

    def cost_probabilities(self, logits: Sequence[Tensor], sample: Sample) -> list[Tensor]:
        return sample.weights


class GDAS(GradientSearch):
    """GDAS (Dong and Yang, CVPR 2019): one path a step, drawn by the Gumbel-max trick; gradients go straight through.

    Forward, the weights are one-hot; backward, they are the Gumbel-softmax that they come from, in which the path that
    ran has a gradient. The temperature falls linearly from 10 to 0.1, as in the paper. One path per knob runs.
    """

    default_temperature = (10.0, 0.1)
    linear_temperature = True

    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        soft = [gumbel_softmax(vector, temperature, generator) for vector in logits]
        # The bracket is zero to the bit: a path that was not drawn has weight zero, and is not run.
        return Sample([F.one_hot(s.argmax(), len(s)).to(s.dtype) + (s - s.detach()) for s in soft])


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A differentiable sample `(choices,)` of near-one-hot weights (Jang et al., ICLR 2017, eq. 2)."""
    noise = -torch.empty_like(logits).exponential_(generator=generator).log()
    return F.softmax((logits + noise) / temperature, dim=0)
