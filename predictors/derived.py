"""Costs that follow from others, or from a function of the user's own, as bound predictors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.base import AdditivePredictor, Array, BoundPredictor, Estimate
from search_spaces import SearchSpace, UserError, Workload
from search_spaces.base import Archs

if TYPE_CHECKING:
    import torch


class Throughput(BoundPredictor):
    """Samples per second of a device that does nothing but one inference (one batch) after the other.

    Args:
        latency: predictor of milliseconds per inference.
        batch: samples in one.
    """

    def __init__(self, latency: BoundPredictor, batch: int) -> None:
        self.latency = latency
        self.batch = batch

    def predict(self, archs: Archs) -> Estimate:
        latency = self.latency.predict(archs)
        with np.errstate(divide="ignore"):
            rate = 1e3 * self.batch / latency.mean
        # The relative error of an inverse is that of the value, in the logarithm.
        return Estimate(rate, latency.std / latency.mean * rate, lognormal=True, warning=latency.warning)

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        return 1e3 * self.batch / self.latency.expected(probabilities)


class StatedEnergy(AdditivePredictor):
    """Energy as latency times the power of the operating point, where latency was measured and energy was not.

    Args:
        latency: predictor of milliseconds per inference.
        power_w: watts.
        log_std: standard deviation of the logarithm of the power that is drawn.
        warning: what is doubtful about the power, repeated with every estimate.
    """

    metric = "energy_mj"

    def __init__(self, latency: AdditivePredictor, power_w: float, log_std: float, warning: str = "") -> None:
        self.latency = latency
        self.power_w = power_w
        self.log_std = log_std
        self.warning = warning
        self.reduce = latency.reduce
        self.leading = latency.leading

    def block_features(self, workload: Workload) -> Array:
        return self.latency.block_features(workload)

    def block_rows(self, workloads: Sequence[Workload]) -> Array:
        return self.latency.block_rows(workloads)

    def head(self, totals: Any) -> Any:
        return self.power_w * self.latency.head(totals)

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        linear = self.latency.coefficients
        return linear and (self.power_w * linear[0], self.power_w * linear[1])

    def around(self, mean: Array) -> Estimate:
        return self._energy(self.latency.around(mean / self.power_w))

    def estimate(self, totals: Array) -> Estimate:
        return self._energy(self.latency.estimate(totals))

    def doubts(self, features: Array, workloads: Iterable[Workload], blocks: bool = False) -> str:
        return self.latency.doubts(features, workloads, blocks)

    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        return self._energy(self.latency.predict(workloads))

    def _energy(self, latency: Estimate) -> Estimate:
        relative = np.log1p((latency.std / latency.mean) ** 2)
        warning = "; ".join(w for w in (latency.warning, self.warning) if w)
        return Estimate.relative(self.power_w * latency.mean, np.sqrt(relative + self.log_std**2), warning)


class FunctionCost(BoundPredictor):
    """A cost that a function of the user's own gives; taken as exact.

    Args:
        space: of the architectures.
        function: from `(n, K)` architectures and the space to `(n,)` numbers; NaN where there is none.
        name: for messages.
    """

    def __init__(self, space: SearchSpace, function: Callable[[Archs, SearchSpace], Any], name: str) -> None:
        self.space = space
        self.function = function
        self.name = name

    def predict(self, archs: Archs) -> Estimate:
        try:
            values = np.asarray(self.function(archs, self.space), dtype=np.float64)
        except Exception as error:  # whatever a user's function may raise
            raise UserError(f"objective {self.name!r}: {type(error).__name__}: {error}") from error
        if values.shape != (len(archs),):
            raise UserError(
                f"objective {self.name!r}: gave shape {values.shape} for {len(archs)} architectures, expected "
                f"({len(archs)},)"
            )
        return Estimate(values, np.zeros_like(values))

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        raise UserError(
            f"objective {self.name!r} is a function of architectures, which has no gradient; take an ask/tell strategy"
        )
