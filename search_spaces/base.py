"""The contract of a search space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import UserError, nearest
from search_spaces.operators import Workload
from search_spaces.rows import RowIndex

if TYPE_CHECKING:
    import torch.nn as nn

    from search_spaces.supernet import MixtureSupernet, Supernet

Archs = NDArray[np.unsignedinteger[Any]]
Choice = int | float | str

# Rounds of drawing again what a restricted space does not permit, and the least number drawn in a round. Together they
# find what one architecture in some ten thousand has.
TRIES = 100
_LEAST_DRAWN = 1000


@dataclass(frozen=True, slots=True)
class Knob:
    """One categorical decision with an ordered tuple of choices."""

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices)) != len(self.choices):
            raise UserError(f"knob {self.name!r}: choices must be distinct and at least one, got {self.choices}")


@dataclass(frozen=True)
class Block:
    """A piece of a space: its operators, between the tensors that it meets its neighbours at; most often one and one.

    Outputs are all tensors that later blocks read, those that the block itself only hands on among them: so that the
    peak memory of its workload is that of the network while the block runs.
    """

    name: str
    workload: Workload


@dataclass(frozen=True)
class Published:
    """What a source says of a reference architecture.

    Args:
        macs, params: exact, or as the source rounds them (`"375M"`); None where it says nothing.
        source: of the figures.
        options: keyword arguments of the space with which the architecture is the published network, where that is not
            the space as it stands: published networks differ in widths that are not searched.
    """

    macs: int | str | None = None
    params: int | str | None = None
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


class Catalog(Sequence[Block]):
    """The distinct blocks of a space, made when first asked for and then kept."""

    def __init__(self, size: int, make: Callable[[int], Block]) -> None:
        self._size = size
        self._make = make
        self._made: dict[int, Block] = {}

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Block: ...
    @overload
    def __getitem__(self, index: slice) -> list[Block]: ...
    def __getitem__(self, index: int | slice) -> Block | list[Block]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(index)
        index %= self._size
        if index not in self._made:
            self._made[index] = self._make(index)
        return self._made[index]


def no_choice(archs: NDArray[Any], cardinalities: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where `archs` `(n, K)` are not the index of one of `(K,)` so many choices: too low, too high, broken or NaN."""
    bad = (archs < 0) | (archs >= cardinalities)
    return bad | (archs != np.trunc(archs)) if archs.dtype.kind == "f" else bad


