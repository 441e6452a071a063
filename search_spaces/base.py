"""The contract of a search space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from search_spaces.errors import UserError, nearest
from search_spaces.operators import Workload

if TYPE_CHECKING:
    import torch.nn as nn

    from search_spaces.supernet import MixtureSupernet, Supernet

Archs = NDArray[np.unsignedinteger[Any]]
Choice = int | float | str


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
    """A piece of a space: its operators, between one input and one output tensor."""

    name: str
    workload: Workload


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
        """Draw `n` architectures, each knob uniform and independent; `(n, K)` canonical."""
        return self.canonical((rng.random((n, len(self.knobs))) * self.cardinalities).astype(self.dtype))

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

    def check(self, archs: NDArray[Any]) -> Archs:
        """`archs` as a `(n, K)` array of this space's dtype.

        Raises:
            UserError: wrong number of columns, or a choice that a knob does not have.
        """
        archs = np.atleast_2d(np.asarray(archs))
        if archs.ndim != 2 or archs.shape[1] != len(self.knobs):
            raise UserError(f"{self.name}: an architecture has {len(self.knobs)} knobs, got shape {archs.shape}")
        bad = np.argwhere((archs < 0) | (archs >= self.cardinalities))
        if len(bad):
            row, column = bad[0]
            knob = self.knobs[column]
            raise UserError(
                f"{self.name}: row {row}, knob {knob.name!r}: index {archs[row, column]} is outside "
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
