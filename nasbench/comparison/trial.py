"""One search of one strategy on one problem from one seed, counted in distinct evaluations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.objectives import Objective, minimised, violations
from nasbench.search import check_fidelity, objective_columns
from nasbench.strategies.base import Strategy
from search_spaces.base import Archs
from search_spaces.rows import row_keys

# Batches in a row without anything new after which a search has nothing more to find.
PATIENCE = 100


@dataclass(frozen=True, eq=False)
class Trial:
    """What a search evaluated, in order; every architecture once.

    Args:
        archs: `(n, K)` canonical.
        values: `(n, M)` minimised; NaN where the evaluation failed.
        feasible: `(n,)` whether all limits are kept.
        seconds: `(n,)` after how many it was known: processor time of the strategy, and what evaluations cost.
        strategy_seconds: processor time of the strategy alone, in all.
        asked: proposals, repeats included.
    """

    archs: Archs
    values: NDArray[np.float64]
    feasible: NDArray[np.bool_]
    seconds: NDArray[np.float64]
    strategy_seconds: float
    asked: int

    @property
    def found(self) -> NDArray[np.float64]:
        """`(n, M)`: the values, NaN where a row failed or breaks a limit."""
        return np.where(self.feasible[:, None], self.values, np.nan)


def run_trial(
    strategy: Strategy, evaluator: Evaluator, objectives: Sequence[Objective], *, evaluations: int, batch: int = 1
) -> Trial:
    """Search until `evaluations` distinct architectures are evaluated.

    What was evaluated before is told from memory and costs nothing; rows beyond the budget are not evaluated. The
    search ends early where the strategy has no more to propose, or proposes nothing new `PATIENCE` times in a row.

    Args:
        batch: proposals per ask.
    """
    objectives = tuple(objectives)
    columns = objective_columns(evaluator, objectives)
    space = strategy.space
    known: dict[int, int] = {}
    archs: Archs = np.empty((evaluations, len(space.knobs)), dtype=space.dtype)
    values = np.full((evaluations, len(objectives)), np.nan)
    limits = np.full((evaluations, sum(len(o.sides) for o in objectives)), np.inf)
    status = np.zeros(evaluations, dtype=np.uint8)
    seconds = np.zeros(evaluations)
    count = asked = idle = 0
    own = spent = 0.0
    while count < evaluations and idle < PATIENCE:
        start = time.process_time()
        proposals = strategy.ask(batch)
        own += time.process_time() - start
        if not len(proposals):
            break
        check_fidelity(evaluator, proposals)
        asked += len(proposals)
        keys = row_keys(space.canonical(proposals.archs)).tolist()
        new: dict[int, int] = {}  # first row of each unknown architecture
        for row, key in enumerate(keys):
            if key not in known:
                new.setdefault(key, row)
        fresh = np.fromiter(new.values(), np.intp, len(new))[: evaluations - count]
        idle = 0 if len(fresh) else idle + 1
        if len(fresh):
            start = time.process_time()
            result = evaluator.evaluate(Proposals(proposals.ids[fresh], proposals.archs[fresh]))
            took = time.process_time() - start
            rows = np.arange(count, count + len(fresh))
            archs[rows], status[rows] = space.canonical(proposals.archs[fresh]), result.status
            values[rows] = minimised(result.values[:, columns], objectives)
            limits[rows] = _broken(result, columns, objectives)
            spent += took if result.seconds is None else 0.0
            cost = np.zeros(len(fresh)) if result.seconds is None else np.nan_to_num(result.seconds)
            seconds[rows] = own + spent + np.cumsum(cost)
            spent += float(cost.sum())
            known.update(zip((keys[r] for r in fresh.tolist()), rows.tolist(), strict=True))
            count += len(fresh)
        if len(fresh) < len(new) or count == evaluations:
            break
        told = np.array([known[key] for key in keys])
        start = time.process_time()
        strategy.tell(proposals, values[told], limits[told], status[told])
        own += time.process_time() - start
    feasible = (status[:count] == Status.OK) & (limits[:count] == 0).all(axis=1)
    return Trial(archs[:count], values[:count], feasible, seconds[:count], own, asked)


def _broken(result: Evaluation, columns: Sequence[int], objectives: tuple[Objective, ...]) -> NDArray[np.float64]:
    limited = result.values if result.limit_values is None else result.limit_values
    return violations(limited[:, columns], objectives)
