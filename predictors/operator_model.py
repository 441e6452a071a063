"""Latency of whole networks as a non-negative linear model of operator totals, fitted to a few dozen measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from scipy.optimize import linprog, nnls

from predictors.base import AdditivePredictor, Array, Estimate
from search_spaces import Operator, UserError, Workload
from search_spaces.errors import explain
from search_spaces.operators import FOLDED

# Additive features of a network. Work and traffic are apart for each kind of kernel, as their speeds differ tenfold;
# counts stand for what a kernel costs however small. Values are elements of activations, whatever their bytes.
FEATURES = (
    "pointwise_macs",  # 1x1 convolutions on maps
    "dense_macs",  # other convolutions
    "depthwise3_macs",  # depthwise convolutions by kernel size, up to 3, up to 5, above
    "depthwise5_macs",
    "depthwise7_macs",
    "border_macs",  # of depthwise convolutions: those of outputs whose window reaches over the edge, a slower path
    "vector_macs",  # linear layers, matrix products and convolutions on single pixels
    "conv_values",  # activations read and written by convolutions
    "depthwise_values",
    "other_values",  # activations read and written by everything else that is not fused
    "activation_values",  # activations through non-linearities that cost arithmetic
    "params",
    "convolutions",
    "reductions",  # pooling, whose input must be complete before anything follows
)
_COLUMN = {name: i for i, name in enumerate(FEATURES)}
# Clamped or free in the producer's epilogue on every runtime.
_FREE = FOLDED | {"relu", "relu6"}
_COSTLY_ACTIVATIONS = frozenset({"hard_swish", "hard_sigmoid", "sigmoid", "silu", "gelu", "tanh", "softmax"})

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
LEAST_NETWORKS = 8
# Where in the spread of the measurements the undisturbed ones are sought.
QUANTILE = 0.35
# Predictions this far outside the measured range are still called inside it.
MARGIN = 0.1


def operator_features(op: Operator) -> Array:
    """`(F,)` what one operator adds to each of `FEATURES`."""
    row = np.zeros(len(FEATURES))
    if op.kind in _FREE:
        return row
    values = sum(t.size for t in op.inputs) + op.output.size
    row[_COLUMN["params"]] = op.params
    if op.kind == "depthwise_conv2d":
        size = max(op.kernel)
        row[_COLUMN[f"depthwise{3 if size <= 3 else 5 if size <= 5 else 7}_macs"]] = op.macs
        inner = prod(max(0, n - k + 1) / n for n, k in zip(op.output.shape[1:], op.kernel, strict=True))
        row[_COLUMN["border_macs"]] = op.macs * (1 - inner)
        row[_COLUMN["depthwise_values"]] = values
        row[_COLUMN["convolutions"]] = 1
    elif op.kind == "conv2d" and op.output.size > op.output.shape[0]:
        row[_COLUMN["pointwise_macs" if set(op.kernel) == {1} else "dense_macs"]] = op.macs
        row[_COLUMN["conv_values"]] = values
        row[_COLUMN["convolutions"]] = 1
    elif op.macs:
        row[_COLUMN["vector_macs"]] = op.macs
    elif op.kind == "add":
        # The sum is written by its producer; only the second operand is read in addition.
        row[_COLUMN["other_values"]] = sum(t.size for t in op.inputs[1:])
    elif op.kind in _COSTLY_ACTIVATIONS:
        row[_COLUMN["activation_values"]] = values
    else:
        row[_COLUMN["other_values"]] = values
        row[_COLUMN["reductions"]] = op.kind.endswith(("pool", "pool2d", "mean"))
    return row


class Fit(BaseModel):
    """A fitted model as plain numbers: all that its predictions depend on.

    Args:
        features: names of the columns.
        weights: ms per unit of each feature, not negative.
        offset_ms: what every network costs.
        log_std: standard deviation of ln(measured / predicted) of networks that were not fitted.
        lowest_ms, highest_ms: range of the fitted latencies.
        seen: whether any fitted network had the feature at all.
        ridge: the regularisation chosen by leave-one-out.
        warning: what was wrong with the measurements, else empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: tuple[str, ...]
    weights: tuple[float, ...]
    offset_ms: float
    log_std: float
    lowest_ms: float
    highest_ms: float
    seen: tuple[bool, ...]
    ridge: float
    warning: str = ""


