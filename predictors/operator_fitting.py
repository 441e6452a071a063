"""How an operator model is fitted: a Gaussian process over operators, observed through the sums that networks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.sparse import csr_matrix, diags_array

from predictors.base import Array
from predictors.operator_features import (
    COORDINATES,
    COSTLIER,
    GROUPS,
    QUANTITIES,
    describe,
    footprints,
    network_kernels,
    strained,
    streamed,
    weights_seldom_used,
)
from search_spaces import Operator, Workload

# Prior of the rates, ms per kernel and per million: a CPU core, but a network's worth of measurements moves all alike.
_START = np.log([0.005, 0.05, 0.3, 0.3, 0.1, 0.05, 0.05, 0.05, 0.05, 0.5])
_RATES = len(QUANTITIES)
_OFFSET = np.log(0.02)
_STREAM = np.log(0.1)  # ms per million weights that come from memory
_CACHE, _CACHE_STD = np.log(8.0), 1.0  # million values: 32 MB in fp32
# Parameters of whole networks, which end a point of the search: log cache, log stream, strain, log offset.
_WHOLE = 4
_STEP = 1e-4  # of a difference that stands for a derivative
_RATE_STD = 3.0  # of the logarithms of the rates that all groups share
_GROUP_STD = 1.0  # of a group's own rates around them
# Of the slope of a group's log cost over a coordinate (per factor of two), and of the smooth rest. Of operators that
# nothing is known of, the last are expected.
BENDS = ((0.02, 0.15), (0.02, 0.3), (0.1, 0.3))
_TREND_STD, _BUMP_STD = BENDS[-1]
_LIMIT = 3.0  # on a trend and rest together: a factor of twenty
_STRAIN_STD = 0.05
_NUGGET = 1e-4
UNSIGNED = np.array([name != "signed" for name in COORDINATES], dtype=float)
_WORTH = 0.1  # an operator that takes this share of a network is worth an inducing point of its own

# Further hyper-parameters that leave-group-out chooses among: length scale in factors of two, noise of a measurement.
LENGTHS = (0.8, 1.5, 3.0)
NOISES = (0.01, 0.02, 0.05)
# Those of networks of many families, for others: chosen once, by how well made-up networks predicted those of a theme
# left out (medleys in eighths) in two runtimes and in int8.
_FOREIGN = BENDS[-1], 2.5, 0.03
_MOST_INDUCING = 512
_FEW = 600  # networks that hyper-parameters are chosen on
_FOLDS = 8


@dataclass(frozen=True)
class Observations:
    """Measured networks as counts of distinct operators.

    Args:
        counts: `(n, d)` sparse, how often each operator occurs in each network.
        groups, quantities, coordinates: of the `d` operators, see `describe`.
        values: `(n,)` what was measured, positive.
        folds: `(n,)` networks with the same number are left out together.
        foreign: the folds are families, and others than these are to be predicted.
    """

    counts: csr_matrix
    groups: NDArray[np.int64]
    quantities: Array
    coordinates: Array
    values: Array
    folds: NDArray[np.int64]
    foreign: bool = False

    @classmethod
    def of(cls, workloads: Sequence[Workload], values: Array, families: Sequence[str] | None) -> Observations:
        index: dict[Operator, int] = {}
        rows, columns, times = [], [], []
        for n, workload in enumerate(workloads):
            for op, count in network_kernels(workload).items():
                rows.append(n)
                columns.append(index.setdefault(op, len(index)))
                times.append(float(count))
        counts = csr_matrix((times, (rows, columns)), shape=(len(workloads), len(index)))
        foreign = families is not None and len(set(families)) > 2
        if foreign:
            folds = np.unique(np.array(families), return_inverse=True)[1]
        else:
            folds = np.random.default_rng(0).permutation(len(workloads)) % min(_FOLDS, len(workloads))
        return cls(counts, *describe(list(index)), values, folds, foreign)

    def rows(self, chosen: NDArray[np.integer]) -> Observations:
        """Some of the networks, and the operators that these have."""
        counts = self.counts[chosen]
        used = np.unique(counts.indices)
        return Observations(
            counts[:, used], self.groups[used], self.quantities[used], self.coordinates[used],
            self.values[chosen], np.unique(self.folds[chosen], return_inverse=True)[1], self.foreign,
        )  # fmt: skip

    @property
    def signed(self) -> bool:
        """Whether any operator reads signed values, and that counts."""
        return bool((self.coordinates @ (1 - UNSIGNED)).any())

    def regardless_of_signs(self) -> Observations:
        """The same, as where reading signed values costs nothing."""
        return replace(self, coordinates=self.coordinates * UNSIGNED)


@dataclass(frozen=True)
class Basis:
    """Inducing operators of the process (Snelson and Ghahramani, NIPS 2005), and what maps operators to features.

    Args:
        groups: `(m,)`, operators of different groups know nothing of each other.
        coordinates: `(m, 9)`.
        length: the squared exponential's scale.
    """

    groups: NDArray[np.int64]
    coordinates: Array
    length: float

    @cached_property
    def factor(self) -> Array:
        """`(m, m)` lower triangular."""
        covariance = self.covariance(self.groups, self.coordinates) + _NUGGET * np.eye(len(self.groups))
        return np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)

    def covariance(self, groups: NDArray[np.int64], coordinates: Array) -> Array:
        """`(n, m)` with the inducing operators."""
        return _kernel(groups, coordinates, self.groups, self.coordinates, self.length)

    def features(self, groups: NDArray[np.int64], coordinates: Array) -> Array:
        """`(n, m)` whose inner products are the process's covariance, as far as the inducing operators tell."""
        if not len(self.groups):
            return np.zeros((len(groups), 0))
        mapped: Array = solve_triangular(self.factor, self.covariance(groups, coordinates).T, lower=True).T
        return mapped

    def unknown(self, groups: NDArray[np.int64], coordinates: Array) -> tuple[Array, Array]:
        """`(n,)` share of the variance that the inducing operators leave, and `(n,)` distance to the nearest."""
        left = np.clip(1 - (self.features(groups, coordinates) ** 2).sum(1), 0.0, 1.0)
        same = groups[:, None] == self.groups[None]
        squared = np.where(same, _squared(coordinates, self.coordinates), np.inf)
        nearest = np.sqrt(squared.min(1, initial=np.inf))
        return left, nearest


