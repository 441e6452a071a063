"""The evaluator of a run with expensive evaluations: objectives joined, every row committed, none done twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import numpy as np

from nasbench.archive import Archive, arch_text
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.objectives import Objective, given_as
from search_spaces import UserError

# Values of the evaluated objectives, status, and why it failed.
Found = tuple[list[float], int, str]


class RecordedEvaluator(Evaluator):
    """One column per objective, from an expensive evaluator or from predictors; rows are committed as they are done.

    Rows that the archive has are not evaluated again: those of this phase are found by their id, and those of earlier
    phases by their architecture, where both are of full fidelity.

    Args:
        objectives: in the order of the columns.
        evaluator: gives the metrics that it lists, row by row.
        predicted: gives the other objectives, under their names; None where there are no others.
        archive: of the run.
        phase: under which the rows are filed; proposal ids are unique within it.
        on_row: called after each commit with how many of the proposals are done.
    """

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
        self.fidelities = evaluator.fidelities
        self.evaluator = evaluator
        self.predicted = predicted
        self.archive = archive
        self.phase = phase
        self.on_row = on_row
        self.evaluated = 0
        given = [(column, given_as(o, evaluator.metrics)) for column, o in enumerate(objectives)]
        evaluated = [(column, metric) for column, metric in given if metric is not None]
        self._columns = [column for column, _ in evaluated]
        self._sources = [evaluator.metrics.index(metric) for _, metric in evaluated]
        self._names = [self.metrics[column] for column in self._columns]
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
        for start in range(0, n, self.evaluator.preferred_batch):
            rows = np.arange(start, min(n, start + self.evaluator.preferred_batch))
            todo = rows[[status[r] == Status.OK or int(proposals.ids[r]) in self._by_id for r in rows]]
            for row, (found, state, message) in zip(todo, self._rows(proposals[todo], values[todo]), strict=True):
                values[row, self._columns], status[row] = found, state
                if message:
                    messages[row] = message
            if self.on_row:
                self.on_row(int(rows[-1]) + 1)
        limits[:, self._columns] = values[:, self._columns]
        values[status != Status.OK] = np.nan
        return Evaluation(values, status, limits, messages=messages)

    def _rows(self, proposals: Proposals, costs: np.ndarray) -> list[Found]:
        """What each proposal gives; what nobody knows yet is evaluated, and what the phase has not yet is committed."""
        texts = [arch_text(arch) for arch in proposals.archs]
        recorded = [self._recorded(id, text) for id, text in zip(proposals.ids.tolist(), texts, strict=True)]
        full = proposals.full
        found = [f or (self._known(t) if w else None) for f, t, w in zip(recorded, texts, full, strict=True)]
        seconds = np.zeros(len(texts))
        new = np.array([row for row, f in enumerate(found) if f is None], dtype=int)
        if len(new):
            start = time.perf_counter()
            result = self.evaluator.evaluate(proposals[new])
            share = (time.perf_counter() - start) / len(new)
            seconds[new] = share if result.seconds is None else result.seconds
            for index, row in enumerate(new.tolist()):
                values = result.values[index, self._sources].tolist()
                found[row] = values, int(result.status[index]), result.messages.get(index, "")
            self.evaluated += len(new)
        complete = cast(list[Found], found)
        for row, (values, status, message) in enumerate(complete):
            if recorded[row]:
                continue
            objectives = dict(zip(self.metrics, costs[row].tolist(), strict=True))
            objectives |= dict(zip(self._names, values, strict=True))
            self.archive.record_evaluation(
                self.phase,
                int(proposals.ids[row]),
                proposals.archs[row],
                objectives,
                status=status,
                fidelity=proposals.fidelity_of(row),
                seconds=float(seconds[row]),
                message=message,
            )
            if status == Status.OK and full[row]:
                self._by_arch[texts[row]] = objectives
        return complete

    def _recorded(self, id: int, arch: str) -> Found | None:
        """What this phase has under an id."""
        if id not in self._by_id:
            return None
        known_arch, status, known = self._by_id[id]
        if known_arch != arch:
            raise UserError(
                f"{self.archive.path}: {self.phase} {id} is architecture {known_arch!r}, but now {arch!r} was "
                "proposed; the run was made with another configuration or version"
            )
        return [known[name] for name in self._names], status, ""

    def _known(self, arch: str) -> Found | None:
        """What any phase has of an architecture at full fidelity."""
        known = self._by_arch.get(arch, {})
        return ([known[n] for n in self._names], int(Status.OK), "") if set(self._names) <= known.keys() else None