@dataclass(frozen=True)
class Menu:
    """The choices that a space offers per knob: all, or fewer where blocks were taken out of it.

    Args:
        counts: `(K,)` int64, how many.
        order: `(K, C)` int64, which, padded with zeros; None where all are offered.
        rank: `(K, C)` int64, the inverse of `order`; -1 for what is not offered.
    """

    counts: NDArray[np.int64]
    order: NDArray[np.int64] | None = None
    rank: NDArray[np.int64] | None = None

    @staticmethod
    def of(offered: Sequence[NDArray[np.bool_]]) -> Menu:
        """From one vector per knob that marks the choices offered."""
        counts = np.array([marks.sum() for marks in offered], dtype=np.int64)
        if all(marks.all() for marks in offered):
            return Menu(counts)
        order = np.zeros((len(offered), max(map(len, offered))), dtype=np.int64)
        rank = np.full_like(order, -1)
        for k, marks in enumerate(offered):
            order[k, : counts[k]] = np.flatnonzero(marks)
            rank[k, order[k, : counts[k]]] = np.arange(counts[k])
        return Menu(counts, order, rank)

    def draw(self, knobs: NDArray[np.integer[Any]], rng: np.random.Generator) -> NDArray[np.int64]:
        """A uniform choice for each of the given knobs (any shape)."""
        places = (rng.random(knobs.shape) * self.counts[knobs]).astype(np.int64)
        return places if self.order is None else self.order[knobs, places]

    def other(
        self, knobs: NDArray[np.integer[Any]], choices: NDArray[Any], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """For each of the given knobs a choice that is not its present one; knobs need two choices or more."""
        counts = self.counts[knobs]
        step = 1 + (rng.random(len(knobs)) * (counts - 1)).astype(np.int64)
        if self.order is None or self.rank is None:
            return (choices + step) % counts
        return self.order[knobs, (self.rank[knobs, choices] + step) % counts]

    def choices(self, knob: int) -> NDArray[np.int64]:
        """The indices offered for one knob."""
        return np.arange(self.counts[knob]) if self.order is None else self.order[knob, : self.counts[knob]]


class SearchSpace(ABC):
    """A set of architectures, each a row of choice indices, one per knob.

    Life of a space: it is built once from a configuration and never changes. Strategies call `sample`, `canonical` and
    `active`; predictors call `features` once per batch, and `catalog` with `blocks` to bind; the runner calls `build`,
    `supernet` and `workload` for the few architectures that become real networks. Everything that takes `archs` is
    batched and vectorised. A subclass provides `knobs`, `blocks`, `catalog`, `block_knobs`, `build`, and `active`
    where some knobs can be inactive; the rest follows.

    Spaces know no devices: what they tell the world of a network is its operators.
    """

    name: str = "space"
    # Blocks that no architecture may have, (blocks + 1,) bool; the last stands for the absent one. None for no such.
    _blocked: NDArray[np.bool_] | None = None
    # The only architectures there are, where a space was restricted to a list of them; None for no such list.
    listed: RowIndex | None = None
    # What draws architectures instead of the uniform draw; None for that.
    _draw: Callable[[int, np.random.Generator], Archs] | None = None

    @property
    @abstractmethod
    def knobs(self) -> tuple[Knob, ...]:
        """The K decisions, in the order of an architecture's columns."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """Shape `(channels, height, width)` of the largest input image that the space's networks take."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Width of the networks' output."""

    @property
    def size(self) -> int:
        """The exact number of distinct canonical architectures, a Python integer of any length."""
        return prod(len(k.choices) for k in self.knobs)

    @cached_property
    def cardinalities(self) -> NDArray[np.int64]:
        """Number of choices per knob, `(K,)` int64."""
        return np.array([len(k.choices) for k in self.knobs], dtype=np.int64)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integer that holds every choice index and one value more."""
        return np.dtype(np.uint8 if self.cardinalities.max() <= 255 else np.uint16)

    def sample(self, n: int, rng: np.random.Generator) -> Archs:
        """Draw `n` architectures, each knob uniform and independent; `(n, K)` canonical, and permitted.

        Of a space made by `drawn_by` they come from there.

        Raises:
            UserError: a restricted space, in which hardly any architecture is permitted.
        """
        if self._draw is not None:
            return self._draw(n, rng)
        if self.listed is not None:
            return self.listed.rows[rng.integers(len(self.listed), size=n)]
        if self._blocked is None:
            return self.canonical((rng.random((n, len(self.knobs))) * self.cardinalities).astype(self.dtype))
        knobs = np.arange(len(self.knobs))
        found = np.empty((0, len(knobs)), dtype=self.dtype)
        for _ in range(TRIES):
            if len(found) >= n:
                break
            drawn = np.broadcast_to(knobs, (max(n - len(found), _LEAST_DRAWN), len(knobs)))
            archs = self.canonical(self.menu.draw(drawn, rng).astype(self.dtype))
            found = np.concatenate([found, archs[self.permits(archs)]])
        if len(found) < n:
            raise UserError(
                f"{self.name}: only {len(found)} of at least {TRIES * _LEAST_DRAWN:,} random architectures are made of "
                "permitted blocks alone; restrict the space itself"
            )
        return found[:n]

    def without_blocks(self, blocked: NDArray[np.bool_]) -> Self:
        """This space less all architectures that have one of the given blocks.

        Architectures keep their rows and their names. What draws or varies architectures (`sample`, `nasbench`'s
        variation, `menu`) stays among those that `permits` tells; `size` and `references` are still the whole space's.

        Args:
            blocked: `(len(catalog),)`, True for a block that no architecture may have.
        """
        restricted = copy(self)
        restricted.__dict__.pop("menu", None)
        marks = np.append(np.asarray(blocked, dtype=bool), False)
        restricted._blocked = marks if self._blocked is None else self._blocked | marks
        return restricted if self.listed is None else restricted.only(self.listed.rows)

    def only(self, archs: Archs) -> Self:
        """This space less all architectures but those of a list `(n, K)`, as `without_blocks` less those with a block.

        Raises:
            UserError: nothing of the list is permitted.
        """
        restricted = copy(self)
        restricted.__dict__.pop("menu", None)
        archs = np.unique(self.canonical(self.check(archs)), axis=0)
        restricted.listed = RowIndex(archs[self.permits(archs)])
        if not len(restricted.listed):
            raise UserError(f"{self.name}: none of the {len(archs)} architectures listed is permitted")
        return restricted

    def drawn_by(self, draw: Callable[[int, np.random.Generator], Archs]) -> Self:
        """This space with `sample(n, rng)` taken from `draw(n, rng)`, such as one that keeps hard limits.

        Only what is drawn at random changes: the space has all its architectures, and variation may reach them.
        """
        drawn = copy(self)
        drawn._draw = draw
        return drawn

    @property
    def restricted(self) -> bool:
        """Whether blocks or architectures were taken out of this space."""
        return self._blocked is not None or self.listed is not None

    def permits(self, archs: Archs) -> NDArray[np.bool_]:
        """Which of `(n, K)` architectures have no block that was taken out, and are listed, `(n,)` bool."""
        good = np.ones(len(archs), dtype=bool) if self.listed is None else self.listed.find(archs) >= 0
        if self._blocked is not None:
            good &= ~self._blocked[self.blocks(archs)].any(axis=1)
        return good

    def permits_blocks(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """Which catalog indices of any shape, -1 for an absent block, were not taken out."""
        return np.ones(ids.shape, dtype=bool) if self._blocked is None else ~self._blocked[ids]

    @cached_property
    def menu(self) -> Menu:
        """The choices worth drawing: all but those that only ever lead to a block that was taken out."""
        offered = [np.ones(count, dtype=bool) for count in self.cardinalities]
        if self.listed is not None:
            rows = self.listed.rows
            return Menu.of([np.isin(np.arange(c), rows[:, k]) for k, c in enumerate(self.cardinalities)])
        if self._blocked is None:
            return Menu.of(offered)
        grids = [self.block_grid(position) for position in range(len(self.block_knobs))]
        changed = True
        while changed:  # one choice less may leave another without company; each turn takes at least one away
            changed = False
            for knobs, grid, ids in grids:
                good = self.permits_blocks(ids)
                for column, k in enumerate(knobs):
                    good &= offered[k][grid[:, column]]
                active = self.active(self._rows(knobs, grid))
                for column, k in enumerate(knobs):
                    seen = np.unique(grid[active[:, k], column])
                    left = np.unique(grid[good & active[:, k], column])
                    lost = np.setdiff1d(seen[offered[k][seen]], left)
                    # A knob without any choice left belongs to a block that can only be absent.
                    if len(lost) and len(lost) < offered[k].sum():
                        offered[k][lost] = False
                        changed = True
        return Menu.of(offered)

    def block_grid(self, position: int) -> tuple[tuple[int, ...], NDArray[np.int64], NDArray[np.int32]]:
        """One position's knobs, all `m` combinations of their choices `(m, knobs)`, and the block of each `(m,)`.

        A position without knobs has one combination, of no column.
        """
        knobs = self.block_knobs[position]
        counts = [int(self.cardinalities[k]) for k in knobs]
        grid = np.indices(counts).reshape(len(knobs), prod(counts)).T
        return knobs, grid, self.blocks(self._rows(knobs, grid))[:, position]

    def _rows(self, knobs: tuple[int, ...], grid: NDArray[np.int64]) -> Archs:
        """Architectures `(m, K)` with the given choices of the given knobs and the first of all others."""
        archs = np.zeros((len(grid), len(self.knobs)), dtype=self.dtype)
        archs[:, list(knobs)] = grid
        return archs

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        """Which knobs take part in each architecture, `(n, K)` bool. All of them, unless a space says otherwise."""
        return np.ones(np.shape(archs), dtype=bool)

    def canonical(self, archs: Archs) -> Archs:
        """`(n, K)` with inactive knobs set to zero, so that one network has one row."""
        archs = np.asarray(archs, dtype=self.dtype)
        return archs * self.active(archs)

    @property
    def references(self) -> dict[str, Archs]:
        """Named architectures `(K,)` to compare a front with, or to start a search from; the two ends by default."""
        ends = np.stack([np.zeros_like(self.cardinalities), self.cardinalities - 1])
        smallest, largest = self.canonical(ends)
        return {"smallest": smallest, "largest": largest}

    @property
    def published(self) -> Mapping[str, Published]:
        """Published figures of architectures in `references`, by their name."""
        return {}

    def check(self, archs: NDArray[Any]) -> Archs:
        """`archs` as a `(n, K)` array of this space's dtype.

        Raises:
            UserError: wrong number of columns, or a choice that a knob does not have.
        """
        archs = np.atleast_2d(np.asarray(archs))
        if archs.ndim != 2 or archs.shape[1] != len(self.knobs):
            raise UserError(f"{self.name}: an architecture has {len(self.knobs)} knobs, got shape {archs.shape}")
        bad = np.argwhere(no_choice(archs, self.cardinalities))
        if len(bad):
            row, column = bad[0]
            knob = self.knobs[column]
            raise UserError(
                f"{self.name}: row {row}, knob {knob.name!r}: index {archs[row, column]} is none of "
                f"0..{len(knob.choices) - 1} ({len(knob.choices)} choices: {knob.choices})"
            )
        return archs.astype(self.dtype)

    def encode(self, choices: Mapping[str, Choice]) -> Archs:
        """The canonical row `(K,)` of an architecture given as `{knob name: choice}`; inactive knobs may be left out.

        Raises:
            UserError: an unknown knob or choice, or an active knob that is missing.
        """
        by_name = {k.name: i for i, k in enumerate(self.knobs)}
        arch = np.zeros(len(self.knobs), dtype=self.dtype)
        for name, choice in choices.items():
            if name not in by_name:
                raise UserError(f"{self.name}: unknown knob {name!r}. {nearest(name, by_name)}")
            knob = self.knobs[by_name[name]]
            if choice not in knob.choices:
                raise UserError(f"{self.name}: knob {name!r} has no choice {choice!r}; it has {knob.choices}")
            arch[by_name[name]] = knob.choices.index(choice)
        missing = [
            k.name for k, on in zip(self.knobs, self.active(arch[None])[0], strict=True) if on and k.name not in choices
        ]
        if missing:
            raise UserError(f"{self.name}: no choice given for {', '.join(missing)}")
        return self.canonical(arch[None])[0]

    def decode(self, arch: Archs) -> dict[str, Choice]:
        """`{knob name: choice}` of one row `(K,)`, active knobs only; the inverse of `encode`."""
        active = self.active(np.asarray(arch)[None])[0]
        return {k.name: k.choices[int(i)] for k, i, on in zip(self.knobs, arch, active, strict=True) if on}

    @cached_property
    def feature_knobs(self) -> tuple[int, ...]:
        """Knobs that `features` shows: those with a choice to make."""
        return tuple(i for i, k in enumerate(self.knobs) if len(k.choices) > 1)

    @cached_property
    def _feature_columns(self) -> tuple[NDArray[np.intp], Archs]:
        """Knob and choice plus one, `(D,)` each, that a column of `features` tells of."""
        columns = [(k, choice + 1) for k in self.feature_knobs for choice in range(self.cardinalities[k])]
        knobs, choices = np.array(columns, dtype=np.intp).reshape(-1, 2).T
        return knobs, choices.astype(self.dtype)

    def features(self, archs: Archs) -> NDArray[np.float32]:
        """One-hot rows `(n, D)` float32 of the knobs in `feature_knobs`, all zero where a knob is inactive."""
        knobs, choices = self._feature_columns
        archs = np.asarray(archs, dtype=self.dtype)
        # Shifted by one, so that an inactive knob, then zero, equals no choice.
        marked = (archs + self.dtype.type(1)) * self.active(archs)
        return (np.take(marked, knobs, axis=1, mode="clip") == choices).astype(np.float32)

    def descriptors(self, archs: Archs) -> tuple[NDArray[np.float32], ...]:
        """What models may compare networks by, beside their knobs; none by default.

        For spaces whose knobs do not show what a network is, such as cells in which an edge may lead nowhere. Each
        group `(n, D)` float32 is compared by Euclidean distance, so that its columns need one scale, on which a
        distance of 1 or 2 is worth mentioning. How many groups and columns does not depend on `archs`.
        """
        return ()

    @property
    @abstractmethod
    def catalog(self) -> Catalog:
        """The distinct blocks; `blocks` points into it."""

    @abstractmethod
    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """Catalog indices `(n, P)` int32 of the blocks of each architecture, in execution order; -1 where absent."""

    @property
    @abstractmethod
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        """Per position (P of them), the indices of the knobs on which `blocks(archs)[:, position]` depends."""

    def workload(self, arch: Archs) -> Workload:
        """The exact operator graph of one architecture `(K,)`."""
        ids = self.blocks(np.asarray(arch)[None])[0]
        return Workload.chain(self.catalog[int(i)].workload for i in ids if i >= 0)

    @abstractmethod
    def build(self, arch: Archs) -> nn.Module:
        """A stand-alone network of one architecture `(K,)`, freshly initialised from torch's random state."""

    def supernet(self) -> Supernet:
        """A freshly initialised weight-sharing network of the whole space.

        Raises:
            UserError: the space has none.
        """
        raise UserError(f"space {self.name!r} has no supernet; choose an evaluator that needs none")

    def mixture_supernet(self) -> MixtureSupernet:
        """A freshly initialised mixture supernet, for gradient search.

        Raises:
            UserError: the space has none.
        """
        raise UserError(f"space {self.name!r} has no mixture supernet; choose a strategy that needs none")
