"""How costs enter the loss of path weights: beside the task's loss, as its factor, or by learned multipliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nasbench.objectives import Objective
from predictors.base import BoundPredictor

_FBNET_ALPHA = 0.2  # Wu et al., CVPR 2019, section 4.1
# Units in which logarithms are well above zero, as their power needs.
_THOUSANDTHS = ("latency_ms", "energy_mj")


class PathCosts(nn.Module):
    """The loss of path weights from the task's loss and the costs that predictors expect.

    Where an objective has a limit, `limit_weight` times the relative excess is added, else `cost_weight` times the
    logarithm, which is the same in any unit. A limit's quantile counts when proposals are ordered; here it is the mean.
    What a subclass learns is a buffer, and so a part of checkpoints.

    Args:
        costs: bound predictor per objective name.
        objectives: of these predictors; others are ignored.
    """

    def __init__(
        self,
        costs: Mapping[str, BoundPredictor],
        objectives: Sequence[Objective],
        *,
        cost_weight: float,
        limit_weight: float,
    ) -> None:
        super().__init__()
        self.costs = dict(costs)
        self.objectives = [o for o in objectives if o.name in costs]
        self.cost_weight, self.limit_weight = cost_weight, limit_weight

    def expected(self, probabilities: Sequence[Tensor]) -> dict[str, Tensor]:
        """Expected cost, a scalar, by objective name, under independent choices."""
        return {o.name: self.costs[o.name].expected(probabilities) for o in self.objectives}

    def forward(self, task_loss: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
        for objective in self.objectives:
            if objective.limit is None:
                task_loss = task_loss + self._logarithm(objective, expected)
        return task_loss + self._excess(expected)

    def _logarithm(self, objective: Objective, expected: Mapping[str, Tensor]) -> Tensor:
        weight = -self.cost_weight if objective.maximise else self.cost_weight
        return weight * expected[objective.name].clamp_min(1e-12).log()

    def _excess(self, expected: Mapping[str, Tensor]) -> Tensor:
        """`limit_weight` times what all limits are broken by."""
        total = torch.zeros(())
        for objective in self.objectives:
            for _, side in objective.sides:
                total = total + self.limit_weight * relative_excess(side, expected[objective.name]).clamp_min(0.0)
        return total

    def stepped(self, expected: Mapping[str, Tensor]) -> None:
        """Called after every step of the logits with the costs before it."""


class ProductCosts(PathCosts):
    """FBNet's loss: the task's, times 0.2 log(cost)^`cost_weight` for each cost without a limit.

    Latency is taken in microseconds and energy in microjoules, for the logarithm's sake.
    """

    def forward(self, task_loss: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
        for objective in (o for o in self.objectives if o.limit is None):
            scale = 1000.0 if objective.metric in _THOUSANDTHS else 1.0
            # Kept above e, where the power of the logarithm has a finite slope.
            logarithm = (scale * expected[objective.name]).clamp_min(math.e).log()
            exponent = -self.cost_weight if objective.maximise else self.cost_weight
            task_loss = task_loss * _FBNET_ALPHA * logarithm**exponent
        return task_loss + self._excess(expected)


class LearnedMultipliers(PathCosts):
    """LightNAS's loss: the task's, plus a multiplier times (cost / target - 1), ascended where the logits descend.

    The multiplier of a cost to be landed on takes either sign, so that it drives costs up to the target as well as
    down (Luo et al., 2022); that of a limit stays at zero or above. Simultaneous steps of both sides run in
    circles around the solution; a quadratic term damps them (Platt and Barr, NIPS 1987), which the paper does not have.

    Args:
        targets: by objective name: costs to land on.
        multiplier_lr: of the ascent.
        damping: of the quadratic term.
    """

    multipliers: Tensor

    def __init__(
        self, costs: Mapping[str, BoundPredictor], objectives: Sequence[Objective], *,
        cost_weight: float, limit_weight: float, targets: Mapping[str, float], multiplier_lr: float, damping: float,
    ) -> None:  # fmt: skip
        super().__init__(costs, objectives, cost_weight=cost_weight, limit_weight=limit_weight)
        self.targets, self.multiplier_lr, self.damping = dict(targets), multiplier_lr, damping
        # Name, and the limit, or None for the target; a cost to land on has no limits beside.
        self._terms: list[tuple[str, Objective | None]] = []
        for objective in self.objectives:
            sides = [None] if objective.name in self.targets else [side for _, side in objective.sides]
            self._terms += [(objective.name, side) for side in sides]
        self.register_buffer("multipliers", torch.zeros(len(self._terms)))

    def _gap(self, name: str, limit: Objective | None, expected: Mapping[str, Tensor]) -> Tensor:
        """Relative distance to the target, or to the limit; above zero where the cost is too high."""
        return expected[name] / self.targets[name] - 1.0 if limit is None else relative_excess(limit, expected[name])

    def forward(self, task_loss: Tensor, expected: Mapping[str, Tensor]) -> Tensor:
        for (name, limit), multiplier in zip(self._terms, self.multipliers, strict=True):
            gap = self._gap(name, limit, expected)
            pressing = gap if limit is None else gap.clamp_min(0.0)
            task_loss = task_loss + multiplier * gap + self.damping / 2 * pressing**2
        for objective in self.objectives:
            if objective.limit is None and objective.name not in self.targets:
                task_loss = task_loss + self._logarithm(objective, expected)
        return task_loss

    @torch.no_grad()
    def stepped(self, expected: Mapping[str, Tensor]) -> None:
        for i, (name, limit) in enumerate(self._terms):
            self.multipliers[i] += self.multiplier_lr * self._gap(name, limit, expected)
            if limit is not None:
                self.multipliers[i].clamp_(min=0.0)


def relative_excess(limit: Objective, value: Tensor) -> Tensor:
    """What a value is beyond an objective's limit, relative to it; below zero where the limit is kept."""
    assert limit.limit is not None
    sign = -1.0 if limit.maximise else 1.0
    return sign * (value - limit.limit) / max(abs(limit.limit), 1e-12)
