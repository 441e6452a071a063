"""The problems of a comparison: a space, what gives its values, and what is known of the best."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.config import parse_config
from nasbench.costs import bound_cost
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.evaluators.table import TableEvaluator
from nasbench.execution.choice import own_code
from nasbench.objectives import Objective, given_as, minimised, violations
from nasbench.plan import Plan, make_plan
from search_spaces import SearchSpace, UserError, nearest

SECTIONS = ("space", "evaluator", "objectives", "targets", "task")


class JointEvaluator(Evaluator):
    """All objectives of a problem as one table of values: what an evaluator gives, and predicted costs beside it."""

    reads_task = False

    def __init__(
        self, objectives: tuple[Objective, ...], evaluator: Evaluator, predicted: PredictedEvaluator | None
    ) -> None:
        self.metrics = tuple(o.name for o in objectives)
        self.evaluator = evaluator
        self.predicted = predicted
        given = [given_as(o, evaluator.metrics) for o in objectives]
        self._own = [i for i, name in enumerate(given) if name is not None]
        self._sources = [evaluator.metrics.index(name) for name in given if name is not None]
        self._costs = [i for i, name in enumerate(given) if name is None]

    def evaluate(self, proposals: Proposals) -> Evaluation:
        result = self.evaluator.evaluate(proposals)
        values = np.full((len(proposals), len(self.metrics)), np.nan)
        values[:, self._own] = result.values[:, self._sources]
        status = result.status.copy()
        limits = values.copy()
        if self.predicted:
            costs = self.predicted.evaluate(proposals)
            values[:, self._costs] = costs.values
            limits[:, self._costs] = costs.values if costs.limit_values is None else costs.limit_values
            status = np.where(status == Status.OK, costs.status, status).astype(np.uint8)
            values[status != Status.OK] = np.nan
        return Evaluation(values, status, limits, result.seconds, result.messages)


@dataclass(frozen=True, eq=False)
class Problem:
    """A space and objectives to search, with an evaluator for all of them.

    Args:
        name: in the comparison.
        plan: of the experiment that it is, without a strategy.
        evaluator: gives every objective under its name.
    """

    name: str
    plan: Plan
    evaluator: JointEvaluator

    @property
    def space(self) -> SearchSpace:
        """The space to search."""
        return self.plan.space

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What is optimised."""
        return self.plan.objectives

    @cached_property
    def known(self) -> NDArray[np.float64] | None:
        """Minimised values `(n, M)` of all architectures that can be proposed; NaN where one breaks a limit.

        None where the values of only a part of them are known.
        """
        source = self.evaluator.evaluator
        if not isinstance(source, TableEvaluator) or not (source.table.complete or self.space.listed is not None):
            return None
        archs = source.table.archs[self.space.permits(source.table.archs)]
        result = self.evaluator.evaluate(Proposals(np.arange(len(archs)), archs))
        limited = result.values if result.limit_values is None else result.limit_values
        kept = (violations(limited, self.objectives) == 0).all(axis=1)
        return np.where(kept[:, None], minimised(result.values, self.objectives), np.nan)

    @cached_property
    def fingerprint(self) -> str:
        """What the results of a search depend on, as a hash: objectives, space, evaluator, a table's values,
        the task's data, and the code of what is the user's own."""
        config = self.plan.config
        digest = hashlib.sha256()
        sections = config.model_dump(include={"space", "objectives", "targets", "evaluator", "task"})
        sections["evaluator"].pop("path", None)  # the content counts, wherever it lies
        digest.update(repr(sorted(sections.items())).encode())
        digest.update(repr([(k.name, k.choices) for k in self.space.knobs]).encode())
        named = (config.task, config.space, config.evaluator, *config.evaluator.also)
        more = [self.plan.task.fingerprint, *(own_code(section.name) for section in named)]
        if any(more):
            digest.update(repr(more).encode())
        source = self.evaluator.evaluator
        if isinstance(source, TableEvaluator):
            digest.update(np.ascontiguousarray(source.table.archs).tobytes())
            digest.update(np.ascontiguousarray(source.table.values).tobytes())
        return digest.hexdigest()


def make_problem(name: str, sections: Mapping[str, Any], where: Path | None = None) -> Problem:
    """Build a problem from the sections of an experiment.

    Args:
        where: directory of the comparison's file; relative paths and the user's modules are looked for there too.

    Raises:
        UserError: what is wrong in the sections, or an evaluator that would have to train first.
    """
    try:
        return _make_problem(name, sections, where)
    except UserError as error:
        raise UserError(f"problems.{name}: {error}") from error


def _make_problem(name: str, sections: Mapping[str, Any], where: Path | None) -> Problem:
    for key in sections:
        if key not in SECTIONS:
            raise UserError(f"unknown section {key!r}. {nearest(key, SECTIONS)}")
    data = dict(sections)
    if isinstance(data.get("objectives"), list):
        data["objectives"] = {str(o): {} for o in data["objectives"]}
    if isinstance(data.get("space"), str):
        data["space"] = {"name": data["space"]}
    data["strategy"] = {"name": "random"}
    plan = make_plan(parse_config(data, "its sections"), where)
    if plan.needs_supernet:
        raise UserError(
            f"evaluator {plan.config.evaluator.name!r} needs a trained supernet, and a comparison repeats every search "
            "from many seeds: give a table, or a function of your own"
        )
    bound = {o.name: bound_cost(plan, o, {}, plan.config.targets.predictors) for o in plan.predicted}
    predicted = PredictedEvaluator(plan.predicted, bound) if bound else None
    return Problem(name, plan, JointEvaluator(plan.objectives, plan.make_evaluator(None, None), predicted))
