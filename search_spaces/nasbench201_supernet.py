"""The weight-sharing networks of NAS-Bench-201: a path per operation of every edge, one taken or all weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from search_spaces.base import Archs
from search_spaces.nasbench201 import EDGES, OPERATIONS
from search_spaces.nasbench201_network import NASBench201, operation
from search_spaces.shared_layers import Drop, Normalise, WeightSharingSupernet, by_batch
from search_spaces.shared_modules import Call, keep, running, running_paths, scaled, share, this_call, total
from search_spaces.supernet import MixtureSupernet

if TYPE_CHECKING:
    from search_spaces.nasbench201 import NASBench201Space

_EDGE = {f"{a}->{b}": index for index, (a, b) in enumerate(EDGES)}


class Edge(nn.Module):
    """The operations between two nodes; those run, and are weighted, that the running call says."""

    def __init__(self, channels: int, edge: int) -> None:
        super().__init__()
        self.edge = edge
        made = {name: operation(name, channels) for name in OPERATIONS}
        self.paths = nn.ModuleDict({name: module for name, module in made.items() if module is not None})

    def forward(self, x: Tensor) -> Tensor | None:
        """None where nothing is there."""
        paths = this_call().running
        assert paths is not None
        terms = [
            scaled(self.paths[OPERATIONS[choice]](x), weight)
            for choice, weight in paths[self.edge]
            if OPERATIONS[choice] != "none"
        ]
        return total(terms) if terms else None


def shared_network(space: NASBench201Space) -> NASBench201:
    """The benchmark's network with every operation on every edge, freshly initialised."""
    return share(NASBench201(space, edge=Edge))


class SuperNASBench201(WeightSharingSupernet):
    """Every network of NAS-Bench-201, one path at a time: each edge of each cell has weights for each operation.

    What the benchmark's authors train for their weight-sharing baselines (Dong and Yang, ICLR 2020, section 4).
    """

    def __init__(self, space: NASBench201Space) -> None:
        super().__init__(space, shared_network(space))

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        row = self.space.check(arch)[0].tolist()
        with running(Call(normalise, drop, [[(choice, None)] for choice in row])):
            logits: Tensor = self.largest(x.contiguous(memory_format=torch.channels_last))
        return logits

    def shared_name(self, name: str, arch: Archs) -> str:
        words = name.split(".")
        for place, word in enumerate(words):
            if word in _EDGE:
                chosen = OPERATIONS[int(self.space.check(arch)[0, _EDGE[word]])]
                return ".".join([*words[: place + 1], "paths", chosen, *words[place + 1 :]])
        return name


class MixtureNASBench201(MixtureSupernet):
    """All networks of NAS-Bench-201 at once: an edge is the weighted sum of its operations (DARTS, Liu et al., 2019).

    The weights are the same for all cells. An operation of weight zero is not run.
    """

    def __init__(self, space: NASBench201Space) -> None:
        super().__init__()
        self.space = space
        self.largest = shared_network(space)  # as in the supernet

    def forward(self, x: Tensor, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Tensor:
        with running(Call(by_batch, keep, running_paths(self.space, weights, run))):
            logits: Tensor = self.largest(x.contiguous(memory_format=torch.channels_last))
        return logits
