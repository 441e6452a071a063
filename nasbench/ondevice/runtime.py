"""Learning in the runtime of the device: ExecuTorch's training extension runs a `.pte` file forward, backward, and SGD.

The file holds the network with its loss and the gradients of what trains; a program on the device, in C++ or Python,
does nothing but run it. ExecuTorch marks the extension experimental.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hardware_profiles.extras import load, quiet, reason, require
from hardware_profiles.paths import atomic
from nasbench.ondevice.memory import Update, layer_updates
from nasbench.ondevice.methods import head
from nasbench.ondevice.saving import LeanAverage, averages
from search_spaces import UserError

EXTRA = "executorch"


class _WithLoss(nn.Module):
    """Loss and classes of a batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(x)
        return self.loss(logits, labels), logits.detach().argmax(dim=1)


def export_trainable(
    network: nn.Module,
    input_shape: Sequence[int],
    path: Path,
    updates: Mapping[str, Update] | None = None,
    *,
    batch: int = 8,
) -> Path:
    """Write a network with its loss and gradients as a `.pte` file that trains itself on the device.

    Normalisation is frozen. Gradients are made for what trains alone, so that the backward pass ends at the first layer
    that does.

    Args:
        network: a plain classifier, on the CPU.
        updates: by name of module; all weights of a layer train, or none; the last layer by default.
        batch: samples a step, fixed in the file.

    Raises:
        UserError: a part of a layer, a name that the network does not have, an operator without a gradient in the
            runtime, or the extra is missing. Nothing is written then.
    """
    require(EXTRA)
    updates = {head(network): Update(1.0, True)} if updates is None else updates
    names = {name for name, _ in network.named_modules()}
    for name, update in updates.items():
        if name not in names:
            raise UserError(f"updates: the network has no module {name!r}")
        if 0 < update.weights < 1:
            raise UserError(f"updates: {name!r} trains in part; in the runtime all weights of a layer train, or none")
    module = copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for name, part in list(module.named_modules()):
        if averages(part) and name:  # ExecuTorch has no gradient of average pooling, but of means
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, LeanAverage(part))
    for name, part in module.named_modules():
        (update,) = layer_updates([name], updates)
        for kind, parameter in part.named_parameters(recurse=False):
            parameter.requires_grad_(update.bias if kind == "bias" else update.weights == 1)
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError("updates: nothing trains")
    sample = torch.zeros(batch, *input_shape), torch.zeros(batch, dtype=torch.int64)
    try:
        with quiet():
            from executorch.exir import to_edge
            from torch.export.experimental import _export_forward_backward

            joint = _export_forward_backward(torch.export.export(_WithLoss(module), sample, strict=False))
            buffer = to_edge(joint).to_executorch().buffer
            _loaded(buffer).forward_backward("forward", sample)
    except UserError:
        raise
    except Exception as error:  # the exporter and the runtime raise their own kinds
        raise UserError(
            f"{type(network).__name__} cannot be trained by ExecuTorch: {reason(error)}; its runtime has gradients of "
            "convolutions, linear layers, frozen normalisation, ReLU and means, and of few others"
        ) from error
    with atomic(path) as temporary:
        temporary.write_bytes(buffer)
    return path


class DeviceTrainer:
    """A `.pte` file of `export_trainable`, trained by ExecuTorch on this machine.

    Args:
        path: of the file.
        lr, momentum, weight_decay: of the runtime's own SGD.

    Raises:
        UserError: no such file, or one of another kind.
    """

    def __init__(self, path: Path, *, lr: float = 0.01, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        require(EXTRA)
        try:
            self._buffer = Path(path).read_bytes()  # the runtime reads from it as long as it runs
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        if self._buffer[4:6] != b"ET":  # a flatbuffer's identifier; the runtime itself would find out too late
            raise UserError(f"{path}: no program of ExecuTorch; export_trainable writes one")
        self.module = _loaded(self._buffer)
        self.options = (lr, momentum, 0.0, weight_decay, False)
        self.optimizer: Any = None

    def step(self, x: Tensor, labels: Tensor) -> float:
        """One step of SGD on a batch of the file's size; the loss before it.

        Raises:
            UserError: a batch of another shape, or a loss that is not finite; nothing was learned from it then.
        """
        try:
            loss = float(self.module.forward_backward("forward", (x.contiguous(), labels))[0])
        except RuntimeError as error:
            raise UserError(f"a batch of shape {tuple(x.shape)} does not fit the program: {error}") from error
        if not torch.isfinite(torch.tensor(loss)):
            raise UserError(f"the loss is {loss}; what was learned before stays")
        if self.optimizer is None:  # the runtime knows its parameters after the first pass
            training = load(EXTRA, "executorch.extension.training")
            with quiet():
                self.optimizer = training.get_sgd_optimizer(self.module.named_parameters(), *self.options)
        self.optimizer.step(self.module.named_gradients())
        return loss

    def parameters(self) -> dict[str, Tensor]:
        """What trains, by its name in the network, as it stands in the runtime; empty before the first step."""
        if self.optimizer is None:
            return {}
        return {n.removeprefix("network."): p.clone() for n, p in self.module.named_parameters().items()}


def _loaded(buffer: bytes) -> Any:
    training = load(EXTRA, "executorch.extension.training")
    with quiet():  # each call warns that it is experimental, as the module's docstring says
        return training._load_for_executorch_for_training_from_buffer(buffer)
