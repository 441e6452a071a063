"""The server of a federation: what it keeps, and a round of asking clients and averaging what they answer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasbench.ondevice.clients import Answer, Client, LocalTraining, Round
from nasbench.ondevice.subnets import flatten, put, trained_elements
from nasbench.ondevice.updates import Compression, Message
from nasbench.training.checkpoint import check_settings, load_tensors, save_tensors
from nasbench.training.loop import BrokeDown, step_seed
from search_spaces.errors import UserError
from search_spaces.supernet import Supernet


class Server:
    """Trains a network in rounds. Arguments as in `federate`, checked there.

    Attributes:
        weights: of the network, as one vector.
        control: the control variate of `scaffold`, as long.
        elements: per client, which of that vector's it trains, int64.
        controls, residuals: per client, as long: its own control variate, and what its messages left out. In truth they
            lie on the devices.
        history: a row per finished round.
    """

    def __init__(
        self,
        network: nn.Module,
        clients: Sequence[Client],
        local: LocalTraining,
        compression: Compression,
        participation: float,
        dropout: float,
        server_lr: float,
        seed: int,
    ) -> None:
        self.network, self.clients, self.local, self.compression = network, clients, local, compression
        self.participation, self.dropout, self.server_lr, self.seed = participation, dropout, server_lr, seed
        self.history: list[dict[str, Any]] = []
        self.weights = flatten(network)
        self.control = torch.zeros_like(self.weights)
        self.elements = _elements(network, clients)
        self.controls = {name: torch.zeros(len(rows)) for name, rows in self.elements.items()}
        self.residuals = {name: torch.zeros(len(rows)) for name, rows in self.elements.items()}
        self._holders = torch.zeros_like(self.weights)  # clients per element, of all
        for rows in self.elements.values():
            self._holders[rows] += 1
        self._buffers = {n: b for n, b in network.named_buffers() if b.is_floating_point()}
        self._worker = copy.deepcopy(network)  # that clients train, one after the other

    def round(self, number: int) -> dict[str, Any]:
        """One round, from 1; the network has its weights then. Returns its row of the history.

        Raises:
            BrokeDown: the mean made the weights non-finite; all stays as before the round.
        """
        rng = np.random.default_rng(step_seed(self.seed, "round", number))
        count = max(1, round(self.participation * len(self.clients)))
        asked = [self.clients[i] for i in sorted(rng.permutation(len(self.clients))[:count])]
        row: dict[str, Any] = {
            "round": number, "loss": float("nan"), "asked": len(asked), "answered": 0, "bytes_down": 0, "bytes_up": 0,
            "left_out": {},
        }  # fmt: skip
        answers = self._collected(number, asked, rng.random(len(asked)) < self.dropout, row)
        row["answered"] = len(answers)
        if answers:
            row["loss"] = self._learned(number, answers)
        return row

    def _collected(
        self, number: int, asked: Sequence[Client], failing: NDArray[np.bool_], row: dict[str, Any]
    ) -> dict[str, tuple[Answer, Tensor]]:
        """Answers that can be used, with their decoded changes, by client; bytes and who is left out go in the row."""
        scaffold = self.local.method == "scaffold"
        answers: dict[str, tuple[Answer, Tensor]] = {}
        for client, fails in zip(asked, failing, strict=True):
            rows = self.elements[client.name]
            row["bytes_down"] += (1 + scaffold) * rows.numel() * self.weights.itemsize
            row["bytes_down"] += sum(b.nbytes for b in self._buffers.values())
            if fails:
                row["left_out"][client.name] = "dropped out"
                continue
            try:
                answer = client.train(self._given(number, client, scaffold))
            except BrokeDown as error:
                row["left_out"][client.name] = str(error)
                continue
            if isinstance(answer, Answer) and isinstance(answer.message, Message):
                row["bytes_up"] += answer.nbytes
            try:
                answers[client.name] = _checked(answer, len(rows), self._buffers, scaffold)
            except UserError as error:
                row["left_out"][client.name] = str(error)
        return answers

    def _given(self, number: int, client: Client, scaffold: bool) -> Round:
        """What a client gets."""
        put(self._worker, self.weights)
        for name, buffer in self._worker.named_buffers():
            if name in self._buffers:
                buffer.copy_(self._buffers[name])
        rows = self.elements[client.name]
        return Round(
            number,
            self._worker,
            rows,
            self.local,
            self.compression,
            self.control[rows] if scaffold else None,
            self.controls[client.name],
            self.residuals[client.name],
            step_seed(self.seed, f"client/{client.name}", number),
        )

    def _learned(self, number: int, answers: Mapping[str, tuple[Answer, Tensor]]) -> float:
        """Take the mean change, and keep what clients keep; the mean loss."""
        changes = {name: (answer.samples, change) for name, (answer, change) in answers.items()}
        weights = self.weights + self.server_lr * _mean(changes, self.elements, len(self.weights))
        if not bool(torch.isfinite(weights).all()):
            raise BrokeDown(f"round {number}: the weights are no longer finite; lower lr or server_lr")
        self.weights = weights
        total = sum(answer.samples for answer, _ in answers.values())
        for name, buffer in self._buffers.items():
            buffer.copy_(sum((a.samples / total * a.buffers[name] for a, _ in answers.values()), torch.zeros(())))
        for name, (answer, _) in answers.items():
            rows = self.elements[name]
            if answer.residual is not None:
                self.residuals[name] = answer.residual
            if answer.control is not None:
                self.control[rows] += answer.control / self._holders[rows]
                self.controls[name] = self.controls[name] + answer.control
        put(self.network, self.weights)
        return float(sum(answer.samples * answer.loss for answer, _ in answers.values()) / total)

    @property
    def _settings(self) -> dict[str, Any]:
        """What the result depends on; a checkpoint of other settings is refused."""
        return {
            "local": asdict(self.local),
            "compression": asdict(self.compression),
            "participation": self.participation,
            "dropout": self.dropout,
            "server_lr": self.server_lr,
            "seed": self.seed,
            "parameters": len(self.weights),
            "clients": [
                [c.name, len(c.task.split("train")), None if c.arch is None else c.arch.tolist()] for c in self.clients
            ],
        }

    def _state(self) -> dict[str, Tensor]:
        kept = {f"buffers/{name}": buffer for name, buffer in self._buffers.items()}
        kept |= {"weights": self.weights, "control": self.control}
        for name in self.elements:
            kept |= {f"residual/{name}": self.residuals[name], f"control/{name}": self.controls[name]}
        return kept

    def save(self, checkpoint: Path) -> None:
        """Write all that the next round depends on."""
        save_tensors(checkpoint, self._state(), {"settings": self._settings, "history": self.history})

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: of another federation.
        """
        found, metadata = load_tensors(checkpoint)
        check_settings(checkpoint, self._settings, metadata)
        for key, tensor in self._state().items():
            tensor.copy_(found[key])
        self.history = metadata["history"]
        put(self.network, self.weights)


