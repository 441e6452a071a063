"""A network at random narrower widths: what to measure so that a predictor knows what pruning does to this network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nasbench.pruning.groups import Channels, removed
from search_spaces import Workload, trace

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Variant:
    """A network with random shares of its channels; see `predictors.suite.CalibrationNetwork`."""

    name: str
    family: str
    input_shape: tuple[int, ...]
    network: nn.Module

    def build(self) -> nn.Module:
        """The module itself."""
        return self.network

    def workload(self) -> Workload:
        """Its operators."""
        return trace(self.network, self.input_shape)


def variants(
    name: str, network: nn.Module, channels: Channels, input_shape: Sequence[int], count: int, seed: int
) -> list[Variant]:
    """`count` of them, the network itself first; half of the others narrow everywhere alike, half group by group."""
    rng, shape = np.random.default_rng(seed), tuple(input_shape)
    made = [Variant(f"{name}/whole", name, shape, network)]
    for i in range(1, count):
        common = rng.uniform(0.1, 1.0)
        keep = {}
        for group in channels.groups:
            share = common if i % 2 else rng.uniform(0.1, 1.0)
            keep[group.name] = np.arange(max(1, round(share * group.channels)), dtype=np.int64)
        made.append(Variant(f"{name}/{i}", name, shape, removed(network, channels.groups, keep)))
    return made
