"""Sparse updates: which layers and channels to train within a memory budget (MCUNetV3; Lin et al., NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from nasbench.ondevice.memory import FULL, NOTHING, Optimizer, Update, layer_updates, training_memory
from nasbench.ondevice.methods import head
from search_spaces import UserError, trace_layers

SHARES = (0.25, 0.5, 1.0)
_BINS = 1000  # of the budget, in the knapsack


@dataclass(frozen=True)
class Contributions:
    """What training parts of a network brings, beside training its last layer alone.

    Args:
        layers: names of the layers with weights, in execution order, without the last.
        weights: per layer, gain in accuracy by share of its input channels that train.
        biases: per layer, gain of training the biases of it and of all layers after it.
    """

    layers: tuple[str, ...]
    weights: dict[str, dict[float, float]]
    biases: dict[str, float]


def layers_with_weights(network: nn.Module, input_shape: Sequence[int]) -> tuple[str, ...]:
    """Convolutions and linear layers in execution order, without the last layer."""
    _, names = trace_layers(network, input_shape)
    modules = dict(network.named_modules())
    last = head(network)
    found = [n for n in dict.fromkeys(names) if isinstance(modules[n], nn.Conv2d | nn.Linear) and n != last]
    return tuple(found)


def contributions(
    network: nn.Module,
    input_shape: Sequence[int],
    accuracy: Callable[[Mapping[str, Update]], float],
    shares: Sequence[float] = SHARES,
) -> Contributions:
    """Measure what each part brings by training it alone, the last layer always with it (MCUNetV3, section 3.2).

    Args:
        accuracy: adapts the network by the updates that it is given, and judges it; never on test data.
    """
    layers = layers_with_weights(network, input_shape)
    last = head(network)
    base = accuracy({last: FULL})
    weights: dict[str, dict[float, float]] = {}
    biases: dict[str, float] = {}
    for name in layers:
        grouped = _grouped(network.get_submodule(name))
        weights[name] = {
            share: accuracy({name: Update(share), last: FULL}) - base for share in shares if share == 1 or not grouped
        }
        biases[name] = accuracy(_biases(network, layers, name, last)) - base
    return Contributions(layers, weights, biases)


def _grouped(module: nn.Module) -> bool:
    """Whether only all of a layer's weights train, or none."""
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.groups not in (1, module.in_channels)
    )


def _biases(network: nn.Module, layers: Sequence[str], first: str, last: str) -> dict[str, Update]:
    """Updates of the biases, and shifts of normalisation, of a layer and of all that run after it."""
    names = [n for n, _ in network.named_modules()]
    order = {name: i for i, name in enumerate(names)}
    return {
        **{n: Update(0.0, True) for n, m in network.named_modules()
           if order[n] >= order[first] and not list(m.children()) and list(m.parameters(recurse=False))},
        last: FULL,
    }  # fmt: skip


def choose_updates(
    network: nn.Module,
    input_shape: Sequence[int],
    gains: Contributions,
    budget: int,
    *,
    batch: int = 8,
    optimizer: Optimizer = "momentum",
) -> dict[str, Update]:
    """The updates with the largest sum of contributions whose training memory keeps a budget.

    For every depth from which biases train, the shares of the layers after it are a multiple-choice knapsack, solved
    exactly up to a thousandth of the budget; MCUNetV3 searches the same space by evolution. Layers before the depth do
    not train, so that no gradient reaches them.

    Args:
        budget: bytes of activations, gradients and optimiser state.

    Returns:
        Updates by name of module, for `methods.prepared(..., "sparse", updates)`.

    Raises:
        UserError: not even the last layer can be trained within the budget; names what that takes.
    """
    workload, names = trace_layers(network, input_shape)
    last = head(network)

    def memory(updates: Mapping[str, Update]) -> int:
        per_operator = layer_updates(names, updates)
        return training_memory(workload, per_operator, batch=batch, optimizer=optimizer).total

    least = memory({last: FULL})
    if least > budget:
        raise UserError(f"budget = {budget} bytes: training the last layer alone takes {least} at batch {batch}")
    best: tuple[float, dict[str, Update]] = 0.0, {last: FULL}
    for depth, first in enumerate(gains.layers):
        base = _biases(network, gains.layers, first, last)
        taken = memory(base)
        if taken > budget:
            continue
        after = gains.layers[depth:]
        options = [
            [(0.0, 0.0, 0)]
            + [
                (share, gain, memory(base | {name: Update(share, base[name].bias)}) - taken)
                for share, gain in gains.weights[name].items()
                if gain > 0
            ]
            for name in after
        ]
        gain, picked = _knapsack(options, budget - taken)
        gain += gains.biases[first]
        if gain > best[0]:
            chosen = {n: Update(s, base.get(n, NOTHING).bias) for n, s in zip(after, picked, strict=True) if s}
            best = gain, base | chosen
    return best[1]


def _knapsack(options: Sequence[Sequence[tuple[float, float, int]]], room: int) -> tuple[float, list[float]]:
    """One option `(share, gain, bytes)` per layer with the largest sum of gains that fits; sizes are rounded up."""
    unit = max(1, -(-room // _BINS))
    bins = room // unit
    best = np.zeros(bins + 1)
    choices = np.zeros((len(options), bins + 1), dtype=int)
    for layer, offered in enumerate(options):
        table = np.full((len(offered), bins + 1), -np.inf)
        for i, (_, gain, size) in enumerate(offered):
            need = -(-size // unit)
            if need <= bins:
                table[i, need:] = best[: bins + 1 - need] + gain
        choices[layer] = table.argmax(axis=0)
        best = table.max(axis=0)
    left, picked = bins, []
    for layer in range(len(options) - 1, -1, -1):
        share, _, size = options[layer][choices[layer, left]]
        picked.append(share)
        left -= -(-size // unit)
    return float(best[bins]), picked[::-1]
