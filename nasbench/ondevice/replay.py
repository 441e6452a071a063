"""A memory of past samples within so many bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nasbench.training.recipe import check_choice
from search_spaces.errors import UserError

Policy = Literal["reservoir", "balanced"]


class ReplayBuffer:
    """Rows of tensors, a sample each, that never take more than a given number of bytes.

    Args:
        memory_bytes: for all columns, labels too.
        policy: `reservoir` (Vitter 1985) keeps every sample of the stream with equal probability; `balanced` keeps the
            classes as equal as the stream allows (class-balancing reservoir sampling; Chrysakis & Moens, ICML 2020).
        seed: of which samples are kept.
    """

    def __init__(self, memory_bytes: int, policy: Policy = "balanced", seed: int = 0) -> None:
        check_choice("policy", policy, get_args(Policy))
        self.memory_bytes = memory_bytes
        self.policy = policy
        self.columns: dict[str, Tensor] = {}
        self._rng = np.random.default_rng(seed)
        self._labels: list[int] = []
        self._met: dict[int, int] = {}
        self._full: set[int] = set()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def nbytes(self) -> int:
        """What the samples take."""
        return sum(column.nbytes for column in self.columns.values())

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Let samples pass by, one row each, of which some are kept.

        Args:
            columns: tensors `(n, ...)` by name; always the same names and shapes, `labels` among them.

        Raises:
            UserError: not even one sample fits.
        """
        row = sum(column[:1].nbytes for column in columns.values())
        capacity = self.memory_bytes // row if row else 0
        if capacity < 1:
            raise UserError(f"memory_bytes = {self.memory_bytes}: one sample takes {row} bytes")
        sources = {}  # slot -> the row of `columns` that ends there
        for source, label in enumerate(columns["labels"].tolist()):
            slot = self._slot(label, capacity)
            if slot is not None:
                sources[slot] = source
        if not sources:
            return
        slots, rows = torch.tensor(list(sources)), torch.tensor(list(sources.values()))
        for name, column in columns.items():
            old = self.columns.get(name, column[:0])
            new = column.new_empty((len(self), *column.shape[1:]))
            new[: len(old)] = old
            new[slots] = column[rows].detach()
            self.columns[name] = new

    def _slot(self, label: int, capacity: int) -> int | None:
        """Where the next sample of the stream goes; None: it is not kept."""
        self._met[label] = self._met.get(label, 0) + 1
        if len(self._labels) < capacity:
            self._labels.append(label)
            return len(self._labels) - 1
        if self.policy == "reservoir":
            slot = int(self._rng.integers(sum(self._met.values())))
            if slot >= capacity:
                return None
        else:
            labels = np.array(self._labels)
            kept = np.bincount(labels)
            largest = np.flatnonzero(kept == kept.max())
            self._full |= set(largest.tolist())
            if label not in self._full:
                slot = int(self._rng.choice(np.flatnonzero(labels == self._rng.choice(largest))))
            elif label < len(kept) and self._rng.random() <= kept[label] / self._met[label] and kept[label]:
                slot = int(self._rng.choice(np.flatnonzero(labels == label)))
            else:
                return None
        self._labels[slot] = label
        return slot

    def draw(self, count: int, seed: int) -> dict[str, Tensor]:
        """Up to `count` different samples at random; none where nothing was kept yet."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return {name: column[rows] for name, column in self.columns.items()}


def to_int8(values: Tensor) -> dict[str, Tensor]:
    """Samples `(n, ...)` as unsigned bytes, with a scale and an offset each."""
    flat = values.flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    shape = (-1, *[1] * (values.ndim - 1))
    coded = ((values - low.view(shape)) / scale.view(shape)).round().clamp(0, 255).to(torch.uint8)
    return {"values": coded, "scale": scale, "offset": low}


def from_int8(columns: Mapping[str, Tensor]) -> Tensor:
    """What `to_int8` wrote, as float32: right to half a step, 1/510 of a sample's range."""
    values = columns["values"].float()
    shape = (-1, *[1] * (values.ndim - 1))
    return values * columns["scale"].view(shape) + columns["offset"].view(shape)
