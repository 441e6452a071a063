"""What a client sends: a vector of changes, quantised or sparse, as the arrays that really travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from search_spaces.errors import UserError

_BLOCK = 256  # values that share a scale: four bytes for 256


@dataclass(frozen=True)
class Message:
    """Changes of some of a vector's values.

    Args:
        length: of the vector.
        values: `(k,)` float32, or int8 in units of their block's scale.
        scales: `(ceil(k / 256),)` float32 for int8; empty for float32.
        positions: of the values, ascending: unsigned integers `(k,)`, or a bit for every one of the `length` (uint8)
            where that is shorter; empty where all are there.
    """

    length: int
    values: NDArray[Any]
    scales: NDArray[np.float32]
    positions: NDArray[np.unsignedinteger[Any]]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.values.nbytes + self.scales.nbytes + self.positions.nbytes

    def decode(self) -> Tensor:
        """The vector `(length,)` float32, zero where nothing was sent.

        Raises:
            UserError: arrays that do not fit together; values may be anything.
        """
        values = self.values.astype(np.float32)
        if self.values.dtype == np.int8:
            blocks = -(-len(values) // _BLOCK)
            if self.scales.shape != (blocks,):
                raise UserError(f"{len(values)} values in int8 come with {self.scales.shape} scales, not {blocks}")
            values *= np.repeat(self.scales, _BLOCK)[: len(values)]
        where = self._where()
        if values.shape != where.shape or (len(where) and where[-1] >= self.length):
            raise UserError(f"{values.shape} values for {where.shape} positions of a vector of {self.length}")
        out = torch.zeros(self.length)
        out[torch.from_numpy(where)] = torch.from_numpy(values)
        return out

    def _where(self) -> NDArray[np.int64]:
        if not len(self.positions):
            return np.arange(self.length if len(self.values) else 0)
        if self.positions.dtype == np.uint8:
            return np.flatnonzero(np.unpackbits(self.positions, count=self.length))
        return self.positions.astype(np.int64)


@dataclass(frozen=True)
class Compression:
    """How changes are made small.

    Args:
        share: of the values that are sent, the largest by magnitude; what is left out is added to the next change
            (error feedback; Stich, Cordonnier & Jaggi, NeurIPS 2018).
        bits: 32, or 8: stochastic rounding, right on average, in steps of 1/127 of the largest of 256 values (as in
            QSGD; Alistarh et al., NeurIPS 2017).
    """

    share: float = 1.0
    bits: Literal[8, 32] = 32

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"compression.share = {self.share}: expected above 0, up to 1")
        if self.bits not in (8, 32):
            raise UserError(f"compression.bits = {self.bits}: expected 8 or 32")

    def encode(self, vector: Tensor, seed: int) -> Message:
        """The message for a vector `(n,)`; what rounding draws follows from `seed`."""
        length = len(vector)
        count = max(1, round(self.share * length))
        positions: NDArray[Any] = np.zeros(0, dtype=np.uint8)
        values = vector.float()
        if count < length:
            rows = values.abs().topk(count).indices.sort().values
            values = values[rows]
            short = np.uint16 if length <= 1 << 16 else np.uint32
            positions = rows.numpy().astype(short)
            if length / 8 < positions.nbytes:
                mask = np.zeros(length, dtype=bool)
                mask[rows.numpy()] = True
                positions = np.packbits(mask)
        scales: NDArray[np.float32] = np.zeros(0, dtype=np.float32)
        if self.bits == 32:
            return Message(length, values.numpy().copy(), scales, positions)
        blocks = -(-count // _BLOCK)
        padded = torch.zeros(blocks * _BLOCK)
        padded[:count] = values
        grid = padded.view(blocks, _BLOCK)
        scale = (grid.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        drawn = torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed))
        coded = (grid / scale[:, None] + drawn).floor().clamp(-127, 127)
        return Message(length, coded.flatten()[:count].numpy().astype(np.int8), scale.numpy(), positions)
