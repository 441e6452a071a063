"""A search space from a network of the user's own: fewer channels, fewer residual blocks."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from search_spaces.base import Archs, Block, Catalog, Knob, SearchSpace
from search_spaces.errors import UserError
from search_spaces.layout import Layout, Position

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

    from search_spaces.elastic_costs import Run
    from search_spaces.elastic_graph import Axis, ElasticGraph, Removable
    from search_spaces.elastic_supernet import Cut, SuperElastic
    from search_spaces.supernet import NormStats

RATIOS = (0.25, 0.5, 0.75, 1.0)
# Distinct blocks that are few enough for a predictor to visit all of them in a few seconds.
MOST_BLOCKS = 20_000


class ElasticSpace(SearchSpace):
    """The networks that a user's own convolutional network becomes with fewer channels and residual blocks.

    Knobs: `LAYER.channels` for every group of channels that can only go together, named by the first layer that writes
    them; and `BLOCK.keep` for every residual block whose output has the shape of its input. A group keeps its most
    important channels, in their order: by the L1 norm of their filters and the scales of their normalisation, each in
    proportion to its layer's mean. The largest architecture is the network itself.

    Groups that the network computes with in other ways (reshaping, shuffling, splitting, attention, convolutions in
    groups) keep all their channels: `fixed` says which and why. Where the distinct blocks of the space would be more
    than 20,000 (as with dozens of layers behind one concatenation), groups that meet in one place get one knob.

    Args:
        network: with her weights; a copy is kept, and the network stays as it is. Classification: one output
            `(batch, classes)`.
        input_shape: `(channels, height, width)` of an image, `(channels, 1, length)` of a window of a signal.
        ratios: shares of a group's channels to choose from, 1 among them.
        multiple: widths are rounded up to a multiple of this.
        blocks: whether residual blocks may go.
        name: what the space is called in messages.

    Raises:
        UserError: a network that cannot be traced (its module is named), or in which nothing is elastic.
    """

    def __init__(
        self,
        network: nn.Module,
        input_shape: Sequence[int],
        *,
        ratios: Sequence[float] = RATIOS,
        multiple: int = 8,
        blocks: bool = True,
        name: str = "elastic",
    ) -> None:
        from copy import deepcopy

        from search_spaces.elastic_costs import ElasticWorkload
        from search_spaces.elastic_graph import analyse

        self.name = name
        listed = not isinstance(ratios, str) and isinstance(ratios, Sequence)
        if not listed or not all(isinstance(r, int | float) and 0 < r <= 1 for r in ratios) or 1 not in ratios:
            raise UserError(
                f"{name}: ratios = {ratios!r}: expected a list of shares above 0 up to 1, with 1 among them"
            )
        if len(input_shape) != 3:
            raise UserError(f"{name}: input_shape = {tuple(input_shape)}: expected (channels, height, width)")
        if not isinstance(multiple, int) or multiple < 1:
            raise UserError(f"{name}: multiple = {multiple!r}: expected a whole number, 1 or more")
        self.network: nn.Module = deepcopy(network).cpu()
        channels, height, width = (int(n) for n in input_shape)
        self._input_shape = channels, height, width
        self.found: ElasticGraph = analyse(self.network, self._input_shape)
        self._classes = _classes(self.found, name)
        self._costs = ElasticWorkload(self.network, self.found, self._input_shape)
        self.removable: tuple[Removable, ...] = self._costs.removable if blocks else ()
        self._widths = {
            g: widths
            for g, group in self.found.groups.items()
            if not group.fixed and len(widths := _widths(group.size, ratios, multiple)) > 1 and group.layers
        }
        self._arrange()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._layout.knobs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self._input_shape

    @property
    def num_classes(self) -> int:
        return self._classes

    @property
    def size(self) -> int:
        total = 1
        of_blocks: dict[str, int] = {}
        for knob in self.knobs:
            owner = self._owner.get(knob.name, "")
            if owner:
                of_blocks[owner] = of_blocks.get(owner, 1) * len(knob.choices)
            elif not knob.name.endswith(".keep"):
                total *= len(knob.choices)
        return total * prod(1 + of_blocks.get(block.name, 1) for block in self.removable)

    @property
    def fixed(self) -> dict[str, str]:
        """Why groups of channels cannot change, by the first layer that writes them."""
        groups = self.found.groups.values()
        return {group.layers[0]: group.fixed for group in groups if group.fixed and group.layers}

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        return self._layout.active(archs)

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """Positions: pieces of the network whose operators depend on the same knobs, in execution order."""
        return self._layout.blocks(archs)

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        return self._layout.position_knobs

    def build(self, arch: Archs) -> nn.Module:
        """The network of one architecture `(K,)`, of the user's own class, every layer of it initialised afresh.

        Layers draw as their `reset_parameters` has it; what has none keeps the network's values.
        """
        from search_spaces.elastic_supernet import cut_network

        network = cut_network(self.network, self, self.check(arch)[0])
        for module in network.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        return network

    def supernet(self) -> SuperElastic:
        """The weight-sharing network, with the weights of the user's network."""
        from search_spaces.elastic_supernet import SuperElastic

        return SuperElastic(self)

    def statistics(self, arch: Archs) -> NormStats:
        """The network's own normalisation statistics, for the channels of one architecture `(K,)`.

        They are right for the largest architecture as long as the weights are the network's own; others need
        `calibrate`.
        """
        from search_spaces.elastic_supernet import cut_network
        from search_spaces.shared_layers import BatchNorm
        from search_spaces.supernet import NormStats

        norms = {
            name: module
            for name, module in cut_network(self.network, self, arch).named_modules()
            if isinstance(module, BatchNorm) and module.running_mean is not None and module.running_var is not None
        }
        return NormStats({k: m.running_mean for k, m in norms.items()}, {k: m.running_var for k, m in norms.items()})  # type: ignore[misc]

    def absent(self, arch: Archs) -> list[Removable]:
        """The residual blocks that one architecture `(K,)` does without."""
        return [b for b in self.removable if not self._layout.choice(f"{b.name}.keep", arch)]

    def cuts(self, arch: Archs) -> dict[str, Cut]:
        """What each layer that does not keep everything keeps in one architecture `(K,)`."""
        choices = {g: self._layout.choice(knob, arch) for g, knob in self._knob_of.items()}
        made: dict[Axis, Any] = {}

        def kept(axis: Axis) -> torch.Tensor | None:
            if axis not in made:
                made[axis] = self._kept(axis, choices)
            return made[axis]

        return {
            name: (None if layer.channelwise else kept(layer.reads), kept(layer.writes))
            for name, layer in self.found.layers.items()
            if kept(layer.reads) is not None or kept(layer.writes) is not None
        }

    @cached_property
    def last_reads(self) -> dict[fx.Node, list[fx.Node]]:
        """By node, the nodes whose values nobody reads afterwards."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.found.graph.nodes:
            last.update(dict.fromkeys(node.all_input_nodes, node))
        # The output of a block that is absent is its input, which has to last as long.
        result: dict[fx.Node, list[fx.Node]] = {}
        sources = {block.source for block in self.removable}
        for node, reader in last.items():
            if node not in sources:
                result.setdefault(reader, []).append(node)
        return result

    def _kept(self, axis: Axis, choices: Mapping[int, int]) -> torch.Tensor | None:
        """Indices along an axis, None for all of them."""
        import torch

        if all(g not in choices or choices[g] == len(self._widths[g]) - 1 for g, _ in axis):
            return None
        parts, offset = [], 0
        for group, per in axis:
            size = self.found.groups[group].size
            channels = np.arange(size) if group not in choices else self._ranked[group][choices[group]]
            parts.append((channels[:, None] * per + np.arange(per)).reshape(-1) + offset)
            offset += size * per
        return torch.from_numpy(np.concatenate(parts))

    @cached_property
    def _ranked(self) -> dict[int, list[NDArray[np.int64]]]:
        """By group and choice, the channels that are kept, ascending."""
        orders = {g: np.argsort(-self._importance(g), kind="stable") for g in self._widths}
        return {g: [np.sort(orders[g][:width]) for width in self._widths[g]] for g in self._widths}

    def _importance(self, group: int) -> NDArray[np.float64]:
        """Of every channel of a group: what its layers weigh in proportion to their mean, `(size,)`."""
        from torch.nn.modules.conv import _ConvTransposeNd

        found = self.found.groups[group]
        total = np.zeros(found.size)
        for name in (*found.layers, *found.norms):
            module: Any = self.network.get_submodule(name)
            if module.weight is None:
                continue
            weight = module.weight.detach().double().abs().cpu()
            rows = weight.transpose(0, 1) if isinstance(module, _ConvTransposeNd) else weight
            norm = rows.reshape(found.size, -1).sum(1).numpy()
            total += norm / max(norm.mean(), np.finfo(float).tiny)
        return total

    def _arrange(self) -> None:
        """Knobs, positions and blocks; groups that meet get one knob while there are too many distinct blocks."""
        if not self._widths and not self.removable:
            reasons = "; ".join(f"{layer}: {why}" for layer, why in list(self.fixed.items())[:5])
            raise UserError(f"{self.name}: nothing of the network is elastic" + (f" ({reasons})" if reasons else ""))
        self._knob_of = {g: f"{self.found.groups[g].layers[0]}.channels" for g in self._widths}
        while True:
            counts = {knob: len(self._labels(knob)) for knob in self._knob_of.values()}
            self._runs: list[Run] = self._costs.runs(self._knob_of)
            names = [sorted({self._knob_of[g] for g in run.groups}) for run in self._runs]
            sizes = [prod(counts[n] for n in knobs) for knobs in names]
            if sum(sizes) <= MOST_BLOCKS:
                break
            kept, gone = names[int(np.argmax(sizes))][:2]
            self._tie(kept, gone)
        self._owner = {knob: self._owned_by(knob) for knob in counts}
        choices: dict[str, tuple[Any, ...]] = {}
        order = sorted(self._knob_of, key=list(self.found.groups).index)
        for knob in dict.fromkeys(self._knob_of[g] for g in order):
            choices[knob] = self._labels(knob)
        choices |= {f"{block.name}.keep": (0, 1) for block in self.removable}
        kept_blocks = {block.name for block in self.removable}
        positions = []
        for run, knobs in zip(self._runs, names, strict=True):
            owner = run.owner if run.owner in kept_blocks else ""
            own = tuple(n for n in knobs if owner and self._owner[n] == owner)
            shared = tuple(n for n in knobs if n not in own)
            positions.append(Position(shared, own, f"{owner}.keep" if owner else "", int(bool(owner))))
        self._layout = Layout(choices, positions, fallback=next(iter(choices)))
        self._catalog = Catalog(int(self._layout.first_id[-1]), self._make_block)

    def _labels(self, knob: str) -> tuple[int, ...]:
        """The choices of a knob: channels of the layer that it is named by."""
        return next(self._widths[g] for g, k in self._knob_of.items() if k == knob)

    def _tie(self, kept: str, gone: str) -> None:
        """Let two knobs be one: of as many choices as the one with fewer."""
        groups = [g for g, knob in self._knob_of.items() if knob in (kept, gone)]
        count = min(len(self._widths[g]) for g in groups)
        for group in groups:
            self._knob_of[group] = kept
            self._widths[group] = self._widths[group][-count:]

    def _owned_by(self, knob: str) -> str:
        """The removable block outside of which nothing has a knob's channels, else empty."""
        groups = {g for g, k in self._knob_of.items() if k == knob}
        nodes = {node for node, axis in self.found.axes.items() if groups & {g for g, _ in axis}}
        return next((block.name for block in self.removable if nodes <= block.nodes), "")

    def _make_block(self, index: int) -> Block:
        position, found = self._layout.locate(index)
        run = self._runs[position]
        widths = {g: self._widths[g][found[self._knob_of[g]]] for g in run.groups}
        path = self._costs.operators[run.first].path
        return Block(path or f"operator {run.first}", self._costs.workload(run, widths))


