"""One gradient search that lands on a given cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from nasbench.objectives import Objective
from nasbench.strategies.gradient import GradientOptions, check_numbers
from nasbench.strategies.gumbel import GDAS
from nasbench.strategies.path_costs import LearnedMultipliers, PathCosts
from predictors.base import BoundPredictor
from search_spaces import SearchSpace, UserError, nearest


class LightNAS(GDAS):
    """LightNAS (Luo et al., 2022): "you only search once", and the network found has the latency that was asked for.

    The trade-off is not a number to be tried out, but a multiplier that is learned with the logits, in the other
    direction: loss = task + multiplier * (cost / target - 1), minimised by the logits and maximised by the multiplier,
    so that the cost is driven up to the target as well as down. One path runs, drawn as in GDAS,
    with a temperature that falls from 5. The cost is the expected one of any predictor, where the paper takes that of
    the path drawn by a perceptron: the aim is the same, the gradient has less noise.

    What the logits land on is an expectation; of the architectures near the most likely one, those that come nearest to
    the target within the limit are handed over first, the likeliest where they are within 0.5 %.

    Args:
        target: costs to land on, by objective name; by default the first limit on a cost. A cost with a limit never
            lands above it; other limits are kept as limits.
        multiplier_lr: learning rate of the multipliers.
        damping: of the circles that multiplier and cost run in; 0 for the paper's own loss.
    """

    default_temperature = (5.0, 0.1)
    linear_temperature = False

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        *,
        target: dict[str, float] | None = None,
        multiplier_lr: float = 0.02,
        damping: float = 10.0,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(space, seed, **options)
        check_numbers(multiplier_lr=multiplier_lr, damping=damping)
        self.target = dict(target or {})
        for name, value in self.target.items():
            if not 0 < value < math.inf:
                raise UserError(f"strategy.target: {name}: must be a finite number above 0, got {value}")
        self.multiplier_lr, self.damping = multiplier_lr, damping

    def check(self, objectives: Sequence[Objective]) -> None:
        costs = [o for o in objectives if o.metric != "accuracy"]
        for name, value in self.target.items():
            named = [o for o in costs if o.name == name]
            if not named:
                raise UserError(
                    f"strategy.target: {name!r} is no objective with a cost. {nearest(name, [o.name for o in costs])}"
                )
            for key, side in named[0].sides:
                assert side.limit is not None
                if value < side.limit if side.maximise else value > side.limit:
                    raise UserError(f"strategy.target: {name} = {value:g} breaks {key} = {side.limit:g} on it")
        if not self.targets(objectives):
            raise UserError(
                "strategy.name = 'lightnas' lands on a given cost, and none is given: set objectives.NAME.limit or "
                "strategy.target = {NAME = value}"
                + (f", such as for {costs[0].name}" if costs else ", with an objective beside accuracy")
                + ". Without a cost to land on: darts, gdas, gumbel, fbnet, proxylessnas"
            )

    def targets(self, objectives: Sequence[Objective]) -> dict[str, float]:
        limits = {o.name: o.limit for o in objectives if o.limit is not None and o.metric != "accuracy"}
        return self.target or dict(list(limits.items())[:1])

    def make_costs(self, costs: Mapping[str, BoundPredictor], objectives: Sequence[Objective]) -> PathCosts:
        targets = self.targets(objectives)
        if unknown := targets.keys() - costs.keys():
            raise UserError(
                f"strategy.name = 'lightnas' lands on a cost that a predictor gives, and none gives {min(unknown)}: "
                f"name one of {', '.join(costs)} in strategy.target"
            )
        return LearnedMultipliers(
            costs,
            objectives,
            cost_weight=self.cost_weight,
            limit_weight=self.limit_weight,
            targets=targets,
            multiplier_lr=self.multiplier_lr,
            damping=self.damping,
        )

    def settings(self) -> dict[str, Any]:
        own = {"target": self.target, "multiplier_lr": self.multiplier_lr, "damping": self.damping}
        return super().settings() | own
