"""Figures of how well predictions hold: the same for every predictor and device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from predictors.base import Array, Estimate

# Predictions this far outside the measured range are still called inside it.
MARGIN = 0.1
# A network with a larger share of its cost in operators unlike all measured ones is told so.
STRANGE = 0.05
# With a larger median error on networks left out, a fit says so itself.
POOR = 0.5


def relative_errors(logs: Array) -> Array:
    """`(m,)` sizes of errors relative to the measurement, from ln(measured / predicted)."""
    return np.abs(np.expm1(-logs))


def share_within(logs: Array, relative: float) -> float:
    """Share of predictions whose error is at most `relative` of the measurement, from ln(measured / predicted)."""
    return float(np.mean(relative_errors(logs) <= relative))


def covered(sizes: Array, groups: NDArray[np.intp], limit: Callable[[NDArray[np.bool_]], float]) -> float:
    """Share of errors inside their intervals, none of which the errors of its own group have a say in.

    Args:
        sizes: `(m,)` of errors of networks left out.
        groups: `(m,)` numbers; errors of one group were left out together.
        limit: half the width of the intervals, in the unit of `sizes`, by the errors that a mask `(m,)` marks.
    """
    inside = np.zeros(len(sizes), dtype=bool)
    for group in np.unique(groups):
        own = groups == group
        inside[own] = sizes[own] <= limit(~own)
    return float(inside.mean())


def figures(logs: Array, measured: Array, inside: float = np.nan) -> dict[str, float]:
    """How well predictions hold; nothing of no networks.

    Args:
        logs: `(m,)` ln(measured / predicted).
        measured: `(n,)` measured values; a rank correlation needs them to be of the same networks.
        inside: share of measured values in the 90 % interval; NaN where that says nothing.

    Returns:
        `median_error` (relative to the measurement), `within_10_percent`, and where they are known
        `interval_90_coverage` and `spearman`.
    """
    from scipy.stats import spearmanr

    if not len(logs):
        return {}
    found = {"median_error": float(np.median(relative_errors(logs))), "within_10_percent": share_within(logs, 0.1)}
    if np.isfinite(inside):
        found["interval_90_coverage"] = inside
    if len(logs) == len(measured) and len(measured) > 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constant values, whose rank correlation is no number
            rank = float(spearmanr(measured / np.exp(logs), measured).statistic)
        if np.isfinite(rank):
            found["spearman"] = rank
    return found


def poor(metric: str, quality: Mapping[str, float]) -> str:
    """What is to be said of a fit with such `figures` of networks left out; empty where it may be relied on."""
    error = quality.get("median_error", 0.0)
    if error <= POOR:
        return ""
    return f"{metric} of networks left out is predicted with a median error of {error:.0%}: do not rely on this fit"


def spread_around(mean: Array, log_std: Array | float, lowest: float, highest: float, unit: str = "") -> Estimate:
    """Log-normal estimate; wider, and with a warning, where the prediction lies outside what was measured.

    Args:
        mean: `(n,)` predictions.
        log_std: of them, as far as they lie inside.
        lowest, highest: of the measured values, in `unit`.
    """
    low, high = lowest / (1 + MARGIN), highest * (1 + MARGIN)
    safe = np.maximum(mean, 1e-12)
    beyond = np.maximum(np.maximum(np.log(safe / high), np.log(low / safe)), 0.0)
    # A heuristic, since nothing was measured there: a factor two outside the range adds 0.14 to the log spread.
    spread = log_std + 0.2 * beyond
    warning = ""
    if outside := int((beyond > 0).sum()):
        measured = f"{lowest:.3g} to {highest:.3g} {unit}".strip()
        warning = f"{outside} of {len(mean)} networks lie outside the measured {measured}"
    return Estimate.relative(mean, spread, warning)


def estimate_figures(estimate: Estimate, measured: Array) -> dict[str, float]:
    """The figures of an estimate of `(n,)` measured values, with the coverage of its 90 % intervals."""
    inside = (estimate.quantile(0.05) <= measured) & (measured <= estimate.quantile(0.95))
    return figures(np.log(measured / estimate.mean), measured, float(np.mean(inside)))
