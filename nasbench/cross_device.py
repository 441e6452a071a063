"""Several devices in one run: a search for each and one for all of them, their fronts, and what specialising costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nasbench.evaluators.base import Evaluation, Proposals
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.feasibility import limit_value
from nasbench.objectives import Objective, minimised, violations
from nasbench.pareto import non_dominated_mask
from predictors.base import BoundPredictor, Estimate
from search_spaces import SearchSpace, UserError, nearest
from search_spaces.base import Archs

if TYPE_CHECKING:
    import torch

ALL = "all"
_SAMPLE = 1000  # random architectures whose median is the unit of a cost without a limit


@dataclass(frozen=True)
class Search:
    """One search of a run.

    Args:
        name: the device, or `all`; empty where there is one search.
        objectives: of the front that it looks for, as the run has them.
        evaluator: gives what the strategy sees.
    """

    name: str
    objectives: tuple[Objective, ...]
    evaluator: PredictedEvaluator


def targets_of(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """The devices that objectives are of, in their order."""
    return tuple(dict.fromkeys(o.target for o in objectives if o.target))


def of_target(objectives: Sequence[Objective], target: str) -> tuple[Objective, ...]:
    """The objectives of one device and those of none.

    Raises:
        UserError: no objective is of that device.
    """
    known = targets_of(objectives)
    found = target if target in known else next((t for t in known if t.partition(":")[0] == target), None)
    if found is None:
        raise UserError(f"no objective is of target {target!r}. {nearest(target, known)}")
    return tuple(o for o in objectives if o.target in ("", found))


def searches(
    space: SearchSpace, objectives: tuple[Objective, ...], bound: Mapping[str, BoundPredictor], seed: int
) -> list[Search]:
    """The searches of a run: one where one device is meant; else one per device, and one for networks that serve all.

    The latter looks at the worst device, so that it has no more objectives than the others: of each metric the largest
    over devices, in units of the device's limit, or of the median of random architectures where it has none. All limits
    hold in it.
    """
    targets = targets_of(objectives)
    if len(targets) < 2 or not any(not o.target for o in objectives):
        return [Search("", objectives, PredictedEvaluator(objectives, bound))]
    found = []
    for target in targets:
        own = of_target(objectives, target)
        found.append(Search(target, own, PredictedEvaluator(own, bound)))
    return [*found, Search(ALL, objectives, _joint(space, objectives, bound, seed))]


class WorstCase(BoundPredictor):
    """The largest of several costs, each in a unit of its own; it predicts no uncertainty.

    Args:
        objectives: of one metric, on several devices.
        bound: predictor per objective name.
        units: `(M,)` positive; of what is to be maximised the smallest share counts, turned around.
    """

    def __init__(
        self, objectives: Sequence[Objective], bound: Mapping[str, BoundPredictor], units: NDArray[np.float64]
    ) -> None:
        self.objectives = tuple(objectives)
        self.bound = [bound[o.name] for o in objectives]
        self.units = units

    def predict(self, archs: Archs) -> Estimate:
        shares = np.stack([b.predict(archs).mean for b in self.bound], axis=1) / self.units
        with np.errstate(divide="ignore"):
            worst = np.where([o.maximise for o in self.objectives], 1.0 / shares, shares).max(axis=1)
        return Estimate(worst, np.zeros_like(worst))

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        costs = torch.stack([b.expected(probabilities) for b in self.bound])
        shares = costs / torch.as_tensor(self.units, dtype=costs.dtype)
        turned = torch.tensor([o.maximise for o in self.objectives])
        return torch.where(turned, 1.0 / shares, shares).max()


class _JointEvaluator(PredictedEvaluator):
    """Shared objectives and worst cases; the limits that it tells are those of all devices together.

    Args:
        objectives, bound: what the strategy sees, the last column last.
        limited: objectives whose limits count in place of the last column's own.
        theirs: their predictors.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        bound: Mapping[str, BoundPredictor],
        limited: Sequence[Objective],
        theirs: Mapping[str, BoundPredictor],
    ) -> None:
        super().__init__(objectives, bound)
        self.limited, self.theirs = tuple(limited), theirs

    def evaluate(self, proposals: Proposals) -> Evaluation:
        found = super().evaluate(proposals)
        if not self.limited:
            return found
        values = [limit_value(o, self.theirs[o.name].predict(proposals.archs)) for o in self.limited]
        # The last objective's limit is 1: all limits kept are 1 or less, the largest excess is what is above.
        excess = violations(np.stack(values, axis=1), self.limited).max(axis=1)
        limits = found.values.copy() if found.limit_values is None else found.limit_values
        limits[:, -1] = 1.0 + excess
        return replace(found, limit_values=limits)


