"""The contract of predictors: an estimate with calibrated uncertainty, for workloads or for a bound space."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from search_spaces import SearchSpace, Workload
from search_spaces.base import Archs

if TYPE_CHECKING:
    import torch

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

# A catalog of this many blocks or fewer is visited at once.
EAGER_BLOCKS = 10**6


@dataclass(frozen=True)
class Estimate:
    """A prediction per network with its uncertainty.

    Args:
        mean: `(n,)` the predicted values, in the metric's unit: as likely too low as too high.
        std: `(n,)` standard deviation of a measurement around the prediction; 0 where the value is exact.
        lognormal: the error is relative and the value positive (latency, energy), and so are quantiles; else normal.
            Then `mean` is the median, which is what a fit to logarithms predicts.
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
        log_std = np.sqrt(np.log1p((self.std / np.maximum(self.mean, np.finfo(float).tiny)) ** 2))
        return self.mean * np.exp(z * log_std)

    @classmethod
    def relative(cls, mean: Array, log_std: Array | float, warning: str = "") -> Estimate:
        """A log-normal estimate from `(n,)` medians and the standard deviation of ln(measured / predicted)."""
        return cls(mean, mean * np.sqrt(np.expm1(np.square(log_std))), lognormal=True, warning=warning)


class BoundPredictor(ABC):
    """A predictor tied to one space: whole populations at a time."""

    space: SearchSpace

    @abstractmethod
    def predict(self, archs: Archs) -> Estimate:
        """Estimate of `(n, K)` architectures."""

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The metric expected under independent choices of the knobs, differentiable in their probabilities.

        By default for any predictor, from `predict` alone: exact in small spaces, else an estimate whose gradient is
        one too (see `predictors.expectation`). A subclass that is a sum over blocks knows better.

        Args:
            probabilities: per knob `(..., choices)`, each with the sum one; many distributions at once along the
                leading dimensions.

        Returns:
            `(...)`, a scalar for vectors.
        """
        from predictors.expectation import expected

        return expected(self, probabilities)

    @cached_property
    def every_prediction(self) -> Array:
        """Means of all combinations of choices, the last knob's fastest: for spaces small enough to enumerate."""
        from predictors.expectation import every_prediction

        return every_prediction(self)


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

    A subclass gives `block_features` (which must be additive over a network's blocks), `head`, and `around`, its
    uncertainty (or `estimate`, where that depends on more than the mean); both forms of prediction then follow and
    agree. Where `coefficients` are given, populations are predicted from one number per block, or from the `leading`
    features where `estimate` needs those.
    """

    reduce: str = "sum"  # or "max": a network's feature, not negative, is the largest of its blocks'
    leading: int = 0  # how many of the first features `head` and `estimate` need; 0 for all

    @abstractmethod
    def block_features(self, workload: Workload) -> Array:
        """`(F,)` features of one block or network."""

    def block_rows(self, workloads: Sequence[Workload]) -> Array:
        """`(n, F)` `block_features` of many; a subclass may be faster at it."""
        return np.stack([self.block_features(w) for w in workloads])

    def network_rows(self, workloads: Sequence[Workload]) -> Array:
        """`(n, F)` features of whole networks: those of a block, unless the whole has costs that no block has."""
        return self.block_rows(workloads)

    @abstractmethod
    def head(self, totals: Any) -> Any:
        """Expected metric `(n,)` from totals `(n, F)`; takes numpy arrays and torch tensors alike."""

    def around(self, mean: Array) -> Estimate:
        """The estimate whose expected values are `mean` `(n,)`. Exact unless a subclass knows better."""
        return Estimate(mean, np.zeros_like(mean))

    def estimate(self, totals: Array) -> Estimate:
        """The estimate for totals `(n, F)`, or for the `leading` columns of them."""
        return self.around(self.head(totals))

    def doubts(self, features: Array, workloads: Iterable[Workload], blocks: bool = False) -> str:
        """What makes predictions of `m` workloads doubtful; else "".

        Args:
            features: `(m, F)` of them.
            blocks: they are a space's blocks, and no networks.
        """
        return ""

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        """`(weights (F,), offset)` where the head is `totals @ weights + offset`, else None. Exact limits need it."""
        return None

    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        if not workloads:
            return self.around(np.empty(0))
        totals = self.network_rows(workloads)
        return _doubted(self.estimate(totals), self.doubts(totals, workloads))

    def bind(self, space: SearchSpace) -> BoundAdditive:
        return BoundAdditive(self, space)


def _doubted(estimate: Estimate, doubts: str) -> Estimate:
    """The estimate with a further warning."""
    return replace(estimate, warning="; ".join(w for w in (estimate.warning, doubts) if w)) if doubts else estimate


class BoundAdditive(BoundPredictor):
    """Per-block features of one space in a table, computed once.

    Args:
        predictor: whose features and head.
        space: its catalog is visited once; of one with more than `EAGER_BLOCKS` blocks, those that are asked for.

    Attributes:
        table: `(blocks + 1, F)` float64; the last row, all zero, is the absent block with index -1.
        warning: the predictor's doubts about this space's blocks; part of every estimate.
    """

    def __init__(self, predictor: AdditivePredictor, space: SearchSpace) -> None:
        self.predictor = predictor
        self.space = space
        blocks = len(space.catalog)
        first = predictor.block_features(space.catalog[0].workload)
        self.table = np.zeros((blocks + 1, len(first)))
        self.warning = ""
        linear = predictor.coefficients if predictor.reduce == "sum" and not predictor.leading else None
        # One column is enough where the head is linear: what each block adds to the metric.
        self._weights: Array = linear[0] if linear else np.ones(1)
        self._offset = linear[1] if linear else None
        self._column = np.zeros(blocks + 1) if linear or len(first) == 1 else None
        self._leading = np.zeros((blocks + 1, predictor.leading))
        self._missing: NDArray[np.bool_] | None = np.arange(blocks + 1) < blocks
        if blocks <= EAGER_BLOCKS:
            self._fill(np.arange(blocks))
            self._missing = None
        else:
            log.warning("%s has %d distinct blocks: their features are computed on demand", space.name, blocks)

    def _fill(self, ids: NDArray[np.integer[Any]]) -> None:
        """Compute the rows of blocks that were never asked for."""
        for some in np.array_split(ids, -(-len(ids) // 4096)):
            self.table[some] = self.predictor.block_rows([self.space.catalog[int(i)].workload for i in some])
        if self._column is not None:
            self._column[ids] = self.table[ids] @ self._weights
        self._leading[ids] = self.table[ids, : self.predictor.leading]
        workloads = (self.space.catalog[int(i)].workload for i in ids)
        self.warning = self.warning or self.predictor.doubts(self.table[ids], workloads, blocks=True)

    def _blocks(self, archs: Archs) -> NDArray[np.int32]:
        """`(n, P)` block ids whose rows of the table are there."""
        ids = self.space.blocks(archs)
        self._fill_missing(ids)
        return ids

    def _fill_missing(self, ids: NDArray[np.int32]) -> None:
        if self._missing is not None and self._missing[ids].any():
            new = np.unique(ids[self._missing[ids]])
            self._fill(new)
            self._missing[new] = False

    def totals(self, archs: Archs) -> Array:
        """`(n, F)` features of whole networks."""
        picked = self.table[self._blocks(archs)]
        return picked.sum(1) if self.predictor.reduce == "sum" else picked.max(1)

    def predict(self, archs: Archs) -> Estimate:
        if self.predictor.leading:
            # Position by position, whole rows at a time: a third of the time of picking all at once.
            positions = np.ascontiguousarray(self._blocks(archs).T)
            totals = np.zeros((len(archs), self.predictor.leading))
            for ids in positions:
                totals += self._leading.take(ids, axis=0)
            return _doubted(self.predictor.estimate(totals), self.warning)
        if self._column is None:
            mean = self.predictor.head(self.totals(archs))
        else:
            picked = self._column[self._blocks(archs)]
            if self._offset is not None:
                mean = picked.sum(1) + self._offset
            else:
                total = picked.sum(1) if self.predictor.reduce == "sum" else picked.max(1)
                mean = self.predictor.head(total[:, None])
        return _doubted(self.predictor.around(mean), self.warning)

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The head of the expected totals: exact for sums with a linear head, a first-order approximation otherwise.

        Args and result as in `BoundPredictor`.
        """
        import torch

        like = probabilities[0]
        terms = []
        for knobs, rows in self._distinct:
            weight = torch.ones((*like.shape[:-1], 1), dtype=like.dtype, device=like.device)
            for k in knobs:  # in the order of `block_grid`: the last knob's choices change fastest
                weight = (weight[..., :, None] * probabilities[k][..., None, :]).flatten(-2)
            terms.append(weight @ torch.as_tensor(rows, dtype=like.dtype, device=like.device))
        stacked = torch.stack(terms)
        totals = stacked.sum(0) if self.predictor.reduce == "sum" else stacked.amax(0)
        result: torch.Tensor = self.predictor.head(totals.flatten(0, -2) if totals.dim() > 1 else totals[None])
        return result.reshape(totals.shape[:-1])

    @cached_property
    def _distinct(self) -> list[tuple[tuple[int, ...], Array]]:
        """Knobs, and features per combination of their choices: positions with the same knobs are added up beforehand.

        Where maxima count, those that are the same are kept once.
        """
        if self.predictor.reduce != "sum":
            return [(knobs, rows) for knobs, _, rows in {id(p[2]): p for p in self.positions}.values()]
        added: dict[tuple[int, ...], Array] = {}
        for knobs, _, rows in self.positions:
            added[knobs] = added[knobs] + rows if knobs in added else rows
        return list(added.items())

    @cached_property
    def positions(self) -> list[tuple[tuple[int, ...], NDArray[np.int64], Array]]:
        """Per position: its knobs, all combinations of their choices `(m, knobs)`, and features of each `(m, F)`.

        Positions that are the same throughout, such as repeated cells, share their arrays.
        """
        made: dict[tuple[tuple[int, ...], bytes], tuple[tuple[int, ...], NDArray[np.int64], Array]] = {}
        positions = []
        for position in range(len(self.space.block_knobs)):
            knobs, grid, ids = self.space.block_grid(position)
            self._fill_missing(ids)
            key = knobs, ids.tobytes()
            if key not in made:
                made[key] = knobs, grid, self.table[ids]
            positions.append(made[key])
        return positions
