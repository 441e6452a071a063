"""Recordings of people: windows, splits by person, standards of the training people; and that networks learn them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.registry import resolve
from nasbench.tasks.recordings import Recordings, RecordingsTask
from nasbench.tasks.smartwatch import SmartwatchExercises, embedded
from nasbench.training import evaluate_network, train_network, train_supernet
from search_spaces import UserError, load_space

SPLITS = ("train", "val", "test")


class Marked(RecordingsTask):
    """Every sample tells its recording and its place in it."""

    lengths = (40, 23, 64, 31, 50, 64)

    def load(self) -> Recordings:
        signals = [
            np.stack([np.full(n, row, np.float64), np.arange(n) + 100.0 * row], 1) for row, n in enumerate(self.lengths)
        ]
        labels = np.array([0, 1, 0, 1, 0, 1])
        return Recordings(signals, labels, np.array([7, 7, 8, 8, 9, 9]), ("still", "moving"))


def marked(**options: object) -> Marked:
    return Marked(**{"window": 16, "validation_persons": 1, "test_persons": 1, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def task() -> SmartwatchExercises:
    return SmartwatchExercises()


@pytest.mark.parametrize(("overlap", "step"), [(0.0, 16), (0.5, 8), (0.99, 1)])
def test_windows_follow_each_other_within_a_recording(overlap: float, step: int) -> None:
    task = marked(overlap=overlap)
    for name in SPLITS:
        split = task.split(name)
        assert split.images.shape[1:] == task.input_shape == (2, 1, 16)
        starts = split.images[:, 1, 0, 0]
        rows = split.images[:, 0, 0]
        assert (rows == rows[:, :1]).all()  # no window spans two recordings
        assert torch.equal(split.images[:, 1, 0], starts[:, None] + torch.arange(16))
        for row in rows[:, 0].unique().tolist():
            mine = rows[:, 0] == row
            assert (starts[mine] - 100 * row).tolist() == list(range(0, Marked.lengths[int(row)] - 15, step))
            assert (split.labels[mine] == int(row) % 2).all()


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_in_two_splits(seed: int) -> None:
    for task in (marked(seed=seed), SmartwatchExercises(seed=seed)):
        people = [set(task.persons[name]) for name in SPLITS]
        assert sum(map(len, people)) == len(set.union(*people)) == len(set(task.recordings.persons.tolist()))
    owner = {7: {0, 1}, 8: {2, 3}, 9: {4, 5}}
    task = marked(seed=seed)
    for name in SPLITS:
        rows = set(task.split(name).images[:, 0].unique().int().tolist())
        assert rows == set.union(*(owner[p] for p in task.persons[name]))


def test_a_seed_decides_who_is_held_out() -> None:
    chosen = [SmartwatchExercises(seed=seed).persons for seed in range(8)]
    assert SmartwatchExercises(seed=3).persons == chosen[3]
    assert len({p["test"] for p in chosen}) > 4


def test_standards_are_those_of_the_training_people_alone(task: SmartwatchExercises) -> None:
    x = task.prepare(task.split("train").images)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(6), atol=1e-3, rtol=0)
    other = task.prepare(task.split("test").images)
    assert (other.mean((0, 2, 3)).abs() > 1e-3).any()
    assert task.preprocessing()["mean"] == task.normalisation[0].tolist()


def test_a_constant_channel_stays_finite() -> None:
    class Constant(Marked):
        def load(self) -> Recordings:
            full = super().load()
            return Recordings([np.ones_like(s) for s in full.signals], full.labels, full.persons, full.class_names)

    task = Constant(window=16, validation_persons=1, test_persons=1)
    assert (task.prepare(task.split("val").images) == 0).all()


def test_augmentation_is_decided_by_its_seed_and_keeps_shape_and_type(task: SmartwatchExercises) -> None:
    images = task.split("train").images[:16]
    a, b, c = task.augment(images, 1), task.augment(images, 1), task.augment(images, 2)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.dtype == images.dtype
    assert a.shape == images.shape
    ratio = a / images
    assert (ratio.std(3) < 1e-3).all()  # one factor for a channel of a window
    off = SmartwatchExercises(scale=0.0)
    assert not off.augments
    assert off.augment(images, 1) is images
    noisy = SmartwatchExercises(scale=0.0, noise=0.5)
    added = (noisy.prepare(noisy.augment(images, 0)) - noisy.prepare(images)).std()
    assert float(added) == pytest.approx(0.5, rel=0.05)


def test_the_embedded_recordings_are_the_published_ones(task: SmartwatchExercises) -> None:
    arrays = embedded()
    assert sorted(arrays) == ["labels", "lengths", "persons", "samples", "sides"]
    assert not any(a.dtype.hasobject for a in arrays.values())
    assert len(arrays["labels"]) == 140
    # Ten people, seven exercises, two arms: each combination once.
    assert len(set(zip(arrays["persons"], arrays["labels"], arrays["sides"], strict=True))) == 140
    assert arrays["samples"].shape == (arrays["lengths"].sum(), 6) == (244_102, 6)
    assert task.num_classes == 7
    assert sum(len(task.split(n)) for n in SPLITS) == sum((n - 128) // 64 + 1 for n in arrays["lengths"].tolist())


def test_a_changed_file_is_refused(tmp_path, monkeypatch) -> None:
    arrays = embedded()
    arrays["labels"] = arrays["labels"].copy()
    arrays["labels"][0] ^= 1
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="differ from the released"):
        embedded(path)
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="cannot be read"):
        embedded(path)
    np.savez(path, samples=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        embedded(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "task.window = 1"),
        ({"overlap": 1.0}, r"task.overlap = 1.0: expected a share"),
        ({"test_persons": 0}, "task.test_persons = 0"),
        ({"scale": -1.0}, "task.scale"),
        ({"noise": float("nan")}, "task.noise"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SmartwatchExercises(**options)  # type: ignore[arg-type]


def test_too_many_people_or_too_long_windows_are_named() -> None:
    with pytest.raises(UserError, match="none of 10 people to train on"):
        SmartwatchExercises(validation_persons=5, test_persons=5).split("train")
    with pytest.raises(UserError, match=r"task.window = 5000.*2618 samples at most"):
        SmartwatchExercises(window=5000).split("train")


def test_a_small_network_knows_exercises_of_people_it_has_never_seen() -> None:
    """End to end, on every fourth window's worth of data: 2-D layers of height one are a network along time."""
    assert resolve("task", "smartwatch") is SmartwatchExercises
    task = SmartwatchExercises(overlap=0.0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = nn.Sequential(
        nn.Conv2d(6, 16, (1, 7), stride=(1, 2), bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, (1, 7), stride=(1, 2), bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7),
    )  # fmt: skip
    train_network(network, task, task.input_shape, epochs=5, batch_size=32, lr=0.1)
    labels = task.split("val").labels
    majority = float(torch.bincount(labels).max()) / len(labels)
    assert majority < 0.25
    assert evaluate_network(network, task, "val", task.input_shape) > 2 * majority


def test_the_space_for_sensors_learns_them_too() -> None:
    task = SmartwatchExercises(overlap=0.0)
    space = load_space("sensor_1d", *(task.input_shape[0], task.num_classes))
    assert space.input_shape == task.input_shape
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = {"epochs": 2, "batch_size": 32, "lr": 0.1, "random_subnets": 1}
    last = train_supernet(space.supernet(), space, task, **options)[-1]
    assert min(last["accuracy_smallest"], last["accuracy_largest"]) > 0.4  # the most frequent exercise: below 0.25


def test_one_persons_recordings_are_cut_in_time():
    task = SmartwatchExercises()
    person = task.persons["test"][0]
    own = task.of_person(person, share=0.4)
    train, rest = own.split("train"), own.split("test")
    assert torch.equal(rest.images, own.split("val").images)
    whole = task.of_person(person, share=0.4)
    everything = {w.tobytes() for w in whole.split("train").images.numpy()}
    assert not everything & {w.tobytes() for w in rest.images.numpy()}
    assert set(train.labels.tolist()) == set(rest.labels.tolist()) == set(range(7))
    assert 0.5 < len(train) / len(rest) < 0.8
    torch.testing.assert_close(
        own.prepare(rest.images), task.prepare(rest.images)
    )  # the task's standards, not their own
    with pytest.raises(UserError, match=r"person = 99: the recordings are of \[1, 2"):
        task.of_person(99)
    with pytest.raises(UserError, match=r"share = 1.0"):
        task.of_person(person, 1.0)
