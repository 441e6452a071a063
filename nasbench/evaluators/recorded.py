"""Evaluators around evaluators: remember every finished row, and join evaluated with predicted objectives."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np

from nasbench.archive import Archive, arch_text
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.objectives import Objective
from search_spaces.errors import UserError


class Recorded(Evaluator):
    """Commits each row of an expensive evaluator to the archive, and never evaluates a committed row again.

    Args:
        evaluator: does the work, one row at a time.
        archive: of the run.
        phase: under which the rows are filed; proposal ids are unique within it.
        on_row: called after each row with how many of the batch are done.
    """

    expensive = True

    def __init__(
        self, evaluator: Evaluator, archive: Archive, phase: str, on_row: Callable[[int], None] | None = None
    ) -> None:
        self.evaluator = evaluator
        self.metrics = evaluator.metrics
        self.archive = archive
        self.phase = phase
        self.on_row = on_row
        self.evaluated = 0
        self._finished = archive.finished(phase)

    def evaluate(self, proposals: Proposals) -> Evaluation:
        """Values of all proposals: recorded ones from the archive, the others evaluated and committed.

        Raises:
            UserError: the archive holds another architecture under a proposal's id, so it is of another experiment.
        """
        values = np.full((len(proposals), len(self.metrics)), np.nan)
        status = np.zeros(len(proposals), dtype=np.uint8)
        messages: dict[int, str] = {}
        for row in range(len(proposals)):
            id, arch = int(proposals.ids[row]), proposals.archs[row]
            if id in self._finished:
                text, status[row], known = self._finished[id]
                if text != arch_text(arch):
                    raise UserError(
                        f"{self.archive.path}: {self.phase} {id} is architecture {text!r}, but now {arch_text(arch)!r} "
                        "was proposed; the run was made with another configuration or version"
                    )
                values[row] = [known[m] for m in self.metrics]
            else:
                start = time.perf_counter()
                result = self.evaluator.evaluate(proposals[row : row + 1])
                values[row], status[row] = result.values[0], result.status[0]
                if result.messages:
                    messages[row] = next(iter(result.messages.values()))
                self.archive.record_evaluation(
                    self.phase,
                    id,
                    arch,
                    dict(zip(self.metrics, values[row].tolist(), strict=True)),
                    status=int(status[row]),
                    fidelity=json.loads(json.dumps({k: v[row].item() for k, v in proposals.fidelity.items()})),
                    seconds=time.perf_counter() - start,
                    message=messages.get(row, ""),
                )
                self.evaluated += 1
            if self.on_row:
                self.on_row(row + 1)
        return Evaluation(values, status, messages=messages)


class Joined(Evaluator):
    """One column per objective: from an evaluator where it has the metric, else from a cheap one.

    Args:
        objectives: in the order of the columns.
        evaluated: gives the metrics that it lists.
        predicted: gives one column per remaining objective, under the objective's name; None where none remains.
    """

    def __init__(self, objectives: tuple[Objective, ...], evaluated: Evaluator, predicted: Evaluator | None) -> None:
        self.metrics = tuple(o.name for o in objectives)
        self.objectives = objectives
        self.evaluated = evaluated
        self.predicted = predicted
        self.expensive = evaluated.expensive

    def evaluate(self, proposals: Proposals) -> Evaluation:
        """Values `(n, M)`; a row fails where either part failed."""
        first = self.evaluated.evaluate(proposals)
        second = self.predicted.evaluate(proposals) if self.predicted else None
        values = np.full((len(proposals), len(self.objectives)), np.nan)
        limits = values.copy()
        for column, objective in enumerate(self.objectives):
            if objective.metric in self.evaluated.metrics:
                values[:, column] = limits[:, column] = first.values[:, self.evaluated.metrics.index(objective.metric)]
            elif second is not None and self.predicted is not None:
                source = self.predicted.metrics.index(objective.name)
                values[:, column] = second.values[:, source]
                chosen = second.values if second.limit_values is None else second.limit_values
                limits[:, column] = chosen[:, source]
        status = first.status if second is None else np.where(first.status != Status.OK, first.status, second.status)
        values[status != Status.OK] = np.nan
        return Evaluation(values, status.astype(np.uint8), limits, first.seconds, first.messages)
