"""The evaluator of a run with expensive evaluations: objectives joined, every row committed, none done twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from nasbench.archive import Archive, arch_text
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status, without_limits
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.objectives import Objective, given_as
from search_spaces import UserError

_OK = int(Status.OK)  # members of an enum are slow to look up
Done = Callable[[Proposals, Evaluation], None]
Key = tuple[str, str]  # architecture and fidelity, as the archive writes them


@dataclass
class _Batch:
    """Proposals with what is known of them so far; rows that are `open` have yet to be evaluated."""

    proposals: Proposals
    keys: list[Key]
    evaluation: Evaluation
    open: list[int]
    done: int = 0


class RecordedEvaluator(Evaluator):
    """One column per objective, from an expensive evaluator or from predictors; rows are committed as they are done.

    Rows that the archive has are not evaluated again: those of this phase are found by their id, and those of earlier
    phases by their architecture and fidelity. Equal rows of one batch are evaluated once.

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
        self.objectives = objectives
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
        self._known = {
            key: [values[name] for name in self._names]
            for key, values in archive.known().items()
            if values.keys() >= set(self._names)
        }

    def evaluate(self, proposals: Proposals) -> Evaluation:
        """Values `(n, M)` of all proposals; a row fails where either part failed.

        Raises:
            UserError: the archive has another architecture under a proposal's id, so it is of another experiment.
        """
        batch = self._begin(proposals)
        self._finish([batch], lambda _: self.on_row and self.on_row(batch.done))
        return batch.evaluation

    def each(self, parts: Iterable[Proposals], done: Done) -> None:
        """Evaluate single proposals, and call `done` with each and its result as soon as it is committed.

        The next proposal is taken when there is room for it, and may depend on what `done` has been told so far.
        """

        def batches() -> Iterator[_Batch]:
            for part in parts:
                batch = self._begin(part)
                if batch.done == len(part):
                    done(part, batch.evaluation)
                yield batch

        self._finish(batches(), lambda batch: done(batch.proposals, batch.evaluation))

    def _begin(self, proposals: Proposals) -> _Batch:
        """A batch with its costs predicted and what is known of it filled in, and the latter committed where new."""
        n = len(proposals)
        values, status = np.full((n, len(self.metrics)), np.nan), np.zeros(n, dtype=np.uint8)
        limits = values.copy()
        if self.predicted:
            costs = self.predicted.evaluate(proposals)
            columns = [self.metrics.index(m) for m in self.predicted.metrics]
            values[:, columns] = costs.values
            limits[:, columns] = costs.values if costs.limit_values is None else costs.limit_values
            status = costs.status.copy()
        archs = [arch_text(arch) for arch in proposals.archs]
        fidelities = [json.dumps(proposals.fidelity_of(row)) if proposals.fidelity else "{}" for row in range(n)]
        batch = _Batch(proposals, list(zip(archs, fidelities, strict=True)), Evaluation(values, status, limits), [])
        for row, (id, key) in enumerate(zip(proposals.ids.tolist(), batch.keys, strict=True)):
            recorded = self._by_id.get(id)
            if recorded is not None:
                if recorded[0] != key[0]:
                    raise UserError(
                        f"{self.archive.path}: {self.phase} {id} is architecture {recorded[0]!r}, but now {key[0]!r} "
                        "was proposed; the run was made with another configuration or version"
                    )
                self._put(batch, row, [recorded[2][name] for name in self._names], recorded[1])
            elif status[row] != _OK:  # a target does not run it: nothing to evaluate, and nothing to record
                self._put(batch, row, [np.nan] * len(self._names), int(status[row]))
            elif key in self._known:
                self._commit(batch, row, self._known[key], _OK)
            else:
                batch.open.append(row)
        return batch

    def _finish(self, batches: Iterable[_Batch], done: Callable[[_Batch], object]) -> None:
        """Evaluate what is open in batches, and commit each row when it is there."""
        waiting: dict[Key, list[tuple[_Batch, int]]] = {}  # under way, with the rows that wait for it
        under_way: dict[int, tuple[_Batch, int]] = {}

        def parts() -> Iterator[Proposals]:
            for batch in batches:
                todo = []
                for row in batch.open:
                    here = waiting.setdefault(batch.keys[row], [])
                    here.append((batch, row))
                    if len(here) == 1:
                        todo.append(row)
                        under_way[int(batch.proposals.ids[row])] = batch, row
                for start in range(0, len(todo), self.evaluator.preferred_batch):
                    yield batch.proposals[np.array(todo[start : start + self.evaluator.preferred_batch])]

        began = time.perf_counter()
        for part, result in self.evaluator.stream(parts()):
            share = (time.perf_counter() - began) / len(part)
            without_limits(result)
            found, states = result.values[:, self._sources].tolist(), result.status.tolist()
            seconds = [share] * len(part) if result.seconds is None else result.seconds.tolist()
            self.evaluated += len(part)
            for index, id in enumerate(part.ids.tolist()):
                batch, row = under_way.pop(id)
                spent, message = seconds[index], result.messages.get(index, "")
                for waiter, place in waiting.pop(batch.keys[row]):
                    self._commit(waiter, place, found[index], states[index], spent, message)
                    spent = 0.0
                    done(waiter)
            began = time.perf_counter()

    def _commit(
        self, batch: _Batch, row: int, values: list[float], status: int, seconds: float = 0.0, message: str = ""
    ) -> None:
        """Record a row that the phase has not yet."""
        objectives = dict(zip(self.metrics, batch.evaluation.values[row].tolist(), strict=True))
        objectives.update(zip(self._names, values, strict=True))
        arch, fidelity = batch.keys[row]
        self.archive.record_evaluation(
            self.phase, int(batch.proposals.ids[row]), arch, objectives,
            status=status, fidelity=fidelity, seconds=seconds, message=message,
        )  # fmt: skip
        if status == _OK:
            self._known[batch.keys[row]] = values
        self._put(batch, row, values, status, message)

    def _put(self, batch: _Batch, row: int, values: list[float], status: int, message: str = "") -> None:
        """Fill in what a row gave."""
        evaluation = batch.evaluation
        evaluation.values[row, self._columns] = values
        assert evaluation.limit_values is not None
        evaluation.limit_values[row, self._columns] = values
        evaluation.status[row] = status
        if status != _OK:
            evaluation.values[row] = np.nan
            if message:
                evaluation.messages[row] = message
        batch.done += 1
