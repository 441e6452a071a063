"""Costs that follow from others, or from a function of the user's own, as bound predictors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from predictors.base import BoundPredictor, Estimate
from search_spaces import SearchSpace, UserError
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
