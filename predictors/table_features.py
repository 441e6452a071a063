"""What networks of a table have in common with each other: features from which a few measurements generalise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.base import Array, BoundPredictor
from predictors.counts import Count
from predictors.tables import MeasuredTable, fbnet_knobs, nasbench201_knobs
from search_spaces import NASBench201Space, Operator, Workload, load_space
from search_spaces.base import Archs, Knob
from search_spaces.nasbench201 import EDGES

# Kinds of operators whose totals describe a network of no space. Saved tables hold these totals, so they keep to
# themselves, whatever an operator model looks at. Normalisation and clamps run with what they follow: no kernels.
TOTALS = ("pointwise", "convolution", "grouped", "depthwise", "linear", "matmul", "activation", "join", "pool", "other")
QUANTITIES = ("kernels", "macs", "values", "params")
_KIND = {
    "linear": "linear",
    "conv2d": "convolution",
    "conv_transpose2d": "convolution",
    "depthwise_conv2d": "depthwise",
    "matmul": "matmul",
    **dict.fromkeys(("hard_swish", "hard_sigmoid", "sigmoid", "silu", "gelu", "tanh", "softmax"), "activation"),
    **dict.fromkeys(("add", "sub", "mul", "concat"), "join"),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "global_avg_pool", "mean"), "pool"),
}
_TAKEN_IN = frozenset({"batch_norm", "relu", "relu6", "clamp", "leaky_relu"})

# What counts as a step on the longest path: any operator, a 3x3 convolution, any arithmetic.
_NB201_STEPS = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=float)


@dataclass(frozen=True)
class Features:
    """Features of n networks.

    Args:
        costs: `(n, C)` what a latency is a sum of: how often each operator or choice occurs, and how much work it is.
        logs: `(n, L)` what the logarithm of a latency is about linear in.
        places: name -> `(n, F)`, what else networks that are alike have in common.
        cut: `(n,)` whether no path leads from input to output, so that a latency says little of the operators.
        executed: `(n, K)` the same networks less what their output does not depend on, which exporters leave out; None
            where nothing is ever left out.
    """

    costs: Array
    logs: Array
    places: dict[str, Array]
    cut: NDArray[np.bool_]
    executed: Archs | None = None


def table_features(table: MeasuredTable, keys: NDArray[Any]) -> Features:
    """Features of networks that need not be in the table.

    Args:
        table: says what the columns of `keys` mean.
        keys: `(n, K)` architectures; for a table without knobs, `(n, F)` operator totals.
    """
    if table.knobs == nasbench201_knobs():
        return _nasbench201(keys)
    none = np.zeros(len(keys), dtype=bool)
    if table.knobs:
        marks = _one_hot(keys, table.knobs)
        size = _fbnet_macs().predict(keys).mean if table.knobs == fbnet_knobs() else np.asarray(keys, dtype=float)
        places = {"counts": marks, "size": np.log(size)[:, None] if size.ndim == 1 else size}
        return Features(marks, marks, places, none)
    totals = np.asarray(keys, dtype=float)
    by_kind = totals.reshape(len(totals), len(TOTALS), len(QUANTITIES))
    places = {"work": np.log1p(by_kind[:, :, 1]), "values": np.log1p(by_kind[:, :, 2])}
    places |= {"counts": by_kind[:, :, 0], "size": np.log(by_kind.sum(1)[:, 1:] + 1e-6)}
    return Features(totals, np.concatenate(list(places.values()), axis=1), places, none)


def workload_totals(workloads: Sequence[Workload]) -> Array:
    """`(n, 4 * len(TOTALS))` kernels, multiply-accumulates, values and parameters (millions) by kind of operator."""
    rows = np.zeros((len(workloads), len(TOTALS), len(QUANTITIES)))
    for row, workload in zip(rows, workloads, strict=True):
        for op in workload.operators:
            if op.kind not in _TAKEN_IN:
                values = sum(t.size for t in op.inputs) + op.output.size
                row[TOTALS.index(_kind(op))] += (1.0, op.macs / 1e6, values / 1e6, op.params / 1e6)
    return rows.reshape(len(workloads), -1)


def _kind(op: Operator) -> str:
    if op.kind == "conv2d" and op.groups > 1:
        return "grouped"
    if op.kind == "conv2d" and set(op.kernel) == {1}:
        return "pointwise"
    return _KIND.get(op.kind, "other")


def _one_hot(keys: NDArray[np.generic], knobs: Sequence[Knob]) -> Array:
    return np.concatenate(
        [keys[:, [i]] == np.arange(len(k.choices)) for i, k in enumerate(knobs)], axis=1, dtype=np.float64
    )


@lru_cache(maxsize=1)
def _fbnet_macs() -> BoundPredictor:
    """Of FBNet at 32x32, as HELP measured it."""
    return Count("macs").bind(load_space("fbnet_32"))


@lru_cache(maxsize=1)
def _nasbench201_macs() -> BoundPredictor:
    return Count("macs").bind(NASBench201Space())


def _nasbench201(keys: NDArray[Any]) -> Features:
    archs: Archs = np.asarray(keys)
    there = archs != 0
    reached, used = np.zeros((2, len(archs), 4), dtype=bool)
    reached[:, 0] = used[:, 3] = True
    for edge, (a, b) in enumerate(EDGES):  # in order of their ends
        reached[:, b] |= reached[:, a] & there[:, edge]
    for edge in (5, 4, 2, 3, 1, 0):  # in reverse order of their starts
        a, b = EDGES[edge]
        used[:, a] |= used[:, b] & there[:, edge]
    needed = np.stack([there[:, e] & used[:, b] for e, (_, b) in enumerate(EDGES)], 1)
    alive = np.stack([needed[:, e] & reached[:, a] for e, (a, _) in enumerate(EDGES)], 1)

    depths = []
    for steps in _NB201_STEPS:
        depth = np.full((len(archs), 4), -np.inf)
        depth[:, 0] = 0
        for edge, (a, b) in enumerate(EDGES):
            longer = np.where(there[:, edge], depth[:, a] + steps[archs[:, edge]], -np.inf)
            depth[:, b] = np.maximum(depth[:, b], longer)
        depths.append(np.maximum(depth[:, 3], 0))
    sums = sum(np.maximum(alive[:, [e for e in range(6) if EDGES[e][1] == b]].sum(1) - 1, 0) for b in (1, 2, 3))
    counts = np.stack([(archs == op).sum(1) for op in range(1, 5)], 1).astype(float)
    places = {
        "counts": counts,
        "depth": np.stack(depths, 1),
        "size": np.log(_nasbench201_macs().predict(archs).mean)[:, None],
        "edges": np.concatenate([archs == op for op in range(1, 5)], 1).astype(float),
        "sums": np.asarray(sums, dtype=float)[:, None],
    }
    executed = (archs * needed).astype(archs.dtype)
    return Features(counts, counts, places, np.asarray(~alive.any(1)), executed)
