"""The search loop without barriers: every result is told at once, and every free worker gets a proposal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from nasbench.archive import arch_row
from nasbench.evaluators.base import Evaluation, Proposals
from nasbench.evaluators.recorded import RecordedEvaluator
from nasbench.objectives import minimised, violations
from nasbench.pareto import ParetoArchive
from nasbench.strategies.base import Strategy
from search_spaces import UserError
from search_spaces.base import Archs


def asynchronous_search(
    make_strategy: Callable[[Sequence[Archs]], Strategy],
    recorded: RecordedEvaluator,
    archive: ParetoArchive,
    *,
    evaluations: int,
    on_row: Callable[[], None] | None = None,
) -> None:
    """Search until `evaluations` rows have been evaluated, those of earlier processes included.

    What is proposed depends on which evaluation was first, so it cannot be replayed: a resumed run gives a new strategy
    what was recorded as its first proposals, tells it their results, and goes on from there.

    Args:
        make_strategy: a strategy that proposes the given architectures before all others.
        recorded: knows what its phase has in the archive of the run.
        archive: takes in all results.
        on_row: called after each result.

    Raises:
        UserError: a strategy that asks for reduced fidelities, whose rounds need a barrier.
    """
    earlier = recorded.archive.finished(recorded.phase)
    ids = np.array(sorted(earlier), dtype=np.int64)[:evaluations]
    strategy = make_strategy([arch_row(earlier[id][0]) for id in ids.tolist()])
    taken = int(ids[-1]) + 1 - len(ids) if len(ids) else 0  # numbers that the archive has, beyond the strategy's own

    def tell(asked: Proposals, evaluation: Evaluation) -> None:
        values = minimised(evaluation.values, recorded.objectives)
        limited = evaluation.values if evaluation.limit_values is None else evaluation.limit_values
        broken = violations(limited, recorded.objectives)
        strategy.tell(asked, values, broken, evaluation.status)
        archive.update(asked.archs, values, broken.sum(axis=1))
        if on_row is not None:
            on_row()

    def proposals() -> Iterator[Proposals]:
        for _ in range(evaluations - len(ids)):
            asked = strategy.ask(1)
            if not len(asked):
                return
            if asked.fidelity:
                raise UserError(
                    "execution.asynchronous: the strategy asks for reduced fidelities, whose rounds need a barrier; "
                    "leave it out, or choose another strategy"
                )
            yield replace(asked, ids=asked.ids + taken)

    if len(ids):
        asked = strategy.ask(len(ids))
        tell(asked, recorded.evaluate(replace(asked, ids=ids)))
    recorded.each(proposals(), lambda asked, result: tell(replace(asked, ids=asked.ids - taken), result))
