"""Spaces of sequential networks: a subclass names the layers and makes their modules, the rest follows."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from search_spaces.base import Archs, Block, Catalog, Choice, SearchSpace
from search_spaces.errors import UserError, nearest
from search_spaces.operators import Shape, Workload

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.layered_network import LayeredNetwork
    from search_spaces.layered_supernet import MixtureLayered, SuperLayered


@dataclass(frozen=True)
class Layer:
    """One place in the networks of a `LayeredSpace`.

    Args:
        name: of the module in every network and of its block.
        knobs: those that the module or the shape of its input depends on.
        paths: those of them of which every choice has weights of its own in a supernet. All other choices share the
            leading channels and the kernels' centres of one weight.
        depth, place: the layer is there only where the choice of the knob `depth`, a number, is above `place`. Such a
            layer gives what it takes, shape for shape, so that the network is whole without it. Always there by
            default.
    """

    name: str
    knobs: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    depth: str = ""
    place: int = 0


class LayeredSpace(SearchSpace):
    """A space of sequential networks: every layer is one module, chosen by the knobs that it names.

    A subclass provides `knobs`, `layers`, `module`, `input_shape` and `num_classes`, and so has everything: operators
    and costs (traced once per distinct block), stand-alone networks, a weight-sharing supernet (a path per choice for
    knobs in `Layer.paths`, leading channels and kernel centres for all others) and a mixture supernet. Where the
    input's size is a knob, it is called `resolution`, and all layers that see it name it. Modules take a tensor and
    give a tensor; convolutions, linear and normalisation layers and parameters of one's own are shared alike.

    Knobs that several layers name are the ones to be frugal with: a layer has a block for every combination of its
    knobs' choices.

    Raises:
        UserError: layers that name unknown knobs, or twice the same name.
    """

    @property
    @abstractmethod
    def layers(self) -> tuple[Layer, ...]:
        """In execution order."""

    @abstractmethod
    def module(self, layer: Layer, choices: Mapping[str, Choice]) -> nn.Module:
        """A fresh module of a layer, given `{knob: choice}` for its knobs; `build` initialises it."""

    def image_shape(self, choices: Mapping[str, Choice]) -> tuple[int, int, int]:
        """Input `(channels, height, width)` of networks with these choices: square where there is a `resolution`."""
        channels, height, width = self.input_shape
        size = choices.get("resolution")
        return (channels, height, width) if size is None else (channels, int(size), int(size))

    def input_of(self, layer: Layer, choices: Mapping[str, Choice]) -> Shape:
        """Shape that a layer's module takes: by default what the layers before it give, computed."""
        place = self.layers.index(layer)
        if place == 0:
            return self.image_shape(choices)
        arch = np.zeros((1, len(self.knobs)), dtype=self.dtype)
        for name, choice in choices.items():
            knob = self._knob_index[name]
            arch[0, knob] = self.knobs[knob].choices.index(choice)
        ids = self.blocks(arch)[0, :place]
        before = [int(i) for i in ids if i >= 0]
        if not before:
            return self.image_shape(choices)
        workload = self.catalog[before[-1]].workload
        return workload.tensors[workload.outputs[0]].shape

    def alike(self, layer: Layer, choices: Mapping[str, Choice]) -> Hashable:
        """Equal for blocks with equal module and input, so that one of them is traced for all."""
        return layer.name, *choices.values()

    def initialise(self, network: nn.Module) -> None:
        """Give a fresh network, or a part of it, its first weights: He initialisation, small residual branches."""
        from search_spaces.reference.blocks import initialise

        initialise(network)

    def build(self, arch: Archs) -> LayeredNetwork:
        from search_spaces.layered_network import LayeredNetwork

        ids = self.blocks(self.canonical(self.check(arch)))[0]
        places = [self.place_of(int(i)) for i in ids if i >= 0]
        network = LayeredNetwork(
            OrderedDict((layer.name, self.module(layer, choices)) for layer, choices in places),
            self.image_shape(places[0][1]),
        )
        self.initialise(network)
        return network

    def supernet(self) -> SuperLayered:
        from search_spaces.layered_supernet import SuperLayered

        return SuperLayered(self)

    def mixture_supernet(self) -> MixtureLayered:
        from search_spaces.layered_supernet import MixtureLayered

        return MixtureLayered(self)

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(int(self._plan.first[-1]), self._make_block)

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """Positions: the layers."""
        plan = self._plan
        archs = np.asarray(archs)
        # As floats, which are exact here, the product is one call of the linear algebra library.
        ids = (archs.astype(np.float64) @ plan.radix + plan.first[:-1]).astype(np.int32)
        if plan.depth_layers.size:
            present = plan.depths[plan.depth_knobs, archs[:, plan.depth_knobs]] > plan.places
            ids[:, plan.depth_layers] = np.where(present, ids[:, plan.depth_layers], -1)
        return ids

    @cached_property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        """Per layer its knobs, and its depth."""
        return tuple(
            tuple(
                self._knob_index[name] for name in dict.fromkeys((*layer.knobs, *([layer.depth] * bool(layer.depth))))
            )
            for layer in self.layers
        )

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        """A knob that only absent layers name takes no part."""
        archs = np.asarray(archs)
        active = np.ones(archs.shape, dtype=bool)
        depths = self._plan.depths
        for knob, needs in self._conditions.items():
            active[:, knob] = np.any([depths[d, archs[:, d]] > place for d, place in needs.items()], axis=0)
        return active

    @property
    def size(self) -> int:
        total = 1
        free = set(range(len(self.knobs)))
        for group in self._groups:
            depths = sorted({d for knob in group for d in self._conditions[knob]})
            free -= {*group, *depths}
            count = 0
            for choice in product(*(self.knobs[d].choices for d in depths)):
                at = dict(zip(depths, choice, strict=True))
                active = [k for k in group if any(int(at[d]) > p for d, p in self._conditions[k].items())]
                count += prod(len(self.knobs[k].choices) for k in active)
            total *= count
        return total * prod(len(self.knobs[k].choices) for k in free)

    def blocks_of(self, position: int) -> range:
        """The catalog indices of a layer."""
        return range(int(self._plan.first[position]), int(self._plan.first[position + 1]))

    def owners(self, position: int) -> Sequence[int]:
        """Blocks of a layer that together have every weight of it, whole: all, unless a space knows better.

        A supernet makes a module of each to know its weights' sizes and first values.
        """
        return self.blocks_of(position)

    def place_of(self, block: int) -> tuple[Layer, dict[str, Choice]]:
        """The layer of a catalog index and the choices of its knobs."""
        first = self._plan.first
        position = int(np.searchsorted(first, block, side="right")) - 1
        layer, local = self.layers[position], block - int(first[position])
        choices = {}
        for name in reversed(layer.knobs):
            knob = self.knobs[self._knob_index[name]]
            local, index = divmod(local, len(knob.choices))
            choices[name] = knob.choices[index]
        return layer, {name: choices[name] for name in layer.knobs}

    def block_of(self, position: int, choices: Sequence[int]) -> int:
        """The catalog index of a layer with the given choice indices of its knobs, in their order."""
        index = 0
        for name, choice in zip(self.layers[position].knobs, choices, strict=True):
            index = index * len(self.knobs[self._knob_index[name]].choices) + choice
        return int(self._plan.first[position]) + index

    @cached_property
    def _knob_index(self) -> dict[str, int]:
        return {knob.name: index for index, knob in enumerate(self.knobs)}

    @cached_property
    def _plan(self) -> _Plan:
        self._check_layers()
        layers = self.layers
        radix = np.zeros((len(self.knobs), len(layers)))
        counts = []
        for position, layer in enumerate(layers):
            step = 1
            for name in reversed(layer.knobs):
                knob = self._knob_index[name]
                radix[knob, position] = step
                step *= len(self.knobs[knob].choices)
            counts.append(step)
        conditional = [p for p, layer in enumerate(layers) if layer.depth]
        depths = np.zeros((len(self.knobs), int(self.cardinalities.max())))
        for name in {layer.depth for layer in layers if layer.depth}:
            choices = self.knobs[self._knob_index[name]].choices
            depths[self._knob_index[name], : len(choices)] = [float(c) for c in choices]
        return _Plan(
            radix,
            np.concatenate([[0], np.cumsum(counts)]),
            np.array(conditional, dtype=np.intp),
            np.array([self._knob_index[layers[p].depth] for p in conditional], dtype=np.intp),
            np.array([layers[p].place for p in conditional], dtype=float),
            depths,
        )

    @cached_property
    def _conditions(self) -> dict[int, dict[int, int]]:
        """Knobs that absent layers alone name: depth knob -> the least place at which a layer names them."""
        conditions: dict[int, dict[int, int]] = {}
        always = {name for layer in self.layers if not layer.depth for name in layer.knobs}
        always |= {layer.depth for layer in self.layers}
        for layer in self.layers:
            for name in set(layer.knobs) - always:
                depth, needs = self._knob_index[layer.depth], conditions.setdefault(self._knob_index[name], {})
                needs[depth] = min(needs.get(depth, layer.place), layer.place)
        return conditions

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Conditional knobs, those together that a depth connects."""
        groups: list[tuple[set[int], list[int]]] = []
        for knob, needs in self._conditions.items():
            depths, members, others = set(needs), [knob], []
            for group in groups:
                if group[0] & depths:
                    depths |= group[0]
                    members += group[1]
                else:
                    others.append(group)
            groups = [*others, (depths, members)]
        return [members for _, members in groups]

    def _check_layers(self) -> None:
        seen: set[str] = set()
        for layer in self.layers:
            if layer.name in seen or not layer.name.isidentifier():
                raise UserError(f"{self.name}: layer {layer.name!r}: names are words, each given to one layer")
            seen.add(layer.name)
            for name in (*layer.knobs, *layer.paths, *([layer.depth] * bool(layer.depth))):
                if name not in self._knob_index:
                    raise UserError(
                        f"{self.name}: layer {layer.name}: no knob {name!r}. {nearest(name, self._knob_index)}"
                    )
            if len(set(layer.knobs)) < len(layer.knobs) or not set(layer.paths) <= set(layer.knobs):
                raise UserError(f"{self.name}: layer {layer.name}: knobs must be distinct, and paths among them")

    def _make_block(self, index: int) -> Block:
        layer, choices = self.place_of(index)
        key = self.alike(layer, choices)
        if key not in self._traced:
            self._traced[key] = self._trace(layer, choices)
        return Block(layer.name, self._traced[key])

    @cached_property
    def _traced(self) -> dict[Hashable, Workload]:
        return {}

    def _trace(self, layer: Layer, choices: Mapping[str, Choice]) -> Workload:
        import torch

        from search_spaces.tracing import trace

        with torch.device("meta"):
            module = self.module(layer, choices)
        return trace(module, self.input_of(layer, choices))


@dataclass(frozen=True)
class _Plan:
    """What turns architectures into blocks.

    Args:
        radix: `(K, P)` float64, what a choice adds to the index of a layer's block.
        first: `(P + 1,)` int64, the first block of each layer, then their number.
        depth_layers, depth_knobs, places: per layer that may be absent, which, by which knob, and above which choice.
        depths: `(K, C)` float64, the choices of depth knobs as numbers.
    """

    radix: NDArray[np.float64]
    first: NDArray[np.int64]
    depth_layers: NDArray[np.intp]
    depth_knobs: NDArray[np.intp]
    places: NDArray[np.float64]
    depths: NDArray[np.float64]
