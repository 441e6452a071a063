"""Federated learning: what is averaged, what is sent, and who is left out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.ondevice.clients import Answer, Client, LocalTraining
from nasbench.ondevice.federated import client_statistics, evaluator, federate
from nasbench.ondevice.subnets import fitting_subnet, flatten, pooled, put, trained_elements
from nasbench.ondevice.updates import Compression, Message
from nasbench.tasks.base import Split, Task
from predictors.training_memory import TrainingMemoryCount
from search_spaces import ElasticSpace, UserError, calibrate, load_space

SHAPE = (1, 4, 4)


class Patterns(Task):
    """Noisy patterns of four classes; a client's own noise and number of samples."""

    name = "patterns"
    input_shape = SHAPE
    class_names = ("a", "b", "c", "d")

    def __init__(self, seed=0, count=24):
        patterns = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(9))
        labels = torch.arange(count) % 4
        noise = 0.3 * torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
        self.data = Split(patterns[labels] + noise, labels)

    def split(self, name):
        return self.data

    def prepare(self, images):
        return images.float()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture(scope="module")
def clients():
    return [Client(f"watch {i}", Patterns(i, 16 + 8 * i)) for i in range(3)]


@pytest.fixture(scope="module")
def space():
    return load_space("tiny_images", 1, 4)


@pytest.fixture(scope="module")
def devices(space):
    small, large = space.references["smallest"], space.references["largest"]
    return [Client("small", Patterns(1, 16), small, space.input_shape),
            Client("large", Patterns(2, 32), large, space.input_shape)]  # fmt: skip


def test_the_mean_is_weighted_by_samples_and_so_are_running_statistics(clients):
    together = net()
    federate(together, clients, rounds=1)
    alone, statistics = [], []
    for client in clients:
        # The others drop out of a federation of the same seed: what a client draws does not depend on them.
        network = net()
        federate(network, [client], rounds=1)
        alone.append(flatten(network))
        statistics.append(network[2].running_mean)
    weights = torch.tensor([16.0, 24.0, 32.0]) / 72
    torch.testing.assert_close(flatten(together), (torch.stack(alone) * weights[:, None]).sum(0))
    torch.testing.assert_close(together[2].running_mean, (torch.stack(statistics) * weights[:, None]).sum(0))
    assert not together.training


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold"])
def test_every_method_learns_and_repeats(clients, method):
    local = LocalTraining(method, epochs=2, batch_size=8, lr=0.1, mu=0.01)
    judge = evaluator(clients[0].task, Patterns(77, 40).data, clients)
    networks = [net(), net()]
    results = [federate(n, clients, rounds=6, local=local, participation=0.67, evaluate=judge) for n in networks]
    assert torch.equal(flatten(networks[0]), flatten(networks[1]))
    table = results[0].frame()
    assert table["accuracy"].iloc[-1] > 0.9
    assert table["loss"].iloc[-1] < table["loss"].iloc[0]
    assert (table["asked"] == 2).all()
    assert results[0].left_out == {}
    reached = results[0].to_reach(0.9)
    assert reached is not None
    assert reached[1] == table["megabytes"][reached[0] - 1]
    assert results[0].to_reach(1.1) is None


def test_bytes_are_those_of_the_weights_and_statistics(clients):
    plain = federate(net(), clients, rounds=1).history[0]
    numbers, statistics = len(flatten(net())), 16
    assert plain["bytes_down"] == plain["bytes_up"] == 3 * 4 * (numbers + statistics)
    twice = federate(net(), clients, rounds=1, local=LocalTraining("scaffold")).history[0]
    assert twice["bytes_down"] == twice["bytes_up"] == 3 * 4 * (2 * numbers + statistics)
    small = federate(net(), clients, rounds=1, compression=Compression(0.25, 8)).history[0]
    assert small["bytes_up"] < 0.3 * 3 * 4 * numbers + 3 * 4 * statistics


