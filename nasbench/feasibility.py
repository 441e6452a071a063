"""Limits checked before a search: what can be reached at all, exactly where the costs allow it.

A cost that adds up over blocks (or is their maximum) is a sum (maximum) of one small table per position of the network,
each over the few knobs that its block depends on. Eliminating one knob after the other, every time keeping the best
choice for all combinations of the knobs beside it, gives the exact minimum over the whole space, 10^19 architectures or
not (bucket elimination: Dechter, Artificial Intelligence 113, 1999; min-sum, and min-max for maxima).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
from numpy.typing import NDArray

from nasbench.objectives import Objective, minimised, violations
from nasbench.strategies.nsga2 import NSGA2
from predictors.base import BoundAdditive, BoundPredictor, Estimate
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

_LARGEST_TABLE = 10**7  # entries of an intermediate table; beyond it the minimum is searched for instead
_POPULATION = 200
Factor = tuple[tuple[int, ...], NDArray[np.float64]]  # knobs, and a value per combination of their choices


@dataclass(frozen=True)
class Reach:
    """How far one limit could be tightened.

    Args:
        objective: with its limit.
        tightest: the best value that any architecture reaches, of the quantile that the limit applies to.
        arch: `(K,)` that reaches it.
        exact: whether nothing better exists; else it is the best value found in the stated budget.
    """

    objective: Objective
    tightest: float
    arch: Archs
    exact: bool


@dataclass(frozen=True)
class FeasibilityReport:
    """Limits that can be kept, each alone and all together.

    Args:
        reaches: one per checked limit.
        arch: `(K,)` that keeps all checked limits at once; None if none was checked.
    """

    reaches: tuple[Reach, ...]
    arch: Archs | None


def check_limits(
    space: SearchSpace,
    objectives: Sequence[Objective],
    bound: Mapping[str, BoundPredictor],
    seed: int = 0,
    budget: int = 20_000,
) -> FeasibilityReport:
    """Check that the limits on predicted costs can be kept, one by one and together.

    A limit on accuracy, or on anything without a predictor, is not checked: it is judged at the end. The minimum of a
    single cost is exact where the predictor adds up over blocks with a linear head (or takes their maximum), and the
    limit's quantile rises with the mean (checked on a sample). Otherwise, and for limits together, it is the best that
    an evolutionary search finds in `budget` predictions.

    Args:
        bound: predictor per objective name.
        seed: of that search.

    Raises:
        UserError: a limit that nothing keeps, with the tightest achievable value; or limits that exclude each other,
            with the architecture that comes nearest.
    """
    limited = [o for o in objectives if o.limit is not None and o.metric != "accuracy" and o.name in bound]
    reaches = tuple(_reach(space, o, bound[o.name], seed, budget) for o in limited)
    if not reaches:
        return FeasibilityReport((), None)
    broken = [r for r in reaches if _excess([r.objective], bound)(r.arch[None]).sum() > 0]
    if broken:
        raise UserError("\n".join(_impossible(space, r, budget) for r in broken))
    # The smallest group of limits that exclude each other is what the user needs to hear of.
    together = reaches[0].arch
    for group in (g for size in range(2, len(reaches) + 1) for g in combinations(reaches, size)):
        together, total = _jointly(space, group, bound, seed, budget)
        if total > 0:
            raise UserError(_exclusive(space, group, together, bound, budget))
    return FeasibilityReport(reaches, together)


def _limit_value(objective: Objective, estimate: Estimate) -> NDArray[np.float64]:
    """What the limit applies to: the objective's quantile, or the mean."""
    return estimate.mean if objective.quantile is None else estimate.quantile(objective.quantile)


def _reach(space: SearchSpace, objective: Objective, predictor: BoundPredictor, seed: int, budget: int) -> Reach:
    """The tightest achievable value of one limit."""

    def value(archs: Archs) -> NDArray[np.float64]:
        return minimised(_limit_value(objective, predictor.predict(archs))[:, None], (objective,))

    arch = minimiser(space, predictor, maximise=objective.maximise)
    exact = arch is not None and _rises_with_mean(space, objective, predictor, seed)
    if arch is None or not exact:
        arch, _ = _best(space, value, seed, budget, [] if arch is None else [arch])
    return Reach(objective, float(_limit_value(objective, predictor.predict(arch[None]))[0]), arch, exact)


