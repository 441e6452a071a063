"""The weight-sharing networks of layered spaces: a path per choice, and weighted paths."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from search_spaces.base import Archs, Choice
from search_spaces.shared_layers import BatchNorm, Drop, Normalise, WeightSharingSupernet, by_batch, norm_names
from search_spaces.shared_modules import (
    Call,
    Running,
    Store,
    keep,
    product_of,
    running,
    running_paths,
    scaled,
    share,
    total,
)
from search_spaces.supernet import MixtureSupernet, dropout, fit

if TYPE_CHECKING:
    from search_spaces.layered import Layer, LayeredSpace


def path_name(layer: Layer, choices: dict[str, Choice]) -> str:
    """Where the weights of a layer with these choices are: `layer3.k3_e6`, or `stem.shared` where nothing is chosen."""
    # Names of modules have no points; escaped, different choices stay different.
    words = [str(choices[name]).replace("%", "%25").replace(".", "%2E") for name in layer.paths]
    return ".".join([layer.name, *(words or ["shared"])])


class LayeredParts:
    """The weights of all blocks of a layered space, and the modules that read them.

    Attributes:
        store: has `<layer>.<choices of its paths>.<name in the module>`, each as large as the largest module needs it.
        norm_names: the names of normalisation layers there; grows, since modules are made when first run.
    """

    def __init__(self, space: LayeredSpace) -> None:
        self.space = space
        self.store = Store()
        self.norm_names: dict[BatchNorm, str] = {}
        self._modules: dict[int, nn.Module] = {}
        for position in range(len(space.layers)):
            self._create([space.place_of(block) for block in space.owners(position)])

    def part(self, block: int) -> nn.Module:
        """The module of a block; it owns nothing."""
        if block not in self._modules:
            layer, choices = self.space.place_of(block)
            path = path_name(layer, choices)
            with torch.device("meta"):
                module = self.space.module(layer, choices)
            share(module, self.store.part(path))
            self.norm_names.update({norm: f"{path}.{name}".strip(".") for norm, name in norm_names(module).items()})
            self._modules[block] = module
        return self._modules[block]

    def _create(self, blocks: list[tuple[Layer, dict[str, Choice]]]) -> None:
        """First values: those of freshly initialised modules, the largest first, smaller ones where they have more."""
        shapes = []
        for layer, choices in blocks:
            with torch.device("meta"):
                module = self.space.module(layer, choices)
            path = path_name(layer, choices)
            shapes.append({f"{path}.{name}": tuple(p.shape) for name, p in module.named_parameters()})
        sizes = [sum(prod(shape) for shape in each.values()) for each in shapes]
        for index in sorted(range(len(blocks)), key=lambda i: -sizes[i]):
            if all(self.store.covers(name, shape) for name, shape in shapes[index].items()):
                continue
            layer, choices = blocks[index]
            module = self.space.module(layer, choices)
            self.space.initialise(module)
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    self.store.put(f"{path_name(layer, choices)}.{name}", parameter)


class SuperLayered(WeightSharingSupernet):
    """Every network of a `LayeredSpace`, one path at a time (single-path one-shot, Guo et al., ECCV 2020).

    Choices in a layer's `paths` have weights of their own; all others (widths, resolutions, depths, strides) share
    leading channels, kernel centres and a stage's leading layers, as in once-for-all (Cai et al., ICLR 2020).
    """

    def __init__(self, space: LayeredSpace) -> None:
        parts = LayeredParts(space)
        super().__init__(space, parts.store)
        self._parts = parts
        self._norm_names = parts.norm_names

    def run(self, x: Tensor, arch: Archs, normalise: Normalise, drop: Drop) -> Tensor:
        blocks = self._blocks(arch)
        _, choices = self._parts.space.place_of(blocks[0])
        x = fit(x, self._parts.space.image_shape(choices)).contiguous(memory_format=torch.channels_last)
        with running(Call(normalise, drop)):
            for block in blocks:
                x = self._parts.part(block)(x)
        return x

    def shared_name(self, name: str, arch: Archs) -> str:
        head, _, rest = name.partition(".")
        layer, choices = next(
            (layer, choices)
            for layer, choices in map(self._parts.space.place_of, self._blocks(arch))
            if layer.name == head
        )
        return f"{path_name(layer, choices)}.{rest}".strip(".")

    def _blocks(self, arch: Archs) -> list[int]:
        """Blocks that an architecture `(K,)` has."""
        space = self._parts.space
        return [int(i) for i in space.blocks(space.canonical(space.check(arch)))[0] if i >= 0]


class MixtureLayered(MixtureSupernet):
    """All networks of a `LayeredSpace` at once, in the weights and under the names of its supernet.

    A layer's output is the sum over the choices of its own knobs, each path times its weight. What several layers
    depend on (a width, a resolution, a stride) is not mixed before the last of them: until then one tensor per choice
    is carried along, so that no path ever sees channels or maps of another size. A layer that may be absent is mixed
    with its input, by the weights of the depths that have it. Time and memory are those of the paths that run: of
    weight not zero, or marked in `run`.
    """

    def __init__(self, space: LayeredSpace) -> None:
        super().__init__()
        self.space = space
        self._parts = LayeredParts(space)
        self.largest = self._parts.store  # as in the supernet
        self._index = {knob.name: index for index, knob in enumerate(space.knobs)}
        later: set[str] = set()
        # Per layer the knobs that layers after it need, too.
        self._needed: list[set[str]] = []
        for layer in reversed(space.layers):
            self._needed.insert(0, set(later))
            later |= set(layer.knobs)

    def forward(self, x: Tensor, weights: Sequence[Tensor], run: Sequence[Tensor] | None = None) -> Tensor:
        paths = running_paths(self.space, weights, run)
        with running(Call(by_batch, _drop if self.training else keep)):
            # One tensor for every choice of the knobs that are carried along.
            carried: list[str] = []
            states: dict[tuple[int, ...], Tensor] = {(): x.contiguous(memory_format=torch.channels_last)}
            for position in range(len(self.space.layers)):
                carried, states = self._layer(position, carried, states, paths)
        return states[()]

    def _layer(
        self, position: int, carried: list[str], states: dict[tuple[int, ...], Tensor], paths: Running
    ) -> tuple[list[str], dict[tuple[int, ...], Tensor]]:
        layer = self.space.layers[position]
        new = [name for name in layer.knobs if name not in carried]
        kept = [name for name in (*carried, *new) if name in self._needed[position]]
        mixed = [name for name in (*carried, *new) if name not in kept]
        there, missing = self._presence(layer, paths)
        terms: dict[tuple[int, ...], list[Tensor]] = {}
        for key, tensor in states.items():
            known = dict(zip(carried, key, strict=True))
            for taken in product(*(paths[self._index[name]] for name in new)):
                at = {**known, **{name: choice for name, (choice, _) in zip(new, taken, strict=True)}}
                weight = product_of(self._weight(paths, name, at[name]) for name in mixed)
                place = tuple(at[name] for name in kept)
                out = terms.setdefault(place, [])
                if there is not _NOTHING:
                    block = self.space.block_of(position, [at[name] for name in layer.knobs])
                    image = (
                        fit(tensor, self.space.image_shape(self.space.place_of(block)[1])) if not position else tensor
                    )
                    out.append(scaled(self._parts.part(block)(image), weight, there))
            if missing is not _NOTHING:
                # Without the layer its own knobs do not matter: their weights add up to one.
                weight = product_of(self._weight(paths, name, known[name]) for name in carried if name in mixed)
                places = product(*(paths[self._index[name]] if name in new else [(known[name], None)] for name in kept))
                for picked in places:
                    out = terms.setdefault(tuple(choice for choice, _ in picked), [])
                    out.append(scaled(tensor, weight, missing))
        return kept, {place: total(parts) for place, parts in terms.items()}

    def _presence(self, layer: Layer, paths: Running) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the depths that have the layer, and of those that do not."""
        if not layer.depth:
            return None, _NOTHING
        index = self._index[layer.depth]
        choices = self.space.knobs[index].choices
        sides: tuple[list[Tensor | None], list[Tensor | None]] = [], []
        for choice, weight in paths[index]:
            sides[float(choices[choice]) <= layer.place].append(weight)
        there, missing = (_sum(side) for side in sides)
        return there, missing

    def _weight(self, paths: Running, name: str, choice: int) -> Tensor | None:
        return next(weight for index, weight in paths[self._index[name]] if index == choice)


# Where no path runs: unlike None, which stands for a weight of one.
_NOTHING = torch.zeros(())


def _sum(weights: list[Tensor | None]) -> Tensor | None:
    if not weights:
        return _NOTHING
    return None if any(w is None for w in weights) else total([w for w in weights if w is not None])


def _drop(x: Tensor, rate: float) -> Tensor:
    return dropout(x, rate) if rate else x
