"""From probabilities of choices to architectures: the likely ones, and those of them that costs and targets ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nasbench.objectives import Objective, violations
from nasbench.variation import first_of_each
from predictors.base import BoundPredictor
from search_spaces import SearchSpace
from search_spaces.base import Archs

_SAMPLES = 2048
_PAIRS = 20_000  # changes of two knobs at once that are looked at
# How near a target is near enough to let the likelihood decide: what LightNAS is published to reach (Luo et al., 2022).
TOLERANCE = 0.005

Probabilities = Sequence[NDArray[np.float64]]


def likely(space: SearchSpace, probabilities: Probabilities, rng: np.random.Generator) -> Archs:
    """Distinct permitted architectures `(n, K)`: the most likely one, its surroundings, and samples.

    The surroundings are all changes of one knob and of two (of many pairs a random part): where every knob's choice is
    settled, samples repeat themselves, and a cost that is just missed is met by changing as little as possible. The
    most likely architecture comes first if it is permitted. Where none of these are, because likely choices are
    permitted one by one but not together, random ones are taken.
    """
    best = np.array([p.argmax() for p in probabilities])
    columns = [rng.choice(len(p), size=_SAMPLES, p=p / p.sum()) for p in probabilities]
    knobs, choices = np.array(
        [(k, c) for k, p in enumerate(probabilities) for c in np.flatnonzero(p > 0) if c != best[k]], dtype=np.int64
    ).reshape(-1, 2).T  # fmt: skip
    first, second = np.triu_indices(len(knobs), 1)
    apart = np.flatnonzero(knobs[first] != knobs[second])
    if len(apart) > _PAIRS:
        apart = np.sort(rng.choice(apart, _PAIRS, replace=False))
    first, second = first[apart], second[apart]
    around = np.tile(best, (1 + len(knobs) + len(apart), 1))
    singles, pairs = around[1 : 1 + len(knobs)], around[1 + len(knobs) :]
    singles[np.arange(len(knobs)), knobs] = choices
    pairs[np.arange(len(apart)), knobs[first]] = choices[first]
    pairs[np.arange(len(apart)), knobs[second]] = choices[second]
    # Changed before they are made canonical, so that what a change switches on has its most likely choices.
    archs = first_of_each(space.canonical(np.vstack([around, np.column_stack(columns)]).astype(space.dtype)))
    archs = archs[space.permits(archs)]
    return archs if len(archs) else first_of_each(space.sample(_SAMPLES, rng))


def log_likelihood(space: SearchSpace, archs: Archs, probabilities: Probabilities) -> NDArray[np.float64]:
    """Of `(n, K)` architectures under independent choices, active knobs only, `(n,)`."""
    logs = [np.log(np.maximum(p, 1e-300)) for p in probabilities]
    each = np.column_stack([log[column] for log, column in zip(logs, archs.T, strict=True)])
    return np.asarray((each * space.active(archs)).sum(axis=1))


def most_wanted(
    space: SearchSpace,
    probabilities: Probabilities,
    count: int,
    costs: Mapping[str, BoundPredictor],
    objectives: Sequence[Objective],
    targets: Mapping[str, float],
    rng: np.random.Generator,
) -> Archs:
    """Up to `count` distinct architectures: those that keep all limits first, then near all targets, then likely.

    Args:
        objectives: with their limits, which apply to the quantile where they name one.
        targets: costs to land on, by objective name; nearer than `TOLERANCE` is not better.
    """
    archs = likely(space, probabilities, rng)
    beyond, away = np.zeros(len(archs)), np.zeros(len(archs))
    for objective in (o for o in objectives if o.name in costs):
        if not objective.limited and objective.name not in targets:
            continue
        estimate = costs[objective.name].predict(archs)
        if objective.limited:
            value = estimate.mean if objective.quantile is None else estimate.quantile(objective.quantile)
            beyond += violations(value[:, None], (objective,)).sum(axis=1)
        if objective.name in targets:
            gap = np.abs(estimate.mean / targets[objective.name] - 1.0)
            away += np.where(gap <= TOLERANCE, 0.0, gap)
    order = np.lexsort((-log_likelihood(space, archs, probabilities), away, beyond))
    return archs[order[:count]]
