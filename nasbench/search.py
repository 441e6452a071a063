"""The search loop for cheap evaluators: ask, evaluate, tell, archive, a whole population at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals
from nasbench.objectives import Objective, minimised, violations
from nasbench.pareto import ParetoArchive
from nasbench.strategies.base import Strategy
from search_spaces import UserError

OnBatch = Callable[[ParetoArchive, Proposals, Evaluation], None]


def search(
    strategy: Strategy,
    evaluator: Evaluator,
    objectives: Sequence[Objective],
    *,
    evaluations: int,
    batch: int,
    archive: ParetoArchive | None = None,
    on_batch: OnBatch | None = None,
) -> ParetoArchive:
    """Run `strategy` until `evaluations` rows have been evaluated, those counted by a given `archive` included.

    To continue a search, pass the restored strategy and archive. It ends early if the strategy has no more to propose.

    Args:
        evaluator: its `metrics` must hold each objective's name, or else its metric.
        evaluations: total number of rows, failed ones and repeats included.
        batch: rows per ask; the last batch may be smaller.
        on_batch: called after every batch with the archive, the proposals and their evaluation (columns in the
            evaluator's order), when the strategy and the archive can be saved.

    Returns:
        The archive; its values are minimised, one column per objective.

    Raises:
        UserError: an objective that the evaluator does not give.
    """
    objectives = tuple(objectives)
    columns = objective_columns(evaluator, objectives)
    archive = ParetoArchive(strategy.space, len(objectives)) if archive is None else archive
    while archive.evaluated < evaluations:
        proposals = strategy.ask(min(batch, evaluations - archive.evaluated))
        if not len(proposals):
            break
        evaluation = evaluator.evaluate(proposals)
        values = minimised(evaluation.values[:, columns], objectives)
        limited = evaluation.values if evaluation.limit_values is None else evaluation.limit_values
        broken = violations(limited[:, columns], objectives)
        strategy.tell(proposals, values, broken, evaluation.status)
        archive.update(proposals.archs, values, broken.sum(axis=1))
        if on_batch is not None:
            on_batch(archive, proposals, evaluation)
    return archive


def objective_columns(evaluator: Evaluator, objectives: Sequence[Objective]) -> list[int]:
    """Per objective, the column of the evaluator's values that holds it: by its name, else by its metric.

    Raises:
        UserError: an objective that the evaluator does not give.
    """
    columns = []
    for objective in objectives:
        name = objective.name if objective.name in evaluator.metrics else objective.metric
        if name not in evaluator.metrics:
            raise UserError(
                f"objectives.{objective.name}: the evaluator gives no {objective.metric!r}; "
                f"it gives {', '.join(evaluator.metrics)}"
            )
        columns.append(evaluator.metrics.index(name))
    return columns