def elastic_space(
    in_channels: int = 3,
    num_classes: int = 1000,
    *,
    network: str | Callable[..., Any],
    resolution: int | tuple[int, int] = 224,
    weights: str = "",
    ratios: Sequence[float] = RATIOS,
    multiple: int = 8,
    blocks: bool = True,
    name: str = "elastic",
) -> ElasticSpace:
    """An `ElasticSpace` of a network that a function makes, as an experiment or a TOML file names it.

    Args:
        in_channels, num_classes: of the task; handed to the function where it has parameters of these names.
        network: the function, or its name, `"module:function"`. What it draws comes from a fixed seed: which channels
            are kept depends on the weights, and is the same in every process.
        resolution: height and width of the images in pixels, one number or two; `[1, length]` for signals.
        weights: a safetensors file for the network.
        ratios, multiple, blocks, name: see `ElasticSpace`.

    Raises:
        UserError: a function that cannot be imported or gives no network, weights that do not fit, or what
            `ElasticSpace` raises.
    """
    import torch
    from torch import nn

    size = [resolution] * 2 if isinstance(resolution, int) else resolution
    pair = isinstance(size, list | tuple) and len(size) == 2
    if not pair or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in size):
        raise UserError(f"{name}: resolution = {resolution!r}: expected a number of pixels, or [height, width]")
    make = network if callable(network) else _imported(network, name)
    task = {"in_channels": in_channels, "num_classes": num_classes}
    wanted = inspect.signature(make).parameters
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            made = make(**{key: value for key, value in task.items() if key in wanted})
        except UserError:
            raise
        except Exception as error:  # whatever a user's function may raise
            raise UserError(f"{name}: network: {network!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{name}: network: {network!r} gave a {type(made).__name__}, not a torch.nn.Module")
    if weights:
        _load(made, Path(weights), name)
    space = ElasticSpace(made, (in_channels, *size), ratios=ratios, multiple=multiple, blocks=blocks, name=name)
    if space.num_classes != num_classes:
        raise UserError(f"{name}: network: has {space.num_classes} outputs, the task has {num_classes} classes")
    return space


