"""Methods of supernet training: what each trains, that it learns and resumes to the bit, and what it refuses."""

from __future__ import annotations

import json
import tomllib

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.config import dump_config, parse_config
from nasbench.plan import make_plan
from nasbench.training import (
    Recipe,
    Shrinking,
    alpha_loss,
    load_weights,
    sandwich_ends,
    soft_loss,
    subnet_accuracy,
    train_network,
    train_supernet,
)
from nasbench.training.averaging import WeightAverage
from nasbench.training.precision import choose_device
from search_spaces import UserError, load_space

SHORT = {"epochs": 2, "batch_size": 64, "random_subnets": 1, "validation_images": 0, "lr": 0.05}
METHODS = {
    "sandwich, kl": {"method": "sandwich"},
    "sandwich, alpha": {"method": "sandwich", "distillation": "alpha"},
    "sandwich, labels": {"method": "sandwich", "distillation": "none"},
    "single path": {"method": "single_path"},
    "progressive shrinking": {"method": "progressive_shrinking"},
    "progressive shrinking, alpha, averaged": {"method": "progressive_shrinking", "distillation": "alpha", "ema": 0.9},
    "bfloat16": {"precision": "bf16"},
    "float16": {"precision": "fp16"},
    "two parts": {"accumulate": 2},
    "averaged": {"ema": 0.9, "schedule": "linear"},
}


class Stop(Exception):
    """As a kill between two steps."""


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


