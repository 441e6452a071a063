"""Sums (or maxima) of small tables over knobs: their exact least value, and exact draws weighted by them.

A cost that adds up over blocks is a sum of one table per position of the network, each over the few knobs that its
block depends on. Eliminating one knob after the other answers questions about all combinations, 10^19 or not (bucket
elimination: Dechter, Artificial Intelligence 113, 1999): with minima the cheapest one, with sums of exponentials draws
in which cheap ones are as much more likely as one wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_TABLE = 10**7  # entries of an intermediate table; beyond it nothing exact is to be had
Table = NDArray[np.float64]
Factor = tuple[tuple[int, ...], Table]  # knobs, and a value per combination of their choices
# A knob, the knobs that its choice depends on, and what was kept of the table over them and it.
Step = tuple[int, tuple[int, ...], NDArray[Any]]


def least(factors: Sequence[Factor], cardinalities: NDArray[np.int64], combine: np.ufunc) -> NDArray[np.int64] | None:
    """The choices `(K,)` with the least combination of all factors; None if a table grows too large. First of equals.

    Args:
        combine: `np.add` or `np.maximum`.
    """
    done = _eliminate(factors, cardinalities, combine, lambda table: (table.argmin(axis=-1), table.min(axis=-1)))
    if done is None:
        return None
    arch = np.zeros(len(cardinalities), dtype=np.int64)
    for knob, scope, choices in reversed(done[0]):
        arch[knob] = choices[tuple(arch[list(scope)])]
    return arch


class Gibbs:
    """The distribution over all combinations of choices with probability proportional to exp(sum of the factors).

    Args:
        factors: logarithms of weights; -inf for what never occurs.
        cardinalities: `(K,)` choices per knob; knobs in no factor are uniform.

    Attributes:
        log_total: logarithm of the sum of all weights; -inf where all are zero.

    Raises:
        ValueError: an intermediate table grows too large.
    """

    def __init__(self, factors: Sequence[Factor], cardinalities: NDArray[np.int64]) -> None:
        done = _eliminate(factors, cardinalities, np.add, _summed)
        if done is None:
            raise ValueError("the factors tie too many knobs together")
        self._steps, rest = done
        self._cardinalities = cardinalities
        fixed = {knob for knob, _, _ in self._steps}
        self._free = [k for k in range(len(cardinalities)) if k not in fixed]
        self.log_total = rest + float(np.log(cardinalities[self._free]).sum())

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`n` independent draws `(n, K)`."""
        out = np.zeros((n, len(self._cardinalities)), dtype=np.int64)
        for k in self._free:
            out[:, k] = rng.integers(self._cardinalities[k], size=n)
        for knob, scope, cumulated in reversed(self._steps):
            rows = cumulated[tuple(out[:, k] for k in scope)]
            out[:, knob] = (rng.random(n)[:, None] >= rows[..., :-1]).sum(axis=-1)
        return out


def _summed(table: Table) -> tuple[Table, Table]:
    """Cumulated probabilities of the last knob's choices, and the logarithm of the sum over them."""
    peak = table.max(axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    cumulated = np.exp(table - peak).cumsum(axis=-1)
    total = cumulated[..., -1]
    with np.errstate(divide="ignore"):
        logs = np.log(total) + peak[..., 0]
    return cumulated / np.where(total > 0, total, 1.0)[..., None], logs


def _eliminate(
    factors: Sequence[Factor],
    cardinalities: NDArray[np.int64],
    combine: np.ufunc,
    reduce: Callable[[Table], tuple[NDArray[Any], Table]],
) -> tuple[list[Step], float] | None:
    """Steps in the order of elimination, and the combination of what is left; None if a table would grow too large.

    Args:
        reduce: from a table with the knob's axis last: what to keep of it, and the table without that axis.
    """
    factors = list(factors)
    steps: list[Step] = []
    left = {k for knobs, _ in factors for k in knobs}
    while left:
        # Greedy order: the knob whose elimination makes the smallest table; exact in any order.
        beside = {knob: {k for knobs, _ in factors if knob in knobs for k in knobs} - {knob} for knob in sorted(left)}
        knob = min(beside, key=lambda k: prod(int(cardinalities[j]) for j in beside[k]))
        scope = (*sorted(beside[knob]), knob)
        shape = tuple(int(cardinalities[k]) for k in scope)
        if prod(shape) > LARGEST_TABLE:
            return None
        bucket = [f for f in factors if knob in f[0]]
        table = _aligned(bucket[0], scope, shape)
        for factor in bucket[1:]:
            table = combine(table, _aligned(factor, scope, shape))
        kept, reduced = reduce(table)
        steps.append((knob, scope[:-1], kept))
        factors = [f for f in factors if knob not in f[0]] + [(scope[:-1], reduced)]
        left.remove(knob)
    rest = [float(table.reshape(-1)[0]) for _, table in factors]
    return steps, float(combine.reduce(rest)) if rest else 0.0


def _aligned(factor: Factor, scope: tuple[int, ...], shape: tuple[int, ...]) -> Table:
    """The factor's table with one axis per knob of `scope`, of length 1 where it does not depend on it."""
    knobs, table = factor
    order = sorted(range(len(knobs)), key=lambda i: scope.index(knobs[i]))
    lengths = [shape[i] if k in knobs else 1 for i, k in enumerate(scope)]
    return np.broadcast_to(table.transpose(order).reshape(lengths), shape)
