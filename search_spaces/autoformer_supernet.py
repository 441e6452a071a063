"""The weight-sharing network of an AutoFormer space."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from search_spaces.autoformer_network import AutoFormer
from search_spaces.base import Archs
from search_spaces.shared_layers import Drop, Normalise, WeightSharingSupernet
from search_spaces.supernet import NormStats, resize

if TYPE_CHECKING:
    from search_spaces.autoformer import AutoFormerSpace


class SuperAutoFormer(WeightSharingSupernet):
    """Every network of an `AutoFormerSpace` in the weights of its largest ("weight entanglement", Chen et al., 2021).

    A subnet uses the leading channels of every embedding, normalisation and linear layer, the leading heads of every
    attention and the leading layers. Layer normalisation has no statistics of a data set, so `NormStats` are empty and
    `calibrate` looks at no image.
    """

    space: AutoFormerSpace
    largest: AutoFormer

    def __init__(self, space: AutoFormerSpace) -> None:
        super().__init__(space, space.build((space.cardinalities - 1).astype(space.dtype)))

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        spec = self.space.spec(arch)
        return self.largest.run(resize(x, spec.resolution), spec, drop)

    def calibrate(self, arch: Archs, batches: Iterable[Tensor]) -> NormStats:
        return NormStats({}, {})

    def extract(self, arch: Archs, stats: NormStats) -> AutoFormer:
        network = super().extract(arch, stats)
        assert isinstance(network, AutoFormer)
        network.positions.reset(next(network.parameters()).device)
        return network
