"""Variation of architectures, generic over any space's knobs: mutation, crossover, neighbours; batched.

Every function returns canonical rows. A knob that becomes active (a block that appears when the depth grows) is drawn
afresh, uniformly: its old value, the canonical zero, meant nothing. Choices come from the space's menu, and what a
restricted space does not permit is drawn again, a bounded number of times, before a row is left as its parent was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search_spaces import SearchSpace
from search_spaces.base import TRIES, Archs
from search_spaces.rows import row_keys


def _settled(space: SearchSpace, archs: Archs, drawn: NDArray[np.bool_], rng: np.random.Generator) -> Archs:
    """Canonical rows, in which active knobs that were not `drawn` `(n, K)` yet are drawn; changes `archs`."""
    while True:  # a knob drawn here may switch on others; each turn draws at least one more
        active = space.active(archs)
        fresh = np.flatnonzero(active & ~drawn)
        if not len(fresh):
            archs *= active
            return archs
        archs.reshape(-1)[fresh] = space.menu.draw(fresh % archs.shape[1], rng)
        drawn = drawn | active


def _permitted(space: SearchSpace, parents: Archs, make: Callable[[Any], Archs], rng: np.random.Generator) -> Archs:
    """`make(rows)` for all rows, made again where the space does not permit it; at last those keep their parent's.

    In a space that is a list of architectures, of which a variation hardly ever hits one, they become the nearest one
    of the list that is not their parent.
    """
    out = make(slice(None))
    if not space.restricted:
        return out
    wrong = np.flatnonzero(~space.permits(out))
    if space.listed is not None and len(wrong):
        out[wrong] = space.listed.rows[space.listed.nearest(out[wrong], parents[wrong], rng)]
        return out
    for _ in range(TRIES):
        if not len(wrong):
            return out
        out[wrong] = make(wrong)
        wrong = wrong[~space.permits(out[wrong])]
    out[wrong] = parents[wrong]
    return out


def mutate(
    space: SearchSpace, archs: Archs, rng: np.random.Generator, rate: float, *, at_least_one: bool = True
) -> Archs:
    """Redraw active knobs of `(n, K)` canonical architectures, each to one of its other choices.

    Args:
        rate: chance of each active knob to change.
        at_least_one: change one active knob of a row at random where none changed by chance, so that no row stays as it
            is; with `rate` 0 exactly one knob changes.
    """
    return _permitted(space, archs, lambda rows: _mutated(space, archs[rows], rng, rate, at_least_one), rng)


def _mutated(space: SearchSpace, archs: Archs, rng: np.random.Generator, rate: float, at_least_one: bool) -> Archs:
    active = space.active(archs)
    can = active & (space.menu.counts > 1)
    if rate > 0:
        change = rng.random(archs.shape, dtype=np.float32) < rate
        change &= can
    else:
        change = np.zeros(archs.shape, dtype=bool)
    if at_least_one:
        still = np.flatnonzero(~change.any(axis=1))
        # The one to change: the k-th that can, k drawn uniformly.
        count = np.cumsum(can[still], axis=1, dtype=np.int32)
        kth = 1 + (rng.random(len(still)) * count[:, -1]).astype(np.int32)
        change[still] = can[still] & (count == kth[:, None])
    flat = np.flatnonzero(change)
    out = archs.copy()
    out.reshape(-1)[flat] = space.menu.other(flat % archs.shape[1], out.reshape(-1)[flat], rng)
    return _settled(space, out, active, rng)


def crossover(space: SearchSpace, first: Archs, second: Archs, rng: np.random.Generator) -> Archs:
    """Uniform crossover of two `(n, K)` arrays row by row: one child each.

    A knob that is active in one parent only comes from that parent, so that a block that the child inherits is never
    made of another parent's absence.
    """
    return _permitted(space, first, lambda rows: _crossed(space, first[rows], second[rows], rng), rng)


def _crossed(space: SearchSpace, first: Archs, second: Archs, rng: np.random.Generator) -> Archs:
    active_first, active_second = space.active(first), space.active(second)
    bits = np.frombuffer(rng.bytes(first.size // 8 + 1), dtype=np.uint8)
    from_first = np.unpackbits(bits, count=first.size).reshape(first.shape).astype(bool)
    # Where both are active the bit decides, else the one that is.
    from_first &= active_first
    from_first |= ~active_second
    return _settled(space, np.where(from_first, first, second), active_first | active_second, rng)


def neighbours(space: SearchSpace, arch: Archs, rng: np.random.Generator) -> Archs:
    """The permitted `(m, K)` architectures that differ from `arch` `(K,)` by one active knob, one for each choice."""
    arch = np.asarray(arch, dtype=space.dtype)
    active = space.active(arch[None])[0]
    knobs, choices = (
        np.array(
            [(k, c) for k in np.flatnonzero(active) for c in space.menu.choices(int(k)) if c != arch[k]],
            dtype=np.int64,
        )
        .reshape(-1, 2)
        .T
    )
    out = np.tile(arch, (len(knobs), 1))
    out[np.arange(len(knobs)), knobs] = choices
    out = _settled(space, out, np.tile(active, (len(knobs), 1)), rng)
    return out[space.permits(out)]


def new_rows(archs: Archs, known: Archs | None = None) -> NDArray[np.bool_]:
    """Which rows of `(n, K)` are the first of their kind and not among `known`, `(n,)` bool.

    Rows are told apart by `row_keys`: a clash, once in 10^13 batches of a thousand, hides a row.
    """
    before = 0 if known is None else len(known)
    keys = row_keys(archs if known is None else np.concatenate([known, archs]))
    out = np.zeros(len(keys), dtype=bool)
    out[np.unique(keys, return_index=True)[1]] = True
    return out[before:]


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
