"""Flower's apps: what a client does in a round, and what is refused. The apps themselves need flwr."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.ondevice.clients import Client, LocalTraining
from nasbench.ondevice.federated import federate
from nasbench.ondevice.flower import exchanged, received, to_flower_client, to_flower_server, train_round
from nasbench.ondevice.subnets import flatten
from nasbench.tasks.base import Split, Task
from search_spaces import UserError


class Noise(Task):
    input_shape = (1, 2, 2)
    class_names = ("a", "b")

    def __init__(self, seed):
        labels = torch.arange(12) % 2
        images = torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) + labels.view(-1, 1, 1, 1)
        self.data = Split(images, labels)

    def split(self, name):
        return self.data

    def prepare(self, images):
        return images


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def clients():
    return [Client(f"device {i}", Noise(i)) for i in range(2)]


@pytest.mark.parametrize("method", ["fedavg", "fedprox"])
def test_rounds_through_flower_are_those_of_federate(method):
    local = LocalTraining(method, batch_size=4)
    expected = net()
    federate(expected, clients(), rounds=2, local=local, seed=3)
    state = exchanged(net())
    for number in (1, 2):
        parts = [train_round(c, net(), state, local, number, 3) for c in clients()]
        total = sum(samples for _, samples, _ in parts)
        state = {n: sum(new[n] * samples / total for new, samples, _ in parts) for n in state}
    torch.testing.assert_close(flatten(received(net(), state)), flatten(expected))
    torch.testing.assert_close(state["2.running_var"], expected[2].running_var)
    assert "2.num_batches_tracked" not in state


def test_what_does_not_go_through_flower_is_refused():
    state = exchanged(net())
    with pytest.raises(UserError, match="no control variates"):
        train_round(clients()[0], net(), state, LocalTraining("scaffold"), 1, 0)
    with pytest.raises(UserError, match="trains a subnet"):
        train_round(Client("a", Noise(0), np.zeros(3)), net(), state, LocalTraining(), 1, 0)
    with pytest.raises(UserError, match=r"'1.bias'.*must build the same network"):
        train_round(clients()[0], net(), {n: t for n, t in state.items() if n != "1.bias"}, LocalTraining(), 1, 0)
    with pytest.raises(UserError, match="rounds = 0"):
        to_flower_server(net(), rounds=0)


def test_without_flower_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)  # as where it is not installed
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    for make in (lambda: to_flower_client(lambda i: clients()[i], net()), lambda: to_flower_server(net(), rounds=1)):
        with pytest.raises(UserError, match="environment of its own"):
            make()


def check_the_apps_run_in_flower():
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.serverapp.strategy import FedAvg
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # which Flower's own launcher sets
    local = LocalTraining(batch_size=4)
    app = to_flower_client(lambda i: clients()[i], net(), local, seed=3)
    arrays = ArrayRecord(exchanged(net()))
    replies = []
    for partition in range(2):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        context = Context(1, partition, {"partition-id": partition}, RecordDict(), {})
        replies.append(app(Message(content, dst_node_id=partition, message_type="train"), context))
        judged = app(Message(content, dst_node_id=partition, message_type="evaluate"), context)
        assert 0 <= judged.content["metrics"]["accuracy"] <= 1
    mean, _ = FedAvg().aggregate_train(1, replies)
    expected = net()
    federate(expected, clients(), rounds=1, local=local, seed=3)
    torch.testing.assert_close(flatten(received(net(), mean.to_torch_state_dict())), flatten(expected))
    assert to_flower_server(net(), rounds=1) is not None


# Flower does not fit beside this project's other dependencies (`docs/on_device_learning.md`), so that no environment of
# the project can hold this test: it is one where Flower is, and none elsewhere.
if importlib.util.find_spec("flwr") is not None:
    test_the_apps_run_in_flower = check_the_apps_run_in_flower
