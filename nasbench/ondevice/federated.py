"""Federated learning: devices train one network, or their own subnets of one supernet, and share weights, not data.

`federate` simulates server and clients in one process; every message is built, checked and counted as it would travel.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from nasbench.ondevice.clients import Answer, Client, LocalTraining, Round
from nasbench.ondevice.subnets import flatten, pooled, put, trained_elements
from nasbench.ondevice.updates import Compression, Message
from nasbench.tasks.base import Split, Task
from nasbench.training.checkpoint import check_settings, load_tensors, save_tensors
from nasbench.training.evaluation import batches, predict_logits
from nasbench.training.loop import BrokeDown, step_seed
from search_spaces.base import Archs
from search_spaces.errors import UserError
from search_spaces.supernet import NormStats, Supernet, calibrate

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass
class FederatedResult:
    """A federation's history.

    Args:
        history: a row per round: `round`, `loss` (mean over the samples of those who answered), `asked`, `answered`,
            `bytes_down`, `bytes_up`, `left_out` (who, and why), and what `evaluate` gave.
    """

    history: list[dict[str, Any]]

    def frame(self) -> pd.DataFrame:
        """The history, with `megabytes`: all that was sent so far, both ways."""
        table = pd.DataFrame(self.history)
        table["megabytes"] = (table["bytes_down"] + table["bytes_up"]).cumsum() / 1e6
        return table

    @property
    def left_out(self) -> dict[str, int]:
        """How often each client's answer could not be used."""
        return dict(Counter(name for row in self.history for name in row["left_out"]))

    def to_reach(self, accuracy: float, metric: str = "accuracy") -> tuple[int, float] | None:
        """Rounds and megabytes until a metric was first so high; None if it never was."""
        table = self.frame()
        reached = table[table[metric] >= accuracy]
        return None if reached.empty else (int(reached["round"].iloc[0]), float(reached["megabytes"].iloc[0]))