@dataclass(frozen=True)
class Parameters:
    """The maximum a posteriori, as numbers.

    Args:
        rates: `(groups, 10)` logarithms of the cost per unit of each quantity.
        trends: `(groups, 9)` slopes over coordinates, from `centre` `(9,)`.
        rest: `(m,)` weights of the basis's covariances.
        offset: what every network costs.
        cache: million values that the last cache holds, see `strained`.
        stream: cost of a million weights that are seldom used and come from memory, see `streamed`.
        strain: power of a network's footprint that its cost grows by, beside what its operators cost each.
        doubt: `(groups,)` standard deviation of the log cost that rates and trends leave.
    """

    rates: Array
    trends: Array
    centre: Array
    rest: Array
    offset: float
    cache: float
    stream: float
    strain: float
    doubt: Array


def costs(p: Parameters, basis: Basis, groups: NDArray[np.int64], quantities: Array, coordinates: Array) -> Array:
    """`(n,)` of operators."""
    bend = ((coordinates - p.centre) * p.trends[groups]).sum(1)
    if len(p.rest):
        bend = bend + basis.covariance(groups, coordinates) @ p.rest
    total: Array = (np.exp(p.rates[groups]) * quantities).sum(1) * np.exp(np.clip(bend, -_LIMIT, _LIMIT))
    return total


def doubts(
    p: Parameters, basis: Basis, groups: NDArray[np.int64], coordinates: Array
) -> tuple[Array, NDArray[np.bool_]]:
    """`(n,)` standard deviation of the log cost of operators, and whether they are outside what was measured."""
    left, nearest = basis.unknown(groups, coordinates)
    reach = np.minimum(nearest, 8.0)
    std = np.sqrt(p.doubt[groups] ** 2 + left * (_BUMP_STD**2 + (_TREND_STD * reach) ** 2))
    return std, nearest > 4.0


@dataclass(frozen=True)
class Fitted:
    """One fit with what it says of networks left out.

    Args:
        parameters, basis: the fit.
        noise: standard deviation of a log measurement.
        signs: whether it matters that operators read signed values; else that coordinate is always 0.
        residuals: `(n,)` ln(measured / predicted by the networks of all other folds).
        spread: `(n,)` standard deviation that those predictions claim.
        trust: `(n,)` in 0..1.
    """

    parameters: Parameters
    basis: Basis
    noise: float
    signs: bool
    residuals: Array
    spread: Array
    trust: Array


