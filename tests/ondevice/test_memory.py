"""Training memory: what is counted is what autograd keeps, and saving layers change nothing else."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.ondevice.memory import (
    FULL,
    NOTHING,
    Update,
    layer_updates,
    measured_activations,
    training_memory,
)
from nasbench.ondevice.methods import head, method_memory, prepared, with_lite_residuals
from nasbench.ondevice.saving import memory_saving, merged
from nasbench.ondevice.sparse import Contributions, _knapsack, choose_updates, layers_with_weights
from nasbench.ondevice.transfer import measured_memory
from predictors.training_memory import TrainingMemoryCount
from search_spaces import UserError, load_space, reference_network, trace_layers

SHAPE = (3, 64, 64)
METHODS = ("full", "last", "bias", "lite_residual")


def _network(name):
    torch.manual_seed(0)
    if name == "sensor":
        space = load_space("sensor_1d", 6, 7)
        return space.build(space.references["largest"]), space.input_shape
    return reference_network(name, resolution=64, num_classes=10).build(), SHAPE


@pytest.fixture(
    scope="module", params=["mobilenet_v2_0.35", "resnet18", "mobilenet_v3_small", "squeezenet1_1", "sensor"]
)
def network(request):
    return _network(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_within_five_percent_of_what_a_step_takes(network, method):
    plain, shape = network
    trainable, _ = prepared(plain, shape, method)
    counted, _ = method_memory(plain, shape, method, batch=4, optimizer="adam")
    measured = measured_memory(trainable, torch.randn(4, *shape), "adam")
    assert counted.activations.sum() == pytest.approx(measured.activations, rel=0.05, abs=8192)
    assert counted.gradients.sum() == measured.gradients
    assert counted.optimizer.sum() == measured.optimizer
    assert counted.total == pytest.approx(measured.total, rel=0.05)
    if method != "lite_residual":
        assert counted.weights.sum() == measured.weights


def test_plain_autograd_keeps_nearly_all_even_where_biases_train_alone(network):
    """What issue 12 of mit-han-lab/tinyml found; the saving has to be made."""
    plain, shape = network
    updates = {"": Update(0.0, True), head(plain): FULL}
    frozen = copy.deepcopy(plain).eval()
    for name, module in frozen.named_modules():
        (update,) = layer_updates([name], updates)
        for kind, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(update.bias if kind == "bias" else update.weights > 0)
    x = torch.randn(4, *shape)
    workload, names = trace_layers(plain, shape)
    counted = training_memory(workload, layer_updates(names, updates), batch=4, saving=False)
    kept = measured_activations(frozen, x)
    assert counted.activations.sum() == pytest.approx(kept, rel=0.05, abs=8192)
    assert measured_activations(memory_saving(plain, updates), x) < 0.5 * kept


def test_saving_layers_give_the_same_outputs_and_gradients(network):
    plain, shape = network
    plain = copy.deepcopy(plain).eval().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are not those of a fresh network
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    saving = memory_saving(plain, {"": FULL}).eval()
    frozen = memory_saving(plain, {"": Update(0.0, True)}).eval()
    x = torch.randn(2, *shape, dtype=torch.float64)
    grown = torch.randn(2, plain(x).shape[1], dtype=torch.float64)
    (plain(x) * grown).sum().backward()
    expected = dict(plain.named_parameters())
    for kind in (saving, frozen):
        torch.testing.assert_close(kind(x), plain(x))
        (kind(x) * grown).sum().backward()
        trained = {name.replace(".layer.", "."): p for name, p in kind.named_parameters() if p.requires_grad}
        assert trained
        for name, parameter in trained.items():
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    assert set(trained) == {n for n in expected if n.endswith("bias")}


@pytest.mark.parametrize("depthwise", [False, True])
def test_parts_of_a_convolution_get_their_part_of_the_gradient(depthwise):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8 if depthwise else 6, 3, 2, 1, groups=8 if depthwise else 1)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 3, 9, 9)
    network(x)
    part = memory_saving(network, {"0": Update(0.0, True), "1": Update(0.5)})
    lean = part[1]
    assert lean.part.requires_grad
    assert not lean.layer.weight.requires_grad
    network(x).square().sum().backward()
    part(x).square().sum().backward()
    torch.testing.assert_close(lean.part.grad, conv.weight.grad.index_select(lean.axis, lean.rows))
    torch.testing.assert_close(part[0].layer.bias.grad, network[0].bias.grad)
    with torch.no_grad():
        lean.part.add_(1.0)
    plain = merged(part)
    torch.testing.assert_close(plain(x), part(x))
    changed = (plain[1].weight != conv.weight).flatten(2).any(2)
    assert changed.sum() == (4 if depthwise else 4 * 6)


def test_what_does_not_train_stays_to_the_bit(network):
    plain, shape = network
    trainable, _ = prepared(plain, shape, "bias")
    optimiser = torch.optim.SGD([p for p in trainable.parameters() if p.requires_grad], 0.1)
    trainable.train()
    trainable(torch.randn(2, *shape)).square().mean().backward()
    optimiser.step()
    before, after = plain.state_dict(), merged(trainable).state_dict()
    assert before.keys() == after.keys()
    last = head(plain)
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same or name.endswith("bias") or name.startswith(last), name
    assert any(not torch.equal(before[n], after[n]) for n in before if n.endswith("bias"))


def test_nothing_is_kept_before_the_first_layer_that_trains():
    network = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(5)))
    workload, names = trace_layers(network, (3, 8, 8))
    for saving, kept in ((True, [0, 0, 0, 0, 0, 0, 1, 1 / 32, 0, 1 / 32]), (False, [0, 0, 0, 0, 0, 0, 1, 1, 0, 1])):
        memory = training_memory(workload, layer_updates(names, {"3": FULL}), batch=2, saving=saving)
        size = 2 * 3 * 8 * 8 * 4
        expected = [k * size for k in kept]
        # Plain, the fourth's output, which its ReLU keeps, is the fifth's input.
        np.testing.assert_array_equal(memory.activations, expected)
    assert training_memory(workload, NOTHING).total == 0


def test_a_tensor_that_two_layers_need_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    workload, _ = trace_layers(Twice(), (3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    assert training_memory(workload, FULL, batch=2).activations.sum() == x.nbytes == measured_activations(Twice(), x)


def test_lite_residuals_change_nothing_at_first(network):
    plain, shape = network
    x = torch.randn(2, *shape)
    lite = with_lite_residuals(plain, shape)
    torch.testing.assert_close(lite.eval()(x), plain.eval()(x))
    assert sum(p.numel() for p in lite.parameters()) > sum(p.numel() for p in plain.parameters())


def test_the_knapsack_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(20):
        options = [
            [(0.0, 0.0, 0)] + [(s, float(rng.random()), int(rng.integers(1, 40))) for s in (0.25, 0.5, 1.0)]
            for _ in range(4)
        ]
        gain, picked = _knapsack(options, 60)
        every = [c for c in itertools.product(*options) if sum(o[2] for o in c) <= 60]
        assert gain == pytest.approx(max(sum(o[1] for o in c) for c in every))
        chosen = [next(o for o in layer if o[0] == share) for layer, share in zip(options, picked, strict=True)]
        assert sum(o[2] for o in chosen) <= 60
        assert sum(o[1] for o in chosen) == pytest.approx(gain)


def test_chosen_updates_keep_their_budget_and_use_it():
    plain, shape = _network("sensor")
    layers = layers_with_weights(plain, shape)
    rng = np.random.default_rng(0)
    gains = Contributions(
        layers,
        {n: {s: float(g) for s, g in zip((0.25, 0.5, 1.0), np.sort(rng.random(3)), strict=True)} for n in layers},
        {n: 0.01 * (len(layers) - i) for i, n in enumerate(layers)},
    )
    totals, counts = [], []
    for budget in (64, 128, 256, 512, 10**6):
        updates = choose_updates(plain, shape, gains, budget * 1024, batch=8)
        counted, _ = method_memory(plain, shape, "sparse", updates, batch=8)
        trainable, _ = prepared(plain, shape, "sparse", updates)
        measured = measured_memory(trainable, torch.randn(8, *shape), "momentum")
        assert counted.total <= budget * 1024
        assert measured.total == pytest.approx(counted.total, rel=0.05, abs=8192)
        totals.append(counted.total)
        counts.append(sum(u.weights > 0 for u in updates.values()))
    assert totals == sorted(totals)
    assert counts[-1] == len(layers) + 1
    with pytest.raises(UserError, match=r"budget = 1000 bytes: training the last layer alone takes \d+ at batch 8"):
        choose_updates(plain, shape, gains, 1000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, s: memory_saving(n, {"layer9": FULL}), "no module 'layer9'"),
        (lambda n, s: Update(1.5), r"weights = 1.5: expected a share"),
        (lambda n, s: prepared(n, s, "biases"), "Did you mean 'bias'"),
        (lambda n, s: prepared(n, s, "sparse"), "needs updates"),
        (lambda n, s: with_lite_residuals(nn.Sequential(nn.Linear(3, 2)), s), "no blocks of convolutions"),
        (lambda n, s: head(nn.ReLU()), "no linear layer"),
        (lambda n, s: training_memory(trace_layers(n, s)[0], [FULL]), "1 updates given for"),
        (lambda n, s: training_memory(trace_layers(n, s)[0], batch=0), "batch = 0"),
        (lambda n, s: training_memory(trace_layers(n, s)[0], optimizer="lion"), "optimizer = 'lion'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(*_network("sensor"))


@pytest.mark.parametrize(("method", "gap"), [("full", 0.02), ("bias", 0.35)])
def test_blocks_add_up_to_the_networks_memory(method, gap):
    """Of whole populations at once, near what the operators of each network give one by one."""
    space = load_space("quickstart")
    archs = space.sample(20, np.random.default_rng(0))
    found = TrainingMemoryCount(8, method).bind(space).predict(archs).mean
    full = method == "full"
    exact = np.array(
        [
            training_memory(
                space.workload(a),
                FULL if full else Update(0.0, True),
                batch=8,
                optimizer="momentum",
                saving=not full,
                batch_statistics=full,
            ).total
            for a in archs
        ]
    )
    np.testing.assert_allclose(found, exact, rtol=gap)
    assert (np.argsort(found) == np.argsort(exact)).mean() > 0.8


def test_training_memory_of_what_cannot_be_counted_is_refused():
    with pytest.raises(UserError, match="method = 'sparse'"):
        TrainingMemoryCount(1, "sparse")
    with pytest.raises(UserError, match="batch = 0"):
        TrainingMemoryCount(0)
