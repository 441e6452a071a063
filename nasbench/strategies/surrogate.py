"""What model-based strategies believe of an objective: Gaussian processes over a space's knobs and descriptors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import logsumexp

from search_spaces import SearchSpace
from search_spaces.base import Archs

Floats = NDArray[np.float64]

# Points that stand for a normal distribution, with their weights: even steps keep the tails, where improvement lies.
NODES: Floats = np.linspace(-3.0, 3.0, 13)
WEIGHTS: Floats = np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum()

_JITTER = 1e-6
_STEPS = 25  # of the optimiser for hyper-parameters at the first fit; a third where it goes on from earlier ones
_LEAST_SHARE = 0.05  # members of the ensemble with less weight are left out


class Encoding:
    """Architectures as columns that kernels compare, for any space.

    One-hot columns of every knob, with one more for "inactive" where a knob can be; and, over knobs that share a list
    of choices, how many take each choice: what "three 3x3 convolutions, wherever" means. Behind them the space's own
    descriptors, where it has any.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.knobs = np.array(space.feature_knobs, dtype=np.intp)
        counts = space.cardinalities[self.knobs]
        self._first = np.concatenate([[0], np.cumsum(counts + 1)]).astype(np.intp)
        self.width = int(self._first[-1])
        self.knob_of = np.repeat(np.arange(len(self.knobs)), counts + 1)  # (width,) the knob that a column belongs to
        lists: dict[tuple[object, ...], list[int]] = {}
        for place, knob in enumerate(self.knobs):
            lists.setdefault(space.knobs[int(knob)].choices, []).append(place)
        self._groups = [(members, len(choices)) for choices, members in lists.items() if len(members) > 1]
        any_arch = np.zeros((1, len(space.knobs)), dtype=space.dtype)
        self.descriptors = [group.shape[1] for group in space.descriptors(any_arch)]  # columns of each group

    def places(self, archs: Archs) -> NDArray[np.intp]:
        """`(n, knobs)` the one-hot column that each knob marks; the first of a knob's columns means inactive."""
        active = self.space.active(archs)[:, self.knobs]
        return self._first[:-1] + (np.asarray(archs)[:, self.knobs].astype(np.intp) + 1) * active

    def one_hot(self, archs: Archs) -> NDArray[np.float32]:
        """`(n, width)` float32."""
        out = np.zeros((len(archs), self.width), dtype=np.float32)
        np.put_along_axis(out, self.places(archs), 1.0, axis=1)
        return out

    def columns(self, archs: Archs) -> NDArray[np.float32]:
        """`(n, width + sum(descriptors))` float32: one-hot columns, then each group of descriptors."""
        groups = self.space.descriptors(archs) if self.descriptors else ()
        return np.concatenate([self.one_hot(archs), *groups], axis=1, dtype=np.float32)

    def counts(self, one_hot: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(n, C)` share of each group's knobs that take each choice, or are inactive; no columns without groups."""
        out = [
            np.stack([one_hot[:, self._first[members] + c].sum(1) for c in range(choices + 1)], axis=1) / len(members)
            for members, choices in self._groups
        ]
        return np.concatenate(out, axis=1) if out else np.zeros((len(one_hot), 0), dtype=np.float32)


@dataclass(frozen=True)
class Warp:
    """A monotone map of an objective to what a Gaussian process likes: centred, scaled, its bad side compressed or not.

    Objectives such as accuracy have a long tail of bad values that says little about good ones. Values above `centre`
    (worse, as all is minimised) grow logarithmically where `bend` is set.
    """

    centre: float
    scale: float
    bend: bool

    @staticmethod
    def of(values: Floats, bend: bool) -> Warp:
        """Centred at the median; one unit is what lies between it and the best tenth (or the standard deviation)."""
        centre = float(np.median(values)) if bend else float(values.mean())
        spread = float(values.std())
        good = centre - float(np.quantile(values, 0.1)) if bend else spread
        scale = next((s for s in (good, spread) if s > 1e-12 * max(1.0, abs(centre))), 1.0)
        return Warp(centre, scale, bend)

    def __call__(self, values: Floats) -> Floats:
        z = (values - self.centre) / self.scale
        return np.where(z > 0, np.log1p(np.maximum(z, 0.0)), z) if self.bend else z

    def inverse(self, z: Floats) -> Floats:
        """Back to the objective's unit."""
        if self.bend:
            z = np.where(z > 0, np.expm1(np.clip(z, 0.0, 30.0)), z)
        return self.centre + self.scale * z

    def log_slope(self, values: Floats) -> Floats:
        """Logarithm of the map's derivative, so that likelihoods of differently bent targets compare."""
        z = (values - self.centre) / self.scale
        return -np.log(self.scale) - (np.log1p(np.maximum(z, 0.0)) if self.bend else 0.0)


class Kernel(ABC):
    """Covariance of architectures as a sum of terms, with the logarithms of its parameters, the last of them noise."""

    def __init__(self, encoding: Encoding) -> None:
        self.encoding = encoding

    @property
    @abstractmethod
    def prior(self) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the parameters' normal prior: few samples do not suffice to tell them."""

    @abstractmethod
    def cross(
        self, theta: Floats, first: NDArray[np.float32], second: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], ...]:
        """The terms `(n, m)` between rows of `Encoding.columns`, without noise."""

    @abstractmethod
    def variance(self, theta: Floats) -> float:
        """Prior variance of any architecture, without noise."""

    @abstractmethod
    def _gradient(self, theta: Floats, x: NDArray[np.float32], terms: Sequence[Floats], g: Floats) -> Floats:
        """Sum of `g` `(n, n)` times the covariance's derivative by each parameter but noise."""

    def loss(self, theta: Floats, x: NDArray[np.float32], z: Floats) -> tuple[float, Floats]:
        """Negative log posterior of the parameters and its gradient (Rasmussen & Williams, 2006, eq. 5.9)."""
        n, noise = len(z), float(np.exp(theta[-1]))
        terms = [part.astype(np.float64) for part in self.cross(theta, x, x)]
        covariance = np.add.reduce(terms)
        covariance.flat[:: n + 1] += noise + _JITTER
        mean, std = self.prior
        prior = (theta - mean) / std
        try:
            factor = cholesky(covariance, lower=True, check_finite=False, overwrite_a=True)
        except LinAlgError:
            return 1e10, prior / std
        inverse = cho_solve((factor, True), np.eye(n), check_finite=False)
        alpha = inverse @ z
        value = 0.5 * z @ alpha + np.log(np.diag(factor)).sum() + 0.5 * prior @ prior
        g = 0.5 * (inverse - np.outer(alpha, alpha))  # d loss / d covariance
        gradient = np.append(self._gradient(theta, x, terms, g), noise * np.trace(g))
        return float(value), gradient + prior / std


class KnobKernel(Kernel):
    """Knobs one by one, all interactions of knobs, and counts of choices: for any space.

    With one relevance per knob for each of the first two terms:
    `sum_k a_k [x_k = y_k] + s exp(-sum_k w_k [x_k != y_k]) + t exp(-|counts - counts'|^2 / 2 l^2) + noise`.
    The first is a linear model of one-hot knobs, right for costs that add up; the second the exponential of a weighted
    Hamming distance, every order of interaction in it.

    Parameters are logarithms, `(2 K + 4,)`: a, w, s, t, l, noise.
    """

    def __init__(self, encoding: Encoding) -> None:
        super().__init__(encoding)
        self.knobs = len(encoding.knobs)

    @cached_property
    def prior(self) -> tuple[Floats, Floats]:
        k = max(self.knobs, 1)
        mean = np.concatenate([np.full(k, np.log(0.5 / k)), np.full(k, np.log(2.0 / k)), np.log([0.5, 0.3, 0.5, 0.01])])
        std = np.concatenate([np.full(2 * k, 1.2), [1.5, 1.5, 1.0, 1.5]])
        return mean[: 2 * k + 4], std

    def _parts(self, theta: Floats) -> tuple[Floats, Floats, float, float, float]:
        k = max(self.knobs, 1)
        s, t, length, _ = np.exp(theta[2 * k :])
        return np.exp(theta[:k]), np.exp(theta[k : 2 * k]), float(s), float(t), float(length)

    def cross(
        self, theta: Floats, first: NDArray[np.float32], second: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], ...]:
        a, w, s, t, length = self._parts(theta)
        first, second = first[:, : self.encoding.width], second[:, : self.encoding.width]
        of = self.encoding.knob_of
        if not len(of):
            ones = np.ones((len(first), len(second)), dtype=np.float32)
            return ones * np.float32(a.sum()), ones * np.float32(s), ones * np.float32(t)
        additive = (first * a[of].astype(np.float32)) @ second.T
        product = (first * w[of].astype(np.float32)) @ second.T
        product -= np.float32(w.sum())
        np.exp(product, out=product)
        product *= np.float32(s)
        x, y = self.encoding.counts(first), self.encoding.counts(second)
        return additive, product, _radial(x, y, t, length) if x.shape[1] else np.zeros_like(product)

    def variance(self, theta: Floats) -> float:
        a, _, s, t, _ = self._parts(theta)
        return float(a.sum() + s + (t if self.encoding._groups or not self.knobs else 0.0))

    def _gradient(self, theta: Floats, x: NDArray[np.float32], terms: Sequence[Floats], g: Floats) -> Floats:
        _, product, counted = terms
        a, w, _, _, length = self._parts(theta)
        x = x[:, : self.encoding.width]
        k, of = max(self.knobs, 1), self.encoding.knob_of
        gradient = np.zeros(2 * k + 3)

        def by_knob(weighted: Floats) -> Floats:
            """Sum of `weighted * [x_k = y_k]` per knob."""
            columns = np.einsum("nd,nd->d", x, weighted.astype(np.float32) @ x)
            return np.bincount(of, columns, minlength=k).astype(np.float64)

        gh = g * product
        total = gh.sum()
        if len(of):
            gradient[:k] = a * by_knob(g)
            gradient[k : 2 * k] = -w * (total - by_knob(gh))
        gradient[2 * k] = total
        if self.encoding._groups:
            gradient[2 * k + 1 :] = _radial_gradient(self.encoding.counts(x), counted, length, g)
        return gradient


class DescriptorKernel(Kernel):
    """A term `t exp(-|d - d'|^2 / 2 l^2)` for each group of what a space's `descriptors` say of the whole network.

    Few parameters, so that few samples suffice, where the space knows what matters: paths through a cell in place of
    edges (White, Neiswanger & Savani, AAAI 2021). Parameters are logarithms: t and l per group, noise.
    """

    @cached_property
    def prior(self) -> tuple[Floats, Floats]:
        groups = len(self.encoding.descriptors)
        return np.log(np.append(np.tile([0.3, 2.0], groups), 0.01)), np.append(np.tile([1.5, 1.0], groups), 1.5)

    def _groups(self, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return np.split(x[:, self.encoding.width :], np.cumsum(self.encoding.descriptors)[:-1], axis=1)

    def cross(
        self, theta: Floats, first: NDArray[np.float32], second: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], ...]:
        sizes, lengths = np.exp(theta[:-1:2]), np.exp(theta[1:-1:2])
        groups = zip(self._groups(first), self._groups(second), sizes, lengths, strict=True)
        return tuple(_radial(x, y, float(t), float(length)) for x, y, t, length in groups)

    def variance(self, theta: Floats) -> float:
        return float(np.exp(theta[:-1:2]).sum())

    def _gradient(self, theta: Floats, x: NDArray[np.float32], terms: Sequence[Floats], g: Floats) -> Floats:
        parts = zip(self._groups(x), terms, np.exp(theta[1:-1:2]), strict=True)
        return np.concatenate([_radial_gradient(d, term, float(length), g) for d, term, length in parts])


def _radial(x: NDArray[np.float32], y: NDArray[np.float32], size: float, length: float) -> NDArray[np.float32]:
    """`size exp(-|x - y|^2 / 2 length^2)` `(n, m)`."""
    x, y = x / np.float32(length), y / np.float32(length)
    out = x @ y.T
    out -= 0.5 * (x * x).sum(1)[:, None]
    out -= 0.5 * (y * y).sum(1)
    np.minimum(out, 0.0, out=out)
    np.exp(out, out=out)
    out *= np.float32(size)
    return np.asarray(out)


def _radial_gradient(x: NDArray[np.float32], term: Floats, length: float, g: Floats) -> Floats:
    """Sum of `g` times the derivative of `term = _radial(x, x, size, length)` by the logarithms of size and length."""
    c = x.astype(np.float64)
    squared = (c * c).sum(1)
    distance = np.maximum(squared[:, None] + squared - 2 * c @ c.T, 0.0) / length**2
    weighted = g * term
    return np.array([weighted.sum(), (weighted * distance).sum()])


@dataclass(frozen=True)
class Process:
    """A Gaussian process with settled parameters, conditioned on evaluated architectures."""

    kernel: Kernel
    theta: Floats
    warp: Warp
    x: NDArray[np.float32]
    factor: Floats
    alpha: Floats
    score: float  # log predictive density of each evaluated value given the others, summed, in the objective's unit

    @staticmethod
    def fit(kernel: Kernel, theta: Floats, warp: Warp, x: NDArray[np.float32], values: Floats) -> Process:
        """Condition on values `(n,)` at rows `(n, D)` of `Encoding.columns`."""
        z = warp(values)
        n = len(z)
        covariance = sum(part.astype(np.float64) for part in kernel.cross(theta, x, x))
        assert isinstance(covariance, np.ndarray)
        noise = float(np.exp(theta[-1])) + _JITTER
        while True:
            try:
                factor = cholesky(covariance + noise * np.eye(n), lower=True, check_finite=False)
                break
            except LinAlgError:  # single precision in the kernel, hardly any noise
                noise = 10 * noise
        alpha = cho_solve((factor, True), z, check_finite=False)
        # Leave-one-out densities in closed form (Rasmussen & Williams, eq. 5.10-5.12).
        half = solve_triangular(factor, np.eye(n), lower=True, check_finite=False)
        precision = np.einsum("ij,ij->j", half, half)
        density = 0.5 * np.log(precision) - 0.5 * alpha**2 / precision - 0.5 * np.log(2 * np.pi)
        # A single surprise counts for no more than a few nats, as in robust cross-validation.
        return Process(
            kernel, theta, warp, x, factor, alpha, float((np.maximum(density, -8) + warp.log_slope(values)).sum())
        )

    @property
    def noise(self) -> float:
        """Variance of what knobs do not explain."""
        return float(np.exp(self.theta[-1])) + _JITTER

    def mean(self, x: NDArray[np.float32]) -> tuple[Floats, NDArray[np.float32]]:
        """Warped mean `(n,)`, and the covariances `(n, evaluated)` it rests on."""
        cross = np.add.reduce(self.kernel.cross(self.theta, x, self.x))
        return (cross @ self.alpha.astype(np.float32)).astype(np.float64), cross

    def whitened(self, cross: NDArray[np.float32]) -> NDArray[np.float32]:
        """`(evaluated, n)`: posterior covariances are prior ones less products of its columns."""
        factor = self.factor.astype(np.float32)
        return np.asarray(solve_triangular(factor, cross.T, lower=True, check_finite=False), dtype=np.float32)


class Surrogate:
    """One objective's ensemble of Gaussian processes.

    On the knobs, and on what the space's descriptors say where it has any; of the objective as it is, and with its bad
    side compressed. Members weigh by how well each predicts evaluated values that were left out, as Bayesian model
    averaging weighs by likelihoods: a latency that adds up over knobs and an accuracy that depends on what is connected
    find their own. Hyper-parameters are found again when `refit` says so, from where they were.

    Life: `fit` after every batch; `predict` and `update` in between. `parameters` is all that the next fit depends on
    beside the data.
    """

    def __init__(self, encoding: Encoding, bends: Sequence[bool] = (False, True)) -> None:
        self.kernels: dict[str, Kernel] = {"knobs": KnobKernel(encoding)}
        if encoding.descriptors:
            self.kernels["descriptors"] = DescriptorKernel(encoding)
        self.bends = tuple(bends)
        self.parameters: dict[str, Floats] = {}
        self.members: list[tuple[float, Process]] = []

    def fit(self, x: NDArray[np.float32], values: Floats, *, refit: bool, rows: NDArray[np.intp]) -> None:
        """Condition on values `(n,)`; with `refit`, find hyper-parameters from `rows` of them first."""
        fitted = []
        for (name, kernel), bend in product(self.kernels.items(), self.bends):
            key = f"{name} bent" if bend else name
            warp = Warp.of(values, bend)
            if refit or key not in self.parameters:
                start = self.parameters.get(key, kernel.prior[0])
                found = minimize(
                    kernel.loss,
                    start,
                    args=(x[rows], warp(values[rows])),
                    jac=True,
                    method="L-BFGS-B",
                    bounds=[(-12.0, 6.0)] * len(start),
                    options={"maxiter": _STEPS if key not in self.parameters else _STEPS // 3, "maxcor": 10},
                )
                self.parameters[key] = np.asarray(found.x)
            fitted.append(Process.fit(kernel, self.parameters[key], warp, x, values))
        scores = np.array([process.score for process in fitted])
        shares = np.exp(scores - logsumexp(scores))
        shares = np.where(shares < _LEAST_SHARE, 0.0, shares)
        self.members = [(float(w), p) for w, p in zip(shares / shares.sum(), fitted, strict=True) if w > 0]

    def guess(self, x: NDArray[np.float32], optimism: float = 1.0) -> Floats:
        """A cheap optimistic value `(n,)`: `optimism` standard deviations below the mean, as far as neighbours tell."""
        total = np.zeros(len(x))
        for share, process in self.members:
            mean, cross = process.mean(x)
            prior = process.kernel.variance(process.theta)
            near = np.clip(cross.max(axis=1).astype(np.float64) / prior, 0.0, 1.0)
            total += share * process.warp.inverse(mean - optimism * np.sqrt(prior * (1 - near**2)))
        return total

    def posterior(self, x: NDArray[np.float32]) -> Posterior:
        """What is believed of `(n, width)` rows jointly, to be updated as some of them are chosen."""
        return Posterior(self, x)


class Posterior:
    """Beliefs about candidates: a distribution per row as weighted points, narrowing as rows are chosen."""

    def __init__(self, surrogate: Surrogate, x: NDArray[np.float32]) -> None:
        self._x = x
        self._members = []
        for share, process in surrogate.members:
            mean, cross = process.mean(x)
            whitened = process.whitened(cross)
            prior = process.kernel.variance(process.theta)
            variance = prior - np.einsum("en,en->n", whitened, whitened).astype(np.float64)
            self._members.append((share, process, mean, whitened, np.maximum(variance, _JITTER * prior)))
        self.weights: Floats = np.concatenate([share * WEIGHTS for share, *_ in self._members])

    def points(self) -> Floats:
        """`(n, S)` values in the objective's unit, of `weights` `(S,)` each."""
        return np.concatenate(
            [
                process.warp.inverse(mean[:, None] + np.sqrt(variance)[:, None] * NODES)
                for _, process, mean, _, variance in self._members
            ],
            axis=1,
        )

    def choose(self, row: int) -> None:
        """Take a row as evaluated at its mean: what is unknown of others shrinks as far as they go together with it."""
        settled = []
        for share, process, mean, whitened, variance in self._members:
            prior = np.add.reduce(process.kernel.cross(process.theta, self._x, self._x[row : row + 1]))[:, 0]
            covariance = (prior - whitened.T @ whitened[:, row]).astype(np.float64)
            # No larger than variances allow: single precision may say so where hardly anything is unknown.
            most = np.sqrt(variance * variance[row])
            column = np.clip(covariance, -most, most) / np.sqrt(variance[row] + process.noise)
            left = np.maximum(variance - column**2, _JITTER * variance)
            # Appended, so that later choices see this one: the whitened columns of one more evaluated row.
            whitened = np.concatenate([whitened, column[None].astype(np.float32)])
            settled.append((share, process, mean, whitened, left))
        self._members = settled
