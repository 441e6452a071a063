"""Clients of a federation: devices that train on data of their own, and what they send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from nasbench.ondevice.subnets import flatten
from nasbench.ondevice.updates import Compression, Message
from nasbench.tasks.base import Task
from nasbench.training.evaluation import fit_size
from nasbench.training.loop import Batch, fit
from nasbench.training.recipe import ConstantRate, check_choice
from search_spaces.base import Archs
from search_spaces.errors import UserError

Method = Literal["fedavg", "fedprox", "scaffold"]


@dataclass(frozen=True)
class LocalTraining(ConstantRate):
    """What a client does in a round; beside the keys of `ConstantRate`:

    Args:
        method: `fedavg` (McMahan et al. 2017), `fedprox` (Li et al. 2020: the loss grows by mu/2 times the squared
            distance to the round's first weights) or `scaffold` (Karimireddy et al. 2020, control variates by
            option II, which is for plain SGD).
        mu: of `fedprox`.
    """

    method: Method = "fedavg"
    mu: float = 0.1

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        self.recipe()
        if self.epochs < 1:
            raise UserError(f"epochs = {self.epochs}: expected 1 or more")
        if not self.mu >= 0:
            raise UserError(f"mu = {self.mu}: expected 0 or more")
        if self.method == "scaffold" and self.momentum:
            raise UserError(
                f"momentum = {self.momentum}: control variates of 'scaffold' are for plain SGD; set it to 0"
            )


@dataclass
class Round:
    """What a client gets: the server's state, and what it kept itself.

    Args:
        number: from 1.
        network: a working copy with the server's weights, for the client to train in place.
        elements: which of `flatten(network)` are the client's, int64.
        control: the server's control variate on the client's elements, for `scaffold`; else None.
        own_control: the client's, as long.
        residual: as long, what earlier messages left out.
        seed: for what the client draws.
    """

    number: int
    network: nn.Module
    elements: Tensor
    local: LocalTraining
    compression: Compression
    control: Tensor | None
    own_control: Tensor
    residual: Tensor
    seed: int


@dataclass
class Answer:
    """What a client sends, and what it keeps.

    Args:
        message: changes of its elements.
        samples: that it trained on.
        loss: mean of its steps.
        buffers: of a plain network, such as running statistics of normalisation.
        control: change of its control variate on its elements, for `scaffold`.
        residual: stays on the device.
    """

    message: Message
    samples: int
    loss: float
    buffers: dict[str, Tensor] = field(default_factory=dict)
    control: Tensor | None = None
    residual: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """What is sent."""
        control = 0 if self.control is None else self.control.nbytes
        return self.message.nbytes + control + sum(b.nbytes for b in self.buffers.values())


class Client:
    """A device with data of its own.

    Args:
        name: unique in the federation.
        task: its training split is the client's.
        arch: its subnet `(K,)` of a supernet; None trains the whole of a plain network.
        input_shape: that the network takes; the task's by default.
    """

    def __init__(
        self, name: str, task: Task, arch: Archs | None = None, input_shape: Sequence[int] | None = None
    ) -> None:
        self.name = name
        self.task = task
        self.arch = None if arch is None else np.asarray(arch)
        self.input_shape = tuple(input_shape or task.input_shape)

    def train(self, given: Round) -> Answer | None:
        """Train on the client's data, and answer; None is no answer.

        Raises:
            BrokeDown: the loss is no longer finite.
        """
        network, local = given.network, given.local
        start = flatten(network)
        anchors = [p.detach().clone() for p in network.parameters()] if local.method == "fedprox" else []
        shifts: list[Tensor] = []
        if given.control is not None:
            parameters = list(network.parameters())
            own = torch.zeros_like(start)
            own[given.elements] = given.control - given.own_control
            split = own.split([p.numel() for p in parameters])
            shifts = [s.view(p.shape) for s, p in zip(split, parameters, strict=True)]

        def backward(batch: Batch) -> dict[str, float]:
            x = fit_size(self.task.prepare(batch.images), self.input_shape)
            logits = network(x) if self.arch is None else network(x, self.arch)
            loss = self.task.loss(logits.float(), batch.labels)
            loss.backward()
            for parameter, anchor in zip(network.parameters(), anchors, strict=bool(anchors)):
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchor, alpha=local.mu)
            for parameter, shift in zip(network.parameters(), shifts, strict=bool(shifts)):
                if parameter.grad is not None:
                    parameter.grad.add_(shift)
            return {"loss": float(loss.detach())}

        history = fit(network, self.task, local.recipe(), backward, settings={}, seed=given.seed)
        change = (flatten(network) - start)[given.elements]
        wanted = change + given.residual
        message = given.compression.encode(wanted, given.seed)
        control = None
        samples = len(self.task.split("train"))
        if given.control is not None:
            steps = local.epochs * (samples // min(local.batch_size, samples))
            # c_i+ = c_i - c + (x - y) / (K lr): the paper's option II.
            control = -given.control - change / (steps * local.lr)
        residual = wanted - message.decode() if given.compression.share < 1 else None
        buffers = {n: b.detach().clone() for n, b in network.named_buffers() if b.is_floating_point()}
        return Answer(message, samples, history[-1]["loss"], buffers, control, residual)
