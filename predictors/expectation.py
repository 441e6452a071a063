"""What any predictor expects of independently chosen knobs, with gradients, from its predictions alone.

The expectation of a function f of independent knobs is linear in each knob's probabilities p: its derivative by the
probability of choice c of knob k is E[f | knob k = c]. So gradient search needs no predictor that torch can
differentiate: predictions will do, of whole-network tables or of a user's own model alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from search_spaces import UserError
from search_spaces.base import Archs

if TYPE_CHECKING:
    from predictors.base import Array, BoundPredictor

ENUMERATED = 50_000  # combinations of choices up to which all are predicted, once, instead of a sample
SAMPLES = 64  # architectures behind each estimate otherwise


def expected(bound: BoundPredictor, probabilities: Sequence[Tensor]) -> Tensor:
    """The mean prediction under independent choices, differentiable in their probabilities.

    Exact where the space has at most `ENUMERATED` combinations: all are predicted in the first call, and kept with the
    predictor. Else the mean over `SAMPLES` architectures, spread evenly over each knob's choices (a Latin hypercube);
    each derivative is the mean over the same architectures with one knob changed. The same probabilities always give
    the same result.

    Args:
        probabilities: per knob `(..., choices)`; inactive knobs have some, too.

    Returns:
        `(...)`.

    Raises:
        UserError: a prediction that is not a number.
    """
    if prod(bound.space.cardinalities.tolist()) <= ENUMERATED:
        return _contracted(torch.as_tensor(bound.every_prediction, dtype=probabilities[0].dtype), probabilities)
    batch = probabilities[0].shape[:-1]
    flat = [p.reshape(-1, p.shape[-1]) for p in probabilities]
    return torch.stack([_estimated(bound, [p[i] for p in flat]) for i in range(len(flat[0]))]).reshape(batch)


def every_prediction(bound: BoundPredictor) -> Array:
    """Mean predictions of all combinations of choices, the last knob's fastest, canonical or not."""
    counts = bound.space.cardinalities.tolist()
    return _predictions(bound, np.indices(counts).reshape(len(counts), -1).T.astype(bound.space.dtype))


def _contracted(table: Tensor, probabilities: Sequence[Tensor]) -> Tensor:
    left = table.to(probabilities[0].device)
    for p in reversed(probabilities):
        left = (left.reshape(*left.shape[:-1], -1, p.shape[-1]) * p[..., None, :]).sum(-1)
    return left[..., 0]


def _estimated(bound: BoundPredictor, probabilities: Sequence[Tensor]) -> Tensor:
    chances = [p.detach().double().cpu().numpy() for p in probabilities]
    rng = np.random.default_rng(0)
    levels = (np.arange(SAMPLES) + 0.5) / SAMPLES
    drawn = np.stack([_chosen(c, rng.permutation(levels)) for c in chances], axis=1).astype(bound.space.dtype)
    changes = [(k, c) for k, p in enumerate(chances) for c in np.flatnonzero(p > 0)]
    changed = np.repeat(drawn[None], len(changes) + 1, axis=0)
    for row, (k, c) in enumerate(changes):
        changed[row, :, k] = c
    means = _predictions(bound, changed.reshape(-1, drawn.shape[1])).reshape(len(changed), SAMPLES).mean(1)
    result = torch.as_tensor(means[-1], dtype=probabilities[0].dtype)
    for (k, c), mean in zip(changes, means[:-1].tolist(), strict=True):
        # Zero in value; the derivative is the conditional mean, less the mean, which a sum of one does not see.
        result = result + (probabilities[k][c] - probabilities[k][c].detach()).cpu() * (mean - float(means[-1]))
    return result


def _chosen(chances: Array, levels: Array) -> Array:
    """The choice at each level of the cumulative distribution."""
    cumulative = np.cumsum(chances)
    return np.searchsorted(cumulative / cumulative[-1], levels, side="right").clip(max=len(chances) - 1)


def _predictions(bound: BoundPredictor, archs: Archs) -> Array:
    means = bound.predict(bound.space.canonical(archs)).mean
    if not np.isfinite(means).all():
        wrong = bound.space.decode(bound.space.canonical(archs[~np.isfinite(means)][:1])[0])
        raise UserError(f"gradient search: the prediction of {wrong} is not a number")
    return means
