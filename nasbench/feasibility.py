"""Limits checked before a search: what can be reached at all, exactly where the costs allow it, and what is in the way.

Where a cost adds up over blocks (or is their maximum) its minimum is exact over the whole space (`nasbench.factors`);
any other is searched for in a stated budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod

import numpy as np
from numpy.typing import NDArray

from nasbench.factors import LARGEST_TABLE, Factor, least
from nasbench.objectives import Objective, check_contradictions, minimised, violations
from nasbench.strategies.nsga2 import NSGA2
from predictors.base import BoundAdditive, BoundPredictor, Estimate
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

_POPULATION = 200
_STARTS = 4  # features whose least architecture a search starts from
_NAMED = 3  # parts of a cost that are named before the others are summed up


@dataclass(frozen=True)
class Reach:
    """How far one limit could be tightened.

    Args:
        objective: with that limit alone.
        tightest: the best value that any architecture reaches, of the quantile that the limit applies to.
        arch: `(K,)` that reaches it.
        exact: whether nothing better exists; else it is the best value found in the stated budget.
        shares: what that value consists of, largest first: a block or what no choice changes, and its share of it.
            Empty where the predictor is no sum over blocks.
        key: of the limit in `[objectives.NAME]`.
    """

    objective: Objective
    tightest: float
    arch: Archs
    exact: bool
    shares: tuple[tuple[str, float], ...] = ()
    key: str = "limit"

    @property
    def name(self) -> str:
        """The limit as the user finds it in the experiment."""
        return f"objectives.{self.objective.name}.{self.key}"


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
    an evolutionary search finds in `budget` predictions. Limits on one metric that contradict each other are told
    before anything is predicted.

    Args:
        bound: predictor per objective name.
        seed: of that search.

    Raises:
        UserError: a limit that nothing keeps, with the tightest achievable value; or limits that exclude each other,
            with the architecture that comes nearest.
    """
    check_contradictions(objectives)
    limited = [side for o in objectives if o.metric != "accuracy" and o.name in bound for side in o.sides]
    reaches = tuple(_reach(space, key, side, bound[side.name], seed, budget) for key, side in limited)
    if not reaches:
        return FeasibilityReport((), None)
    broken = [r for r in reaches if excess([r.objective], bound)(r.arch[None]).sum() > 0]
    if broken:
        raise UserError("\n".join(_impossible(space, r, budget) for r in broken))
    together, total = _jointly(space, reaches, bound, seed, budget)
    if total > 0:
        # The smallest group of limits that exclude each other is what the user needs to hear of.
        for group in (g for size in range(2, len(reaches)) for g in combinations(reaches, size)):
            nearest, least_total = _jointly(space, group, bound, seed, budget)
            if least_total > 0:
                raise UserError(_exclusive(space, group, nearest, bound, budget))
        raise UserError(_exclusive(space, reaches, together, bound, budget))
    return FeasibilityReport(reaches, together)


def limit_value(objective: Objective, estimate: Estimate) -> NDArray[np.float64]:
    """What the limit applies to: the objective's quantile, or the mean."""
    return estimate.mean if objective.quantile is None else estimate.quantile(objective.quantile)


def _reach(
    space: SearchSpace, key: str, objective: Objective, predictor: BoundPredictor, seed: int, budget: int
) -> Reach:
    """The tightest achievable value of one limit."""

    def value(archs: Archs) -> NDArray[np.float64]:
        return minimised(limit_value(objective, predictor.predict(archs))[:, None], (objective,))

    arch = minimiser(space, predictor, maximise=objective.maximise)
    exact = arch is not None and _rises_with_mean(space, objective, predictor, seed)
    if arch is None or not exact:
        arch, _ = _best(space, value, seed, budget, _cheapest(space, predictor, objective.maximise))
    tightest = float(limit_value(objective, predictor.predict(arch[None]))[0])
    if np.isnan(tightest):
        raise UserError(
            f"objectives.{objective.name}.{key}: the predictor gives no number for any architecture that was tried; "
            "check its table or model for NaN"
        )
    return Reach(objective, tightest, arch, exact, shares(space, predictor, arch), key)