def fit(observations: Observations) -> Fitted:
    """The model of measured networks: with the most likely hyper-parameters, and disturbed networks left aside."""
    n = len(observations.values)
    few = observations
    if n > _FEW:
        few = observations.rows(np.sort(np.random.default_rng(0).permutation(n)[:_FEW]))
    trust = np.ones(len(few.values))

    if observations.foreign:
        bend, length, noise = _FOREIGN
    else:
        designs = [_Design(few, length, *bend) for bend in BENDS for length in LENGTHS]
        best = max(designs, key=lambda design: _Problem(design, NOISES[1], trust).solve().score())
        noise = max(NOISES, key=lambda candidate: _Problem(best, candidate, trust).solve().score())
        bend, length = (best.trend_std, best.bump_std), best.length
    ways = [observations, *([observations.regardless_of_signs()] if observations.signed else [])]
    designs = [_Design(o, length, *bend) for o in ways]
    problem = max((_Problem(design, noise, np.ones(n)).solve() for design in designs), key=lambda p: p.score())
    for _ in range(4):
        problem = replace(problem, trust=problem.believed(), start=problem.point).solve()
    return problem.result()


@dataclass(frozen=True)
class _Design:
    """Observations and scales of the prior, and what follows from them before any value is looked at."""

    observations: Observations
    length: float
    trend_std: float
    bump_std: float

    @cached_property
    def present(self) -> NDArray[np.int64]:
        """The groups that occur."""
        return np.unique(self.observations.groups)

    @cached_property
    def own(self) -> NDArray[np.int64]:
        """`(d,)` index into `_present`."""
        return np.searchsorted(self.present, self.observations.groups)

    @cached_property
    def centre(self) -> Array:
        """Mean coordinates of the operators."""
        centre: Array = self.observations.coordinates.mean(0)
        return centre

    @cached_property
    def footprints(self) -> Array:
        """`(n,)` of networks; of one family as if none, so that costs stay sums, as exact limits of a search need."""
        o = self.observations
        touched: Array = o.counts @ (footprints(o.quantities) * o.foreign)
        return touched

    @cached_property
    def seldom(self) -> Array:
        """`(n,)` millions of weights of networks that are seldom used, see `weights_seldom_used`."""
        o = self.observations
        weights: Array = o.counts @ weights_seldom_used(o.quantities, o.coordinates)
        return weights

    def strained(self, cache: float) -> Array:
        """`(n,)` of networks, see `strained`."""
        found: Array = strained(self.footprints, cache)
        return found

    def streamed(self, cache: float) -> Array:
        """`(n,)` millions of seldom used weights that networks read from memory, see `streamed`."""
        found: Array = self.seldom * streamed(self.footprints, cache)
        return found

    @cached_property
    def shares(self) -> csr_matrix:
        """`(n, d)` the share of each network that each operator has, by the prior's rates."""
        o = self.observations
        cost = (np.exp(_START + _COSTLIER[o.groups]) * o.quantities).sum(1)
        part = o.counts @ diags_array(cost)
        return csr_matrix(diags_array(1 / np.asarray(part.sum(1)).ravel()) @ part)

    @cached_property
    def inducing(self) -> NDArray[np.int64]:
        """Operators that matter and differ: pivoted Cholesky, with what they are worth as weight."""
        o = self.observations
        worth = np.minimum(np.asarray(self.shares.max(0).todense()).ravel() / _WORTH, 1.0)
        most = min(_MOST_INDUCING, max(128, 2 * len(o.values)), len(worth))
        left, rows, chosen = np.ones(len(worth)), np.zeros((most, len(worth))), []
        for i in range(most):
            best = int(np.argmax(left * worth))
            if left[best] * worth[best] < 1e-3:
                break
            column = _kernel(o.groups[[best]], o.coordinates[[best]], o.groups, o.coordinates, self.length)[0]
            rows[i] = (column - rows[:i, best] @ rows[:i]) / np.sqrt(left[best])
            left = np.maximum(left - rows[i] ** 2, 0.0)
            left[best] = 0.0
            chosen.append(best)
        return np.array(chosen, dtype=np.int64)

    @cached_property
    def basis(self) -> Basis:
        o = self.observations
        return Basis(o.groups[self.inducing], o.coordinates[self.inducing], self.length)

    @cached_property
    def bumps(self) -> Array:
        """`(d, groups * 9 + m)` features of trends and rest, of unit prior variance."""
        o, size = self.observations, len(COORDINATES)
        trends = np.zeros((len(o.groups), len(self.present) * size))
        columns = self.own[:, None] * size + np.arange(size)
        trends[np.arange(len(o.groups))[:, None], columns] = self.trend_std * (o.coordinates - self.centre)
        return np.hstack([trends, self.bump_std * self.basis.features(o.groups, o.coordinates)])

    @cached_property
    def prior_mean(self) -> Array:
        free = _RATES * len(self.present) + self.bumps.shape[1]
        return np.concatenate([_START, np.zeros(free), [_CACHE, _STREAM, 0.0, _OFFSET]])

    @cached_property
    def precision(self) -> Array:
        own = np.full(_RATES * len(self.present), _GROUP_STD)
        whole = [_CACHE_STD, _RATE_STD, _STRAIN_STD, _RATE_STD]
        std = np.concatenate([np.full(_RATES, _RATE_STD), own, np.ones(self.bumps.shape[1]), whole])
        precision: Array = std**-2.0
        return precision


