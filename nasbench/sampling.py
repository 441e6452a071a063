"""Random architectures that keep hard limits, where one in a million does.

Drawing until something fits is hopeless there. Costs that add up over blocks allow draws from the distribution in which
an architecture is exp(-beta . costs) times as likely as before (exponential tilting; Siegmund, Annals of Statistics 4,
1976), exactly and without a Markov chain (`nasbench.factors.Gibbs`). With the beta that moves the mean cost to the
limit, about every second draw keeps it, and what keeps it is thinned to the distribution that `SearchSpace.sample` has
within the limits. Costs that do not add up are tilted by the sum that fits them best near the limit, refitted to draws
as those come nearer; the limits themselves are always judged by the predictors. Where that ends without a foothold, an
evolutionary search looks for one, from which random walks spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from nasbench.factors import Factor, Gibbs
from nasbench.feasibility import excess, least_violation, limit_value
from nasbench.objectives import Objective
from nasbench.variation import mutate, new_rows
from predictors.base import BoundAdditive, BoundPredictor
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

Floats = NDArray[np.float64]
# One step of the ladder of tilts, in standard deviations of the cost: the further, the cheaper.
_LADDER = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_ROUNDS = 8  # of fitting sums to costs that are none
_PROBES = 1024  # draws per round and step of the ladder
_MOST_DATA = 8 * _PROBES  # that a sum is fitted to
_ENOUGH = 0.1  # share of them within the limits that ends the rounds
_STEEPEST = 300.0  # per standard deviation of the cost
_BATCH, _LARGEST_BATCH = 256, 2**17
_LEAST_SHARE = 1e-4  # of draws within the limits, below which walks are cheaper


@dataclass(frozen=True)
class _Sum:
    """A limit with the tables whose weighted sum stands for its cost; less is better.

    Args:
        objective: one side, with its limit.
        positions: per position its knobs, and features `(combinations, F)`.
        weights: `(F,)` where the cost is that sum exactly, and its `offset`; else None.
    """

    objective: Objective
    predictor: BoundPredictor
    positions: Sequence[tuple[tuple[int, ...], Floats]]
    weights: Floats | None
    offset: float = 0.0

    @property
    def sign(self) -> float:
        return -1.0 if self.objective.maximise else 1.0

    def value(self, archs: Archs) -> Floats:
        return self.sign * limit_value(self.objective, self.predictor.predict(archs))


class FeasibleSampler:
    """Draws architectures of a space that keep all limits on predicted costs.

    Build once, draw often: building finds the tilt (some ten thousand predictions where costs are no sums, none where
    they are), and a draw costs some microseconds.

    Args:
        space: blocks that were taken out of it are never drawn.
        objectives: with their limits; those without a predictor are not looked at.
        bound: predictor per objective name.
        seed: of what building draws.
        start: `(m, K)` architectures that are known to keep the limits (such as `check_limits` found); may be None.
        budget: most predictions for building, and per call for each batch of draws.

    Attributes:
        share: of the space's own distribution that keeps the limits, estimated; NaN where costs are no sums.

    Raises:
        UserError: nothing within the limits was found in the budget.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        bound: Mapping[str, BoundPredictor],
        *,
        seed: int = 0,
        start: Archs | None = None,
        budget: int = 50_000,
    ) -> None:
        self.space = space
        self.limits = tuple(side for o in objectives if o.name in bound for _, side in o.sides)
        self._excess = excess(self.limits, bound) if self.limits else None
        self._rows: Archs | None = None
        self._budget = budget
        rng = np.random.default_rng(seed)
        self._masks = _masks(space)
        self._plain: list[Factor] = list(self._masks)
        sums: list[_Sum] = []
        for limit in self.limits:
            blocked = _largest_blocks(space, limit, bound[limit.name])
            if blocked is None:
                sums.append(_sum(space, limit, bound[limit.name]))
            else:
                self._masks += blocked
        self._ladder: list[Gibbs] = []
        self._tilt = np.zeros(len(sums))
        self._known = np.empty((0, len(space.knobs)), dtype=space.dtype)
        if start is not None and len(start):
            self._keep(space.canonical(space.check(start)))
        self._shares = np.zeros(0)
        self.share = np.nan
        if self.limits and space.listed is not None:
            # So few that each can be looked at.
            self._rows = space.listed.rows[self._within(space.listed.rows)]
            self._known = self._rows
            self.share = len(self._rows) / len(space.listed)
        elif self.limits:
            self._fit(sums, rng)
        if self.limits:
            self._foothold(bound, seed)

    def draw(self, n: int, rng: np.random.Generator, *, spread: bool = True) -> Archs:
        """`n` architectures `(n, K)` within the limits, repeats possible.

        Args:
            spread: from what just keeps the limits down to the cheapest, for populations that are to find a front.
                Otherwise as `space.sample` would draw within the limits, which crowds at them: exactly, where all
                costs are sums over blocks (or maxima), else nearly.

        Raises:
            UserError: the budget ended before `n` were found, which only happens without `spread`.
        """
        if not self.limits:
            return self.space.sample(n, rng)
        if self._rows is not None:
            return self._rows[rng.integers(len(self._rows), size=n)]
        found = self._empty()
        levels = np.flatnonzero(self._shares > _LEAST_SHARE) if spread else np.arange(min(1, len(self._ladder)))
        # An equal part from each step of the ladder; which ones get what is left over is chance.
        turns = rng.permutation(len(levels))
        share, rest = divmod(n, max(len(levels), 1))
        quota = share + (turns < rest)
        for level, wanted in zip(levels.tolist(), quota, strict=True):
            found = np.concatenate([found, self._from(level, int(wanted), rng, thin=not spread)])
        if len(found) < n:
            if not spread:
                raise UserError(
                    f"{self.space.name}: only {len(found)} of {n} architectures within the limits were found in "
                    f"{self._budget:,} draws; draw with spread, or loosen a limit"
                )
            found = np.concatenate([found, self._walks(n - len(found), found, rng)])
        return rng.permutation(found[:n])

    def _empty(self) -> Archs:
        return np.empty((0, len(self.space.knobs)), dtype=self.space.dtype)

    def _within(self, archs: Archs) -> NDArray[np.bool_]:
        """Which canonical architectures are permitted and keep all limits."""
        assert self._excess is not None
        good = self.space.permits(archs)
        good[good] = self._excess(archs[good]).sum(axis=1) == 0
        return good

    def _keep(self, archs: Archs, most: int = 256) -> None:
        """Remember some architectures within the limits."""
        if len(archs) and self.limits:
            archs = archs[self._within(archs)]
        self._known = np.concatenate([self._known, archs])
        self._known = self._known[new_rows(self._known)][:most]

    def _from(self, level: int, n: int, rng: np.random.Generator, *, thin: bool) -> Archs:
        """Up to `n` draws of one step of the ladder that keep the limits."""
        parts, count, tried = [self._empty()], 0, 0
        size = _BATCH
        while count < n and tried < max(self._budget, 50 * n):
            raw = self._ladder[level].draw(size, rng)
            tried += size
            archs = self.space.canonical(raw.astype(self.space.dtype))
            good = self._within(archs)
            if thin:
                # Tilted weights are undone: of what keeps the limits, that far below them becomes rare again.
                good &= rng.random(size) < np.exp(np.minimum(self._scores(raw) @ self._tilt, 0.0))
            parts.append(archs[good])
            count += int(good.sum())
            rate = max(count, 0.5) / tried
            size = int(min(max(1.1 * (n - count) / rate, _BATCH), _LARGEST_BATCH))
        return np.concatenate(parts)[:n]

    # Building -------------------------------------------------------------------------------------------------------

    def _fit(self, sums: Sequence[_Sum], rng: np.random.Generator) -> None:
        """Find the tilt, and the ladder of steeper ones."""
        try:
            plain = Gibbs(self._masks, self.space.cardinalities)
        except ValueError:
            # Too many knobs in one table: blocks that were taken out are left to rejection.
            self._masks = [m for m in self._masks if len(m[0]) == 1]
            self._plain = []
            plain = Gibbs(self._masks, self.space.cardinalities)
        if not np.isfinite(plain.log_total):
            return  # no combination of blocks at all; the search for a foothold will tell
        self._gibbs, self._tables = plain, [list[Factor]() for _ in sums]
        self._goals = np.zeros(len(sums))
        data = [(np.empty((0, s.positions[0][1].shape[1])), np.empty(0)) for s in sums]
        for _ in range(_ROUNDS):
            raw = np.concatenate([g.draw(_PROBES, rng) for g in (self._ladder or [plain])])
            archs = self.space.canonical(raw.astype(self.space.dtype))
            for i, s in enumerate(sums):
                features = _features(self.space, s.positions, raw)
                if s.weights is not None:
                    weights, goal = s.weights, s.sign * float(s.objective.limit or 0.0) - s.offset
                else:
                    values = s.value(archs)
                    ok = np.isfinite(values)
                    data[i] = (
                        np.concatenate([data[i][0], features[ok]])[-_MOST_DATA:],
                        np.concatenate([data[i][1], values[ok]])[-_MOST_DATA:],
                    )
                    if not len(data[i][1]):
                        return
                    weights, goal = _fitted(*data[i], s.sign * float(s.objective.limit or 0.0))
                score = _features(self.space, s.positions, plain.draw(_PROBES, rng)) @ weights
                centre, spread = float(score.mean()), max(float(score.std()), 1e-12 * (1.0 + abs(float(score.mean()))))
                # Standard units: the mean of the space at 0, the limit at `goal`.
                share = centre / len(s.positions)
                self._tables[i] = [
                    (knobs, (rows @ weights - share).reshape(self.space.cardinalities[list(knobs)]) / spread)
                    for knobs, rows in s.positions
                ]
                self._goals[i] = (goal - centre) / spread
            self._solve()
            self._shares = np.array([self._within(self._probe(g, rng)).mean() for g in self._ladder])
            if self._shares[0] >= _ENOUGH or all(s.weights is not None for s in sums):
                break
        for gibbs in self._ladder:
            self._keep(self._probe(gibbs, rng))
        if all(s.weights is not None for s in sums) and self._shares[0] > 0:
            raw = self._ladder[0].draw(16 * _PROBES, rng)
            good = self._within(self.space.canonical(raw.astype(self.space.dtype)))
            undone = np.exp(self._scores(raw)[good] @ self._tilt).sum() / len(raw)
            log = self._ladder[0].log_total + float(self._tilt @ self._goals)
            if len(self._plain) or not self.space.restricted:
                log -= Gibbs(self._plain, self.space.cardinalities).log_total
                self.share = float(undone * np.exp(log))

    def _probe(self, gibbs: Gibbs, rng: np.random.Generator) -> Archs:
        return self.space.canonical(gibbs.draw(_PROBES, rng).astype(self.space.dtype))

    def _tilted(self, tilt: Floats) -> Gibbs:
        factors = list(self._masks)
        for strength, tables in zip(tilt.tolist(), self._tables, strict=True):
            factors += [(knobs, -strength * table) for knobs, table in tables]
        return Gibbs(_merged(factors), self.space.cardinalities)

    def _solve(self) -> None:
        """The tilt that brings the mean of each cost to its limit where it lies beyond: the dual of maximal entropy."""
        if len(self._goals):

            def dual(tilt: Floats) -> float:
                return self._tilted(tilt).log_total + float(tilt @ self._goals)

            bounds = [(0.0, _STEEPEST)] * len(self._goals)
            start = np.clip(-self._goals, 0.0, 20.0)
            found = minimize(dual, start, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30, "maxfun": 200})
            self._tilt = np.clip(found.x, 0.0, _STEEPEST)
        norm = float(np.linalg.norm(self._tilt))
        count = max(len(self._tilt), 1)
        towards = self._tilt / norm if norm > 0.1 else np.full(len(self._tilt), count**-0.5)
        steps = _LADDER if len(self._tilt) else (0.0,)
        self._ladder = [self._tilted(self._tilt + step * towards) for step in steps]

    def _scores(self, raw: NDArray[np.int64]) -> Floats:
        """`(n, limits)` how far above its limit each sum is, in standard units."""
        columns = [
            sum(
                (table[tuple(raw[:, k] for k in knobs)] if knobs else np.full(len(raw), float(table)))
                for knobs, table in tables
            )
            - goal
            for tables, goal in zip(self._tables, self._goals.tolist(), strict=True)
        ]
        return np.stack(columns, axis=1) if columns else np.zeros((len(raw), 0))

    def _foothold(self, bound: Mapping[str, BoundPredictor], seed: int) -> None:
        """At least one architecture within the limits, by search where draws found none.

        Raises:
            UserError: none in the budget.
        """
        if len(self._known):
            return
        arch, total = least_violation(self.space, self.limits, bound, seed, self._budget)
        if total > 0 or not self.space.permits(arch[None])[0]:
            names = ", ".join(dict.fromkeys(limit.name for limit in self.limits))
            raise UserError(
                f"{self.space.name}: none of {self._budget:,} architectures tried keeps the limits on {names}; "
                "check_limits tells which of them is too tight"
            )
        self._known = arch[None]

    def _walks(self, n: int, found: Archs, rng: np.random.Generator) -> Archs:
        """`n` ends of random walks of single changes within the limits, from what is known to keep them."""
        starts = np.concatenate([self._known, found])
        here = starts[rng.integers(len(starts), size=n)]
        for _ in range(4 * len(self.space.knobs)):
            there = mutate(self.space, here, rng, 1.0 / len(self.space.knobs))
            moves = self._within(there)
            here = np.where(moves[:, None], there, here)
        return here


