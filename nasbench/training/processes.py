"""Several processes that train one model, started by torch's own launcher: `torchrun --nproc-per-node 2 ...`.

Each takes its part of every batch; gradients are averaged over all. Only the first writes files. Processes find each
other through what the launcher puts into the environment; without it there is one process, and nothing here does
anything.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The first process may calibrate and measure for hours before it comes to train.
_PATIENCE = timedelta(days=7)


def launched() -> int:
    """How many processes the launcher started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_available() else 1


def launched_rank() -> int:
    """Which of them this is; 0 without the launcher."""
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def local_rank() -> int:
    """Which of the processes of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together; of one alone, every method hands back what it is given."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.count == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        given: T = box[0]
        return given

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors of one type by their means over the processes: one message for all."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def means(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Numbers by name, averaged over the processes."""
        if self.count == 1:
            return values
        means = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(means)
        return dict(zip(values, (means / self.count).tolist(), strict=True))


ALONE = Ranks()
_JOINED = itertools.count()


@cache
def _meeting_point() -> tuple[dist.Store, int, int]:
    """The launcher's store, this process's rank, and how many there are."""
    found: tuple[dist.Store, int, int] = next(iter(dist.rendezvous("env://", timeout=_PATIENCE)))
    return found


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the launched processes for as long as the context lasts; a group that exists already is used and left."""
    if launched() == 1:
        yield ALONE
        return
    own = not dist.is_initialized()
    if own:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, rank, count = _meeting_point()
        # A group of its own each time: what an earlier one left in the store would be taken for this one's.
        store = dist.PrefixStore(f"nasbench-{next(_JOINED)}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if own:
            dist.destroy_process_group()
