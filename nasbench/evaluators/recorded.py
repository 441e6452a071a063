"""The evaluator of a run with expensive evaluations: objectives joined, every row committed, none done twice."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from nasbench.archive import Archive, arch_text
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.objectives import Objective
from search_spaces import UserError


class RecordedEvaluator(Evaluator):
    """One column per objective, from an expensive evaluator or from predictors; each row is committed as it is done.

    Rows that the archive has are not evaluated again: those of this phase are found by their id, and those of earlier
    phases by their architecture, where both are of full fidelity.

    Args:
        objectives: in the order of the columns.
        evaluator: gives the metrics that it lists, row by row.
        predicted: gives the other objectives, under their names; None where there are no others.
        archive: of the run.
        phase: under which the rows are filed; proposal ids are unique within it.
        on_row: called after each row with how many of the batch are done.
    """

    expensive = True

    def __init__(
        self,
        objectives: tuple[Objective, ...],
        evaluator: Evaluator,
        predicted: PredictedEvaluator | None,
        archive: Archive,
        phase: str,
        on_row: Callable[[int], None] | None = None,
    ) -> None:
        self.metrics = tuple(o.name for o in objectives)
        self.evaluator = evaluator
        self.predicted = predicted
        self.archive = archive
        self.phase = phase
        self.on_row = on_row
        self.evaluated = 0
        evaluated = [(column, o.metric) for column, o in enumerate(objectives) if o.metric in evaluator.metrics]
        self._columns = [column for column, _ in evaluated]
        self._sources = [evaluator.metrics.index(metric) for _, metric in evaluated]
        self._by_id = archive.finished(phase)
        self._by_arch = archive.known()

    def evaluate(self, proposals: Proposals) -> Evaluation:
        """Values `(n, M)` of all proposals; a row fails where either part failed.

        Raises:
            UserError: the archive has another architecture under a proposal's id, so it is of another experiment.
        """
        n = len(proposals)
        values, status = np.full((n, len(self.metrics)), np.nan), np.zeros(n, dtype=np.uint8)
        limits, messages = values.copy(), {}
        if self.predicted:
            costs = self.predicted.evaluate(proposals)
            columns = [self.metrics.index(m) for m in self.predicted.metrics]
            values[:, columns] = costs.values
            limits[:, columns] = costs.values if costs.limit_values is None else costs.limit_values
            status = costs.status.copy()
        for row in range(n):
            if status[row] == Status.OK or int(proposals.ids[row]) in self._by_id:
                values[row, self._columns], status[row], message = self._row(proposals[row : row + 1], values[row])
                if message:
                    messages[row] = message
            if self.on_row:
                self.on_row(row + 1)
        limits[:, self._columns] = values[:, self._columns]
        values[status != Status.OK] = np.nan
        return Evaluation(values, status, limits, messages=messages)

    def _row(self, proposal: Proposals, costs: np.ndarray) -> tuple[list[float], int, str]:
        """The evaluated objectives of one proposal, its status and why it failed."""
        id, arch = int(proposal.ids[0]), arch_text(proposal.archs[0])
        names = [self.metrics[c] for c in self._columns]
        if id in self._by_id:
            known_arch, status, known = self._by_id[id]
            if known_arch != arch:
                raise UserError(
                    f"{self.archive.path}: {self.phase} {id} is architecture {known_arch!r}, but now {arch!r} was "
                    "proposed; the run was made with another configuration or version"
                )
            return [known[name] for name in names], status, ""
        start, message = time.perf_counter(), ""
        if not proposal.fidelity and arch in self._by_arch and set(names) <= self._by_arch[arch].keys():
            found, status = [self._by_arch[arch][name] for name in names], int(Status.OK)
        else:
            result = self.evaluator.evaluate(proposal)
            found, status = result.values[0, self._sources].tolist(), int(result.status[0])
            message = next(iter(result.messages.values()), "")
            self.evaluated += 1
        row = dict(zip(self.metrics, costs.tolist(), strict=True)) | dict(zip(names, found, strict=True))
        self.archive.record_evaluation(
            self.phase,
            id,
            proposal.archs[0],
            row,
            status=status,
            fidelity={k: v[0].item() for k, v in proposal.fidelity.items()},
            seconds=time.perf_counter() - start,
            message=message,
        )
        if status == Status.OK and not proposal.fidelity:
            self._by_arch[arch] = row
        return found, status, message