def _mean(changes: Mapping[str, tuple[int, Tensor]], elements: Mapping[str, Tensor], length: int) -> Tensor:
    """Weighted by samples, element by element over those that hold it."""
    total, weight = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    for name, (samples, change) in changes.items():
        total[elements[name]] += samples * change.double()
        weight[elements[name]] += samples
    return (total / weight.clamp_min(1)).float()


def _checked(
    answer: Answer | None, length: int, buffers: Mapping[str, Tensor], scaffold: bool
) -> tuple[Answer, Tensor]:
    """An answer with its decoded changes.

    Raises:
        UserError: what is wrong with it.
    """
    if answer is None:
        raise UserError("sent nothing")
    if not isinstance(answer, Answer) or not isinstance(answer.message, Message):
        raise UserError(f"sent a {type(answer).__name__}, not an Answer with a Message")
    if answer.message.length != length:
        raise UserError(f"sent changes of {answer.message.length} weights, its network has {length}")
    change = answer.message.decode()
    if not isinstance(answer.samples, int) or answer.samples < 1:
        raise UserError(f"samples = {answer.samples!r}: expected 1 or more")
    given = {"the changes": change}
    if scaffold:
        if answer.control is None or answer.control.shape != change.shape:
            raise UserError("sent no control variate, or one of the wrong shape")
        given["the control variate"] = answer.control
    for name, buffer in buffers.items():
        if name not in answer.buffers or answer.buffers[name].shape != buffer.shape:
            raise UserError(f"buffer {name!r} is missing or of the wrong shape")
        given[f"buffer {name!r}"] = answer.buffers[name]
    for what, tensor in given.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{what} are not finite" if what == "the changes" else f"{what} is not finite")
    return answer, change


def _elements(network: nn.Module, clients: Sequence[Client]) -> dict[str, Tensor]:
    """Each client's elements of the flat vector of weights."""
    found: dict[bytes | None, Tensor] = {}
    for client in clients:
        key = None if client.arch is None else client.arch.tobytes()
        if key not in found:
            if client.arch is None:
                found[key] = torch.arange(len(flatten(network)))
            else:
                assert isinstance(network, Supernet)
                found[key] = trained_elements(network, client.arch, client.input_shape)
    return {c.name: found[None if c.arch is None else c.arch.tobytes()] for c in clients}
