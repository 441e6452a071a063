"""The search loop for cheap evaluators: ask, evaluate, tell, archive, a whole population at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals
from nasbench.objectives import Objective, given_as, minimised, violations
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
        UserError: an objective that the evaluator does not give, or a fidelity that it does not know.
    """
    objectives = tuple(objectives)
    columns = objective_columns(evaluator, objectives)
    archive = ParetoArchive(strategy.space, len(objectives)) if archive is None else archive
    while archive.evaluated < evaluations:
        proposals = strategy.ask(min(batch, evaluations - archive.evaluated))
        if not len(proposals):
            break
        check_fidelity(evaluator, proposals)
        evaluation = evaluator.evaluate(proposals)
        values = minimised(evaluation.values[:, columns], objectives)
        limited = evaluation.values if evaluation.limit_values is None else evaluation.limit_values
        broken = violations(limited[:, columns], objectives)
        strategy.tell(proposals, values, broken, evaluation.status)
        archive.update(proposals.archs, values, broken.sum(axis=1), proposals.full)
        if on_batch is not None:
            on_batch(archive, proposals, evaluation)
    return archive


def check_fidelity(evaluator: Evaluator, proposals: Proposals) -> None:
    """Refuse proposals of a fidelity that the evaluator would ignore.

    Raises:
        UserError: names the fidelities that it knows.
    """
    known = evaluator.fidelities
    unknown = [name for name in proposals.fidelity if known is not None and name not in known]
    if unknown:
        raise UserError(
            f"strategy.fidelity = {unknown[0]!r}: the evaluator knows "
            + (f"only {', '.join(known)}" if known else "no fidelity, so choose another strategy")
        )


def objective_columns(evaluator: Evaluator, objectives: Sequence[Objective]) -> list[int]:
    """Per objective, the column of the evaluator's values that holds it: see `given_as`.

    Raises:
        UserError: an objective that the evaluator does not give.
    """
    columns = []
    for objective in objectives:
        name = given_as(objective, evaluator.metrics)
        if name is None:
            raise UserError(
                f"objectives.{objective.name}: the evaluator gives no {objective.metric!r}; "
                f"it gives {', '.join(evaluator.metrics)}"
            )
        columns.append(evaluator.metrics.index(name))
    return columns
