"""Where the knobs and blocks of a space lie in arrays: spaces of positions whose blocks depend on a few knobs each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from search_spaces.base import Archs, Block, Catalog, Choice, Knob, SearchSpace


@dataclass(frozen=True)
class Position:
    """A place in a network that holds one block, or none.

    Args:
        shared: decisions that the block depends on and that exist without it, most significant for its id first.
        own: decisions of this block alone, inactive where it is absent.
        depth: the decision that tells whether the block is there; empty where it always is.
        least: index of the first choice of `depth` with which it is there.
    """

    shared: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    depth: str = ""
    least: int = 0


class Layout:
    """Turns architectures into active knobs and block ids by one array operation each.

    Args:
        choices: every decision with its choices, in the order of the knobs; those with one choice are no knobs.
        positions: in execution order; may name decisions that are not in `choices`.
        fallback: the decision that is kept as a knob where none has a choice.
    """

    def __init__(
        self, choices: Mapping[str, tuple[Choice, ...]], positions: Sequence[Position], fallback: str = "resolution"
    ) -> None:
        names = [name for name, values in choices.items() if len(values) > 1] or [fallback]
        self.knobs = tuple(Knob(name, choices[name]) for name in names)
        self._column = {name: column for column, name in enumerate(names)}
        count = len(positions)
        self._depth_knob = np.arange(len(names))  # a knob is active where knob `_depth_knob` is at least `_least_depth`
        self._least_depth = np.zeros(len(names), dtype=np.uint8)
        self._id_knobs = [[self._column[n] for n in (*p.shared, *p.own) if n in self._column] for p in positions]
        sizes = [prod(len(self.knobs[k].choices) for k in knobs) for knobs in self._id_knobs]
        first_id = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        # A float product runs in BLAS and is exact below 2^24 (2^53).
        exact = np.float32 if first_id[-1] < 2**24 else np.float64
        self.first_id = first_id
        self._first = first_id[:-1].astype(exact)
        self._least = np.array([p.least for p in positions], dtype=exact)
        # Weights of each knob in each position's id, then the depth knob of each position.
        self._radix = np.zeros((len(names), 2 * count), dtype=exact)
        position_knobs = []
        for i, position in enumerate(positions):
            weight = 1
            for knob in reversed(self._id_knobs[i]):
                self._radix[knob, i] = weight
                weight *= len(self.knobs[knob].choices)
            depth = [self._column[position.depth]] if position.least and position.depth in self._column else []
            for knob in depth:
                own = [self._column[name] for name in position.own if name in self._column]
                self._depth_knob[own], self._least_depth[own] = knob, position.least
                self._radix[knob, count + i] = 1
            position_knobs.append(tuple(self._id_knobs[i] + [k for k in depth if k not in self._id_knobs[i]]))
        self.position_knobs = tuple(position_knobs)

    def column(self, name: str) -> int | None:
        """Column of the named decision, None where it is no knob."""
        return self._column.get(name)

    def choice(self, name: str, arch: Archs) -> int:
        """Index of the choice that `arch` makes for the named decision, 0 where it is no knob."""
        column = self.column(name)
        return 0 if column is None else int(arch[column])

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        """`(n, K)`: which knobs belong to a block that is there, or to no block."""
        return np.take(archs, self._depth_knob, axis=1, mode="clip") >= self._least_depth

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """`(n, P)` ids, -1 where absent: mixed-radix numbers of a position's knobs, so one matrix product gives all."""
        both = np.asarray(archs).astype(self._radix.dtype) @ self._radix
        count = len(self._first)
        ids = both[:, :count] + self._first
        ids[both[:, count:] < self._least] = -1
        return ids.astype(np.int32)

    def locate(self, block: int) -> tuple[int, dict[str, int]]:
        """Position of a block id, and the choices (decision -> index) of the knobs on which the id depends."""
        position = int(np.searchsorted(self.first_id, block, side="right")) - 1
        rest = block - int(self.first_id[position])
        found = {}
        for knob in reversed(self._id_knobs[position]):
            rest, digit = divmod(rest, len(self.knobs[knob].choices))
            found[self.knobs[knob].name] = digit
        return position, found

    def tells_depth(self, column: int) -> bool:
        """Whether every step up of a depth knob switches some other knob on, so that their presence tells it."""
        steps = {int(s) for k, s in zip(self._depth_knob, self._least_depth, strict=True) if k == column}
        return set(range(1, len(self.knobs[column].choices))) <= steps


class LaidOutSpace(SearchSpace):
    """A space whose knobs and blocks lie in a `Layout`; a subclass sets `_layout` and makes the blocks."""

    _layout: Layout

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._layout.knobs

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        return self._layout.active(archs)

    @cached_property
    def feature_knobs(self) -> tuple[int, ...]:
        """Knobs that `features` shows: those with a choice, without depths that the blocks' zeros tell anyway."""
        chosen = (index for index, knob in enumerate(self.knobs) if len(knob.choices) > 1)
        return tuple(index for index in chosen if not self._layout.tells_depth(index))

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(int(self._layout.first_id[-1]), self._make_block)

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        return self._layout.blocks(archs)

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        return self._layout.position_knobs

    @abstractmethod
    def _make_block(self, index: int) -> Block:
        """The block with an index of the catalog."""
