"""What of a network trains on a device: everything, the last layer, biases, lite residuals, or chosen layers and
channels."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasbench.ondevice.memory import (
    FULL,
    Optimizer,
    TrainingMemory,
    Update,
    layer_updates,
    training_memory,
)
from nasbench.ondevice.saving import memory_saving
from search_spaces import UserError, nearest, trace_layers

Method = Literal["full", "last", "bias", "lite_residual", "sparse"]
METHODS: tuple[Method, ...] = ("full", "last", "bias", "lite_residual")  # those that need no updates

_GROUPS, _KERNEL, _POOL = 2, 5, 2  # of lite residuals, as TinyTL's published code sets them
_NORM_CHANNELS = 8  # per group of their normalisation


class LiteResidual(nn.Module):
    """A block with a cheap trainable branch beside it (TinyTL; Cai, Gan, Zhu & Han, NeurIPS 2020).

    The branch sees the block's input at half the resolution: a grouped convolution and a pointwise one, each followed
    by group normalisation, then is enlarged to the block's output. It starts at zero, so that the network's outputs
    stay.

    Args:
        block: stays as it is.
        given, made: shapes of the block's input and output, `(batch, channels, height, width)`.
    """

    def __init__(self, block: nn.Module, given: Sequence[int], made: Sequence[int]) -> None:
        super().__init__()
        self.block = block
        self.given, self.made = tuple(given), tuple(made)
        cin, cout = given[1], made[1]
        # Windows of signals have height 1; and no kernel is larger than what it sees.
        (height, width), pool = given[-2:], (min(_POOL, given[-2]), min(_POOL, given[-1]))
        stride = max(1, round(height / made[-2])), max(1, round(width / made[-1]))
        kernel = _kernel(height), _kernel(width)
        padding = kernel[0] // 2, kernel[1] // 2
        self.pool = nn.AvgPool2d(pool, ceil_mode=True)
        groups = _GROUPS if cin % _GROUPS == 0 else 1
        self.lite = nn.Sequential(
            nn.Conv2d(cin, cin, kernel, stride, padding, groups=groups, bias=False),
            nn.GroupNorm(_norm_groups(cin), cin),
            nn.ReLU(),
            nn.Conv2d(cin, cout, 1, bias=False),
            nn.GroupNorm(_norm_groups(cout), cout),
        )
        nn.init.zeros_(self.lite[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        size = [int(s) for s in out.shape[-2:]]  # a constant of exported graphs
        return out + F.interpolate(self.lite(self.pool(x)), size, mode="bilinear", align_corners=False)


def _kernel(size: int) -> int:
    """The odd kernel for a map of that size before pooling: 5, less on small maps, 1 where there is but one row."""
    return min(_KERNEL, max(3, size // _POOL | 1)) if size > 1 else 1


def _norm_groups(channels: int) -> int:
    return channels // math.gcd(channels, _NORM_CHANNELS)


def with_lite_residuals(network: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """A copy of a network with a lite residual beside each of its blocks; one that has them keeps those.

    Blocks are the outermost modules, sequences aside, that hold two convolutions or more and turn maps into maps; in a
    plain stack of layers, those that hold one.

    Raises:
        UserError: the network has no such block.
    """
    out = copy.deepcopy(network)
    if any(isinstance(module, LiteResidual) for module in out.modules()):
        return out
    names = _blocks(out, 2) or _blocks(out, 1)
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    handles = [
        out.get_submodule(name).register_forward_hook(
            lambda _, args, result, name=name: shapes.__setitem__(name, (args[0].shape, result.shape))
        )
        for name in names
    ]
    training = out.training
    with torch.no_grad():
        if names:
            out.eval()(torch.zeros(1, *input_shape))
    out.train(training)
    for handle in handles:
        handle.remove()
    found = {n: s for n, s in shapes.items() if len(s[0]) == len(s[1]) == 4}
    if not found:
        raise UserError(
            f"method = 'lite_residual': {type(network).__name__} has no blocks of convolutions to put residuals "
            "beside; choose 'bias', 'last' or 'sparse'"
        )
    for name, (given, made) in found.items():
        parent, _, attribute = name.rpartition(".")
        setattr(out.get_submodule(parent), attribute, LiteResidual(out.get_submodule(name), given, made))
    return out


def _blocks(module: nn.Module, convolutions: int, name: str = "") -> list[str]:
    """Names of the outermost modules with that many convolutions or more, looking into sequences and the root."""
    found = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if sum(isinstance(m, nn.Conv2d) for m in child.modules()) < convolutions:
            continue
        inner = _blocks(child, convolutions, full) if isinstance(child, nn.Sequential | nn.ModuleList) else []
        if inner or not isinstance(child, nn.Conv2d | nn.ModuleList):
            found += inner or [full]
    return found


def head(network: nn.Module) -> str:
    """The name of the last layer: the last linear one, or convolution.

    Raises:
        UserError: there is none.
    """
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Linear)] or [
        n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)
    ]
    if not names:
        raise UserError(f"{type(network).__name__} has no linear layer and no convolution to train")
    return names[-1]


def prepared(
    network: nn.Module,
    input_shape: Sequence[int],
    method: Method,
    updates: Mapping[str, Update] | None = None,
) -> tuple[nn.Module, dict[str, Update]]:
    """A copy of a network in which a method's parameters train, and what trains by name of module.

    `full` is the plain network, trained by plain autograd with normalisation by batch statistics. All others keep the
    running statistics and save memory (see `saving`). `sparse` trains what `updates` names.

    Raises:
        UserError: an unknown method, or `updates` missing where they are needed.
    """
    if method == "lite_residual":
        network = with_lite_residuals(network, input_shape)
    chosen = _trained(network, method, updates)
    if method != "full":
        return memory_saving(network, chosen), chosen
    plain = copy.deepcopy(network)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    return plain, chosen


def _trained(network: nn.Module, method: Method, updates: Mapping[str, Update] | None) -> dict[str, Update]:
    """What trains, by name of module, of a network that has its lite residuals already."""
    if method not in get_args(Method):
        raise UserError(f"method = {method!r}: unknown. {nearest(method, get_args(Method))}")
    if method == "full":
        return {"": FULL}
    if method == "sparse":
        if not updates:
            raise UserError("method = 'sparse' needs updates: choose_updates picks them for a memory budget")
        return dict(updates)
    if method == "last":
        return {head(network): FULL}
    lite = {f"{n}.lite": FULL for n, m in network.named_modules() if isinstance(m, LiteResidual)}
    return {"": Update(0.0, True), head(network): FULL, **lite}


def method_memory(
    network: nn.Module,
    input_shape: Sequence[int],
    method: Method,
    updates: Mapping[str, Update] | None = None,
    *,
    batch: int = 8,
    optimizer: Optimizer = "momentum",
    saving: bool = True,
) -> tuple[TrainingMemory, tuple[str, ...]]:
    """The analytic training memory of a method, and the module that each operator runs in.

    Args:
        saving: as this package trains; False tells what plain autograd would keep for the same updates.
    """
    if method == "lite_residual":
        network = with_lite_residuals(network, input_shape)
    workload, names = trace_layers(network, input_shape)
    chosen = _trained(network, method, updates)
    full = method == "full"
    memory = training_memory(
        workload,
        layer_updates(names, chosen),
        batch=batch,
        optimizer=optimizer,
        saving=saving and not full,
        batch_statistics=full,
    )
    return memory, names


def with_new_head(network: nn.Module, classes: int) -> nn.Module:
    """A copy of a network whose last layer is fresh, with as many outputs as there are classes.

    Raises:
        UserError: the last layer is no linear one.
    """
    out = copy.deepcopy(network)
    name = head(out)
    old = out.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise UserError(f"{type(network).__name__} ends in a {type(old).__name__}, not in a linear layer")
    parent, _, attribute = name.rpartition(".")
    new = nn.Linear(old.in_features, classes)
    nn.init.normal_(new.weight, 0.0, old.in_features**-0.5)
    nn.init.zeros_(new.bias)
    setattr(out.get_submodule(parent), attribute, new)
    return out