def seen_archs(supernet, monkeypatch):
    """The architectures that run, in order."""
    seen, forward = [], type(supernet).forward

    def spy(self, x, arch, *args, **kwargs):
        seen.append((self is supernet, tuple(int(a) for a in arch)))
        return forward(self, x, arch, *args, **kwargs)

    monkeypatch.setattr(type(supernet), "forward", spy)
    return seen


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
def test_every_method_learns_and_resumes_to_the_bit(space, few_images, tmp_path, options):
    images = 128 if options.get("precision") == "fp16" else 480
    task, steps = few_images(train=images), 2 * (images // 32)
    given = {**SHORT, "batch_size": 32, "lr": 0.1, **options, "save_every_s": 0.0}
    torch.manual_seed(0)
    supernet = space.supernet()
    twin, resumed = space.supernet(), space.supernet()
    twin.load_state_dict(supernet.state_dict())
    whole = train_supernet(supernet, space, task, **given)

    path = tmp_path / "supernet.safetensors"
    for stop in (2 + steps // 6, 2 * steps // 3):  # before and after the teacher of progressive shrinking is frozen

        def progress(update, stop=stop):
            if update.step == stop:
                raise Stop

        with pytest.raises(Stop):
            train_supernet(twin, space, task, checkpoint=path, progress=progress, **given)
        twin = space.supernet()
    again = train_supernet(resumed, space, task, checkpoint=path, **given)
    assert same_weights(supernet, resumed)
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]
    loaded = space.supernet()
    load_weights(loaded, path)
    assert same_weights(supernet, loaded)  # averaged ones, where there is an average

    calibration, validation = task.split("train").images[:256], task.split("val")
    accuracy = subnet_accuracy(supernet, sandwich_ends(space)[1], task, calibration, validation)
    assert accuracy > 0.2 or steps < 10  # chance is 0.1


def test_the_sandwich_trains_both_ends_and_single_path_one_random_architecture(supernet, space, task, monkeypatch):
    seen = seen_archs(supernet, monkeypatch)
    train_supernet(supernet, space, task, **{**SHORT, "epochs": 1, "random_subnets": 2})
    smallest, largest = (tuple(map(int, a)) for a in sandwich_ends(space))
    assert [a for _, a in seen[0::4]] == [largest] * 10
    assert [a for _, a in seen[3::4]] == [smallest] * 10
    seen.clear()
    train_supernet(supernet, space, task, **{**SHORT, "epochs": 4, "random_subnets": None}, method="single_path")
    assert len(seen) == 40
    assert len(set(seen)) > 12  # of 24


def test_progressive_shrinking_opens_knob_by_knob_and_asks_a_frozen_teacher(supernet, space, task, monkeypatch):
    seen = seen_archs(supernet, monkeypatch)
    phases = {"kernel": 0.2, "depth|width": 0.3}
    options = {**SHORT, "epochs": 10, "method": "progressive_shrinking", "phases": phases}
    train_supernet(supernet, space, task, **options)
    _, largest = sandwich_ends(space)
    alone = [a for own, a in seen[:50] if own]
    assert len(alone) == 50
    assert set(alone) == {tuple(map(int, largest))}  # the resolution too: the teacher is the largest
    rest = seen[50:]
    assert [a for own, a in rest if not own] == [tuple(map(int, largest))] * 50
    students = np.array([a for own, a in rest if own])
    assert (students[:20, [0, 2]] == largest[[0, 2]]).all()  # width and depth are still closed
    assert set(students[:10, 1]) == {1, 2}  # kernels open from the largest on
    assert set(students[10:20, 1]) == {0, 1, 2}
    assert all(len(set(students[20:, knob])) == count for knob, count in enumerate(space.cardinalities))


@pytest.mark.parametrize("name", ["quickstart", "ofa_mobilenet_v3"])
def test_closed_knobs_stay_at_the_largest_network(name):
    space = load_space(name)
    _, largest = sandwich_ends(space)
    shrinking = Shrinking(space, largest, None, 100)
    assert [p.name for p in shrinking.phases] == ["kernel", "depth", "width"]
    assert shrinking.phases[-1].end == 100
    kernels = [i for i, k in enumerate(space.knobs) if "kernel" in k.name]
    elastic = [*kernels, *(i for i, k in enumerate(space.knobs) if "resolution" in k.name)]
    archs = shrinking.draw(64, 45, np.random.default_rng(0))
    assert (np.delete(archs, elastic, axis=1) == np.delete(largest, elastic)).all()
    assert (archs[:, kernels] < largest[kernels]).any()
    everything = shrinking.draw(2000, 99, np.random.default_rng(0))
    assert (everything == space.canonical(everything)).all()
    uniform = space.sample(2000, np.random.default_rng(1))
    assert np.abs(everything.mean(0) - uniform.mean(0)).max() < 0.12


def test_a_space_of_operations_shrinks_too():
    """Its knobs have no order of their own: their choices open by cost."""
    space = load_space("nasbench201")
    _, largest = sandwich_ends(space)
    shrinking = Shrinking(space, largest, None, 100)
    first = shrinking.draw(200, shrinking.begin, np.random.default_rng(0))
    names = {space.knobs[0].choices[i] for i in np.unique(first)}
    assert names == {"nor_conv_3x3", "nor_conv_1x1"}


def test_the_alpha_divergence_is_that_of_its_formula():
    torch.manual_seed(0)
    student, teacher = (3 * torch.randn(64, 10, dtype=torch.float64) for _ in range(2))
    q, p = student.softmax(1), teacher.softmax(1)
    kl = (p * (p / q).log()).sum(1)
    chi2 = 0.5 * ((q * (q / p).clamp(max=5)).sum(1) - 1)
    assert 0 < (chi2 > kl).sum() < 64  # both cases occur
    student.requires_grad_()
    loss = alpha_loss(student, teacher)
    torch.testing.assert_close(loss.detach(), torch.maximum(kl, chi2).mean())
    loss.backward()
    # Row by row: the gradient of the Kullback-Leibler divergence, or -1/alpha E_q[(p/q)^alpha grad log q].
    weight = q * (q / p).clamp(max=5)
    expected = torch.where((chi2 > kl)[:, None], weight - weight.sum(1, keepdim=True) * q, q - p) / 64
    torch.testing.assert_close(student.grad, expected)


def test_divergences_vanish_where_student_and_teacher_agree():
    logits = torch.randn(8, 5).requires_grad_()
    loss = alpha_loss(logits, logits.detach())
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6
    assert logits.grad.abs().max() < 1e-6


def test_over_confident_students_are_held_back_more_by_alpha():
    """The Kullback-Leibler divergence hardly minds weight where the teacher has none; alpha = -1 does."""
    teacher = torch.tensor([[2.0, 2.0, -6.0]])
    student = torch.tensor([[2.0, 2.0, 1.0]])

    def pull(loss):
        logits = student.clone().requires_grad_()
        loss(logits, teacher).backward()
        return float(logits.grad[0, 2])

    assert pull(alpha_loss) > 1.5 * pull(soft_loss) > 0


def test_parts_of_a_batch_add_up_to_the_whole(task):
    """Of a network whose normalisation does not see the batch."""

    def train(accumulate):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
        train_network(network, task, (1, 28, 28), epochs=1, batch_size=64, lr=0.05, accumulate=accumulate)
        return network[1].weight

    torch.testing.assert_close(train(1), train(4), atol=2e-5, rtol=1e-3)
    with pytest.raises(UserError, match=r"accumulate = 5: .*batch_size = 64 can be divided into"):
        train(5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_stays_near_single_precision(space, few_images, precision):
    task = few_images(train=128)

    def train(precision):
        torch.manual_seed(0)
        supernet = space.supernet()
        history = train_supernet(supernet, space, task, **SHORT, precision=precision)
        assert all(p.dtype == torch.float32 for p in supernet.parameters())
        return [row["loss"] for row in history]

    mixed, single = train(precision), train("fp32")
    assert mixed != single
    assert mixed == pytest.approx(single, rel=0.05)


def test_the_average_follows_its_formula_and_comes_off_again():
    network = nn.Linear(2, 2, bias=False)
    average = WeightAverage(network, 0.5)
    expected = network.weight.detach().clone()
    for step in range(1, 20):
        nn.init.normal_(network.weight)
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * network.weight.detach()
    own = network.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(network.weight.detach(), expected)
    assert torch.equal(network.weight, own)
    average.put()
    torch.testing.assert_close(network.weight.detach(), expected)


def test_averaged_weights_are_what_is_validated(space, few_images):
    """Of few late steps at a rate that never falls, the average is better than the last step."""
    task = few_images(train=1000)

    def judge(ema):
        torch.manual_seed(0)
        supernet = space.supernet()
        options = {**SHORT, "lr": 0.4, "schedule": "constant", "validation_images": 200, "ema": ema}
        last = train_supernet(supernet, space, task, **options)[-1]
        return last, supernet

    (averaged, supernet), (raw, _) = judge(0.9), judge(0.0)
    assert averaged["loss"] == raw["loss"]  # the same steps
    assert averaged["accuracy_largest"] != raw["accuracy_largest"]
    assert np.mean([averaged[k] for k in averaged if k.startswith("accuracy")]) > np.mean(
        [raw[k] for k in raw if k.startswith("accuracy")]
    )
    assert not supernet.training


def test_validation_while_training_judges_both_ends_and_random_ones(supernet, space, task):
    rows = train_supernet(supernet, space, task, **{**SHORT, "validation_images": 100}, method="progressive_shrinking")
    assert {"accuracy_smallest", "accuracy_random", "accuracy_largest", "phase"} <= rows[0].keys()
    assert [r["phase"] for r in rows] == ["kernel", "width"]
    json.dumps(rows)


def test_schedules():
    def rates(schedule, restarts=(0,)):
        recipe = Recipe(epochs=1, batch_size=2, lr=1.0, warmup=0.1, schedule=schedule)
        return [recipe.lr_at(step, 100, restarts) for step in range(100)]

    assert set(rates("constant")[10:]) == {1.0}
    assert rates("linear")[55] == pytest.approx(0.5)
    assert sorted(set(np.round(rates("step")[10:], 9))) == [0.01, 0.1, 1.0]
    twice = rates("cosine", (0, 50))
    assert twice[:50] == twice[50:]
    assert twice[5] == 1.0
    assert twice[49] < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sandwhich"}, r"method = 'sandwhich'.*Did you mean 'sandwich'"),
        ({"distillation": "kd"}, r"distillation = 'kd'.*expected one of kl, alpha, none"),
        ({"method": "single_path", "distillation": "kl", "random_subnets": 1}, "'single_path' has no teacher"),
        ({"method": "single_path", "random_subnets": 3}, "random_subnets = 3: expected 1"),
        ({"method": "progressive_shrinking", "random_subnets": 0}, "random_subnets = 0: expected 1 or more"),
        ({"phases": {"kernel": 0.5}}, "only method = 'progressive_shrinking' has phases"),
        ({"method": "progressive_shrinking", "phases": {"kernle": 0.5}}, r"'kernle' matches no knob.*width, kernel"),
        ({"method": "progressive_shrinking", "phases": {"(": 0.5}}, "no regular expression"),
        ({"method": "progressive_shrinking", "phases": {"kernel": 0.5, "k": 0.2}}, "'k' matches no knob that is still"),
        ({"method": "progressive_shrinking", "phases": {"kernel": 0.5, "depth": 0.5}}, "sum below 1"),
        ({"method": "progressive_shrinking", "phases": {"kernel": 0.0}}, "above 0"),
        ({"schedule": "cosin"}, r"schedule = 'cosin'.*'cosine'"),
        ({"precision": "int8"}, r"precision = 'int8'.*expected one of fp32, bf16, fp16"),
        ({"ema": 1.0}, "ema = 1.0: expected a decay"),
        ({"accumulate": 0}, "accumulate = 0: expected 1"),
        ({"accumulate": 64}, "at least two images a part"),
        ({"accumulate": 3}, r"accumulate = 3: expected 1 \(off\), or more parts that batch_size ="),
        ({"device": "tpu"}, "device = 'tpu': expected auto, cpu, cuda"),
        ({"device": "cuda:99"}, r"device = 'cuda:99': torch finds \d+ CUDA devices here"),
    ],
)
def test_what_does_not_go_together_is_refused(supernet, space, task, options, message):
    with pytest.raises(UserError, match=message):
        train_supernet(supernet, space, task, **{**SHORT, **options})


