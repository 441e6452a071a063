"""Accuracy of a space's architectures, learned from a sample of evaluated ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy.optimize import minimize
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from hardware_profiles.paths import atomic
from predictors.base import Array, BoundPredictor, Estimate
from predictors.counts import Count
from predictors.quality import covered
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

MIN_SAMPLES = 10
MAX_SAMPLES = 2000  # of the mean: cost grows with the cube in training, and linearly in prediction
_FEW = 256  # samples that hyper-parameters and variances are taken from
_FORMAT = "nasbench accuracy predictor 1"
_TOTALS = ("macs", "params")
_Z90 = 1.6448536269514722  # half-width of a normal 90 % interval
# Logarithms of the kernel's parameters, for standardised inputs and targets: variance and length over knobs, variance
# and two lengths over totals, noise variance. A weak prior around these keeps ten samples from being over-explained.
_PRIOR_MEAN = torch.tensor([-1.0, 0.0, -1.0, 0.5, 0.5, -2.0], dtype=torch.float64)
_PRIOR_STD = 1.5
_JITTER = 1e-4


class AccuracyPredictor(BoundPredictor):
    """A Gaussian process over the knobs and over the logarithms of MACs and parameters.

    The kernel is the sum of two squared exponentials, one of the Hamming distance between architectures (so that every
    knob and their interactions count) and one of the totals (so that size counts across knobs), plus noise; parameters
    by maximum a posteriori (Rasmussen & Williams, 2006, ch. 5). Held-out Kendall tau with 100 samples, beside a ridge
    and an ensemble of perceptrons: 0.29, 0.17, 0.21 on a briefly trained supernet; 0.57, 0.54, 0.58 on NAS-Bench-201.
    It is fitted in a second. Any metric will do, since targets are standardised. Standard deviations are scaled so that
    90 % intervals cover 90 % of out-of-fold residuals.

    Life: `fit` once, or `load`; then `predict`. It is tied to its space: another needs samples of its own. Beyond 2,000
    samples so many are used, chosen at random.

    Args:
        space: whose architectures are predicted.
        seed: of the folds and of the choice among too many samples.
        folds: of the cross-validation behind `report`.

    Attributes:
        report: out-of-fold quality: `samples`, `kendall_tau`, `spearman`, `mae`, `coverage_90` (each fold's intervals
            scaled by the other folds' residuals); empty before `fit`. Rank correlations of constant targets are 0.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, *, folds: int = 5) -> None:
        if folds < 2:
            raise UserError(f"accuracy predictor: folds must be at least 2, got {folds}")
        self.space = space
        self.seed = seed
        self.folds = folds
        self.report: dict[str, float] = {}
        self._totals = [Count(metric).bind(space) for metric in _TOTALS]
        self._process: _Process | None = None
        self._stretch = 1.0

    def fit(self, archs: Archs, accuracy: Array) -> AccuracyPredictor:
        """Learn from evaluated architectures; returns itself.

        Args:
            archs: `(n, K)`, distinct ones.
            accuracy: `(n,)` their values, in any unit.

        Raises:
            UserError: fewer than ten samples, or a value that is not finite.
        """
        archs, accuracy = self.space.check(archs), np.asarray(accuracy, dtype=np.float64)
        if accuracy.shape != (len(archs),):
            raise UserError(f"accuracy predictor: {len(archs)} architectures, but values of shape {accuracy.shape}")
        if len(archs) < MIN_SAMPLES:
            raise UserError(f"accuracy predictor: needs at least {MIN_SAMPLES} samples, got {len(archs)}")
        if not np.isfinite(accuracy).all():
            raise UserError("accuracy predictor: a value is not finite; leave failed evaluations out")
        rng = np.random.default_rng(self.seed)
        rows = rng.permutation(len(archs))[:MAX_SAMPLES]
        knobs, totals, values = *self._inputs(archs[rows]), accuracy[rows]

        fold = np.arange(len(rows)) % min(self.folds, len(rows))
        mean, std = np.empty(len(rows)), np.empty(len(rows))
        for k in np.unique(fold):
            seen, held_out = fold != k, fold == k
            process = _Process.fit(knobs[seen], totals[seen], values[seen])
            mean[held_out], std[held_out] = process(knobs[held_out], totals[held_out])
        self._process = _Process.fit(knobs, totals, values)
        ratio = np.abs(values - mean) / std
        self._stretch = _stretch(ratio)
        self.report = {
            "samples": len(rows),
            "kendall_tau": _rank(kendalltau, mean, values),
            "spearman": _rank(spearmanr, mean, values),
            "mae": float(np.abs(values - mean).mean()),
            "coverage_90": covered(ratio, fold, lambda others: _Z90 * _stretch(ratio[others])),
        }
        return self

    def predict(self, archs: Archs) -> Estimate:
        """Estimate of `(n, K)` architectures, in the unit of the samples.

        Raises:
            UserError: before `fit` or `load`.
        """
        mean, std = self._fitted()(*self._inputs(archs))
        return Estimate(mean, self._stretch * std)

    def expected(self, probabilities: Sequence[Tensor]) -> Tensor:
        """The prediction at the expected inputs: differentiable, and an approximation, since the model is not linear.

        A knob counts as active with the probability that the one knob it depends on gives.
        """
        columns = []
        for knob in self.space.feature_knobs:
            switch, on = self._switches[knob]
            share = torch.as_tensor(on, dtype=probabilities[switch].dtype)
            active = (probabilities[switch] * share).sum(-1, keepdim=True)
            columns.append(probabilities[knob] * active)
        knobs = torch.cat(columns, dim=-1).double()
        totals = [bound.expected(probabilities).clamp_min(1.0).log() for bound in self._totals]
        mean = self._fitted().mean(
            knobs.reshape(-1, knobs.shape[-1]), torch.stack(totals, -1).double().reshape(-1, len(totals))
        )
        return mean.reshape(knobs.shape[:-1])

    def save(self, path: Path) -> None:
        """Write the fitted model to a safetensors file, atomically.

        Raises:
            UserError: before `fit` or `load`, or where the file cannot be written.
        """
        about = {
            "format": _FORMAT,
            "space": self._fingerprint,
            "seed": self.seed,
            "folds": self.folds,
            "stretch": self._stretch,
            "report": self.report,
        }
        tensors = self._fitted().samples
        with atomic(Path(path)) as temporary:
            try:
                save_file(tensors, temporary, metadata={"about": json.dumps(about)})
            except SafetensorError as error:
                raise UserError(f"{path}: cannot write it: {error}") from error

    @classmethod
    def load(cls, path: Path, space: SearchSpace) -> AccuracyPredictor:
        """A fitted predictor from `save`.

        Raises:
            UserError: no such file, another kind of file, or a model of another space.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("about", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as an accuracy predictor: {error}") from error
        if about.get("format") != _FORMAT:
            raise UserError(f"{path}: is no accuracy predictor of this version")
        predictor = cls(space, about["seed"], folds=about["folds"])
        if about["space"] != predictor._fingerprint:
            raise UserError(f"{path}: was fitted to another space than {space.name!r}; fit one to this space")
        predictor._process = _Process(**tensors)
        predictor._stretch, predictor.report = about["stretch"], about["report"]
        return predictor

    def _fitted(self) -> _Process:
        if self._process is None:
            raise UserError("accuracy predictor: not fitted yet; call fit(archs, accuracy) first")
        return self._process

    @property
    def _fingerprint(self) -> list[Any]:
        """What an architecture's row means: names and choices of all knobs, as JSON gives them back."""
        return [[knob.name, list(knob.choices)] for knob in self.space.knobs]

    def _inputs(self, archs: Archs) -> tuple[Tensor, Tensor]:
        """One-hot knobs `(n, D)` and logarithms of the totals `(n, T)`, float64."""
        totals = np.column_stack([bound.predict(archs).mean for bound in self._totals])
        return torch.from_numpy(self.space.features(archs)).double(), torch.from_numpy(np.log(np.maximum(totals, 1.0)))

    @cached_property
    def _switches(self) -> dict[int, tuple[int, NDArray[np.float64]]]:
        """Per shown knob, a knob that switches it and the share of architectures with it active per choice of that.

        Found on a sample: the knob whose choice tells most about the activity; itself, always on, where none does.
        """
        archs = self.space.sample(4096, np.random.default_rng(0))
        active = self.space.active(archs)
        found = {}
        for knob in self.space.feature_knobs:
            best, least = (knob, np.ones(self.space.cardinalities[knob])), float(active[:, knob].var())
            for other in range(len(self.space.knobs)) if least else ():
                if other == knob or not active[:, other].all():
                    continue
                counts = np.bincount(archs[:, other], minlength=self.space.cardinalities[other])
                on = np.bincount(archs[:, other], active[:, knob], minlength=self.space.cardinalities[other])
                share = on / np.maximum(counts, 1)
                left = float((share * (1 - share))[archs[:, other]].mean())
                if left < least - 1e-12:
                    best, least = (other, share), left
            found[knob] = best
        return found


@dataclass
class _Process:
    """A Gaussian process given its samples and parameters; everything else follows.

    Args:
        knobs, totals: `(n, D)`, `(n, T)` inputs of the samples, as they are.
        values: `(n,)` targets, as they are.
        parameters: `(6,)` logarithms, see `_PRIOR_MEAN`.
    """

    knobs: Tensor
    totals: Tensor
    values: Tensor
    parameters: Tensor

    def __post_init__(self) -> None:
        self._knob_mean, centred = self.knobs.mean(0), self.knobs - self.knobs.mean(0)
        self._knob_scale = (centred**2).sum(1).mean().sqrt().clamp_min(1e-9)
        self._total_mean, self._total_scale = self.totals.mean(0), self.totals.std(0, correction=0).clamp_min(1e-9)
        self._centre, self._unit = float(self.values.mean()), max(float(self.values.std(correction=0)), 1e-12)
        self._x, self._t = self._standardised(self.knobs, self.totals)
        self._y = (self.values - self._centre) / self._unit
        whole = _noisy_kernel(self.parameters, self._x, self._t)
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(whole[:_FEW, :_FEW]))
        self._weights = torch.cholesky_solve(self._y[:, None], torch.linalg.cholesky(whole))[:, 0]

    @classmethod
    def fit(cls, knobs: Tensor, totals: Tensor, values: Array) -> _Process:
        """The process with the parameters that are most probable given (a few of) the samples."""
        process = cls(knobs, totals, torch.from_numpy(values), _PRIOR_MEAN)
        x, t, y = process._x[:_FEW], process._t[:_FEW], process._y[:_FEW]

        def loss(point: Array) -> tuple[float, Array]:
            p = torch.tensor(point, requires_grad=True)
            factor = torch.linalg.cholesky(_noisy_kernel(p, x, t))
            fit = y @ torch.cholesky_solve(y[:, None], factor)[:, 0] / 2 + factor.diagonal().log().sum()
            total = fit + (((p - _PRIOR_MEAN) / _PRIOR_STD) ** 2).sum() / 2
            total.backward()
            assert p.grad is not None
            return float(total.detach()), p.grad.numpy()

        bounds = [(-8.0, 5.0)] * len(_PRIOR_MEAN)
        found = minimize(loss, _PRIOR_MEAN.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 50})
        return cls(knobs, totals, process.values, torch.from_numpy(np.array(found.x)))

    @property
    def samples(self) -> dict[str, Tensor]:
        """The arguments that make this process again."""
        return {
            "knobs": self.knobs.contiguous(),
            "totals": self.totals.contiguous(),
            "values": self.values.contiguous(),
            "parameters": self.parameters,
        }

    def mean(self, knobs: Tensor, totals: Tensor) -> Tensor:
        """Posterior mean `(m,)`, differentiable."""
        across = _kernel(self.parameters, *self._standardised(knobs, totals), self._x, self._t)
        return self._centre + self._unit * (across @ self._weights)

    @torch.inference_mode()
    def __call__(self, knobs: Tensor, totals: Tensor) -> tuple[Array, Array]:
        """Posterior mean and standard deviation of a measurement, `(m,)` each.

        The deviation is that given the first few samples: with more it would be smaller, at n^2 operations a row.
        """
        across = _kernel(self.parameters, *self._standardised(knobs, totals), self._x, self._t)
        few = across[:, : len(self._inverse)]
        prior = self.parameters[[0, 2, 5]].exp().sum()
        variance = (prior - ((few @ self._inverse) * few).sum(1)).clamp_min(_JITTER)
        mean = self._centre + self._unit * (across @ self._weights)
        return mean.numpy(), self._unit * variance.sqrt().numpy()

    def _standardised(self, knobs: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        return (knobs - self._knob_mean) / self._knob_scale, (totals - self._total_mean) / self._total_scale


def _kernel(p: Tensor, x: Tensor, t: Tensor, x_other: Tensor, t_other: Tensor) -> Tensor:
    """Covariances `(n, m)` without noise."""
    lengths = torch.exp(-p[3:5])
    over_knobs = torch.exp(p[0] - torch.exp(-2 * p[1]) * _squared(x, x_other) / 2)
    return over_knobs + torch.exp(p[2] - _squared(t * lengths, t_other * lengths) / 2)


def _noisy_kernel(p: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return _kernel(p, x, t, x, t) + (p[5].exp() + _JITTER) * torch.eye(len(x), dtype=x.dtype)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `(n, m)` between rows."""
    return ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T).clamp_min(0.0)


def _stretch(ratios: Array) -> float:
    """The factor on standard deviations that makes 90 % intervals cover 90 % of |residual| / deviation `(n,)`.

    With the finite-sample correction of split conformal prediction (Vovk et al. 2005); at most the largest ratio.
    """
    level = min(np.ceil(0.9 * (len(ratios) + 1)) / len(ratios), 1.0)
    return float(np.quantile(ratios, level, method="higher")) / _Z90


def _rank(correlation: Any, first: Array, second: Array) -> float:
    """A rank correlation, 0 where one side is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(correlation(first, second).statistic)