class OperatorModel(AdditivePredictor):
    """Latency of any network from the totals of its operators, calibrated on whole networks.

    Weights and offset minimise the relative error, robustly and with a small ridge, and none is negative, so that a
    larger network is never predicted faster. Measuring whole networks rather than blocks keeps out the graph inputs and
    layout changes that blocks measured alone pay for and blocks inside a network do not. The model knows operators
    only, so one calibration binds to every space whose operators it has seen; others raise a warning.

    Make one with `OperatorModel.fit(workloads, latencies_ms)`; it never changes afterwards.

    Args:
        fit: the fitted numbers.
    """

    metric = "latency_ms"

    def __init__(self, fit: Fit) -> None:
        if tuple(fit.features) != FEATURES:
            raise UserError("this operator model was fitted by another version, on other features; calibrate again")
        self.numbers = fit
        self.weights = np.array(fit.weights)
        self._rows: dict[Operator, Array] = {}

    @classmethod
    def fit(cls, workloads: Sequence[Workload], latencies_ms: Sequence[float] | Array) -> OperatorModel:
        """A model of measured networks.

        Args:
            workloads: at least `LEAST_NETWORKS`.
            latencies_ms: one per workload, positive and finite.

        Raises:
            UserError: too few networks, or a latency that is none.
        """
        return cls.fit_totals(network_totals(workloads), latencies_ms)

    @classmethod
    def fit_totals(cls, totals: Array, latencies_ms: Sequence[float] | Array, warning: str = "") -> OperatorModel:
        """As `fit`, from feature totals `(n, F)`, so that measurements of several spaces can be pooled."""
        y = np.asarray(latencies_ms, dtype=float)
        if len(y) != len(totals) or len(y) < LEAST_NETWORKS:
            raise UserError(
                f"an operator model needs at least {LEAST_NETWORKS} networks and a latency for each, "
                f"got {len(totals)} networks and {len(y)} latencies"
            )
        if not (np.isfinite(y).all() and (y > 0).all()):
            raise UserError(f"latencies must be positive and finite, got {y[~(np.isfinite(y) & (y > 0))][0]} ms")
        trust = trusted(totals, y)
        residuals = {ridge: leave_one_out(totals, y, trust, ridge) for ridge in RIDGES}
        # A few disturbed measurements must not choose the regularisation: errors count up to 20 %.
        ridge = min(RIDGES, key=lambda r: float(np.mean(np.minimum(np.abs(residuals[r]), 0.2) ** 2)))
        weights = _solve(totals, y, trust, ridge)
        return cls(
            Fit(
                features=FEATURES,
                weights=tuple(weights[:-1].tolist()),
                offset_ms=float(weights[-1]),
                log_std=_spread(residuals[ridge]),
                lowest_ms=float(y.min()),
                highest_ms=float(y.max()),
                seen=tuple(bool(column.any()) for column in totals.T),
                ridge=ridge,
                warning=warning,
            )
        )

    def block_features(self, workload: Workload) -> Array:
        """`(F,)` totals of `FEATURES`."""
        total = np.zeros(len(FEATURES))
        for op in workload.operators:
            if op not in self._rows:
                self._rows[op] = operator_features(op)
            total += self._rows[op]
        return total

    def head(self, totals: Any) -> Any:
        if isinstance(totals, np.ndarray):
            return totals @ self.weights + self.numbers.offset_ms
        return totals @ totals.new_tensor(self.weights) + self.numbers.offset_ms

    @property
    def coefficients(self) -> tuple[Array, float]:
        return self.weights, self.numbers.offset_ms

    def around(self, mean: Array) -> Estimate:
        """Log-normal around `mean`; wider, and with a warning, outside the measured range."""
        low, high = self.numbers.lowest_ms / (1 + MARGIN), self.numbers.highest_ms * (1 + MARGIN)
        beyond = np.maximum(np.log(np.maximum(mean, 1e-12) / high), np.log(low / np.maximum(mean, 1e-12)))
        outside = beyond > 0
        # A heuristic, since nothing was measured there: a factor two outside the range adds 0.14 to the log spread.
        log_std = self.numbers.log_std + 0.2 * np.maximum(beyond, 0.0)
        warning = self.numbers.warning
        if outside.any():
            far = f"{int(outside.sum())} of {len(mean)} networks lie outside the calibrated {low:.3g}-{high:.3g} ms"
            warning = f"{warning}; {far}" if warning else far
        return Estimate(mean, mean * np.sqrt(np.expm1(log_std**2)), lognormal=True, warning=warning)

    def doubts(self, features: Array) -> str:
        unseen = features.any(0) & ~np.array(self.numbers.seen)
        names = [name for name, new in zip(FEATURES, unseen, strict=True) if new]
        return f"no calibration network had {', '.join(names)}" if names else ""

    def to_dict(self) -> dict[str, Any]:
        """The fitted numbers as JSON-able values."""
        return self.numbers.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OperatorModel:
        """The inverse of `to_dict`, predicting to the same bits.

        Raises:
            UserError: missing or unknown keys, or features of another version.
        """
        try:
            return cls(Fit.model_validate(values))
        except ValidationError as error:
            raise UserError(explain(error, "operator model", Fit.model_fields)) from error


