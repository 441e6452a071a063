"""Channels that can only go together: found, checked, and taken out.

Torch-Pruning (Fang et al., CVPR 2023, "DepGraph") follows channels through convolutions, normalisations, shortcuts and
concatenations. Attention is ours: its reshapes hide heads from any tracer, so the attention modules of this project say
how theirs are laid out. Every group is tried out before it is offered: the network without some of its channels must
compute what it computed with the weights that read them set to zero.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hardware_profiles.extras import load
from search_spaces.autoformer_network import Attention as RelativeAttention
from search_spaces.autoformer_network import AutoFormer, Perceptron
from search_spaces.errors import UserError
from search_spaces.reference.transformers import Attention, SplitAttention

Side = Literal["out", "in"]
Indices = NDArray[np.int64]

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Member:
    """One side of one layer that a group's channels run through.

    Args:
        module: its name in the network.
        side: `out`: the layer makes them (a normalisation has one side only, which counts as this); `in`: reads them.
        index: `(channels, m)` int64: for each channel of the group, which of the layer's are it.
    """

    module: str
    side: Side
    index: Indices


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together in all of their layers.

    Args:
        name: the layer that makes them, the first where there are several.
        channels: how many.
        members: all layers that they run through.
        kind: `channels`, or `heads` of an attention, each of which is one channel here.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    kind: Literal["channels", "heads"] = "channels"


@dataclass(frozen=True)
class Channels:
    """What of a network can be pruned by channels.

    Args:
        groups: in the order of the network.
        fixed: names of layers whose output channels all stay, and why.
    """

    groups: tuple[ChannelGroup, ...]
    fixed: Mapping[str, str]


def find_channels(network: nn.Module, input_shape: Sequence[int]) -> Channels:
    """The groups of a network's channels, each tried out.

    Raises:
        UserError: Torch-Pruning is not installed, or cannot follow the network.
    """
    network = copy.deepcopy(network).float().eval()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    found = [*_attention_groups(network), *_traced_groups(network, input_shape)]
    order = {name: i for i, (name, _) in enumerate(network.named_modules())}
    fixed: dict[str, str] = {}
    groups = []
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    for group, reason in sorted(found, key=lambda pair: order[pair[0].name]):
        reason = reason or _tried(network, group, x)
        if reason:
            fixed[group.name] = reason
        else:
            groups.append(group)
    known = {m.module for g in groups for m in g.members if m.side == "out"} | fixed.keys()
    for name, module in network.named_modules():
        if isinstance(module, _LAYERS) and name not in known:
            fixed[name] = "it is not seen in the network's graph"
    return Channels(tuple(groups), fixed)


def removed(network: nn.Module, groups: Sequence[ChannelGroup], keep: Mapping[str, Indices]) -> nn.Module:
    """A copy of the network with fewer channels, in its mode.

    Args:
        groups: of this network (`find_channels`).
        keep: per group name the channels that stay, at least one; groups not named stay whole.
    """
    network = copy.deepcopy(network)
    gone: dict[tuple[str, Side], set[int]] = defaultdict(set)
    for group in groups:
        if group.name in keep:
            lost = np.setdiff1d(np.arange(group.channels), keep[group.name])
            for member in group.members:
                gone[member.module, member.side].update(member.index[lost].ravel().tolist())
    heads = {g.name.rpartition(".")[0]: len(keep[g.name]) for g in groups if g.kind == "heads" and g.name in keep}
    for (name, side), indices in gone.items():
        if indices:
            _narrow(network.get_submodule(name), side, sorted(indices))
    for name, count in heads.items():
        if hasattr(network.get_submodule(name), "heads"):
            network.get_submodule(name).heads = count  # type: ignore[assignment]
    _respecify(network)
    return network


def _narrow(module: nn.Module, side: Side, indices: list[int]) -> None:
    """Take channels out of one side of a layer, in place."""
    function = load("prune", "torch_pruning").pruner.function
    if isinstance(module, nn.Linear):
        prune = function.prune_linear_out_channels if side == "out" else function.prune_linear_in_channels
    elif isinstance(module, _BATCH_NORMS):
        prune = function.prune_batchnorm_out_channels
    elif isinstance(module, nn.PReLU):
        prune = function.prune_prelu_out_channels
    elif _depthwise(module):
        prune = function.prune_depthwise_conv_out_channels
    else:
        prune = function.prune_conv_out_channels if side == "out" else function.prune_conv_in_channels
    prune(module, indices)


def _depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return False
    return module.groups == module.out_channels > 1 and module.groups == module.in_channels


def _respecify(network: nn.Module) -> None:
    """Bring the plain description that an AutoFormer runs by up to date with its layers."""
    for module in network.modules():
        if isinstance(module, AutoFormer):
            layers = []
            for modules, layer in zip(module.layers, module.spec.layers, strict=True):
                attention, mlp = modules["attention"], modules["mlp"]  # type: ignore[index]
                if isinstance(attention, RelativeAttention):
                    layer = replace(layer, heads=attention.project.in_features // attention.head_width)
                if isinstance(mlp, Perceptron):
                    layer = replace(layer, hidden=mlp.widen.out_features)
                layers.append(layer)
            module.spec = replace(module.spec, layers=tuple(layers))


_Found = tuple[ChannelGroup, str]  # a group, and why it cannot be pruned, if so


def _attention_groups(network: nn.Module) -> Iterator[_Found]:
    """Heads of the attention modules that this project knows, and hidden channels of AutoFormer's perceptrons."""
    for name, module in network.named_modules():
        at = f"{name}." if name else ""
        if isinstance(module, Attention):
            width = module.out.in_features // module.heads
            rows = _consecutive(module.heads, width)
            three = np.concatenate([rows + part * module.heads * width for part in range(3)], 1)
            members = (Member(f"{at}qkv", "out", three), Member(f"{at}out", "in", rows))
            yield ChannelGroup(f"{at}qkv", module.heads, members, "heads"), ""
        elif isinstance(module, SplitAttention):
            rows = _consecutive(module.heads, module.out.in_features // module.heads)
            outs = tuple(Member(f"{at}{part}", "out", rows) for part in ("query", "key", "value"))
            yield ChannelGroup(f"{at}query", module.heads, (*outs, Member(f"{at}out", "in", rows)), "heads"), ""
        elif isinstance(module, RelativeAttention):
            heads = module.project.in_features // module.head_width
            members = (
                Member(f"{at}qkv", "out", _consecutive(heads, 3 * module.head_width)),
                Member(f"{at}project", "in", _consecutive(heads, module.head_width)),
            )
            yield ChannelGroup(f"{at}qkv", heads, members, "heads"), ""
        elif isinstance(module, Perceptron):
            rows = _consecutive(module.widen.out_features, 1)
            members = (Member(f"{at}widen", "out", rows), Member(f"{at}project", "in", rows))
            yield ChannelGroup(f"{at}widen", module.widen.out_features, members), ""
        elif isinstance(module, nn.MultiheadAttention):
            yield ChannelGroup(f"{at}out_proj", 0, ()), "heads of torch's own attention cannot be taken out"


def _consecutive(count: int, width: int) -> Indices:
    """`(count, width)`: the numbers from 0 on, row by row."""
    return np.arange(count * width, dtype=np.int64).reshape(count, width)


def _traced_groups(network: nn.Module, input_shape: Sequence[int]) -> Iterator[_Found]:
    """What Torch-Pruning finds, without what belongs to attention."""
    pruning = load("prune", "torch_pruning")
    names = {module: name for name, module in network.named_modules()}
    inside = tuple(
        f"{name}." for name, m in network.named_modules()
        if isinstance(m, Attention | SplitAttention | RelativeAttention | nn.MultiheadAttention | Perceptron)
    )  # fmt: skip
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = pruning.DependencyGraph().build_dependency(network, torch.randn(2, *input_shape))
            groups = list(graph.get_all_groups(root_module_types=_LAYERS))
    except Exception as error:  # it follows any code of the user's, and fails in as many ways
        raise UserError(f"{type(network).__name__}: its channels cannot be followed: {error}") from error
    for items in groups:
        root = names[items[0].dep.target.module]
        if root.startswith(inside):
            continue
        yield _group(root, items, graph, names)


def _group(root: str, items: Any, graph: Any, names: Mapping[nn.Module, str]) -> _Found:
    """A group in our terms, or one without members and the reason why it cannot be pruned."""
    empty = ChannelGroup(root, 0, ())
    members = []
    reads = False
    channels = len(items[0].idxs)
    for item in items:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return empty, "its channels are added to a parameter that belongs to no layer"
        if module not in names:
            continue  # an operation between layers
        known = isinstance(module, (*_LAYERS, *_BATCH_NORMS, nn.PReLU))
        if not known:
            return empty, f"its channels run through {names[module]!r}, a {type(module).__name__}"
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1 and not _depthwise(module):
            return empty, f"its channels run through {names[module]!r}, a convolution of {module.groups} groups"
        reading = graph.is_in_channel_pruning_fn(item.dep.handler) and not _depthwise(module)
        side: Side = "in" if reading and isinstance(module, _LAYERS) else "out"
        local = np.asarray(item.idxs, dtype=np.int64)
        roots = np.asarray(item.root_idxs if item.root_idxs is not None else local)
        if (
            len(local) % channels
            or roots.dtype == object
            or np.any(np.bincount(roots, minlength=channels) * channels != len(local))
        ):
            return empty, f"its channels and those of {names[module]!r} do not go one by one"
        index = local[np.argsort(roots, kind="stable")].reshape(channels, -1)
        members.append(Member(names[module], side, index))
        reads |= side == "in"
    if not reads:
        return empty, "no layer reads its channels: they are the network's output"
    return ChannelGroup(root, channels, tuple(members)), ""


def _tried(network: nn.Module, group: ChannelGroup, x: Tensor) -> str:
    """Why a group cannot be pruned after all; empty where it can."""
    if group.channels < 2:
        return "it has one channel only" if group.channels else "it has none"
    keep = np.arange(0, group.channels, 2, dtype=np.int64)
    lost = np.arange(1, group.channels, 2, dtype=np.int64)
    muted = copy.deepcopy(network)
    for member in group.members:
        if member.side == "in":
            module = muted.get_submodule(member.module)
            dim = 0 if isinstance(module, nn.ConvTranspose2d) else 1
            with torch.no_grad():
                module.weight.index_fill_(dim, torch.from_numpy(member.index[lost].ravel()), 0)  # type: ignore[operator]
    try:
        with torch.no_grad():
            expected, found = muted(x), removed(network, [group], {group.name: keep})(x)
    except Exception as error:  # a network with code that knows its own widths
        return f"without some of its channels the network does not run: {str(error).splitlines()[0][:120]}"
    if expected.shape != found.shape:
        return "without some of its channels the output has another shape"
    scale = float(expected.abs().max()) or 1.0
    if not float((expected - found).abs().max()) <= 1e-3 * scale:
        return "without some of its channels the network computes something else"
    return ""
