"""Evaluation by predictors: whole populations in a few matrix operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.objectives import Objective
from predictors.base import BoundPredictor
from search_spaces import UserError


class PredictedEvaluator(Evaluator):
    """Values from bound predictors, one per objective; its metrics are the objectives' names.

    The values are the predictors' means; the limits see an objective's quantile where it asks for one. A prediction
    that is not a number makes its row `UNSUPPORTED`.

    Args:
        objectives: in the order of the columns.
        bound: predictor per objective name.

    Raises:
        UserError: an objective without a predictor.
    """

    def __init__(self, objectives: Sequence[Objective], bound: Mapping[str, BoundPredictor]) -> None:
        missing = [o.name for o in objectives if o.name not in bound]
        if missing:
            raise UserError(f"objectives.{missing[0]}: there is no predictor for it; there are {', '.join(bound)}")
        self.objectives = tuple(objectives)
        self.bound = dict(bound)
        self.metrics = tuple(o.name for o in objectives)

    def evaluate(self, proposals: Proposals) -> Evaluation:
        values = np.empty((len(proposals), len(self.objectives)))
        quantiles = {}
        for column, objective in enumerate(self.objectives):
            estimate = self.bound[objective.name].predict(proposals.archs)
            values[:, column] = estimate.mean
            if objective.limited and objective.quantile is not None:
                quantiles[column] = estimate.quantile(objective.quantile)
        status = np.full(len(proposals), Status.OK, dtype=np.uint8)
        failed = np.isnan(values).any(axis=1)
        if failed.any():
            status[failed] = Status.UNSUPPORTED
            values[failed] = np.nan
        if not quantiles:
            return Evaluation(values, status)
        limited = values.copy()
        for column, quantile in quantiles.items():
            limited[:, column] = quantile
        return Evaluation(values, status, limited)
