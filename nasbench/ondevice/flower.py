"""Clients and server of a federation as apps of Flower (flwr), for devices that are really apart.

Flower moves the messages and averages; a client trains as in `federate`. One plain network by FedAvg or FedProx: mean
by elements of subnets, control variates, compression and the check of answers are `federate`'s own. flwr is imported
when an app is made. It needs older typer and rich than this project's tested versions, so it has an environment of its
own (`docs/on_device_learning.md`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nasbench.ondevice.clients import Client, LocalTraining, Round
from nasbench.ondevice.subnets import flatten
from nasbench.ondevice.updates import Compression
from nasbench.training.evaluation import evaluate_network
from nasbench.training.loop import step_seed
from search_spaces.errors import UserError


def exchanged(network: nn.Module) -> dict[str, Tensor]:
    """What travels: weights and running statistics by name, no counters."""
    return {n: t.detach().clone() for n, t in network.state_dict().items() if t.is_floating_point()}


def received(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with a state that came over the wire.

    Raises:
        UserError: tensors that are missing, unknown or of another shape: the apps have different networks.
    """
    out = copy.deepcopy(network)
    own = {n: tuple(t.shape) for n, t in exchanged(network).items()}
    given = {n: tuple(t.shape) for n, t in state.items()}
    for name in sorted(own.keys() | given.keys()):
        if own.get(name) != given.get(name):
            raise UserError(
                f"tensor {name!r}: the server sent {given.get(name)}, this client's network has {own.get(name)}; "
                "server and clients must build the same network"
            )
    out.load_state_dict(dict(state), strict=False)
    return out


def train_round(
    client: Client, network: nn.Module, state: Mapping[str, Tensor], local: LocalTraining, number: int, seed: int
) -> tuple[dict[str, Tensor], int, float]:
    """A client's part of a round: the new state, samples that it trained on, and the mean loss.

    Raises:
        UserError: a subnet or `scaffold`, which do not go through Flower, or a state of another network.
    """
    if client.arch is not None:
        raise UserError(
            f"client {client.name!r} trains a subnet: use federate, Flower's strategies average whole networks"
        )
    if local.method == "scaffold":
        raise UserError("method = 'scaffold': Flower's strategies carry no control variates; use fedavg or fedprox")
    worker = received(network, state)
    weights = flatten(worker)
    own = step_seed(seed, f"client/{client.name}", number)
    nothing = torch.zeros_like(weights)
    every = torch.arange(len(weights))
    answer = client.train(Round(number, worker, every, local, Compression(), None, nothing, nothing, own))
    if answer is None:
        raise UserError(f"client {client.name!r} has no answer")
    return exchanged(worker), answer.samples, answer.loss


def to_flower_client(
    make: Callable[[int], Client], network: nn.Module, local: LocalTraining | None = None, *, seed: int = 0
) -> Any:
    """A `flwr.clientapp.ClientApp`.

    Args:
        make: the client with the data of a device, by Flower's `partition-id` (0 where the device was given none).
        network: as the server builds it.

    Raises:
        UserError: flwr is not installed.
    """
    app = _flwr("flwr.app")
    client_app = _flwr("flwr.clientapp").ClientApp()
    local = local or LocalTraining()

    @client_app.train()
    def train(message: Any, context: Any) -> Any:
        client = make(int(context.node_config.get("partition-id", 0)))
        number = int(message.content["config"].get("server-round", 0))
        state = message.content["arrays"].to_torch_state_dict()
        new, samples, loss = train_round(client, network, state, local, number, seed)
        content = app.RecordDict(
            {"arrays": app.ArrayRecord(new), "metrics": app.MetricRecord({"loss": loss, "num-examples": samples})}
        )
        return app.Message(content, reply_to=message)

    @client_app.evaluate()
    def evaluate(message: Any, context: Any) -> Any:
        client = make(int(context.node_config.get("partition-id", 0)))
        judged = received(network, message.content["arrays"].to_torch_state_dict())
        accuracy = evaluate_network(judged, client.task, "val", client.input_shape)
        metrics = {"accuracy": accuracy, "num-examples": len(client.task.split("val"))}
        return app.Message(app.RecordDict({"metrics": app.MetricRecord(metrics)}), reply_to=message)

    return client_app


def to_flower_server(
    network: nn.Module, *, rounds: int, participation: float = 1.0, finished: Callable[[nn.Module], None] | None = None
) -> Any:
    """A `flwr.serverapp.ServerApp` that averages by FedAvg.

    Args:
        network: gives the first weights.
        participation: share of the connected clients that train in a round.
        finished: called with a copy that has the last round's weights.

    Raises:
        UserError: flwr is not installed, or values out of range.
    """
    if rounds < 1 or not 0 < participation <= 1:
        raise UserError(f"rounds = {rounds}, participation = {participation}: expected 1 or more, and above 0 up to 1")
    app, serverapp = _flwr("flwr.app"), _flwr("flwr.serverapp")
    strategies = _flwr("flwr.serverapp.strategy")
    server_app = serverapp.ServerApp()

    @server_app.main()
    def main(grid: Any, context: Any) -> None:
        strategy = strategies.FedAvg(fraction_train=participation)
        result = strategy.start(grid=grid, initial_arrays=app.ArrayRecord(exchanged(network)), num_rounds=rounds)
        if finished is not None:
            finished(received(network, result.arrays.to_torch_state_dict()).eval())

    return server_app


def _flwr(module: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module} cannot be imported ({error}). Flower is no extra of this project: make an environment of its own"
            " by `pip install nasbench-hw 'flwr>=1.21'`; see docs/on_device_learning.md"
        ) from error
