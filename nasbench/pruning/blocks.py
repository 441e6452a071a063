"""Residual blocks: what can be taken out of a network whole, since its shortcut stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasbench.stages.structure import Skip


def find_blocks(network: nn.Module, input_shape: Sequence[int]) -> list[str]:
    """Names of the modules that become the identity where all their parameters are zero: bodies beside a shortcut.

    Of nested ones the innermost. A block that ends in a ReLU counts, for its input, which a block before it has
    rectified, passes unchanged.
    """
    network = copy.deepcopy(network).eval()
    calls: dict[str, tuple[tuple[Any, ...], Tensor]] = {}
    hooks = []
    for name, module in network.named_modules():
        if name and any(True for _ in module.parameters()) and any(True for _ in module.children()):

            def seen(m: nn.Module, args: tuple[Any, ...], result: Any, name: str = name) -> None:
                if (
                    args
                    and isinstance(args[0], Tensor)
                    and isinstance(result, Tensor)
                    and args[0].shape == result.shape
                ):
                    calls[name] = args, result

            hooks.append(module.register_forward_hook(seen))
    x = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    found = [name for name, (args, _) in calls.items() if _is_identity_at_zero(network.get_submodule(name), args)]
    order = {name: i for i, (name, _) in enumerate(network.named_modules())}
    inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    return sorted(inner, key=order.__getitem__)


def _is_identity_at_zero(module: nn.Module, args: tuple[Any, ...]) -> bool:
    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        return bool(torch.equal(module(*args), args[0]))


def without(network: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A copy of the network that skips the named blocks."""
    network = copy.deepcopy(network)
    for name in blocks:
        network.set_submodule(name, Skip())
    return network


def least_needed(
    network: nn.Module, blocks: Sequence[str], loss: Callable[[nn.Module], float], enough: Callable[[list[str]], bool]
) -> tuple[list[str], bool]:
    """Blocks to take out, one after the other whichever costs the least loss, until `enough` says so.

    Returns:
        The blocks, and whether that was enough; all of them where it was not.
    """
    gone: list[str] = []
    left = list(blocks)
    while not enough(gone):
        if not left:
            return gone, False
        losses = {name: loss(without(network, [*gone, name])) for name in left}
        chosen = min(left, key=losses.__getitem__)
        gone.append(chosen)
        left.remove(chosen)
    return gone, True