def test_fedprox_is_fedavg_without_its_term_and_stays_nearer_with_it(clients):
    start, moved = flatten(net()), {}
    for name, local in {
        "avg": LocalTraining(epochs=4),
        "none": LocalTraining("fedprox", epochs=4, mu=0.0),
        "some": LocalTraining("fedprox", epochs=4, mu=5.0),
    }.items():
        network = net()
        federate(network, clients, rounds=1, local=local)
        moved[name] = flatten(network) - start
    assert torch.equal(moved["avg"], moved["none"])
    assert moved["some"].norm() < 0.7 * moved["avg"].norm()


class Line(Task):
    """One weight: squared error of `w x` from `y`, in which clients differ in what is best and in curvature."""

    input_shape = (1, 1, 1)
    class_names = ("y",)

    def __init__(self, x, y):
        self.data, self.y = Split(torch.full((8, 1, 1, 1), float(x)), torch.zeros(8, dtype=torch.int64)), float(y)

    def split(self, name):
        return self.data

    def prepare(self, images):
        return images

    def loss(self, logits, labels):
        return (logits - self.y).square().mean()

    def accuracy(self, logits, labels):
        return 0.0


def test_scaffold_finds_the_minimum_of_all_where_fedavg_drifts():
    clients = [Client("flat", Line(1, 0)), Client("steep", Line(3, 3))]  # minima 0 and 1, of both together 0.9
    ends = {}
    for method in ("fedavg", "scaffold"):
        network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False))
        federate(network, clients, rounds=15, local=LocalTraining(method, epochs=10, batch_size=8, lr=0.05))
        ends[method] = float(network[1].weight.detach())
    assert abs(ends["fedavg"] - 0.9) > 0.1
    assert ends["scaffold"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("name", ["tiny_images", "sensor_1d", "vit28", "elastic"])
def test_a_subnet_trains_as_many_elements_as_its_own_network_has(name):
    torch.manual_seed(0)
    if name == "elastic":
        plain = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
        )  # fmt: skip
        space = ElasticSpace(plain, (1, 12, 12))
    else:
        space = load_space(name, 6 if name == "sensor_1d" else 1, 4)
    supernet, rng = space.supernet(), np.random.default_rng(3)
    # However far training has pressed the shifts down.
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.ndim == 1:
                parameter.fill_(-3.0)
    shape = (space.input_shape[0], *(min(s, 64) for s in space.input_shape[1:]))
    for arch in space.sample(2, rng):
        elements = trained_elements(supernet, arch, shape)
        stats = calibrate(supernet, arch, torch.randn(4, *shape))
        assert len(elements) == sum(p.numel() for p in supernet.extract(arch, stats).parameters())
        assert len(elements.unique()) == len(elements)


def test_each_weight_is_averaged_over_the_clients_that_hold_it(space, devices):
    torch.manual_seed(0)
    first = space.supernet()
    start = flatten(first)
    changes = {}
    for client in devices:
        supernet = copy.deepcopy(first)
        federate(supernet, [client], rounds=1)
        changes[client.name] = flatten(supernet) - start
    supernet = copy.deepcopy(first)
    result = federate(supernet, devices, rounds=1)
    change = flatten(supernet) - start
    held = {c.name: trained_elements(first, c.arch, space.input_shape) for c in devices}
    own = {name: torch.zeros(len(start), dtype=torch.bool) for name in held}
    for name, rows in held.items():
        own[name][rows] = True
    both, one = own["small"] & own["large"], own["small"] ^ own["large"]
    assert both.any()
    assert one.any()
    expected = (16 * changes["small"] + 32 * changes["large"]) / 48
    torch.testing.assert_close(change[both], expected[both])
    torch.testing.assert_close(change[one], (changes["small"] + changes["large"])[one])
    assert not change[~(own["small"] | own["large"])].any()
    # A device receives and sends its own subnet only.
    assert result.history[0]["bytes_down"] == 4 * sum(len(rows) for rows in held.values())


def test_a_federation_of_subnets_learns_and_is_judged_by_each(space, devices):
    torch.manual_seed(0)
    supernet = space.supernet()
    judge = evaluator(devices[0].task, Patterns(77, 40).data, devices)
    local = LocalTraining(epochs=3, batch_size=8, lr=0.05)
    row = federate(supernet, devices, rounds=4, local=local, evaluate=judge).history[-1]
    assert row["accuracy"] > 0.8
    assert row["accuracy_largest"] > 0.8