def limited_space(
    space: SearchSpace,
    objectives: Sequence[Objective],
    bound: Mapping[str, BoundPredictor],
    *,
    seed: int = 0,
    start: Archs | None = None,
) -> SearchSpace:
    """The space with random architectures drawn within the limits on predicted costs, for strategies to start from.

    The space itself where no predicted cost has a limit. Arguments as of `FeasibleSampler`.

    Raises:
        UserError: nothing within the limits was found.
    """
    if not any(o.limited and o.name in bound for o in objectives):
        return space
    return space.drawn_by(FeasibleSampler(space, objectives, bound, seed=seed, start=start).draw)


def sample_feasible(
    space: SearchSpace,
    n: int,
    rng: np.random.Generator,
    objectives: Sequence[Objective],
    bound: Mapping[str, BoundPredictor],
    *,
    spread: bool = True,
    start: Archs | None = None,
) -> Archs:
    """`n` random architectures `(n, K)` that keep all limits on predicted costs; see `FeasibleSampler`.

    Raises:
        UserError: nothing within the limits was found.
    """
    sampler = FeasibleSampler(space, objectives, bound, seed=int(rng.integers(2**31)), start=start)
    return sampler.draw(n, rng, spread=spread)


def _masks(space: SearchSpace) -> list[Factor]:
    """Logarithmic factors that are -inf for what a restricted space does not permit or offer."""
    if not space.restricted:
        return []
    masks: list[Factor] = []
    for k, count in enumerate(space.cardinalities.tolist()):
        offered = np.full(count, -np.inf)
        offered[space.menu.choices(k)] = 0.0
        masks.append(((k,), offered))
    for position in range(len(space.block_knobs)):
        knobs, _, ids = space.block_grid(position)
        good = space.permits_blocks(ids)
        if not good.all():
            masks.append((knobs, np.where(good, 0.0, -np.inf).reshape(space.cardinalities[list(knobs)])))
    return masks