def _cheapest(space: SearchSpace, predictor: BoundPredictor, maximise: bool) -> list[Archs]:
    """Architectures to start a search from: the least of each of the first features that add up, if some do."""
    predictor = getattr(predictor, "corrected", predictor)
    arch = minimiser(space, predictor, maximise=maximise)
    if arch is not None:
        return [arch]
    if not isinstance(predictor, BoundAdditive) or predictor.predictor.reduce != "sum" or _ties_too_many(space):
        return []
    sign = -1.0 if maximise else 1.0
    columns = range(min(predictor.table.shape[1], _STARTS))
    found = (_least(space, [sign * rows[:, c] for _, _, rows in predictor.positions], np.add) for c in columns)
    kept = [arch for arch in found if arch is not None and space.permits(arch[None])[0]]
    return list(np.unique(np.stack(kept), axis=0)) if kept else []


def _rises_with_mean(space: SearchSpace, objective: Objective, predictor: BoundPredictor, seed: int) -> bool:
    if objective.quantile is None:
        return True
    estimate = predictor.predict(space.sample(1000, np.random.default_rng(seed)))
    ordered = estimate.quantile(objective.quantile)[np.argsort(estimate.mean, kind="stable")]
    return bool((np.diff(ordered) >= -1e-9 * np.abs(ordered[1:])).all())


def minimiser(space: SearchSpace, predictor: BoundPredictor, *, maximise: bool = False) -> Archs | None:
    """An architecture `(K,)` with the least (or greatest) expected cost of the whole space, exactly.

    Blocks that were taken out of the space cost without bound, and of a list every row is looked at. None where that is
    not to be had: the predictor is no table over blocks, or its head is not linear, or the space ties too many knobs
    together (tables beyond 10^7 entries). Of equally good choices the first is taken.
    """
    if space.listed is not None:
        values = predictor.predict(space.listed.rows).mean * (-1.0 if maximise else 1.0)
        return space.listed.rows[int(np.where(np.isnan(values), np.inf, values).argmin())]
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
    return any(prod(space.cardinalities[list(knobs)].tolist()) > LARGEST_TABLE for knobs in space.block_knobs)


def _least(space: SearchSpace, costs: Sequence[NDArray[np.float64]], combine: np.ufunc) -> Archs | None:
    """The permitted architecture `(K,)` with the least combination of one cost per position and row of its grid."""
    factors: list[Factor] = []
    for position, cost in enumerate(costs):
        knobs, _, ids = space.block_grid(position)
        possible = np.where(space.permits_blocks(ids), cost, np.inf)
        # What is not a number cannot be promised to keep a limit.
        possible = np.where(np.isnan(possible), np.inf, possible)
        factors.append((knobs, possible.reshape(space.cardinalities[list(knobs)])))
    found = least(factors, space.cardinalities, combine)
    return None if found is None else space.canonical(found[None].astype(space.dtype))[0]


def shares(space: SearchSpace, predictor: BoundPredictor, arch: Archs) -> tuple[tuple[str, float], ...]:
    """What the cost of `arch` `(K,)` consists of: part and share, largest first; empty for no sum or maximum of blocks.

    A block's part is what the network would cost less without it. Blocks that are the same in every architecture (often
    stem and head) and what a network costs without any block are parts of their own. Of a maximum, the block that
    reaches it has all of it.
    """
    predictor = getattr(predictor, "corrected", predictor)
    if not isinstance(predictor, BoundAdditive):
        return ()
    head, ids = predictor.predictor, space.blocks(arch[None])[0]
    predictor.predict(arch[None])  # rows of blocks that were never asked for are made now
    rows = predictor.table[ids][:, : head.leading or None]
    if head.reduce == "max":
        largest = int(rows[:, 0].argmax())
        return ((_part(space, arch, largest), 1.0),)
    # The network as it is, without each of its blocks, and without all.
    without = np.vstack([rows.sum(0), rows.sum(0) - rows, np.zeros((1, rows.shape[1]))])
    with np.errstate(all="ignore"):
        values = np.nan_to_num(head.estimate(without).mean)
    amounts = np.append(values[0] - values[1:-1], values[-1])
    total = amounts[amounts > 0].sum()
    if not total > 0:
        return ()
    parts: dict[str, float] = {}
    for position, amount in enumerate(amounts):
        if position == len(ids):
            name = "fixed overhead"
        elif ids[position] < 0:
            continue
        else:
            name = _part(space, arch, position)
        parts[name] = parts.get(name, 0.0) + max(float(amount), 0.0) / total
    return tuple(sorted(((n, p) for n, p in parts.items() if p > 0), key=lambda part: -part[1]))