def test_auto_takes_what_is_there():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"


def test_the_experiment_file_has_all_keys_and_refuses_wrong_ones_at_once():
    section = {
        "method": "progressive_shrinking", "phases": {"kernel": 0.2, "depth": 0.2}, "distillation": "alpha",
        "ema": 0.99, "schedule": "linear", "precision": "bf16", "random_subnets": 3,
    }  # fmt: skip
    plan = make_plan(parse_config({"supernet": section}))
    assert section.items() <= plan.training_options.items()
    assert plan.training_options["phases"] == section["phases"]
    again = make_plan(parse_config(tomllib.loads(dump_config(plan.config))))
    assert again.training_options == plan.training_options
    for wrong, message in (
        ({"method": "progresive_shrinking"}, "method"),
        ({"method": "progressive_shrinking", "phases": {"heads": 0.2}}, "'heads' matches no knob"),
        ({"method": "single_path", "distillation": "alpha"}, "no teacher"),
        ({"lr": -1.0}, r"supernet\.lr = -1.0: expected above 0"),
        ({"log_dir": "x"}, "unknown key 'log_dir'"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(parse_config({"supernet": wrong}))


@pytest.mark.extra("tensorboard")
def test_tensorboard_gets_every_epoch_and_some_steps(supernet, space, task, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train_supernet(supernet, space, task, **{**SHORT, "validation_images": 100}, log_dir=tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"step/loss", "step/lr", "epoch/accuracy_smallest", "epoch/loss"} <= set(events.Tags()["scalars"])
    logged = events.Scalars("epoch/loss")
    assert [e.step for e in logged] == [10, 20]
    assert [e.value for e in logged] == pytest.approx([r["loss"] for r in rows])


def test_without_tensorboard_the_error_names_the_extra(supernet, space, task, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install nasbench-hw\[tensorboard\]"):
        train_supernet(supernet, space, task, **SHORT, log_dir=tmp_path)