def federate(
    network: nn.Module,
    clients: Sequence[Client],
    *,
    rounds: int,
    local: LocalTraining | None = None,
    compression: Compression | None = None,
    participation: float = 1.0,
    dropout: float = 0.0,
    server_lr: float = 1.0,
    evaluate: Evaluate | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> FederatedResult:
    """Train a network by rounds: clients train copies on their own data, the server averages what they changed.

    The mean is weighted by samples, and taken weight by weight over the clients whose subnet holds it (as in HeteroFL;
    Diao, Ding & Tarokh, ICLR 2021), so that devices of any size take part. Normalisation of plain networks: running
    statistics are averaged like weights, uncompressed. A supernet keeps none: clients normalise by their batches, and
    who runs a subnet calibrates it by `client_statistics`.

    An answer that is missing, of the wrong shape or not finite is left out of the round, with its reason. Everything
    follows from the seed, and a run that goes on from its checkpoint ends with the same bits.

    Args:
        network: a plain network or a supernet, trained in place, on the CPU; ends in eval mode.
        clients: all with an `arch` for a supernet, none for a plain network.
        rounds: in all; a checkpoint of fewer is gone on with.
        participation: share of the clients asked in a round, one at least.
        dropout: probability that a client that was asked fails in mid-round: it has received, and sends nothing.
        server_lr: step along the mean change.
        evaluate: called after every round with the network; what it returns joins the history.
        checkpoint: file written after every round.

    Raises:
        UserError: bad values, or a checkpoint of another federation.
        BrokeDown: the mean made the weights non-finite; network and checkpoint stay as before the round.
    """
    local, compression = local or LocalTraining(), compression or Compression()
    _check(network, clients, rounds, participation, dropout, server_lr)
    elements = _elements(network, clients)
    names = [c.name for c in clients]
    scaffold = local.method == "scaffold"
    weights = flatten(network)
    control = torch.zeros_like(weights)
    own = {n: torch.zeros(len(elements[n])) for n in names}
    residuals = {n: torch.zeros(len(elements[n])) for n in names}
    held = torch.zeros_like(weights)  # clients per element, of all
    for rows in elements.values():
        held[rows] += 1
    history: list[dict[str, Any]] = []
    settings = {
        "local": asdict(local), "compression": asdict(compression), "participation": participation, "dropout": dropout,
        "server_lr": server_lr, "seed": seed, "parameters": len(weights),
        "clients": [[c.name, len(c.task.split("train")), None if c.arch is None else c.arch.tolist()] for c in clients],
    }  # fmt: skip
    buffers = {n: b for n, b in network.named_buffers() if b.is_floating_point()}

    def state() -> dict[str, Tensor]:
        kept = {f"buffers/{n}": b for n, b in buffers.items()} | {"weights": weights, "control": control}
        for name in names:
            kept |= {f"residual/{name}": residuals[name], f"control/{name}": own[name]}
        return kept

    if checkpoint is not None and checkpoint.exists():
        found, metadata = load_tensors(checkpoint)
        check_settings(checkpoint, settings, metadata)
        for key, tensor in state().items():
            tensor.copy_(found[key])
        history = metadata["history"]
        put(network, weights)
    worker = copy.deepcopy(network)
    for number in range(len(history) + 1, rounds + 1):
        rng = np.random.default_rng(step_seed(seed, "round", number))
        asked = [
            clients[i] for i in sorted(rng.permutation(len(clients))[: max(1, round(participation * len(clients)))])
        ]
        failing = rng.random(len(asked)) < dropout
        answers: dict[str, tuple[Answer, Tensor]] = {}
        left_out: dict[str, str] = {}
        down = up = 0
        for client, fails in zip(asked, failing, strict=True):
            rows = elements[client.name]
            down += (1 + scaffold) * rows.numel() * weights.itemsize + sum(b.nbytes for b in buffers.values())
            if fails:
                left_out[client.name] = "dropped out"
                continue
            put(worker, weights)
            for name, buffer in worker.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
            given = Round(
                number, worker, rows, local, compression, control[rows] if scaffold else None, own[client.name],
                residuals[client.name], step_seed(seed, f"client/{client.name}", number),
            )  # fmt: skip
            try:
                answer = client.train(given)
            except BrokeDown as error:
                left_out[client.name] = str(error)
                continue
            up += answer.nbytes if isinstance(answer, Answer) and isinstance(answer.message, Message) else 0
            try:
                answers[client.name] = _checked(answer, len(rows), buffers, scaffold)
            except UserError as error:
                left_out[client.name] = str(error)
        row: dict[str, Any] = {
            "round": number, "loss": float("nan"), "asked": len(asked), "answered": len(answers), "bytes_down": down,
            "bytes_up": up, "left_out": left_out,
        }  # fmt: skip
        if answers:
            mean = _mean({n: (a.samples, change) for n, (a, change) in answers.items()}, elements, len(weights))
            new = weights + server_lr * mean
            if not bool(torch.isfinite(new).all()):
                raise BrokeDown(f"round {number}: the weights are no longer finite; lower lr or server_lr")
            weights = new
            total = sum(a.samples for a, _ in answers.values())
            row["loss"] = sum(a.samples * a.loss for a, _ in answers.values()) / total
            for name, buffer in buffers.items():
                buffer.copy_(sum((a.samples / total * a.buffers[name] for a, _ in answers.values()), torch.zeros(())))
            for name, (answer, _) in answers.items():
                if answer.residual is not None:
                    residuals[name] = answer.residual
                if answer.control is not None:
                    control[elements[name]] += answer.control / held[elements[name]]
                    own[name] = own[name] + answer.control
            put(network, weights)
        network.eval()
        if evaluate is not None:
            row |= evaluate(network)
        history.append(row)
        if checkpoint is not None:
            save_tensors(checkpoint, state(), {"settings": settings, "history": history})
    return FederatedResult(history)


def client_statistics(supernet: Supernet, arch: Archs, clients: Sequence[Client], batch_size: int = 100) -> NormStats:
    """Normalisation statistics of a subnet over all clients' training data.

    Each client calibrates on its own data and sends a mean and a variance per channel, which are pooled.

    Raises:
        UserError: no clients.
    """
    return pooled(
        (
            len(images := client.task.split("train").images),
            calibrate(supernet, arch, batches(client.task, images, batch_size)),
        )
        for client in clients
        if len(client.task.split("train")) > 1
    )


def evaluator(task: Task, split: Split, clients: Sequence[Client]) -> Evaluate:
    """For `federate`: accuracy on a split, by every subnet that clients have.

    Of a supernet, `accuracy` is the mean over the clients of their own subnets' accuracy, `accuracy_largest` that of
    the subnet with the most weights; statistics of each subnet are pooled over the clients that train it.
    """

    def of_network(network: nn.Module) -> dict[str, float]:
        shape = clients[0].input_shape
        return {"accuracy": task.accuracy(predict_logits(network, task, split.images, shape), split.labels)}

    def of_supernet(supernet: nn.Module) -> dict[str, float]:
        assert isinstance(supernet, Supernet)
        groups: dict[bytes, list[Client]] = {}
        for client in clients:
            assert client.arch is not None
            groups.setdefault(client.arch.tobytes(), []).append(client)
        found, sizes = [], []
        for group in groups.values():
            arch: Any = group[0].arch
            stats = client_statistics(supernet, arch, group)
            logits = predict_logits(
                lambda x, arch=arch, stats=stats: supernet(x, arch, stats),  # type: ignore[misc]
                task, split.images, device=torch.device("cpu"),
            )  # fmt: skip
            found.append(task.accuracy(logits, split.labels))
            sizes.append(sum(v.numel() for v in supernet.extract(arch, stats).parameters()))
        mean = float(np.average(found, weights=[len(g) for g in groups.values()]))
        return {"accuracy": mean, "accuracy_largest": found[int(np.argmax(sizes))]}

    return lambda network: of_supernet(network) if isinstance(network, Supernet) else of_network(network)


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


def _check(
    network: nn.Module, clients: Sequence[Client], rounds: int, participation: float, dropout: float, server_lr: float
) -> None:
    rules = {
        "rounds": (rounds, rounds >= 0, "0 or more"),
        "participation": (participation, 0 < participation <= 1, "a share above 0, up to 1"),
        "dropout": (dropout, 0 <= dropout <= 1, "a probability in 0..1"),
        "server_lr": (server_lr, 0 < server_lr < float("inf"), "above 0"),
    }
    for key, (value, right, expected) in rules.items():
        if not right:
            raise UserError(f"{key} = {value}: expected {expected}")
    if not clients:
        raise UserError("clients: expected one or more")
    names = Counter(c.name for c in clients)
    if twice := [n for n, count in names.items() if count > 1]:
        raise UserError(f"clients: {twice[0]!r} is there twice; names must be unique")
    for client in clients:
        if (client.arch is not None) != isinstance(network, Supernet):
            raise UserError(
                f"client {client.name!r} has {'an' if client.arch is not None else 'no'} arch, the network is a "
                f"{type(network).__name__}: subnets are of supernets, and every client of a supernet has one"
            )
        if len(client.task.split("train")) < 2:
            raise UserError(f"client {client.name!r} has fewer than two samples")
