"""Bayesian optimisation: an ensemble of predictors chooses what to evaluate; the default strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.strategies.acquisition import ExpectedImprovement
from nasbench.strategies.base import Costs, Strategy
from nasbench.strategies.nsga2 import NSGA2
from nasbench.strategies.surrogate import Encoding, Posterior, Surrogate
from nasbench.variation import mutate, new_rows, sample_distinct
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

Floats = NDArray[np.float64]

_FIT_ROWS = 200  # evaluated rows that hyper-parameters are found from
_REFIT = 1.25  # growth of the data after which they are found again
_SHORT = 500  # candidates that are looked at closely
_LONG_SIZE = 50_000  # candidates for spaces beyond this size are evolved, since random ones are hopeless
_GREEDY = 64  # rows of a batch that are chosen one after the other; a population asked for at once is bred instead
_LOCAL_FROM, _LOCAL_SHARE = 150, 0.01  # evaluations, and share of the space, from which half of a batch are mutants
_PARENTS = 30
_MARGIN = 0.1  # of the range of each objective, by which the reference point lies beyond the worst value
_KNOWN = np.ones(1)


class BayesianOptimization(Strategy):
    """Evaluates where an ensemble of predictors expects the front to grow most.

    After BANANAS (White, Neiswanger & Savani, AAAI 2021: an ensemble of predictors, candidates by mutation), with
    Gaussian processes on a space's knobs and descriptors in place of networks, and for several objectives expected
    hypervolume improvement (Emmerich, Deutz & Klinkenberg 2011; Daulton, Balandat & Bakshy, NeurIPS 2020). A batch is
    chosen greedily, each choice taken as evaluated at its predicted mean before the next. Objectives that cost nothing
    to know (`use_costs`) are not predicted but looked up for every candidate. The chance that limits are kept, and that
    an evaluation does not fail, is a factor.

    From `model_evaluations` on, and for what is asked beyond 64 at once, proposals are bred by NSGA-II from the best of
    all that was seen: where evaluations are so cheap, more of them find more than a model of them.

    Args:
        design: architectures that are spread over the space before anything is predicted.
        model_evaluations: evaluated architectures up to which models choose; their cost grows with the square.
        candidates: architectures that are drawn and bred for a choice.
        population_size: of NSGA-II, which breeds candidates, and takes over in the end.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        design: int = 12,
        model_evaluations: int = 1000,
        candidates: int = 2000,
        population_size: int = 100,
    ) -> None:
        super().__init__(space, seed, initial)
        least = {"design": (design, 2), "model_evaluations": (model_evaluations, 0), "candidates": (candidates, 10)}
        for name, (value, low) in least.items():
            if value < low:
                raise UserError(f"strategy.{name}: must be at least {low}, got {value}")
        self.design = design
        self.model_evaluations = model_evaluations
        self.candidates = candidates
        self._evolution = NSGA2(space, seed, population_size=population_size)
        self._evolution.rng = self.rng
        self._encoding = Encoding(space)
        self._costs: Costs | None = None
        self._asked: Archs = np.empty((0, len(space.knobs)), dtype=space.dtype)
        self._archs, self._shortlist = self._asked, self._asked
        self._values: Floats = np.empty((0, 0))
        self._violations: Floats = np.empty((0, 0))
        self._failed: NDArray[np.bool_] = np.empty(0, dtype=bool)
        self._models: dict[str, Surrogate] = {}
        self._fitted = 0

    def use_costs(self, costs: Costs) -> None:
        self._costs = costs

    def ask(self, n: int) -> Proposals:
        first = max(self.design, 0 if self.initial is None else len(self.initial)) - self.next_id
        usable = len(self._archs) - int(self._failed.sum())
        untaught = n if usable < 2 else min(n, max(first, 0))
        parts = [self._spread(untaught)] if untaught else []
        if n > untaught:
            wanted = n - untaught
            if len(self._archs) < self.model_evaluations:
                modelled = min(wanted, _GREEDY)
                parts.append(self._beside_front(modelled, np.concatenate([self._asked, *parts])))
                parts.append(self._choose(modelled - len(parts[-1]), np.concatenate([self._asked, *parts])))
                wanted -= len(parts[-1]) + len(parts[-2])
            if wanted:
                parts.append(self._evolution.breed(wanted))
        archs = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(self._archs) < self.model_evaluations:
            self._asked = np.concatenate([self._asked, archs])
        return self._proposals(archs)

    def tell(
        self,
        proposals: Proposals,
        values: Floats,
        violations: Floats,
        status: NDArray[np.uint8],
    ) -> None:
        self._evolution.tell(proposals, values, violations, status)
        if len(self._archs) >= self.model_evaluations:
            return
        new, before = new_rows(proposals.archs, self._archs), len(self._archs)
        self._archs = np.concatenate([self._archs, proposals.archs[new]])
        self._values = np.concatenate([self._values.reshape(before, values.shape[1]), values[new]])
        self._violations = np.concatenate([self._violations.reshape(before, violations.shape[1]), violations[new]])
        failed = (status != 0) | ~np.isfinite(values).all(axis=1)
        self._failed = np.concatenate([self._failed, failed[new]])

    def _spread(self, n: int) -> Archs:
        """`n` architectures that need no results: what is left of `initial`, then far from each other.

        Evenly spread over a cost that is known, where there is one; over the knobs, by Hamming distance, otherwise.
        """
        given = self._asked[:0] if self.initial is None else self.initial[self.next_id : self.next_id + n]
        known = np.concatenate([self._asked, given])
        missing = n - len(given)
        if not missing:
            return given
        pool = sample_distinct(self.space, max(500, 2 * missing), self.rng, known)
        if missing > self.design or not new_rows(pool, known).all():  # a population, or hardly any left
            return np.concatenate([given, pool[:missing]])
        cost = self._known(pool)
        column = np.flatnonzero(np.isfinite(cost).all(axis=0))
        if len(column):
            order = np.argsort(cost[:, column[0]], kind="stable")
            low, high = cost[order[[0, -1]], column[0]]
            levels = np.linspace(low, high, missing)
            picked: list[int] = []
            for level in levels:
                nearest = np.argsort(np.abs(cost[:, column[0]] - level), kind="stable")[: len(picked) + 1]
                picked.append(next(int(row) for row in nearest if int(row) not in picked))
            return np.concatenate([given, pool[picked]])
        places = self._encoding.places(pool)
        nearest_distance = np.full(len(pool), places.shape[1] + 1)
        for arch in self._encoding.places(known):
            nearest_distance = np.minimum(nearest_distance, (places != arch).sum(1))
        picked = []
        for _ in range(missing):
            row = int(nearest_distance.argmax())
            picked.append(row)
            nearest_distance = np.minimum(nearest_distance, (places != places[row]).sum(1))
        return np.concatenate([given, pool[picked]])

    def _known(self, archs: Archs) -> Floats:
        """`(n, M)` objectives that cost nothing, NaN elsewhere; `(n, 0)` where there are none."""
        return np.empty((len(archs), 0)) if self._costs is None else np.asarray(self._costs(archs), dtype=np.float64)

    def _beside_front(self, n: int, taken: Archs) -> Archs:
        """Mutants of the best, for about half of a batch of `n` once much of a space is known; none before.

        What is left to find then lies beside the front, and differs from it by what no model of the knobs tells.
        """
        if len(self._archs) < max(_LOCAL_FROM, _LOCAL_SHARE * self.space.size):
            return taken[:0]
        parents = self._evolution.archs[self.rng.integers(min(len(self._evolution.archs), _PARENTS), size=25 * n)]
        mutants = mutate(self.space, parents, self.rng, 0.0)
        return mutants[new_rows(mutants, taken)][: int(n / 2 + self.rng.random())]

    def _choose(self, n: int, taken: Archs) -> Archs:
        """Up to `n` new architectures by expected improvement; fewer where candidates run out."""
        if not n:
            return taken[:0]
        good = ~self._failed
        values, violations = self._values[good], self._violations[good]
        feasible = (violations <= 0).all(axis=1)
        basis = values[feasible] if feasible.any() else values
        low, high = basis.min(axis=0), basis.max(axis=0)
        span = np.where(high > low, high - low, 1.0)
        limits, unlinked = _linked_limits(values, violations)
        reference = np.minimum(high, limits) + _MARGIN * span
        improvement = ExpectedImprovement(values[feasible], reference, self.rng)

        known = self._known(self._archs[:1])
        free = np.isfinite(known[0]) if known.shape[1] else np.zeros(values.shape[1], dtype=bool)
        targets: dict[str, tuple[NDArray[np.bool_], Floats]] = {
            str(m): (good, values[:, m]) for m in np.flatnonzero(~free)
        }
        for column in unlinked:
            targets[f"limit{column}"] = (good, _signed(violations[:, column]))
        if 0.02 < self._failed.mean() < 0.98:
            targets["failed"] = (np.ones_like(good), np.where(self._failed, 1.0, -1.0))
        self._fit(targets)
        beliefs = _Beliefs(self, free, targets, limits, span)

        archs = self._candidates(taken, beliefs, improvement)
        if not len(archs):
            return archs
        beliefs.settle(archs)
        chosen: list[int] = []
        open_rows = np.ones(len(archs), dtype=bool)
        while len(chosen) < n and open_rows.any():
            score = np.where(open_rows, beliefs.score(improvement), -np.inf)
            row = int(score.argmax())
            chosen.append(row)
            open_rows[row] = False
            if len(chosen) < n:
                improvement.add(beliefs.expected(row)[None])
                beliefs.choose(row)
        left = np.argsort(-np.where(open_rows, score, -np.inf), kind="stable")[: min(len(archs) // 2, 200)]
        self._shortlist = archs[left[open_rows[left]]]
        return archs[chosen]

    def _fit(self, targets: Mapping[str, tuple[NDArray[np.bool_], Floats]]) -> None:
        refit = len(self._archs) >= _REFIT * self._fitted
        if refit:
            self._fitted = len(self._archs)
        x = self._encoding.columns(self._archs)
        for name, (rows, values) in targets.items():
            model = self._models.setdefault(
                name, Surrogate(self._encoding, (False, True) if name.isdigit() else (False,))
            )
            some = np.sort(self.rng.permutation(len(values))[:_FIT_ROWS]) if refit else np.arange(0)
            if not len(some) and not model.parameters:
                some = np.arange(min(len(values), _FIT_ROWS))
            model.fit(x[rows], values, refit=refit, rows=some)

    def _candidates(self, taken: Archs, beliefs: _Beliefs, improvement: ExpectedImprovement) -> Archs:
        """The most promising new architectures of many that are drawn at random and bred from the best; canonical."""
        quarter = self.candidates // 4
        drawn = [self.space.sample(quarter, self.rng), self._shortlist]
        if len(self._evolution.archs):
            drawn += [self._evolution.breed(quarter)]
            parents = self._evolution.archs[
                self.rng.integers(min(len(self._evolution.archs), _PARENTS), size=2 * quarter)
            ]
            drawn += [mutate(self.space, parents, self.rng, 0.5 / len(self.space.knobs))]
        archs = np.concatenate(drawn)
        archs = archs[new_rows(archs, taken)]
        if not len(archs):
            return archs
        score = beliefs.guess(archs, improvement)
        for _ in range(2 if self.space.size > _LONG_SIZE else 0):
            best = archs[np.argsort(-score, kind="stable")[:_SHORT]]
            more = mutate(self.space, best, self.rng, 0.5 / len(self.space.knobs))
            more = more[new_rows(more, np.concatenate([taken, archs]))]
            archs, score = np.concatenate([archs, more]), np.concatenate([score, beliefs.guess(more, improvement)])
        return archs[np.argsort(-score, kind="stable")[:_SHORT]]

    def state_dict(self) -> dict[str, Any]:
        own = {
            "asked": self._asked,
            "archs": self._archs,
            "values": self._values,
            "violations": self._violations,
            "failed": self._failed,
            "shortlist": self._shortlist,
            "fitted": self._fitted,
            "parameters": {name: dict(model.parameters) for name, model in self._models.items()},
            "population": {k: v for k, v in self._evolution.state_dict().items() if k not in ("rng", "next_id")},
        }
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        shape = (-1, len(self.space.knobs))
        self._asked, self._archs, self._shortlist = (
            np.asarray(state[name], dtype=self.space.dtype).reshape(shape) for name in ("asked", "archs", "shortlist")
        )
        self._values, self._violations = (
            np.asarray(state[name], dtype=np.float64).reshape(len(self._archs), -1)
            if len(self._archs)
            else np.empty((0, 0))
            for name in ("values", "violations")
        )
        self._failed = np.asarray(state["failed"], dtype=bool)
        self._fitted = int(state["fitted"])
        self._models = {}
        for name, parameters in state["parameters"].items():
            model = Surrogate(self._encoding, (False, True) if name.isdigit() else (False,))
            model.parameters = {member: np.asarray(theta, dtype=np.float64) for member, theta in parameters.items()}
            self._models[name] = model
        self._evolution.load_state_dict({"rng": state["rng"], "next_id": 0} | dict(state["population"]))
        self._evolution.rng = self.rng


class _Beliefs:
    """What is known and believed of candidates: objectives, and the chance to keep limits and not to fail."""

    def __init__(
        self,
        strategy: BayesianOptimization,
        free: NDArray[np.bool_],
        targets: Mapping[str, Any],
        limits: Floats,
        span: Floats,
    ) -> None:
        self._strategy = strategy
        self._free = free
        self._limits = limits
        self._span = span
        self._objectives = [None if f else strategy._models[str(m)] for m, f in enumerate(free)]
        self._conditions = [strategy._models[name] for name in targets if not name.isdigit()]
        self._known: Floats = np.empty((0, 0))
        self._posteriors: list[Posterior | None] = []
        self._chances: list[Posterior] = []

    def guess(self, archs: Archs, improvement: ExpectedImprovement) -> Floats:
        """A cheap score `(n,)`: what an optimistic value would improve, where that may keep the limits."""
        x, known = self._strategy._encoding.columns(archs), self._strategy._known(archs)
        points = [
            known[:, m, None] if model is None else model.guess(x)[:, None] for m, model in enumerate(self._objectives)
        ]
        score = improvement(points, [_KNOWN] * len(points))
        broken = np.zeros(len(archs))
        for m, column in enumerate(points):
            broken += np.maximum(column[:, 0] - self._limits[m], 0.0) / self._span[m]
        for model in self._conditions:
            broken += np.maximum(model.guess(x), 0.0)
        # Without any improvement in sight, what is least bad.
        tiny = 1e-9 * float(np.prod(self._span))
        worst = sum(
            ((p[:, 0] - p[:, 0].min()) / s for p, s in zip(points, self._span, strict=True)), np.zeros(len(archs))
        )
        return np.where(broken > 0, -tiny * (1.0 + broken), score) - tiny * 1e-3 * worst

    def settle(self, archs: Archs) -> None:
        """Look closely at these."""
        x = self._strategy._encoding.columns(archs)
        self._known = self._strategy._known(archs)
        self._posteriors = [None if model is None else model.posterior(x) for model in self._objectives]
        self._chances = [model.posterior(x) for model in self._conditions]

    def _points(self) -> tuple[list[Floats], list[Floats]]:
        points = [
            self._known[:, m, None] if posterior is None else posterior.points()
            for m, posterior in enumerate(self._posteriors)
        ]
        return points, [_KNOWN if p is None else p.weights for p in self._posteriors]

    def score(self, improvement: ExpectedImprovement) -> Floats:
        """Expected improvement `(n,)` times the chance to keep limits; where that is nothing, nearness to them."""
        points, weights = self._points()
        chance, distance = np.ones(len(points[0])), np.zeros(len(points[0]))
        for m in np.flatnonzero(np.isfinite(self._limits)):
            chance *= (points[m] <= self._limits[m]) @ weights[m]
            distance += np.maximum(points[m] - self._limits[m], 0.0) @ weights[m] / self._span[m]
        for posterior in self._chances:
            condition = posterior.points()
            chance *= (condition <= 0) @ posterior.weights
            distance += np.maximum(condition, 0.0) @ posterior.weights
        score = improvement(points, weights) * chance
        tiny = 1e-12 * float(np.prod(self._span))
        return np.where(score > tiny, score, -tiny * distance)

    def expected(self, row: int) -> Floats:
        """Mean objectives `(M,)` of a candidate."""
        points, weights = self._points()
        return np.array([p[row] @ w for p, w in zip(points, weights, strict=True)])

    def choose(self, row: int) -> None:
        """Take a candidate as evaluated."""
        for posterior in (*self._posteriors, *self._chances):
            if posterior is not None:
                posterior.choose(row)


def _linked_limits(values: Floats, violations: Floats) -> tuple[Floats, list[int]]:
    """Limits `(M,)` on objectives, inf for none, as far as violations show them; and the columns that show none.

    A violation is the relative excess over a limit, so that where it is a linear function of an objective's values,
    zero below, that objective needs no second model.
    """
    limits = np.full(values.shape[1], np.inf)
    unlinked = []
    for column, broken in enumerate(violations.T):
        if not (broken > 0).any():
            continue
        excess = np.flatnonzero((broken > 0) & np.isfinite(broken))
        found = False
        for m in range(values.shape[1]):
            y = values[:, m]
            if len(excess) < 2 or np.ptp(y[excess]) <= 0:
                continue
            a, b = excess[y[excess].argmin()], excess[y[excess].argmax()]
            slope = (broken[b] - broken[a]) / (y[b] - y[a])
            if slope <= 0:
                continue
            limit = y[a] - broken[a] / slope
            scale = max(float(broken[b]), 1e-12)
            if np.abs(np.maximum(slope * (y - limit), 0.0) - broken).max() <= 1e-6 * scale:
                limits[m] = min(limits[m], limit)
                found = True
                break
        if not found:
            unlinked.append(column)
    return limits, unlinked


def _signed(broken: Floats) -> Floats:
    """A violation `(n,)` as what a model can learn: -1 where the limit is kept, else above 0 and growing slowly."""
    positive = broken[(broken > 0) & np.isfinite(broken)]
    least = float(np.quantile(positive, 0.05)) if len(positive) else 1.0
    worst = float(positive.max()) if len(positive) else 1.0
    grown = np.log1p(np.minimum(np.where(np.isnan(broken), np.inf, broken), worst) / max(least, 1e-12))
    return np.where(broken > 0, 0.5 + grown, -1.0)
