"""A predictor corrected by measurements of networks of its own space, with what is still uncertain."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular

from predictors.base import Array, BoundPredictor, Estimate
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

if TYPE_CHECKING:
    import torch

# Prior standard deviations of ln(measured / predicted): of a factor common to all networks, and of one that grows or
# falls by a standard deviation of the logarithm of what is predicted.
_COMMON, _TREND = 0.5, 0.2
# Tried for the rest: its standard deviation, over how large a share of unlike choices it is alike, and the noise.
_REST, _LENGTH, _NOISE = (0.01, 0.03, 0.1, 0.3), (0.1, 0.3, 1.0), (0.005, 0.01, 0.02, 0.05, 0.1)
# What is believed of the two together before: a spread that is usual for calibrated predictors, worth some measurements
# (a scaled inverse chi-squared distribution); two networks that agree by luck prove nothing.
_USUAL, _WORTH = 0.05, 4.0
# Of the combinations of these, those with less than this share of the best one's likelihood do not count, and only the
# first so many do.
_UNLIKELY, _MOST = 0.02, 12


_Fit = tuple[float, float, float, float, Array, Array]  # share, rest, length, noise, Cholesky factor, weights


class CorrectedPredictor(BoundPredictor):
    """What another predictor says, times what measurements taught about its errors.

    ln(measured / predicted) is a Gaussian process over architectures (Rasmussen and Williams 2006, algorithm 2.1): a
    common factor, a trend in the prediction, a part that is alike for architectures with like choices, and noise. The
    parameters of the latter two are averaged over by marginal likelihood, so that few measurements leave the spread
    wide; far from all measurements it is wider than near one.

    Args:
        corrected: the predictor.
        space: of the architectures.
        archs: `(n, K)` that were measured.
        measured: `(n,)` positive, in the metric's unit; rows with a NaN, or that are predicted as none, do not count.

    Raises:
        UserError: no usable measurement.
    """

    def __init__(self, corrected: BoundPredictor, space: SearchSpace, archs: Archs, measured: Array) -> None:
        self.corrected = corrected
        self.space = space
        predicted = corrected.predict(archs).mean
        usable = np.isfinite(predicted) & np.isfinite(measured) & (predicted > 0) & (measured > 0)
        if not usable.any():
            raise UserError("a prediction is corrected by measurements of networks that it predicts; there is none")
        self._archs = archs[usable]
        logs = np.log(predicted[usable])
        self._centre, self._spread = float(logs.mean()), max(float(logs.std()), 1e-3)
        self._errors = np.log(measured[usable]) - logs
        common, apart = self._common(logs, logs), self._apart(self._archs)
        fits: list[_Fit] = []
        for rest, length, noise in product(_REST, _LENGTH, _NOISE):
            covariance = common + rest**2 * np.exp(-apart / length) + noise**2 * np.eye(len(logs))
            factor = cholesky(covariance, lower=True)
            weights = cho_solve((factor, True), self._errors)
            likelihood = -0.5 * float(self._errors @ weights) - float(np.log(np.diag(factor)).sum())
            rough = rest**2 + noise**2
            likelihood -= (_WORTH / 2 + 1) * np.log(rough) + _WORTH * _USUAL**2 / (2 * rough)
            fits.append((likelihood, rest, length, noise, factor, weights))
        fits = sorted(fits, key=lambda fit: -fit[0])[:_MOST]
        shares = np.exp([fit[0] - fits[0][0] for fit in fits])
        kept = [(share, *fit[1:]) for share, fit in zip(shares, fits, strict=True) if share >= _UNLIKELY]
        total = sum(share for share, *_ in kept)
        self._fits: list[_Fit] = [(fit[0] / total, *fit[1:]) for fit in kept]
        self._logs = logs

    def _common(self, logs: Array, others: Array) -> Array:
        """Covariance `(n, m)` of the common factor and the trend."""
        first, second = ((v - self._centre) / self._spread for v in (logs, others))
        return _COMMON**2 + _TREND**2 * np.outer(first, second)

    def _apart(self, archs: Archs) -> Array:
        """`(n, m)` share of choices that differ from those of the measured architectures."""
        ours, theirs = self.space.features(archs), self.space.features(self._archs)
        alike = (ours @ theirs.T).astype(float)
        most = np.maximum(ours.sum(1)[:, None], theirs.sum(1)[None])
        return 1.0 - alike / np.maximum(most, 1.0)

    def predict(self, archs: Archs) -> Estimate:
        base = self.corrected.predict(archs)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log(base.mean)
        common, apart = self._common(logs, self._logs), self._apart(archs)
        own = _COMMON**2 + _TREND**2 * ((logs - self._centre) / self._spread) ** 2
        mean, square = np.zeros(len(archs)), np.zeros(len(archs))
        for share, rest, length, noise, factor, weights in self._fits:
            across = common + rest**2 * np.exp(-apart / length)
            solved = solve_triangular(factor, across.T, lower=True)
            variance = np.maximum(own + rest**2 - (solved**2).sum(0), 0.0) + noise**2
            error = across @ weights
            mean += share * error
            square += share * (variance + error**2)
        spread = np.sqrt(np.maximum(square - mean**2, 1e-12))
        return Estimate.relative(base.mean * np.exp(mean), spread, base.warning)

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        """The predictor's, times the mean factor of the measured networks."""
        return self.corrected.expected(probabilities) * float(np.exp(self._errors.mean()))