def _imported(path: str, name: str) -> Callable[..., Any]:
    module, colon, function = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not colon:
        raise UserError(f'{name}: network = {path!r}: expected "module:function"')
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a user's module may raise
        raise UserError(f"{name}: network: cannot import {path!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{name}: network: {path!r} is a {type(found).__name__}; a function was expected")
    return found


def _load(network: nn.Module, path: Path, name: str) -> None:
    """Read a network's weights from a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{name}: weights: {path} cannot be read as safetensors: {error}") from error
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{name}: weights: {path}: {key} has values that are not finite")
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"{name}: weights: {path} does not fit the network: {' '.join(lines[:3])}") from error


def _widths(size: int, ratios: Sequence[float], multiple: int) -> tuple[int, ...]:
    """Ascending channels of a group at the given shares; two at least, as one would make a depthwise layer plain."""
    rounded = {min(size, max(2, ceil(round(size * r, 6) / multiple) * multiple)) for r in ratios if r < 1}
    return tuple(sorted(rounded | {size}))


def _classes(found: ElasticGraph, name: str) -> int:
    """The network's number of outputs."""
    results = [n for node in found.graph.nodes if node.op == "output" for n in node.all_input_nodes]
    shapes = [n.meta.get("shape", ()) for n in results]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise UserError(
            f"{name}: the network gives outputs of shape {shapes}; expected one, (batch, classes). A network with "
            "several, or with maps, needs a class around it that gives what is judged"
        )
    return int(shapes[0][1])