def _joint(
    space: SearchSpace, objectives: Sequence[Objective], bound: Mapping[str, BoundPredictor], seed: int
) -> PredictedEvaluator:
    shared = [o for o in objectives if not o.target]
    sample = space.sample(_SAMPLE, np.random.default_rng(seed))
    seen, theirs = list(shared), {o.name: bound[o.name] for o in shared}
    for metric in dict.fromkeys(o.metric for o in objectives if o.target):
        group = [o for o in objectives if o.target and o.metric == metric]
        units = [
            o.limit if o.limit else float(np.nanmedian(np.abs(bound[o.name].predict(sample).mean))) or 1.0
            for o in group
        ]
        worst = Objective(f"worst {metric}", f"worst {metric}")
        theirs[worst.name] = WorstCase(group, bound, np.array(units, dtype=float))
        seen.append(worst)
    limited = [o for o in objectives if o.target and o.limited]
    if limited:
        seen[-1] = replace(seen[-1], limit=1.0)
    return _JointEvaluator(seen, theirs, limited, bound)


def front_of(frame: pd.DataFrame, objectives: Sequence[Objective]) -> pd.DataFrame:
    """The networks of a run's `front.csv` that are non-dominated and within the limits, by these objectives alone."""
    objectives = tuple(objectives)
    values = frame[[o.name for o in objectives]].to_numpy(dtype=float)
    good = (violations(values, objectives).sum(1) == 0) & ~np.isnan(values).any(1) & (frame["kind"] == "front")
    good = np.array(good)
    good[good] = non_dominated_mask(minimised(values[good], objectives))
    return frame[good]


def cross_device(frame: pd.DataFrame, objectives: Sequence[Objective], measure: str = "cost_ratio") -> pd.DataFrame:
    """What a network specialised for one device loses on another: a row per device that it was chosen for, a column per
    device that it runs on.

    In the manner of the tables of ProxylessNAS (Cai, Zhu & Han, ICLR 2019, table 5) and of Once-for-all (Cai et al.,
    ICLR 2020), which run networks made for one device on others; but of whole fronts. Specialised for A are all
    networks on A's front, over everything that the run verified.

    Args:
        measure: `cost_ratio`: cost on B of a network of A's front over the least cost on B of any network on B's front
            that is as good or better in the first objective that needs no device (accuracy); geometric mean over A's
            front. 1 on the diagonal, never below. `loss`: what is lost of that objective at equal cost on B: that of
            the best network on B's front within a cost, less that of the best on A's front within it, the mean over the
            costs of B's front; 0 on the diagonal, NaN where no network of A's keeps the least of these costs.

    Raises:
        UserError: fewer than two devices, no objective without a device, or an unknown measure.
    """
    targets = targets_of(objectives)
    quality = next((o for o in objectives if not o.target and o.maximise), None) or next(
        (o for o in objectives if not o.target), None
    )
    if len(targets) < 2 or quality is None:
        raise UserError(
            "what specialising for a device costs is told of two devices or more, and an objective without a device, "
            f"such as accuracy; this run has {', '.join(targets) or 'no device'}"
        )
    if measure not in ("cost_ratio", "loss"):
        raise UserError(f"measure = {measure!r}. {nearest(measure, ('cost_ratio', 'loss'))}")
    costs = {t: next(o for o in objectives if o.target == t) for t in targets}
    # The pair of objectives alone, without limits: what is compared are networks, not budgets.
    fronts = {
        t: front_of(frame, [replace(o, limit=None, opposite=None) for o in (quality, cost)])
        for t, cost in costs.items()
    }
    sign = 1.0 if quality.maximise else -1.0
    table = np.full((len(targets), len(targets)), np.nan)
    for row, of in enumerate(targets):
        for column, on in enumerate(targets):
            name = costs[on].name
            turn = -1.0 if costs[on].maximise else 1.0
            theirs, best = (fronts[t][[quality.name, name]].to_numpy(dtype=float) for t in (of, on))
            theirs, best = theirs * [sign, turn], best * [sign, turn]
            table[row, column] = _ratio(theirs, best) if measure == "cost_ratio" else _loss(theirs, best)
    return pd.DataFrame(
        table, index=pd.Index(targets, name="specialised for"), columns=pd.Index(targets, name="runs on")
    )


def _ratio(theirs: NDArray[np.float64], best: NDArray[np.float64]) -> float:
    """Geometric mean of their cost over the least cost at equal quality; columns are quality (more is better), cost."""
    if not len(theirs) or not len(best):
        return float("nan")
    as_good = best[None, :, 0] >= theirs[:, None, 0]
    least = np.where(as_good, best[None, :, 1], np.inf).min(axis=1)
    least = np.minimum(least, theirs[:, 1])  # a network of theirs that is on no other front is its own best
    logs = np.log(np.abs(theirs[:, 1])) - np.log(np.abs(least))
    return float(np.exp(np.abs(logs).mean()))


def _loss(theirs: NDArray[np.float64], best: NDArray[np.float64]) -> float:
    """Mean over the costs of `best` of what is lost of quality within that cost."""
    if not len(theirs) or not len(best):
        return float("nan")
    within = theirs[None, :, 1] <= best[:, None, 1]
    reached = np.where(within, theirs[None, :, 0], -np.inf).max(axis=1)
    at_all = np.isfinite(reached)
    ours = np.where(best[None, :, 1] <= best[:, None, 1], best[None, :, 0], -np.inf).max(axis=1)
    return float((ours - reached)[at_all].mean()) if at_all.any() else float("nan")