def network_totals(workloads: Sequence[Workload]) -> Array:
    """`(n, F)` totals of `FEATURES` of whole networks."""
    return np.array([np.sum([operator_features(op) for op in w.operators], axis=0) for w in workloads])


def _scaled(totals: Array, y: Array) -> tuple[Array, Array]:
    """`(n, F + 1)` totals and a one, over the latencies and over `(F + 1,)` scales; and the scales."""
    relative = np.hstack([totals, np.ones((len(y), 1))]) / y[:, None]
    scale = relative.mean(0)
    scale[scale == 0] = 1.0
    return relative / scale, scale


def _solve(totals: Array, y: Array, trust: Array, ridge: float) -> Array:
    """`(F + 1,)` weights and offset >= 0 that minimise sum trust (predicted / y - 1)^2 + ridge |scaled weights|^2."""
    shares, scale = _scaled(totals, y)
    root = np.sqrt(trust)
    system = np.vstack([root[:, None] * shares, np.sqrt(ridge) * np.eye(len(scale))])
    weights: Array = nnls(system, np.concatenate([root, np.zeros(len(scale))]))[0] / scale
    return weights


def trusted(totals: Array, y: Array) -> Array:
    """`(n,)` in 0..1: how far each measurement is to be believed, by how well the others explain it.

    Interference only ever adds time. So a quantile regression (Koenker and Bassett, Econometrica 1978) a little below
    the median finds the undisturbed measurements, and Tukey's biweight (Beaton and Tukey, Technometrics 1974), iterated
    from there, gives the weights. With a quarter of 32 measurements 1.2 to 1.6 times too slow, predictions stay as good
    as without (least squares alone: 72 % of networks within 10 %); without disturbance all weights are near one.
    """
    shares, _ = _scaled(totals, y)
    n, f = shares.shape
    cost = np.concatenate([np.full(f, 1e-4), np.full(n, QUANTILE), np.full(n, 1 - QUANTILE)])
    weights = linprog(cost, A_eq=np.hstack([shares, np.eye(n), -np.eye(n)]), b_eq=np.ones(n)).x[:f]
    for _ in range(8):
        residual = 1 - shares @ weights
        # With few networks a fit may pass through most of them; a repeated measurement itself differs by some 2 %.
        scale = max(1.4826 * float(np.median(np.abs(residual))), 0.02)
        trust: Array = np.maximum(1 - (residual / (4.685 * scale)) ** 2, 0.0) ** 2
        weights = nnls(np.sqrt(trust)[:, None] * shares, np.sqrt(trust))[0]
    return trust


def leave_one_out(totals: Array, y: Array, trust: Array, ridge: float) -> Array:
    """`(n,)` ln(measured / predicted) of each network, predicted by a fit to all others."""
    keep = ~np.eye(len(y), dtype=bool)
    weights = np.array([_solve(totals[k], y[k], trust[k], ridge) for k in keep])
    predicted = (np.hstack([totals, np.ones((len(y), 1))]) * weights).sum(1)
    logs: Array = np.log(y / np.maximum(predicted, 1e-12))
    return logs


def _spread(residuals: Array) -> float:
    """Log standard deviation whose 90 % interval covers at least 90 % of new residuals.

    The conformal rank, ceil(0.9 (n + 1)) of n (Vovk et al., 2005), guards against tails heavier than the normal.
    """
    ordered = np.sort(np.abs(residuals))
    rank = min(len(ordered), int(np.ceil(0.9 * (len(ordered) + 1))))
    return float(max(1.4826 * np.median(ordered), ordered[rank - 1] / 1.645))