def _largest_blocks(space: SearchSpace, limit: Objective, predictor: BoundPredictor) -> list[Factor] | None:
    """Factors that leave out every block beyond an upper limit on a maximum over blocks; None for other costs."""
    if limit.maximise or not isinstance(predictor, BoundAdditive) or predictor.predictor.reduce != "max":
        return None
    if predictor.table.shape[1] != 1:
        return None
    masks: list[Factor] = []
    for knobs, _, rows in predictor.positions:
        values = limit_value(limit, predictor.predictor.estimate(rows))
        good = values <= float(limit.limit or 0.0)
        if not good.all():
            masks.append((knobs, np.where(good, 0.0, -np.inf).reshape(space.cardinalities[list(knobs)])))
    return masks


def _sum(space: SearchSpace, limit: Objective, predictor: BoundPredictor) -> _Sum:
    """The tables that a limit's cost is tilted by: of its predictor where that has some, else one per knob."""
    inner = getattr(predictor, "corrected", predictor)
    sign = -1.0 if limit.maximise else 1.0
    if isinstance(inner, BoundAdditive) and inner.predictor.reduce == "sum":
        head = inner.predictor
        linear = head.coefficients if inner is predictor and limit.quantile is None else None
        positions = [(knobs, rows) for knobs, _, rows in inner.positions]
        if linear is not None:
            columns = [(knobs, sign * (rows @ linear[0])[:, None]) for knobs, rows in positions]
            return _Sum(limit, predictor, columns, np.ones(1), sign * linear[1])
        features = head.leading or positions[0][1].shape[1]
        if features <= 64:
            return _Sum(limit, predictor, [(knobs, rows[:, :features]) for knobs, rows in positions], None)
    total = int(space.cardinalities.sum())
    single: list[tuple[tuple[int, ...], Floats]] = []
    for k, count in enumerate(space.cardinalities.tolist()):
        first = int(space.cardinalities[:k].sum())
        single.append(((k,), np.eye(total)[first : first + count]))
    return _Sum(limit, predictor, single, None)


