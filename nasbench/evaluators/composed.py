"""Several evaluators as one: accuracy from training, say, and latency from measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status, without_limits
from search_spaces.base import Archs

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.supernet import Supernet


class ComposedEvaluator(Evaluator):
    """The metrics of its parts, side by side.

    Parts are asked in their order, and a row that failed in one is not asked of the next. A part does nothing for rows
    whose metrics are `known` already. Fidelities are those that any part knows; the others work at full fidelity.

    Args:
        parts: of different metrics.
    """

    def __init__(self, parts: Sequence[Evaluator]) -> None:
        self.parts = tuple(parts)
        self.metrics = tuple(metric for part in parts for metric in part.metrics)
        self.preferred_batch = min(part.preferred_batch for part in parts)
        known = [part.fidelities for part in parts]
        self.fidelities = None if None in known else tuple(dict.fromkeys(f for part in known for f in part or ()))
        self._extracting = next((part for part in self.parts if hasattr(part, "extract")), None)
        if self._extracting is not None:
            self.extract = self._extract

    def evaluate(self, proposals: Proposals) -> Evaluation:
        n = len(proposals)
        columns: list[np.ndarray] = []
        status, seconds = np.zeros(n, dtype=np.uint8), np.zeros(n)
        messages: dict[int, str] = {}
        for part in self.parts:
            nothing = np.full(n, np.nan)
            values = np.stack([proposals.known.get(metric, nothing) for metric in part.metrics], axis=1)
            rows = np.flatnonzero(np.isnan(values).any(axis=1) & (status == Status.OK))
            if len(rows):
                asked = proposals[rows]
                if part.fidelities is not None:
                    kept = {name: column for name, column in asked.fidelity.items() if name in part.fidelities}
                    asked = Proposals(asked.ids, asked.archs, kept, asked.known)
                result = without_limits(part.evaluate(asked))
                values[rows], status[rows] = result.values, result.status
                seconds[rows] += 0.0 if result.seconds is None else result.seconds
                messages |= {int(rows[row]): message for row, message in result.messages.items()}
            columns.append(values)
        found = np.concatenate(columns, axis=1)
        found[status != Status.OK] = np.nan
        return Evaluation(found, status, seconds=seconds, messages=messages)

    def _extract(self, arch: Archs) -> nn.Module:
        """The trained network of one architecture `(K,)`, from the first part that has such."""
        network: nn.Module = self._extracting.extract(arch)  # type: ignore[union-attr]
        return network

    @property
    def network(self) -> Supernet | None:
        """The supernet of the first part that has one."""
        return next((part.network for part in self.parts if hasattr(part, "network")), None)

    def close(self) -> None:
        for part in self.parts:
            part.close()
