"""Training memory by layers of a module, and as autograd itself tells it; `predictors.training_memory` counts it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from predictors.training_memory import (
    FULL,
    NOTHING,
    Optimizer,
    TrainingMemory,
    Update,
    channels,
    training_memory,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "FULL", "NOTHING", "Optimizer", "TrainingMemory", "Update", "channels", "layer_updates", "measured_activations",
    "training_memory",
]  # fmt: skip


def layer_updates(names: Sequence[str], updates: Mapping[str, Update]) -> list[Update]:
    """Updates per operator, from updates by the dotted names of modules.

    An operator takes the update of the innermost named module that holds the one it ran in; none holds: nothing trains.
    """
    out = []
    for name in names:
        parts = name.split(".")
        holders = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        out.append(next((updates[h] for h in (*holders, "") if h in updates), NOTHING))
    return out


def measured_activations(network: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that autograd keeps after `network(x)`, parameters and buffers left out, each storage once.

    Args:
        x: a batch, as in training; the network runs in the mode it is in.
    """
    return sum(_kept_storages(network, lambda: network(x)).values())


def _kept_storages(network: nn.Module, run: Callable[[], object]) -> dict[int, int]:
    import torch

    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    found: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return found
