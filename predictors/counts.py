"""Metrics that follow from a network's operators alone: exact, and the same on every device."""

from __future__ import annotations

from typing import Any

import numpy as np

from predictors.base import AdditivePredictor, Array
from search_spaces import UserError, Workload, nearest

COUNTS = ("macs", "params", "peak_memory_bytes", "file_bytes")


class Count(AdditivePredictor):
    """Multiply-accumulates, parameters, their bytes, or memory of activations of one sample.

    Sums are exact. `file_bytes` is the weights at the target's precision: what a file holds besides, its graph, is some
    hundred bytes an operator. Peak memory is the maximum of the blocks' own peaks,
    boundary tensors included: exact where blocks meet at one tensor, and an ideal lower bound of what a runtime takes
    (no weights, no workspaces).

    Args:
        metric: one of `COUNTS`.
        itemsize: bytes per element at the target's precision; only peak memory and the file depend on it.

    Raises:
        UserError: no such metric.
    """

    def __init__(self, metric: str, itemsize: int = 4) -> None:
        if metric not in COUNTS:
            raise UserError(f"no exact count {metric!r}. {nearest(metric, COUNTS)}")
        self.metric = metric
        self.itemsize = itemsize
        self.reduce = "max" if metric == "peak_memory_bytes" else "sum"

    def block_features(self, workload: Workload) -> Array:
        if self.metric == "file_bytes":
            return np.array([self.itemsize * workload.params], dtype=float)
        if self.metric == "peak_memory_bytes":
            workload = workload.at(self.itemsize)
        return np.array([getattr(workload, self.metric)], dtype=float)

    def head(self, totals: Any) -> Any:
        return totals[:, 0]

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        return (np.ones(1), 0.0) if self.reduce == "sum" else None