def test_pooled_statistics_are_those_of_all_data(space, devices):
    torch.manual_seed(0)
    supernet, arch = space.supernet(), space.references["smallest"]
    first, second = torch.randn(8, *space.input_shape), 3 * torch.randn(8, *space.input_shape)
    parts = pooled([(8, calibrate(supernet, arch, first)), (8, calibrate(supernet, arch, second))])
    whole = calibrate(supernet, arch, [first, second])
    for name in whole.mean:
        torch.testing.assert_close(parts.mean[name], whole.mean[name])
        torch.testing.assert_close(parts.var[name], whole.var[name])
    with pytest.raises(UserError, match="no client"):
        client_statistics(supernet, arch, [])


class Broken(Client):
    def __init__(self, name, task, harm):
        super().__init__(name, task)
        self.harm = harm

    def train(self, given):
        return self.harm(super().train(given))


def _not_finite(answer):
    answer.message.values[3] = np.nan
    return answer


def _short(answer):
    answer.message = Message(5, answer.message.values[:5], answer.message.scales, answer.message.positions)
    return answer


def _torn(answer):
    answer.message = Message(answer.message.length, answer.message.values[:5], answer.message.scales,
                             answer.message.positions)  # fmt: skip
    return answer


def _no_statistics(answer):
    answer.buffers = {}
    return answer


def _no_samples(answer):
    answer.samples = 0
    return answer


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda answer: None, "sent nothing"),
        (lambda answer: "thanks", "sent a str"),
        (_not_finite, "the changes are not finite"),
        (_short, "changes of 5 weights, its network has"),
        (_torn, "5,\\) values for"),
        (_no_statistics, "running_mean"),
        (_no_samples, "samples = 0"),
    ],
)
def test_a_bad_answer_is_named_left_out_and_counted(clients, harm, message):
    bad = Broken("watch 1", clients[1].task, harm)
    network, expected = net(), net()
    result = federate(network, [clients[0], bad, clients[2]], rounds=2)
    federate(expected, [clients[0], clients[2]], rounds=2)
    assert torch.equal(flatten(network), flatten(expected))
    assert result.left_out == {"watch 1": 2}
    assert result.history[0]["answered"] == 2
    with pytest.raises(UserError, match=message):
        raise UserError(result.history[0]["left_out"]["watch 1"])


def test_a_client_whose_loss_is_not_finite_is_left_out(clients):
    task = Patterns(5)
    task.data.images[:] = float("inf")
    network = net()
    result = federate(network, [clients[0], Client("hot", task)], rounds=1)
    assert "loss nan" in result.history[0]["left_out"]["hot"]
    assert flatten(network).isfinite().all()
    assert network[2].running_mean.isfinite().all()


def test_nothing_changes_where_all_drop_out(clients):
    network = net()
    result = federate(network, clients, rounds=2, dropout=1.0)
    assert torch.equal(flatten(network), flatten(net()))
    assert result.left_out == {"watch 0": 2, "watch 1": 2, "watch 2": 2}
    assert result.history[1]["bytes_up"] == 0 < result.history[1]["bytes_down"]


