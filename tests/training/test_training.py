"""Training: it learns, resumes to the bit, and says what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.training import (
    Recipe,
    evaluate_network,
    fit_size,
    fixed_subset,
    load_weights,
    predict_logits,
    sandwich_ends,
    save_weights,
    subnet_accuracy,
    subnet_teacher,
    train_network,
    train_supernet,
)
from nasbench.training.loop import step_seed
from nasbench.training.losses import smoothed_loss, soft_loss
from search_spaces import MobileNetV3Space, UserError, calibrate

SHORT = {"epochs": 2, "batch_size": 64, "random_subnets": 1, "validation_images": 0}


class Stop(Exception):
    """Raised from a progress callback, as a kill would: at any point between two steps."""


def stop_after(step):
    def progress(update):
        if update.step == step:
            raise Stop

    return progress


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


def test_the_sandwich_ends_are_the_cheapest_and_dearest_of_all(space):
    smallest, largest = sandwich_ends(space)
    archs = np.array(list(np.ndindex(*space.cardinalities)), dtype=space.dtype)
    macs = [space.workload(a).macs for a in archs]
    assert space.workload(smallest).macs == min(macs)
    assert space.workload(largest).macs == max(macs)


def test_a_supernet_learns_real_images(trained, space, task):
    validation = task.split("val")
    calibration = task.split("train").images[:256]
    accuracy = [subnet_accuracy(trained, a, task, calibration, validation) for a in sandwich_ends(space)]
    assert min(accuracy) > 0.6  # chance is 0.1


def test_history_has_a_row_per_epoch(supernet, space, task):
    history = train_supernet(supernet, space, task, **{**SHORT, "validation_images": 100})
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[1]["loss"] < history[0]["loss"]
    assert {"loss_largest", "accuracy_smallest", "accuracy_largest", "images_per_s", "seconds", "lr"} <= set(history[0])
    json.dumps(history)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("stopped_at", [1, 7, 10, 13])
def test_resumed_training_ends_with_the_same_bits(supernet, space, task, tmp_path, optimizer, stopped_at):
    """Ten steps an epoch: killed at the start, within an epoch, at its end, and after it."""
    options = {**SHORT, "optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.002, "save_every_s": 0.0}
    twin = space.supernet()
    twin.load_state_dict(supernet.state_dict())
    whole = train_supernet(supernet, space, task, **options)

    path = tmp_path / "supernet.safetensors"
    with pytest.raises(Stop):
        train_supernet(twin, space, task, checkpoint=path, progress=stop_after(stopped_at), **options)
    other = space.supernet()  # fresh weights: everything must come from the file
    if not path.exists():  # killed before the first checkpoint: begin anew
        other.load_state_dict(torch_like(space))
    resumed = train_supernet(other, space, task, checkpoint=path, **options)
    assert same_weights(supernet, other)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]


def torch_like(space):
    torch.manual_seed(0)
    return space.supernet().state_dict()


def test_a_finished_checkpoint_is_used_as_it_is(supernet, space, task, tmp_path):
    path = tmp_path / "supernet.safetensors"
    first = train_supernet(supernet, space, task, checkpoint=path, **SHORT)
    other = space.supernet()
    steps = []
    again = train_supernet(other, space, task, checkpoint=path, progress=steps.append, **SHORT)
    assert again == first
    assert steps == []
    assert same_weights(supernet, other)


def test_a_seed_decides_everything(space, task):
    def run(seed):
        torch.manual_seed(0)
        supernet = space.supernet()
        torch.manual_seed(np.random.randint(1000))  # noqa: NPY002 (torch's own state must not matter)
        train_supernet(supernet, space, task, **{**SHORT, "epochs": 1}, seed=seed)
        return supernet

    assert same_weights(run(1), run(1))
    assert not same_weights(run(1), run(2))


def test_subnets_side_by_side_give_the_same_bits(task):
    """One thread runs them one after the other, four threads one each; dropout draws the same for both."""
    stages = [{"width": 8, "kernels": [3, 5], "expansions": [2, 3], "depths": [1, 2], "stride": 2}]
    space = MobileNetV3Space(1, 10, stages=stages, resolutions=[14, 28], final_width=32, dropout=0.3)

    def run(threads):
        torch.manual_seed(0)
        supernet = space.supernet()
        torch.set_num_threads(threads)
        train_supernet(supernet, space, task, **{**SHORT, "epochs": 1, "validation_images": 0})
        assert torch.get_num_threads() == threads
        return supernet

    assert same_weights(run(1), run(4))


def test_a_subnet_that_fails_ends_the_training(supernet, space, task, monkeypatch):
    """The others wait for the largest's output: its failure must not leave them waiting."""

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    torch.set_num_threads(2)
    monkeypatch.setattr(supernet, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        train_supernet(supernet, space, task, **{**SHORT, "validation_images": 0})


def test_dropout_resumes_too(task, tmp_path):
    def network():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    options = {"epochs": 1, "batch_size": 64, "save_every_s": 0.0}
    whole, killed, resumed = network(), network(), network()
    train_network(whole, task, (1, 28, 28), **options)
    path = tmp_path / "n.safetensors"
    with pytest.raises(Stop):
        train_network(killed, task, (1, 28, 28), checkpoint=path, progress=stop_after(6), **options)
    train_network(resumed, task, (1, 28, 28), checkpoint=path, **options)
    assert same_weights(whole, resumed)


def test_ctrl_c_saves_the_state_of_the_last_whole_step(supernet, space, task, tmp_path):
    path = tmp_path / "supernet.safetensors"

    def interrupt(update):
        if update.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_supernet(supernet, space, task, checkpoint=path, progress=interrupt, **SHORT)
    assert load_weights(space.supernet(), path)["step"] in (3, 4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_checkpoint_of_other_settings_is_refused(supernet, space, task, tmp_path):
    path = tmp_path / "supernet.safetensors"
    train_supernet(supernet, space, task, checkpoint=path, **SHORT)
    with pytest.raises(UserError, match=r"begun with lr = 0.3, now it is 0.2"):
        train_supernet(supernet, space, task, checkpoint=path, lr=0.2, **SHORT)


def test_broken_checkpoints_are_named(supernet, space, task, tmp_path):
    path = tmp_path / "supernet.safetensors"
    train_supernet(supernet, space, task, checkpoint=path, **{**SHORT, "epochs": 1})
    good = path.read_bytes()
    for bad in (good[:100], good[: len(good) // 2], b"", b"\x00" * 64):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"supernet.safetensors: not a readable checkpoint.*delete it"):
            train_supernet(supernet, space, task, checkpoint=path, **{**SHORT, "epochs": 1})
    with pytest.raises(UserError, match="no such checkpoint"):
        load_weights(supernet, tmp_path / "absent.safetensors")


def test_weights_of_another_network_are_refused_and_nothing_changes(supernet, tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, nn.Linear(2, 2))
    before = {n: t.clone() for n, t in supernet.state_dict().items()}
    with pytest.raises(UserError, match="of another network"):
        load_weights(supernet, path)
    assert all(torch.equal(before[n], t) for n, t in supernet.state_dict().items())
    with pytest.raises(UserError, match=r"tensor 'weight' is \(2, 2\), here it is \(2, 3\)"):
        load_weights(nn.Linear(3, 2), path)


def test_a_directory_that_cannot_be_written_is_named(supernet, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        save_weights(tmp_path / "file" / "w.safetensors", supernet)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(supernet, space, task, tmp_path):
    path = tmp_path / "supernet.safetensors"
    before = {n: t.clone() for n, t in supernet.state_dict().items()}
    with torch.no_grad():
        supernet.head.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"broke down at step 1 of 20.*Lower lr"):
        train_supernet(supernet, space, task, checkpoint=path, **SHORT)
    assert all(torch.equal(before[n], t) for n, t in supernet.state_dict().items() if n != "head.weight")


def test_a_diverging_run_keeps_a_finite_checkpoint(space, task, tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    path = tmp_path / "n.safetensors"
    options = {"epochs": 4, "batch_size": 64, "lr": 1e30, "warmup": 0.0, "clip_norm": 0.0, "momentum": 0.0}
    with pytest.raises(UserError, match="the last good state is kept in"):
        train_network(network, task, (1, 28, 28), checkpoint=path, save_every_s=0.0, **options)
    load_weights(network, path)
    assert all(torch.isfinite(t).all() for t in network.state_dict().values())


def test_networks_learn_and_are_judged_at_their_resolution(space, few_images):
    task = few_images(train=2000)
    network = space.build(np.array([1, 1, 1, 0]))
    history = train_network(network, task, network.input_shape, epochs=3, batch_size=50, lr=0.1)
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy_train"] > history[0]["accuracy_train"]
    assert evaluate_network(network, task, "val", network.input_shape) > 0.55
    assert not network.training


def test_a_student_learns_what_the_teacher_says(space, task):
    """A teacher that calls everything class 3: with it alone, labels do not matter."""
    network = space.build(np.array([1, 1, 1, 0]))

    def teacher(x):
        assert x.shape[1:] == (1, 28, 28)  # the task's own size, whatever the student takes
        return torch.full((len(x), 10), -8.0).index_fill_(1, torch.tensor([3]), 8.0)

    options = {"epochs": 2, "batch_size": 40, "lr": 0.05, "distillation_weight": 1.0}
    train_network(network, task, network.input_shape, teacher=teacher, **options)
    logits = predict_logits(network, task, task.split("val").images, network.input_shape)
    assert (logits.argmax(1) == 3).float().mean() > 0.99


def test_in_place_distillation_follows_the_largest(space, task):
    """The smallest answers more like the largest where it is taught by it."""

    def agreement(distillation):
        torch.manual_seed(0)
        supernet = space.supernet()
        train_supernet(supernet, space, task, **{**SHORT, "epochs": 3}, lr=0.1, distillation_weight=distillation)
        smallest, largest = sandwich_ends(space)
        images = task.split("val").images
        answers = []
        for arch in (smallest, largest):
            stats = calibrate(supernet, arch, task.prepare(task.split("train").images))
            answers.append(predict_logits(lambda x, a=arch, s=stats: supernet(x, a, s), task, images).softmax(1))
        return float((answers[0] - answers[1]).abs().sum(1).mean())

    assert agreement(1.0) < agreement(0.0)


def test_a_subnet_as_a_teacher_is_the_calibrated_subnet(trained, space, task):
    _, largest = sandwich_ends(space)
    teacher = subnet_teacher(trained, largest, task, calibration_images=0)
    images = task.split("val").images
    accuracy = task.accuracy(predict_logits(teacher, task, images), task.split("val").labels)
    assert accuracy == subnet_accuracy(trained, largest, task, task.split("train").images, task.split("val"))


def test_losses(task):
    logits, labels = torch.randn(32, 10), torch.randint(10, (32,))
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(smoothed_loss(task, logits, labels, 0.2), expected)
    # A student equal to its teacher has no gradient, at any temperature.
    student = logits.clone().requires_grad_()
    soft_loss(student, logits, 3.0).backward()
    assert student.grad.abs().max() < 1e-6


def test_a_teacher_may_be_its_logits(trained, space, few_images):
    """Of images that do not change: asked beforehand, it says what it says when asked at each step."""
    task = few_images(flip=False)
    teacher = subnet_teacher(trained, sandwich_ends(space)[1], task)
    logits = predict_logits(teacher, task, task.split("train").images)

    def train(teacher):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        train_network(
            network, task, (1, 28, 28), epochs=1, batch_size=64, lr=0.05, teacher=teacher, distillation_weight=1.0
        )
        return network[1].weight

    assert not task.augments
    torch.testing.assert_close(train(logits), train(teacher), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(train(logits), train(logits.roll(1, dims=0)), atol=1e-3)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    recipe = Recipe(epochs=1, batch_size=2, lr=0.4, warmup=0.1)
    rates = [recipe.lr_at(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[9] == pytest.approx(0.4)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.001


def test_weight_decay_spares_biases_and_normalisation():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, spared = Recipe(epochs=1, batch_size=2, lr=0.1, weight_decay=0.5).make_optimizer(network).param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in spared["params"]} == {1}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.0), ("lr", float("nan")), ("batch_size", 1), ("epochs", -1), ("momentum", 1.0), ("warmup", 2.0),
        ("optimizer", "adam"), ("label_smoothing", 1.0), ("weight_decay", -1.0), ("clip_norm", -1.0),
        ("random_subnets", -1), ("distillation_weight", 1.5),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(supernet, space, task, key, value):
    with pytest.raises(UserError, match=f"{key} = .*expected"):
        train_supernet(supernet, space, task, **{**SHORT, key: value})


def test_seeds_differ_by_purpose_and_step():
    seeds = {step_seed(s, p, i) for s in range(5) for p in ("order", "augment", "archs") for i in range(50)}
    assert len(seeds) == 750
    assert all(0 <= s < 2**63 for s in seeds)


def test_a_fixed_subset_is_fixed(task):
    split = task.split("val")
    a, b = fixed_subset(split, 50, 7), fixed_subset(split, 50, 7)
    assert torch.equal(a.images, b.images)
    assert len(a) == 50
    assert not torch.equal(a.labels, fixed_subset(split, 50, 8).labels)
    assert fixed_subset(split, 0, 7) is split


def test_fit_size_leaves_what_fits():
    x = torch.randn(2, 1, 28, 28)
    assert fit_size(x, (1, 28, 28)) is x
    assert fit_size(x, (1, 40, 40)).shape == (2, 1, 40, 40)


def test_progress_is_told_after_every_step(supernet, space, task):
    updates = []
    train_supernet(supernet, space, task, progress=updates.append, **{**SHORT, "epochs": 1})
    assert [u.step for u in updates] == list(range(1, 11))
    assert all(u.steps == 10 and u.images_per_s > 0 and np.isfinite(u.loss) for u in updates)
    assert updates[-1].seconds_left == 0
    assert "images/s · loss" in str(updates[-1])
    assert str(updates[-1]).endswith("0:00 left")


def test_the_checkpoint_directory_holds_no_temporary_files(supernet, space, task, tmp_path):
    train_supernet(supernet, space, task, checkpoint=tmp_path / "a" / "s.safetensors", save_every_s=0.0, **SHORT)
    assert [p.name for p in Path(tmp_path / "a").iterdir()] == ["s.safetensors"]
