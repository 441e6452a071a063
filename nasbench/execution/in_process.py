"""Evaluations in this process, with failed ones repeated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status, Wrapped, joined
from nasbench.execution.base import guarded
from search_spaces import UserError


class InProcess(Wrapped):
    """Evaluates here, `preferred_batch` at a time; what an evaluator raises is the failure of the row that it is from.

    Args:
        retries: further attempts at a row that failed.
    """

    def __init__(self, evaluator: Evaluator, *, retries: int = 0) -> None:
        super().__init__(evaluator)
        self.retries = retries

    def stream(self, parts: Iterable[Proposals]) -> Iterator[tuple[Proposals, Evaluation]]:
        for part in parts:
            result = self._evaluate(part)
            for _ in range(self.retries):
                rows = np.flatnonzero(np.isin(result.status, (Status.FAILED, Status.TIMEOUT)))
                if not len(rows):
                    break
                result = _with_rows(result, rows, self._evaluate(part[rows]))
            yield part, result

    def _evaluate(self, part: Proposals) -> Evaluation:
        try:
            return self.evaluator.evaluate(part)
        except UserError:
            raise
        except Exception:
            rows = (part[np.array([row])] for row in range(len(part)))
            return joined(part, ((row, guarded(self.evaluator, row)) for row in rows), len(self.metrics))


def _with_rows(result: Evaluation, rows: np.ndarray, again: Evaluation) -> Evaluation:
    """A result in which rows are replaced by those of another attempt."""
    values, status = result.values.copy(), result.status.copy()
    values[rows], status[rows] = again.values, again.status
    seconds = result.seconds
    if seconds is not None and again.seconds is not None:
        seconds = seconds.copy()
        seconds[rows] += again.seconds
    redone = set(rows.tolist())
    messages = {row: text for row, text in result.messages.items() if row not in redone}
    messages |= {int(rows[row]): text for row, text in again.messages.items()}
    return replace(result, values=values, status=status, seconds=seconds, messages=messages)
