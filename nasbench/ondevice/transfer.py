"""Transfer on the device: train what a method says, in as little memory as it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasbench.ondevice.memory import Optimizer, Update, measured_activations
from nasbench.ondevice.methods import Method, prepared
from nasbench.ondevice.saving import merged
from nasbench.tasks.base import Task
from nasbench.training.loop import History
from nasbench.training.network import train_network


def adapt(
    network: nn.Module,
    task: Task,
    input_shape: Sequence[int],
    *,
    method: Method = "lite_residual",
    updates: Mapping[str, Update] | None = None,
    epochs: int = 5,
    batch_size: int = 8,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> tuple[nn.Module, History]:
    """Train a copy of a network on a task's training split by one of the methods of `methods.prepared`.

    Args:
        updates: what trains, for `sparse`.
        batch_size: 8 by default, as memory allows on a device.
        momentum: 0 needs no optimiser state.

    Returns:
        A plain network with what was learned (lite residuals are part of it), in eval mode; and the history.

    Raises:
        UserError: as `prepared` and `train_network`.
    """
    trainable, _ = prepared(network, input_shape, method, updates)
    history = train_network(
        trainable,
        task,
        input_shape,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        seed=seed,
    )
    return merged(trainable).eval(), history


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes that a real training step took, as autograd and the optimiser tell."""

    activations: int
    gradients: int
    optimizer: int
    weights: int

    @property
    def total(self) -> int:
        """Activations, gradients and optimiser state; the weights are a matter of their own."""
        return self.activations + self.gradients + self.optimizer


def measured_memory(trainable: nn.Module, x: Tensor, optimizer: Optimizer = "momentum") -> MeasuredMemory:
    """What one step of training on a batch `x` takes; the network's parameters are changed by it.

    Args:
        trainable: of `methods.prepared`.
    """
    trainable.train()
    parameters = [p for p in trainable.parameters() if p.requires_grad]
    activations = measured_activations(trainable, x)
    trainable(x).float().square().mean().backward()
    if optimizer == "adam":
        made: torch.optim.Optimizer = torch.optim.Adam(parameters, 1e-6)
    else:
        made = torch.optim.SGD(parameters, 1e-6, momentum=0.9 if optimizer == "momentum" else 0.0)
    made.step()
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    state = sum(
        value.nbytes
        for values in made.state.values()
        for value in values.values()
        if isinstance(value, Tensor) and value.numel() > 1
    )
    weights = sum(p.nbytes for p in trainable.parameters())
    return MeasuredMemory(activations, gradients, state, weights)