def _part(space: SearchSpace, arch: Archs, position: int) -> str:
    """A block by its name and the choices that make it."""
    knobs, _, ids = space.block_grid(position)
    name = space.catalog[int(space.blocks(arch[None])[0, position])].name
    if len(np.unique(ids)) == 1:
        return f"{name}, the same in every architecture"
    chosen = ", ".join(f"{space.knobs[k].name}={space.knobs[k].choices[int(arch[k])]}" for k in knobs)
    return f"block {name} ({chosen})"


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


def least_violation(
    space: SearchSpace, limits: Sequence[Objective], bound: Mapping[str, BoundPredictor], seed: int, budget: int
) -> tuple[Archs, float]:
    """The architecture `(K,)` that breaks the limits least of those an evolutionary search tries, and by how much."""
    seeds = [arch for o in limits for arch in _cheapest(space, bound[o.name], o.maximise)]
    return _best(space, excess(limits, bound), seed, budget, seeds, enough=0.0)


def excess(
    objectives: Sequence[Objective], bound: Mapping[str, BoundPredictor]
) -> Callable[[Archs], NDArray[np.float64]]:
    """Relative violations `(n, L)` of the given limits."""

    def excess(archs: Archs) -> NDArray[np.float64]:
        columns = [limit_value(o, bound[o.name].predict(archs)) for o in objectives]
        return violations(np.column_stack(columns), tuple(objectives))

    return excess


def _jointly(
    space: SearchSpace, group: Sequence[Reach], bound: Mapping[str, BoundPredictor], seed: int, budget: int
) -> tuple[Archs, float]:
    """The architecture with the least total violation found, and that total."""
    initial = np.unique(np.stack([r.arch for r in group]), axis=0)
    return _best(space, excess([r.objective for r in group], bound), seed, budget, list(initial), enough=0.0)


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
        f"{reach.name}: no architecture of space {space.name!r} keeps "
        f"{'at least' if objective.maximise else 'at most'} {objective.limit:g}{unit}{which}. The tightest achievable "
        f"limit is {_amount(objective, reach.tightest)}, {how}, by {_brief(space, reach.arch)}.{_tight(reach)}"
    )


def _tight(reach: Reach) -> str:
    """What that value consists of, in a sentence."""
    if not reach.shares:
        return ""
    named = [f"{share:.0%} {part}" for part, share in reach.shares[:_NAMED]]
    rest = sum(share for _, share in reach.shares[_NAMED:])
    if rest >= 0.005:
        named.append(f"{rest:.0%} in {len(reach.shares) - _NAMED} smaller parts")
    return f" Of that: {'; '.join(named)}."


def _exclusive(
    space: SearchSpace, group: Sequence[Reach], arch: Archs, bound: Mapping[str, BoundPredictor], budget: int
) -> str:
    told = []
    for reach in group:
        objective = reach.objective
        assert objective.limit is not None
        value = float(limit_value(objective, bound[objective.name].predict(arch[None]))[0])
        told.append(
            f"{objective.name} {_amount(objective, value)} (limit {objective.limit:g}, "
            f"alone {_amount(objective, reach.tightest)} can be reached)"
        )
    names = " and ".join(r.name for r in group)
    return (
        f"{names}: each can be kept alone, but none of {budget:,} architectures tried keeps them together. Nearest: "
        f"{'; '.join(told)}, by {_brief(space, arch)}."
    )