def _rises_with_mean(space: SearchSpace, objective: Objective, predictor: BoundPredictor, seed: int) -> bool:
    if objective.quantile is None:
        return True
    estimate = predictor.predict(space.sample(1000, np.random.default_rng(seed)))
    ordered = estimate.quantile(objective.quantile)[np.argsort(estimate.mean, kind="stable")]
    return bool((np.diff(ordered) >= -1e-9 * np.abs(ordered[1:])).all())


def minimiser(space: SearchSpace, predictor: BoundPredictor, *, maximise: bool = False) -> Archs | None:
    """An architecture `(K,)` with the least (or greatest) expected cost of the whole space, exactly.

    Blocks that were taken out of the space cost without bound. None where that is not to be had: the predictor is no
    table over blocks, or its head is not linear, or the space ties too many knobs together (tables beyond 10^7
    entries). Of equally good choices the first is taken.
    """
    if not isinstance(predictor, BoundAdditive):
        return None
    linear = predictor.predictor.coefficients
    largest = predictor.predictor.reduce == "max"
    if largest and not maximise and predictor.table.shape[1] == 1:
        # The head of a maximum is taken to rise with it: a bigger worst block never makes a smaller network.
        weights = np.ones(1)
    elif linear is not None and not largest:
        weights = linear[0] * (-1.0 if maximise else 1.0)
    else:
        return None
    if _ties_too_many(space):
        return None
    costs = [rows @ weights for _, _, rows in predictor.positions]
    return _least(space, costs, np.maximum if largest else np.add)


def fewest_blocks(space: SearchSpace, unwanted: NDArray[np.bool_]) -> Archs | None:
    """An architecture `(K,)` with as few of the unwanted blocks `(len(catalog),)` as any; None as in `minimiser`."""
    if _ties_too_many(space):
        return None
    marks = np.append(unwanted, False).astype(float)
    return _least(space, [marks[space.block_grid(p)[2]] for p in range(len(space.block_knobs))], np.add)


def _ties_too_many(space: SearchSpace) -> bool:
    return any(prod(space.cardinalities[list(knobs)].tolist()) > _LARGEST_TABLE for knobs in space.block_knobs)


def _least(space: SearchSpace, costs: Sequence[NDArray[np.float64]], combine: np.ufunc) -> Archs | None:
    """The permitted architecture `(K,)` with the least combination of one cost per position and row of its grid."""
    factors: list[Factor] = []
    for position, cost in enumerate(costs):
        knobs, _, ids = space.block_grid(position)
        possible = np.where(space.permits_blocks(ids), cost, np.inf)
        factors.append((knobs, possible.reshape(space.cardinalities[list(knobs)])))
    found = _eliminate(factors, space.cardinalities, combine)
    return None if found is None else space.canonical(found[None].astype(space.dtype))[0]


def _eliminate(factors: list[Factor], cardinalities: NDArray[np.int64], combine: np.ufunc) -> NDArray[np.int64] | None:
    """The choices `(K,)` that minimise the combination of all factors; None if a table would grow too large."""
    best_choices: list[tuple[int, tuple[int, ...], NDArray[np.intp]]] = []
    left = {k for knobs, _ in factors for k in knobs}
    while left:
        # Greedy order: the knob whose elimination makes the smallest table; exact in any order.
        beside = {knob: {k for knobs, _ in factors if knob in knobs for k in knobs} - {knob} for knob in sorted(left)}
        knob = min(beside, key=lambda k: prod(int(cardinalities[j]) for j in beside[k]))
        scope = (*sorted(beside[knob]), knob)
        shape = tuple(int(cardinalities[k]) for k in scope)
        if prod(shape) > _LARGEST_TABLE:
            return None
        bucket = [f for f in factors if knob in f[0]]
        table = _aligned(bucket[0], scope, shape)
        for factor in bucket[1:]:
            table = combine(table, _aligned(factor, scope, shape))
        best_choices.append((knob, scope[:-1], table.argmin(axis=-1)))
        factors = [f for f in factors if knob not in f[0]] + [(scope[:-1], table.min(axis=-1))]
        left.remove(knob)
    arch = np.zeros(len(cardinalities), dtype=np.int64)
    for knob, scope, choices in reversed(best_choices):
        arch[knob] = choices[tuple(arch[list(scope)])]
    return arch