@pytest.mark.parametrize("kind", ["plain", "supernet"])
def test_a_federation_goes_on_from_its_checkpoint_to_the_same_bits(clients, devices, space, kind, tmp_path):
    def network():
        torch.manual_seed(0)
        return net() if kind == "plain" else space.supernet()

    members = clients if kind == "plain" else devices
    settings = {"local": LocalTraining("scaffold", lr=0.02), "compression": Compression(0.2, 8), "dropout": 0.3}
    whole, first, second = network(), network(), network()
    expected = federate(whole, members, rounds=4, **settings)
    path = tmp_path / "federation.safetensors"
    federate(first, members, rounds=2, checkpoint=path, **settings)
    result = federate(second, members, rounds=4, checkpoint=path, **settings)
    assert torch.equal(flatten(second), flatten(whole))
    for a, b in zip(second.buffers(), whole.buffers(), strict=True):
        assert torch.equal(a, b) or not a.is_floating_point()
    assert str(result.history) == str(expected.history)
    before = path.read_bytes()
    with pytest.raises(UserError, match="begun with seed = 0, now it is 1"):
        federate(network(), members, rounds=5, checkpoint=path, seed=1, **settings)
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.01, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("length", [1, 300, 70000])
def test_a_message_keeps_the_largest_values(share, bits, length):
    vector = torch.randn(length, generator=torch.Generator().manual_seed(1))
    message = Compression(share, bits).encode(vector, 0)
    back = message.decode()
    count = max(1, round(share * length))
    exact = torch.zeros(length)
    rows = vector.abs().topk(count).indices
    exact[rows] = vector[rows]
    if bits == 32:
        assert torch.equal(back, exact)
    else:
        assert ((back - exact).abs() <= vector.abs().max() / 127 * 1.001).all()
        assert (back[exact == 0] == 0).all()
    values = count * bits / 8 + (bits == 8) * 4 * -(-count // 256)
    assert message.nbytes <= values + (count < length) * min(4 * count, -(-length // 8))


def test_stochastic_rounding_is_right_on_average():
    vector = torch.tensor([1.0, 0.003, -0.0011, 0.5002])
    mean = torch.stack([Compression(bits=8).encode(vector, seed).decode() for seed in range(3000)]).mean(0)
    torch.testing.assert_close(mean, vector, atol=6e-4, rtol=0)


def test_what_a_sparse_message_leaves_out_is_sent_later(clients):
    sent, changes = [], []

    class Spy(Client):
        def train(self, given):
            before, residual = flatten(given.network), given.residual.clone()
            answer = super().train(given)
            sent.append(answer.message.decode())
            changes.append(flatten(given.network) - before)
            torch.testing.assert_close(sent[-1] + answer.residual, changes[-1] + residual)
            self.last = answer.residual
            return answer

    spy = Spy("spy", Patterns())
    federate(net(), [spy], rounds=4, compression=Compression(0.1, 8))
    assert spy.last.any()
    torch.testing.assert_close(sum(sent) + spy.last, sum(changes), atol=1e-5, rtol=1e-4)


def test_the_subnet_of_a_device_fits_it_and_the_impossible_is_named(space):
    cost = TrainingMemoryCount(batch=8).bind(space)
    ends = cost.predict(np.stack([space.references["smallest"], space.references["largest"]])).mean
    limit = float(ends.mean())
    arch = fitting_subnet(space, cost, limit)
    assert cost.predict(arch[None]).mean[0] <= limit
    assert np.array_equal(fitting_subnet(space, cost, 1e12), space.references["largest"])
    with pytest.raises(UserError, match="the least of"):
        fitting_subnet(space, cost, 10)


def test_put_is_the_inverse_of_flatten():
    network, other = net(), net()
    vector = torch.randn(len(flatten(network)))
    put(other, vector)
    assert torch.equal(flatten(other), vector)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"participation": 0.0}, "participation"),
        ({"dropout": 1.5}, "dropout"),
        ({"rounds": -1}, "rounds"),
        ({"server_lr": 0.0}, "server_lr"),
        ({"clients": []}, "one or more"),
        ({"clients": [Client("a", Patterns()), Client("a", Patterns())]}, "'a' is there twice"),
        ({"clients": [Client("a", Patterns(), np.zeros(5))]}, "has an arch"),
        ({"clients": [Client("a", Patterns(count=1))]}, "fewer than two samples"),
    ],
)
def test_bad_input_is_named(clients, change, message):
    with pytest.raises(UserError, match=message):
        federate(net(), **({"clients": clients, "rounds": 1} | change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalTraining("fedavgg"), "Did you mean 'fedavg'"),
        (lambda: LocalTraining("scaffold", momentum=0.9), "plain SGD"),
        (lambda: LocalTraining(mu=-1), "mu"),
        (lambda: LocalTraining(epochs=0), "epochs"),
        (lambda: Compression(share=0), "share"),
        (lambda: Compression(bits=4), "8 or 32"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_an_answer_counts_all_that_is_sent():
    message = Compression().encode(torch.ones(10), 0)
    assert Answer(message, 1, 0.0, {"mean": torch.ones(3)}, torch.ones(10), torch.ones(10)).nbytes == 40 + 12 + 40