@dataclass(frozen=True)
class _Problem:
    """Observations under given hyper-parameters, and the point that maximises their posterior once solved.

    The cost of operator o is exp(trend and rest of o) * sum over quantities q of rate(group of o, q) * q(o); a
    network's value is the sum over its operators, its weights from memory and an offset, times a power of its strain
    and log-normal noise. All rates are logarithms with normal priors, a group's own around those that all groups share,
    so that a group of few measurements leans on the others. Everything is positive by construction. Gauss-Newton with
    Levenberg's damping finds the maximum; its normal equations then give the posterior (Laplace), and nearly what
    networks left out would be predicted as.
    """

    design: _Design
    noise: float
    trust: Array
    start: Array | None = None
    state: _State | None = None

    @property
    def observations(self) -> Observations:
        return self.design.observations

    def solve(self, steps: int = 40) -> _Problem:
        """Itself, solved."""
        point = self.design.prior_mean.copy()
        if self.start is None:
            shift = float(np.median(self._evaluate(point).residual))
            point[:_RATES] += shift
            point[[-3, -1]] += shift  # stream and offset
        else:
            point = self.start.copy()
        here = self._evaluate(point)
        damping = 1e-3
        for _ in range(steps):
            jacobian = self._jacobian(here)
            weighted = jacobian * (np.sqrt(self.trust) / self.noise)[:, None]
            normal = weighted.T @ weighted
            normal[np.diag_indices_from(normal)] += self.design.precision
            slope = weighted.T @ (np.sqrt(self.trust) * here.residual / self.noise)
            slope -= (here.point - self.design.prior_mean) * self.design.precision
            there = here
            while damping < 1e8:
                damped = normal.copy()
                damped[np.diag_indices_from(damped)] *= 1 + damping
                step = np.clip(cho_solve(cho_factor(damped), slope), -1.5, 1.5)
                there = self._evaluate(here.point + step)
                if there.loss < here.loss:
                    damping = max(damping / 5, 1e-9)
                    break
                damping *= 5
            gain = here.loss - there.loss
            here = there
            if gain < 1e-3 + 1e-4 * here.loss:
                break
        return replace(self, state=here)

    @property
    def solved(self) -> _State:
        assert self.state is not None, "solve first"
        return self.state

    @property
    def point(self) -> Array:
        return self.solved.point

    def score(self) -> float:
        """Log density of each network given those of the other folds; one that is far off counts as three sigma."""
        residuals, spread = self.left_out
        return float(-np.sum(np.minimum((residuals / spread) ** 2, 9.0) / 2 + np.log(spread)))

    def believed(self) -> Array:
        """`(n,)` trust as of Student's t, three degrees of freedom (Lange et al., JASA 1989).

        Networks of a space are doubted on the slow side alone: interference only ever adds time, so one that is too
        fast for the model is the model's fault. Among networks of many families some are fast by what no sum of
        operators tells, such as strides that a runtime moves to earlier convolutions. No network is dropped.
        """
        leverage = np.minimum((self._weighted @ self._covariance * self._weighted).sum(1), 0.999)
        residual = self.solved.residual / np.sqrt(1 - leverage)
        residual = residual - np.median(residual)
        scale = max(1.4826 * float(np.median(np.abs(residual))), 0.02)
        doubtful = residual if self.observations.foreign else np.maximum(residual, 0.0)
        trust: Array = 3 / (3 + (doubtful / scale) ** 2)
        return trust

    @cached_property
    def left_out(self) -> tuple[Array, Array]:
        """`(n,)` log residuals and their standard deviations, each fold predicted by all others, to first order."""
        residuals, spread = np.empty(len(self.trust)), np.empty(len(self.trust))
        for fold in np.unique(self.observations.folds):
            out = self.observations.folds == fold
            own, raw = self._weighted[out], self._raw[out]
            factor = cho_factor(self._normal - own.T @ own)
            missed = own.T @ (np.sqrt(self.trust[out]) * self.solved.residual[out] / self.noise)
            residuals[out] = self.solved.residual[out] + raw @ cho_solve(factor, missed)
            variance = (raw * cho_solve(factor, raw.T).T).sum(1)
            spread[out] = np.sqrt(self.noise**2 + np.maximum(variance, 0.0))
        return residuals, spread

    def result(self) -> Fitted:
        """The fit, with residuals of left-out folds beside the spread that the finished model would claim for them."""
        o, parameters = self.observations, self._parameters()
        residuals, spread = np.empty(len(self.trust)), np.empty(len(self.trust))
        weight = costs(parameters, self.design.basis, o.groups, o.quantities, o.coordinates)
        for fold in np.unique(o.folds):
            out = o.folds == fold
            rest = replace(self, trust=np.where(out, 0.0, self.trust), start=self.point).solve(10)
            residuals[out] = rest.solved.residual[out]
            seen = np.asarray((self.design.shares[~out]).max(0).todense()).ravel()
            kept = seen[self.design.inducing] > 0.2 * _WORTH
            known = np.zeros(len(GROUPS), dtype=bool)
            known[np.unique(o.groups[seen > 0])] = True
            basis = Basis(self.design.basis.groups[kept], self.design.basis.coordinates[kept], self.design.length)
            without = replace(parameters, doubt=np.where(known, parameters.doubt, _UNSEEN))
            used = np.unique(o.counts[out].indices)
            std, _ = doubts(without, basis, o.groups[used], o.coordinates[used])
            doubt = (o.counts[out][:, used] @ (weight[used] * std)) * self._factor[out] / self.solved.total[out]
            spread[out] = np.sqrt(self.noise**2 + doubt**2)
        return Fitted(parameters, self.design.basis, self.noise, o.signed, residuals, spread, self.trust)

    def _evaluate(self, point: Array) -> _State:
        o, first = self.observations, _RATES + _RATES * len(self.design.present)
        rates = point[:_RATES] + point[_RATES:first].reshape(-1, _RATES)[self.design.own] + _COSTLIER[o.groups]
        parts = np.exp(rates) * o.quantities
        bend = self.design.bumps @ point[first:-_WHOLE]
        cost = parts.sum(1) * np.exp(np.clip(bend, -_LIMIT, _LIMIT))
        cache, stream, strain, offset = point[-_WHOLE:]
        total = o.counts @ cost + np.exp(stream) * self.design.streamed(np.exp(cache)) + np.exp(offset)
        total = total * self.design.strained(np.exp(cache)) ** strain
        residual = np.log(o.values / total)
        loss = (self.trust * (residual / self.noise) ** 2).sum()
        loss += ((point - self.design.prior_mean) ** 2 * self.design.precision).sum()
        return _State(point, parts, cost, total, residual, float(loss))

    def _jacobian(self, at: _State) -> Array:
        """`(n, p)` of the log predictions."""
        o = self.observations
        cache, stream, strain, offset = at.point[-_WHOLE:]
        streamed, strained = self._by_cache(cache)
        more_streamed, more_strained = self._by_cache(cache + _STEP)
        factor = np.exp(strain * strained) / at.total
        from_memory = factor * np.exp(stream)
        by_cache = (from_memory * (more_streamed - streamed) + strain * (more_strained - strained)) / _STEP
        ends = np.column_stack([by_cache, from_memory * streamed, strained, factor * np.exp(offset)])
        weight = csr_matrix(diags_array(factor) @ o.counts @ diags_array(at.cost))
        return np.hstack([*(_dense(weight @ part) for part in self._operator_jacobian(at)), ends])

    def _by_cache(self, cache: float) -> tuple[Array, Array]:
        """`(n,)` weights that come from memory and `(n,)` log strain, at a log cache."""
        return self.design.streamed(np.exp(cache)), np.log(self.design.strained(np.exp(cache)))

    def _operator_jacobian(self, at: _State) -> tuple[Array, csr_matrix, Array]:
        """`(d, 10)`, `(d, 10 * groups)` and `(d, ...)` of operators' log costs: by rates, groups' rates, bumps."""
        share = at.parts / at.parts.sum(1, keepdims=True)
        rows, columns = np.indices(share.shape)
        own = csr_matrix(
            (share.ravel(), (rows.ravel(), (self.design.own[:, None] * _RATES + columns).ravel())),
            shape=(len(share), _RATES * len(self.design.present)),
        )
        return share, own, self.design.bumps

    @cached_property
    def _factor(self) -> Array:
        cache, _, strain, _ = self.point[-_WHOLE:]
        factor: Array = self.design.strained(np.exp(cache)) ** strain
        return factor

    @cached_property
    def _raw(self) -> Array:
        return self._jacobian(self.solved)

    @cached_property
    def _weighted(self) -> Array:
        weighted: Array = self._raw * (np.sqrt(self.trust) / self.noise)[:, None]
        return weighted

    @cached_property
    def _normal(self) -> Array:
        normal: Array = self._weighted.T @ self._weighted
        normal[np.diag_indices_from(normal)] += self.design.precision
        return normal

    @cached_property
    def _covariance(self) -> Array:
        inverse: Array = cho_solve(cho_factor(self._normal), np.eye(len(self._normal)))
        return inverse

    def _parameters(self) -> Parameters:
        point, size = self.point, len(COORDINATES)
        first = _RATES + _RATES * len(self.design.present)
        second = first + size * len(self.design.present)
        rates = point[:_RATES] + _COSTLIER
        rates[self.design.present] += point[_RATES:first].reshape(-1, _RATES)
        trends = np.zeros((len(GROUPS), size))
        trends[self.design.present] = self.design.trend_std * point[first:second].reshape(-1, size)
        rest = np.zeros(0)
        if len(self.design.inducing):
            rest = solve_triangular(
                self.design.basis.factor.T, self.design.bump_std * point[second:-_WHOLE], lower=False
            )
        doubt = np.full(len(GROUPS), _UNSEEN)
        covariance, parts = self._covariance[:-_WHOLE, :-_WHOLE], self._operator_jacobian(self.solved)
        for group in self.design.present:
            members = np.flatnonzero(self.observations.groups == group)[:200]
            jacobian = np.hstack([_dense(part[members]) for part in parts])
            doubt[group] = np.sqrt(np.mean((jacobian @ covariance * jacobian).sum(1)))
        log_cache, log_stream, strain, log_offset = point[-_WHOLE:].tolist()
        cache, stream, offset = np.exp([log_cache, log_stream, log_offset]).tolist()
        if not self.observations.foreign:
            stream = 0.0
        return Parameters(rates, trends, self.design.centre, rest, offset, cache, stream, strain, doubt)