def _features(
    space: SearchSpace, positions: Sequence[tuple[tuple[int, ...], Floats]], raw: NDArray[np.int64]
) -> Floats:
    """`(n, F)` sums over positions."""
    out = np.zeros((len(raw), positions[0][1].shape[1]))
    for knobs, rows in positions:
        counts = space.cardinalities[list(knobs)]
        at = np.ravel_multi_index(tuple(raw[:, k] for k in knobs), tuple(counts)) if knobs else np.zeros(len(raw), int)
        out += rows[at]
    return out


def _fitted(features: Floats, values: Floats, limit: float) -> tuple[Floats, float]:
    """Weights of the sum that follows `values` best around `limit`, and the sum where the value is the limit."""
    distance = np.abs(values - limit)
    near = np.exp(-0.5 * (distance / max(float(np.median(distance)), 1e-12)) ** 2) + 0.05
    mean, spread = np.average(features, axis=0, weights=near), features.std(axis=0)
    scaled = (features - mean) / np.where(spread > 0, spread, 1.0)
    target = np.average(values, weights=near)
    gram = (scaled * near[:, None]).T @ scaled
    gram[np.diag_indices_from(gram)] += 1e-6 * max(float(np.trace(gram)) / len(gram), 1e-12)
    weights = np.linalg.solve(gram, (scaled * near[:, None]).T @ (values - target)) / np.where(spread > 0, spread, 1.0)
    return weights, limit - target + float(mean @ weights)


def _merged(factors: Sequence[Factor]) -> list[Factor]:
    """Factors over the same knobs added up."""
    merged: dict[tuple[int, ...], Floats] = {}
    for knobs, table in factors:
        merged[knobs] = merged[knobs] + table if knobs in merged else table
    return list(merged.items())
