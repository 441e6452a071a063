"""Continual learning: every method keeps one contract, and the figures are those of the papers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.ondevice.continual import ContinualResult, Training, accuracy_figure, run_stream, summary
from nasbench.ondevice.continual_methods import EWC, FineTuning, Joint, LatentReplay, LwF, Replay, StreamingLDA
from nasbench.ondevice.replay import ReplayBuffer, from_int8, to_int8
from nasbench.ondevice.streams import Stream, class_stream, person_stream
from nasbench.tasks.base import Split, Task
from nasbench.tasks.smartwatch import SmartwatchExercises
from search_spaces import UserError

CLASSES, SHAPE = 4, (1, 4, 4)
FAST = Training(epochs=4, batch_size=8, lr=0.05)
METHODS = {
    "fine-tuning": lambda training=FAST: FineTuning(training),
    "joint": lambda training=FAST: Joint(training),
    "replay": lambda training=FAST: Replay(training, memory_bytes=2000),
    "reservoir": lambda training=FAST: Replay(training, memory_bytes=2000, policy="reservoir"),
    "latent": lambda training=FAST: LatentReplay("body", training, memory_bytes=2000, int8=False),
    "latent int8": lambda training=FAST: LatentReplay("body", training, memory_bytes=2000),
    "EWC": lambda training=FAST: EWC(training, samples=20),
    "LwF": lambda training=FAST: LwF(training),
    "streaming LDA": lambda training=FAST: StreamingLDA(training),
}


class Patterns(Task):
    """Four noisy patterns that a small network tells apart in a moment."""

    name = "patterns"
    input_shape = SHAPE
    class_names = ("a", "b", "c", "d")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.patterns = torch.randn(CLASSES, *SHAPE, generator=generator)
        self.splits = {}
        for name, count in (("train", 24), ("val", 10), ("test", 10)):
            labels = torch.arange(CLASSES).repeat_interleave(count)
            noise = 0.3 * torch.randn(len(labels), *SHAPE, generator=generator)
            self.splits[name] = Split(self.patterns[labels] + noise, labels)

    def split(self, name):
        return self.splits[name]

    def prepare(self, images):
        return images.float()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.middle = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.middle(self.body(x)))


@pytest.fixture(scope="module")
def stream():
    return class_stream(Patterns(), [(0, 1), (2,), (3,)])


def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def results(stream):
    return {name: run_stream(make(), net(), stream) for name, make in METHODS.items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_repeats_and_leaves_the_users_network_alone(name, stream, results):
    network, method = net(), METHODS[name]()
    before = copy.deepcopy(network.state_dict())
    again = run_stream(method, network, stream)
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in before.items())
    np.testing.assert_array_equal(again.matrix, results[name].matrix)
    assert again.matrix.shape == (3, 3)
    assert again.matrix[0, 0] > 0.7, "the first task is learned by all"
    assert (np.triu(again.matrix, 1) == 0).all(), "classes that were not met are never named"
    assert not again.stopped
    assert (again.memory_bytes > 0) == (name != "fine-tuning")
    if name in ("replay", "reservoir", "latent", "latent int8"):
        assert again.memory_bytes <= 2000
    # A second stream starts from nothing.
    np.testing.assert_array_equal(run_stream(method, network, stream).matrix, again.matrix)


@pytest.mark.parametrize("name", METHODS)
def test_a_pretrained_network_only_remembers_the_first_task(name, stream):
    network = net()
    first = FineTuning(FAST)
    first.begin(network, SHAPE, CLASSES)
    first.learn(stream.tasks[0], 0)
    method = METHODS[name]()
    result = run_stream(method, first.network, stream, pretrained=True)
    assert result.matrix[0, 0] > 0.7


@pytest.mark.parametrize("name", METHODS)
def test_statistics_of_normalisation_stay_after_the_first_task(name, stream):
    method = METHODS[name]()
    method.begin(net(), SHAPE, CLASSES)
    method.learn(stream.tasks[0], 0)
    method.remember(stream.tasks[0], 0)
    before = method.network.get_submodule("middle.1").running_mean.clone()
    method.learn(stream.tasks[1], 1)
    same = torch.equal(before, method.network.get_submodule("middle.1").running_mean)
    assert same == (name != "joint")


@pytest.mark.parametrize("name", ["fine-tuning", "replay", "latent", "EWC", "LwF", "joint", "streaming LDA"])
def test_a_loss_that_is_not_finite_ends_the_stream_with_the_last_good_network(name, stream):
    broken = Patterns()
    broken.splits["train"] = Split(broken.splits["train"].images.clone(), broken.splits["train"].labels)
    broken.splits["train"].images[broken.splits["train"].labels == 2] = float("nan")
    method = METHODS[name]()
    result = run_stream(method, net(), class_stream(broken, [(0, 1), (2,), (3,)]))
    assert "step 2 (c)" in result.stopped
    assert np.isfinite(result.matrix[0]).all()
    assert np.isnan(result.matrix[1:]).all()
    expected = METHODS[name]()
    expected.begin(net(), SHAPE, CLASSES)
    expected.learn(stream.tasks[0], 0)
    for key, value in expected.network.state_dict().items():
        assert torch.equal(value, method.network.state_dict()[key]), key


def test_what_remembers_forgets_less_than_fine_tuning(results):
    lower = results["fine-tuning"]
    assert lower.forgetting >= 0.5
    for name in ("joint", "replay", "reservoir", "latent", "latent int8", "streaming LDA"):
        assert results[name].average_accuracy > lower.average_accuracy + 0.2, name


def test_the_figures_are_those_of_the_papers():
    matrix = np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.5, 0.6, 0.7]])
    result = ContinualResult("m", ("a", "b", "c"), matrix, np.array([0.1, 0.1, 0.1]), 8, sizes=np.array([2, 1, 1]))
    assert result.average_accuracy == pytest.approx(0.6)
    assert result.final_accuracy == pytest.approx(0.575)
    assert result.forgetting == pytest.approx((0.4 + 0.2) / 2)
    assert result.backward_transfer == pytest.approx(-(0.4 + 0.2) / 2)
    assert result.forward_transfer == pytest.approx((0.1 + 0.2) / 2)
    assert result.frame().loc["c", "b"] == 0.6
    assert list(summary([result])["memory_bytes"]) == [8]
    assert len(accuracy_figure([result] * 5).axes) == 9  # eight panels and the scale


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_a_buffer_keeps_its_bytes_and_its_policy(policy):
    buffer = ReplayBuffer(10 * 50, policy)
    labels = torch.tensor([0] * 500 + [1] * 100 + [2] * 30)
    for part in labels.split(70):
        buffer.add({"x": part.double()[:, None], "labels": part.short()})
    assert len(buffer) == 50
    assert buffer.nbytes == 500
    assert torch.equal(buffer.columns["x"].flatten().short(), buffer.columns["labels"])
    kept = buffer.columns["labels"].long().bincount(minlength=3)
    if policy == "balanced":
        assert kept.max() - kept.min() <= 3
    else:
        assert kept[0] > 30
    drawn = buffer.draw(20, 3)
    assert torch.equal(drawn["labels"], buffer.draw(20, 3)["labels"])
    with pytest.raises(UserError, match="one sample takes 10 bytes"):
        ReplayBuffer(9).add({"x": labels.double()[:, None], "labels": labels.short()})


def test_a_reservoir_keeps_every_sample_with_equal_probability():
    kept = torch.zeros(40)
    for seed in range(300):
        buffer = ReplayBuffer(2 * 10, "reservoir", seed)
        buffer.add({"labels": torch.arange(40).short()})
        kept[buffer.columns["labels"].long()] += 1
    assert (kept / 300 - 0.25).abs().max() < 0.1


def test_bytes_are_right_to_half_a_step_of_each_sample():
    values = torch.randn(7, 3, 5) * torch.logspace(-3, 3, 7)[:, None, None]
    values[0] = 1.5  # a constant sample
    back = from_int8(to_int8(values))
    span = (values.amax((1, 2)) - values.amin((1, 2)))[:, None, None]
    assert ((back - values).abs() <= span / 510 * 1.01 + 1e-6).all()


def test_streaming_lda_is_the_one_of_all_samples_at_once(stream):
    lda = StreamingLDA(FAST)
    lda.begin(net(), SHAPE, CLASSES)
    features, labels = torch.randn(60, 5, dtype=torch.float64), torch.arange(60) % 3
    for part in torch.randperm(60).split(7):
        lda.observe(features[part], labels[part])
    scatter = torch.zeros(5, 5, dtype=torch.float64)
    for label in range(3):
        own = features[labels == label]
        torch.testing.assert_close(lda.mean[label], own.mean(0))
        scatter += (own - own.mean(0)).T @ (own - own.mean(0))
    torch.testing.assert_close(lda.scatter, scatter)


def test_latent_replay_trains_nothing_below_its_layer(stream):
    method = METHODS["latent"]()
    method.begin(net(), SHAPE, CLASSES)
    method.learn(stream.tasks[0], 0)
    method.remember(stream.tasks[0], 0)
    below, above = copy.deepcopy(method.network.body.state_dict()), copy.deepcopy(method.network.middle.state_dict())
    method.learn(stream.tasks[1], 1)
    assert all(torch.equal(v, method.network.body.state_dict()[k]) for k, v in below.items())
    assert not torch.equal(above["0.weight"], method.network.middle.state_dict()["0.weight"])


def test_a_layer_that_something_flows_past_is_refused():
    class Residual(Net):
        def forward(self, x):
            body = self.body(x)
            return self.head(body + self.middle(body))

    with pytest.raises(UserError, match="something flows past it"):
        LatentReplay("middle", FAST).begin(Residual(), SHAPE, CLASSES)
    with pytest.raises(UserError, match="Did you mean 'middle'"):
        LatentReplay("midle", FAST).begin(Residual(), SHAPE, CLASSES)


def test_ewc_holds_what_mattered(stream):
    moved = []
    for strength in (0.0, 1e5):
        method = EWC(FAST, strength=strength, samples=20)
        method.begin(net(), SHAPE, CLASSES)
        method.learn(stream.tasks[0], 0)
        method.remember(stream.tasks[0], 0)
        anchor, fisher = dict(method.anchor), dict(method.fisher)
        assert all((f >= 0).all() for f in fisher.values())
        method.learn(stream.tasks[1], 1)
        weights = {name: p.detach() for name, p in method.network.named_parameters()}
        moved.append(sum(float((fisher[n] * (weights[n] - anchor[n]) ** 2).sum()) for n in fisher))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Training(lr=-1).recipe(), "lr"),
        (lambda: EWC(strength=-1), "strength"),
        (lambda: LwF(temperature=0), "temperature"),
        (lambda: StreamingLDA(shrinkage=0), "shrinkage"),
        (lambda: Replay(policy="oldest"), "policy"),
        (lambda: class_stream(Patterns(), [(0, 1), (1,)]), "two steps"),
        (lambda: class_stream(Patterns(), [(0, 9)]), "9 is not among"),
        (lambda: Stream((Patterns(),), ("a",)), "two or more"),
        (lambda: accuracy_figure([]), "no results"),
        (lambda: run_stream(FineTuning(), nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
                            class_stream(Patterns(), [(0,), (1,)])), "3 outputs"),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_people_one_after_the_other():
    task = SmartwatchExercises()
    people = sorted({int(p) for p in task.recordings.persons})
    stream = person_stream(task, [people[:2], people[2]])
    assert stream.names == (f"people {people[0]}, {people[1]}", f"person {people[2]}")
    assert stream.classes == 7
    assert len(stream.tasks[0].split("train")) == sum(len(task.of_person(p, 0.6).split("train")) for p in people[:2])
    with pytest.raises(UserError, match="nobody in two steps"):
        person_stream(task, [people[0], people[:2]])