@dataclass(frozen=True)
class _State:
    """A point of the search and what it predicts."""

    point: Array
    parts: Array
    cost: Array
    total: Array
    residual: Array
    loss: float


_UNSEEN = 1.0
_COSTLIER = np.array([[np.log(COSTLIER.get((g, q), 1.0)) for q in QUANTITIES] for g in GROUPS])


def _dense(matrix: Array | csr_matrix) -> Array:
    dense: Array = matrix.toarray() if isinstance(matrix, csr_matrix) else matrix
    return dense


def _squared(x: Array, y: Array) -> Array:
    """`(n, m)` squared distances."""
    squared: Array = np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0.0)
    return squared


def _kernel(g: NDArray[np.int64], x: Array, h: NDArray[np.int64], y: Array, length: float) -> Array:
    """`(n, m)` within groups, zero between them: half of it of all coordinates at once, half of each alone.

    The first is a squared exponential, which tells what is special about operators that are alike in everything. The
    second, a mean of rational quadratics, learns what one size does wherever the others were (additive Gaussian
    processes: Duvenaud et al., NIPS 2011).
    """
    covariance = np.zeros((len(g), len(h)))
    for group in np.intersect1d(g, h):
        rows, columns = np.flatnonzero(g == group), np.flatnonzero(h == group)
        together, alone = np.zeros((2, len(rows), len(columns)))
        for a, b in zip(x[rows].T / length, y[columns].T / length, strict=True):
            squared = (a[:, None] - b) ** 2
            together += squared
            alone += 1 / (1 + squared)
        covariance[np.ix_(rows, columns)] = np.exp(-0.5 * together) / 2 + alone / (2 * x.shape[1])
    return covariance
