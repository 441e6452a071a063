"""Federated learning: devices train one network, or their own subnets of one supernet, and share weights, not data.

`federate` simulates server and clients in one process; every message is built, checked and counted as it would travel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from nasbench.ondevice.clients import Client, LocalTraining
from nasbench.ondevice.server import Server
from nasbench.ondevice.subnets import pooled
from nasbench.ondevice.updates import Compression
from nasbench.tasks.base import Split, Task
from nasbench.training.evaluation import batches, predict_logits
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
    _check(network, clients, rounds, participation, dropout, server_lr)
    local, compression = local or LocalTraining(), compression or Compression()
    server = Server(network, clients, local, compression, participation, dropout, server_lr, seed)
    if checkpoint is not None and checkpoint.exists():
        server.restore(checkpoint)
    for number in range(len(server.history) + 1, rounds + 1):
        row = server.round(number)
        network.eval()
        if evaluate is not None:
            row |= evaluate(network)
        server.history.append(row)
        if checkpoint is not None:
            server.save(checkpoint)
    return FederatedResult(server.history)


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
