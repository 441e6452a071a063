"""The contract of predictors: an estimate with calibrated uncertainty, for workloads or for a bound space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from search_spaces import SearchSpace, Workload
from search_spaces.base import Archs

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A prediction per network with its uncertainty.

    Args:
        mean: `(n,)` the expected values, in the metric's unit.
        std: `(n,)` standard deviation of a measurement around the prediction; 0 where the value is exact.
        lognormal: the error is relative and the value positive (latency, energy), so that quantiles are too; else normal.
        warning: what makes this estimate doubtful (extrapolation, no measurements), else empty.
    """

    mean: Array
    std: Array
    lognormal: bool = False
    warning: str = ""

    def quantile(self, q: float) -> Array:
        """`(n,)` the value that a measurement stays below with probability `q`, 0 < q < 1."""
        z = float(ndtri(q))
        if not self.lognormal:
            return self.mean + z * self.std
        # mean and std are those of the log-normal variable itself, so match its moments.
        variance = np.log1p((self.std / np.maximum(self.mean, np.finfo(float).tiny)) ** 2)
        return self.mean * np.exp(z * np.sqrt(variance) - variance / 2)


class BoundPredictor(ABC):
    """A predictor tied to one space: whole populations at a time."""

    @abstractmethod
    def predict(self, archs: Archs) -> Estimate:
        """Estimate of `(n, K)` architectures."""

    @abstractmethod
    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The metric expected under independent choices, one probability vector per knob; a differentiable scalar."""


class Predictor(ABC):
    """Estimates one metric of any network without running it.

    Life: built from a profile or fitted to measurements, then `bind(space)` once per space and `predict` on the bound
    predictor for populations, or `predict(workloads)` for single networks. A predictor is immutable once fitted.
    """

    metric: str

    @abstractmethod
    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        """Estimate of any networks, one per workload."""

    @abstractmethod
    def bind(self, space: SearchSpace) -> BoundPredictor:
        """This predictor with its per-block table for `space` computed."""


class AdditivePredictor(Predictor):
    """A predictor whose features add up over blocks: a table per space, and a head from totals to an estimate.

    A subclass gives `block_features` (which must be additive over a network's blocks) and `head`; both forms of
    prediction then follow and agree.
    """

    reduce: str = "sum"  # or "max": a network's feature is the largest of its blocks'

    @abstractmethod
    def block_features(self, workload: Workload) -> Array:
        """`(F,)` features of one block or network."""

    @abstractmethod
    def head(self, totals: Any) -> Any:
        """Expected metric `(n,)` from totals `(n, F)`; written so that it takes numpy arrays and torch tensors alike."""

    @abstractmethod
    def estimate(self, totals: Array) -> Estimate:
        """Estimate from totals `(n, F)`."""

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        """`(weights (F,), offset)` where the head is `totals @ weights + offset`, else None. Exact limits need it."""
        return None

    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        return self.estimate(np.stack([self.block_features(w) for w in workloads]))

    def bind(self, space: SearchSpace) -> BoundAdditive:
        return BoundAdditive(self, space)


class BoundAdditive(BoundPredictor):
    """Per-block features of one space in a table, computed once."""

    def __init__(self, predictor: AdditivePredictor, space: SearchSpace) -> None:
        self.predictor_ = predictor
        self.space = space
        rows = [predictor.block_features(block.workload) for block in space.catalog]
        # Row -1 is the absent block, so that table[ids] needs no mask.
        self.table = np.vstack([*rows, np.zeros_like(rows[0])])

    def totals(self, archs: Archs) -> Array:
        """`(n, F)` features of whole networks."""
        ids = self.space.blocks(archs)
        if self.table.shape[1] == 1:
            picked = self.table[:, 0][ids]
            return (picked.sum(1) if self.predictor_.reduce == "sum" else picked.max(1))[:, None]
        picked = self.table[ids]
        return picked.sum(1) if self.predictor_.reduce == "sum" else picked.max(1)

    def predict(self, archs: Archs) -> Estimate:
        return self.predictor_.estimate(self.totals(archs))

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The head of the expected totals: exact for a linear head, a first-order approximation otherwise."""
        import torch

        total: Any = 0.0
        for position, knobs in enumerate(self.space.block_knobs):
            choices = [np.arange(self.space.cardinalities[k]) for k in knobs]
            grid = np.stack([g.ravel() for g in np.meshgrid(*choices, indexing="ij")], axis=1) if knobs else None
            archs = np.zeros((1 if grid is None else len(grid), len(self.space.knobs)), dtype=self.space.dtype)
            weight = torch.ones(1)
            if grid is not None:
                archs[:, list(knobs)] = grid
                for column, k in enumerate(knobs):
                    weight = weight * probabilities[k][torch.as_tensor(grid[:, column])]
            rows = self.table[self.space.blocks(archs)[:, position]]
            features = (weight[:, None] * torch.as_tensor(rows, dtype=weight.dtype)).sum(0)
            if self.predictor_.reduce == "sum":
                total = total + features
            else:
                total = features if position == 0 else torch.maximum(total, features)
        result: torch.Tensor = self.predictor_.head(total[None])[0]
        return result
