"""Variation of architectures, generic over any space's knobs: mutation, crossover, neighbours; batched.

Every function returns canonical rows. A knob that becomes active (a block that appears when the depth grows) is drawn
afresh, uniformly: its old value, the canonical zero, meant nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from search_spaces import SearchSpace
from search_spaces.base import Archs


def _filled(space: SearchSpace, archs: Archs, active: NDArray[np.bool_], rng: np.random.Generator) -> Archs:
    """A copy with uniform draws in inactive knobs, ready for whichever become active."""
    out = archs.copy()
    rows, knobs = np.nonzero(~active)
    out[rows, knobs] = (rng.random(len(rows)) * space.cardinalities[knobs]).astype(out.dtype)
    return out


def mutate(
    space: SearchSpace, archs: Archs, rng: np.random.Generator, rate: float, *, at_least_one: bool = True
) -> Archs:
    """Redraw knobs of `(n, K)` canonical architectures, each to one of its other choices.

    Args:
        rate: chance of each knob to change.
        at_least_one: change one active knob of a row at random where none changed by chance, so that no row stays as it
            is; with `rate` 0 exactly one knob changes.
    """
    active = space.active(archs)
    out = _filled(space, archs, active, rng)
    several = space.cardinalities > 1
    change = (rng.random(archs.shape, dtype=np.float32) < rate) & several if rate > 0 else np.zeros(archs.shape, bool)
    if at_least_one:
        can = active & several
        still = np.flatnonzero(~(change & can).any(axis=1) & can.any(axis=1))
        change[still, np.where(can[still], rng.random((len(still), archs.shape[1])), -1.0).argmax(axis=1)] = True
    rows, knobs = np.nonzero(change)
    cardinality = space.cardinalities[knobs]
    step = 1 + (rng.random(len(rows)) * (cardinality - 1)).astype(np.int64)
    out[rows, knobs] = (out[rows, knobs] + step) % cardinality
    return space.canonical(out)


def crossover(space: SearchSpace, first: Archs, second: Archs, rng: np.random.Generator) -> Archs:
    """Uniform crossover of two `(n, K)` arrays row by row: one child each.

    A knob that is active in one parent only comes from that parent, so that a block that the child inherits is never
    made of another parent's absence.
    """
    active_first, active_second = space.active(first), space.active(second)
    from_first = rng.integers(0, 2, size=first.shape, dtype=np.uint8).astype(bool)
    from_first = np.where(active_first == active_second, from_first, active_first)
    child = np.where(from_first, first, second)
    return space.canonical(_filled(space, child, active_first | active_second, rng))


def neighbours(space: SearchSpace, arch: Archs, rng: np.random.Generator) -> Archs:
    """All distinct architectures `(m, K)` that differ from `arch` `(K,)` by one active knob's choice."""
    arch = np.asarray(arch, dtype=space.dtype)
    active = space.active(arch[None])[0]
    knobs, choices = (
        np.array(
            [(k, c) for k in np.flatnonzero(active) for c in range(space.cardinalities[k]) if c != arch[k]],
            dtype=np.int64,
        )
        .reshape(-1, 2)
        .T
    )
    out = _filled(space, np.tile(arch, (len(knobs), 1)), np.tile(active, (len(knobs), 1)), rng)
    out[np.arange(len(knobs)), knobs] = choices
    return first_of_each(space.canonical(out))


def row_keys(archs: Archs) -> NDArray[np.uint64]:
    """A 64-bit key `(n,)` per row: equal rows have equal keys, and two others hardly ever."""
    # Fixed odd multipliers spread over 64 bits (Weyl sequence, then two rounds of splitmix64's finaliser).
    weights = np.arange(1, archs.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    weights = (weights ^ (weights >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    weights = (weights ^ (weights >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys: NDArray[np.uint64] = archs.astype(np.uint64) @ (weights ^ (weights >> np.uint64(31)))
    return keys


def new_rows(archs: Archs, known: Archs | None = None) -> NDArray[np.bool_]:
    """Which rows of `(n, K)` are the first of their kind and not among `known`, `(n,)` bool.

    Rows are told apart by `row_keys`: a clash, once in 10^13 batches of a thousand, hides a row.
    """
    keys = row_keys(archs)
    out = np.zeros(len(archs), dtype=bool)
    out[np.unique(keys, return_index=True)[1]] = True
    if known is not None and len(known):
        out &= ~np.isin(keys, row_keys(known))
    return out


def first_of_each(archs: Archs) -> Archs:
    """The distinct rows of `(n, K)`, in order."""
    return archs[new_rows(archs)]


def sample_distinct(space: SearchSpace, n: int, rng: np.random.Generator, known: Archs | None = None) -> Archs:
    """`n` random architectures `(n, K)`, distinct and not among `known` where a few draws find enough such.

    A space that has too few gives repeats rather than an endless search.
    """
    archs = space.sample(n, rng)
    for _ in range(10):
        repeated = np.flatnonzero(~new_rows(archs, known))
        if not len(repeated):
            break
        archs[repeated] = space.sample(len(repeated), rng)
    return archs