def _aligned(factor: Factor, scope: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """The factor's table with one axis per knob of `scope`, of length 1 where it does not depend on it."""
    knobs, table = factor
    order = sorted(range(len(knobs)), key=lambda i: scope.index(knobs[i]))
    lengths = [shape[i] if k in knobs else 1 for i, k in enumerate(scope)]
    return np.broadcast_to(table.transpose(order).reshape(lengths), shape)


def _best(
    space: SearchSpace,
    values: Callable[[Archs], NDArray[np.float64]],
    seed: int,
    budget: int,
    initial: Sequence[Archs],
    enough: float = -np.inf,
) -> tuple[Archs, float]:
    """The architecture with the least sum of `values` `(n, M)` that NSGA-II finds in `budget`, and that sum.

    It stops as soon as `enough` is reached.
    """
    strategy = NSGA2(space, seed, np.stack(initial) if len(initial) else None, population_size=_POPULATION)
    best, least = np.zeros(len(space.knobs), dtype=space.dtype), np.inf
    for done in range(0, budget, _POPULATION):
        proposals = strategy.ask(min(_POPULATION, budget - done))
        found = values(proposals.archs)
        total = np.where(np.isnan(found).any(axis=1), np.inf, found.sum(axis=1))
        row = int(total.argmin())
        if total[row] < least or done == 0:
            best, least = proposals.archs[row], float(total[row])
        if least <= enough:
            break
        strategy.tell(proposals, found, np.zeros((len(found), 0)), np.zeros(len(found), dtype=np.uint8))
    return best, least


def _excess(
    objectives: Sequence[Objective], bound: Mapping[str, BoundPredictor]
) -> Callable[[Archs], NDArray[np.float64]]:
    """Relative violations `(n, L)` of the given limits."""

    def excess(archs: Archs) -> NDArray[np.float64]:
        columns = [_limit_value(o, bound[o.name].predict(archs)) for o in objectives]
        return violations(np.column_stack(columns), tuple(objectives))

    return excess


def _jointly(
    space: SearchSpace, group: Sequence[Reach], bound: Mapping[str, BoundPredictor], seed: int, budget: int
) -> tuple[Archs, float]:
    """The architecture with the least total violation found, and that total."""
    initial = np.unique(np.stack([r.arch for r in group]), axis=0)
    return _best(space, _excess([r.objective for r in group], bound), seed, budget, list(initial), enough=0.0)


def _amount(objective: Objective, value: float) -> str:
    """Four digits and the unit, rounded to the side on which a limit is kept."""
    if value and np.isfinite(value):
        step = 10.0 ** (np.floor(np.log10(abs(value))) - 3)
        value = float((np.floor if objective.maximise else np.ceil)(value / step) * step)
    return f"{value:.10g}" + (f" {objective.unit}" if objective.unit else "")


def _brief(space: SearchSpace, arch: Archs, most: int = 6) -> str:
    choices = [f"{name}={choice}" for name, choice in space.decode(arch).items()]
    return ", ".join(choices[:most]) + (f", and {len(choices) - most} more" if len(choices) > most else "")


def _impossible(space: SearchSpace, reach: Reach, budget: int) -> str:
    objective = reach.objective
    assert objective.limit is not None
    which = "" if objective.quantile is None else f" (quantile {objective.quantile:g} of the prediction)"
    unit = f" {objective.unit}" if objective.unit else ""
    how = "exact over the whole space" if reach.exact else f"the best of {budget:,} architectures tried"
    return (
        f"objectives.{objective.name}.limit: no architecture of space {space.name!r} keeps "
        f"{'at least' if objective.maximise else 'at most'} {objective.limit:g}{unit}{which}. "
        f"The tightest achievable limit is {_amount(objective, reach.tightest)}, {how}, by {_brief(space, reach.arch)}."
    )


def _exclusive(
    space: SearchSpace, group: Sequence[Reach], arch: Archs, bound: Mapping[str, BoundPredictor], budget: int
) -> str:
    told = []
    for reach in group:
        objective = reach.objective
        assert objective.limit is not None
        value = float(_limit_value(objective, bound[objective.name].predict(arch[None]))[0])
        told.append(
            f"{objective.name} {_amount(objective, value)} (limit {objective.limit:g}, "
            f"alone {_amount(objective, reach.tightest)} can be reached)"
        )
    names = " and ".join(f"objectives.{r.objective.name}.limit" for r in group)
    return (
        f"{names}: each can be kept alone, but none of {budget:,} architectures tried keeps them together. Nearest: "
        f"{'; '.join(told)}, by {_brief(space, arch)}."
    )
