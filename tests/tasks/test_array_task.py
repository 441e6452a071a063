"""Normalisation and augmentation, which all tasks of images in memory share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nasbench.tasks.array_task import ArrayTask, Dataset, stratified, to_split
from search_spaces import UserError


class Given(ArrayTask):
    def __init__(self, images, **options):
        super().__init__(**options)
        self.images = images

    def load(self):
        split = to_split(self.images, np.arange(len(self.images)) % 3)
        return Dataset({"train": split, "val": split, "test": split}, ("a", "b", "c"))


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (50, 3, 12, 10), dtype=np.uint8)


def test_training_images_come_out_with_mean_0_and_variance_1(images):
    task = Given(images)
    x = task.prepare(task.split("train").images)
    assert x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5, rtol=0)


def test_statistics_come_from_training_images_alone(images):
    task = Given(images)
    dark = Dataset({**task.dataset.splits, "val": to_split(np.zeros_like(images), np.zeros(50, int))}, ("a", "b", "c"))
    other = Given(images)
    other.__dict__["dataset"] = dark
    assert torch.equal(task.normalisation[0], other.normalisation[0])


def test_the_manifest_describes_what_prepare_does(images):
    task = Given(images)
    told = task.preprocessing()
    x = images.transpose(0, 2, 3, 1) * told["scale"]
    expected = ((x - told["mean"]) / told["std"]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(task.prepare(torch.from_numpy(images)).numpy(), expected, atol=1e-5)


def test_a_constant_channel_stays_finite():
    task = Given(np.full((4, 1, 8, 8), 7, np.uint8))
    assert task.prepare(task.split("train").images).abs().max() < 1e-6


def test_augmentation_is_a_function_of_the_seed(images):
    task, x = Given(images, shift=2, flip=True), torch.from_numpy(images)
    before = x.clone()
    assert torch.equal(task.augment(x, 5), task.augment(x, 5))
    assert not torch.equal(task.augment(x, 5), task.augment(x, 6))
    assert torch.equal(x, before)
    state = torch.get_rng_state()
    task.augment(x, 7)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_augmented_image_is_a_shifted_and_perhaps_mirrored_original(images):
    task, x = Given(images, shift=2, flip=True), torch.from_numpy(images)
    moved = task.augment(x, 1)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    mirrored = 0
    offsets = set()
    for i, image in enumerate(moved.numpy()):
        found = [
            (flip, dy, dx)
            for flip in (False, True)
            for dy in range(5)
            for dx in range(5)
            if np.array_equal(image[:, :, ::-1] if flip else image, padded[i, :, dy : dy + 12, dx : dx + 10])
        ]
        assert len(found) == 1
        mirrored += found[0][0]
        offsets.add(found[0][1:])
    assert 10 < mirrored < 40
    assert len(offsets) > 15


def test_nothing_is_changed_where_nothing_was_asked_for(images):
    x = torch.from_numpy(images)
    assert Given(images).augment(x, 0) is x
    only_shift = Given(images, shift=1).augment(x, 0)
    assert only_shift.shape == x.shape
    only_flip = Given(images, flip=True).augment(x, 0)
    same = (only_flip == x).flatten(1).all(1)
    assert torch.equal(only_flip[~same], x[~same].flip(3))


def test_a_negative_shift_is_refused(images):
    with pytest.raises(UserError, match="task.shift"):
        Given(images, shift=-1)


def test_a_shift_as_wide_as_the_images_is_refused(images):
    with pytest.raises(UserError, match="task.shift = 99: images have"):
        Given(images, shift=99).split("train")
    Given(images, shift=min(images.shape[2:]) - 1).split("train")


def test_stratified_splits_keep_shares_per_class_and_lose_nothing():
    labels = np.repeat([0, 1, 2], [100, 40, 10])
    names = [f"image{i}" for i in range(150)]
    rows = stratified(names, labels, {"val": 0.2, "test": 0.1}, 0, "here")
    assert sorted(np.concatenate(list(rows.values()))) == list(range(150))
    assert np.bincount(labels[rows["val"]]).tolist() == [20, 8, 2]
    assert np.bincount(labels[rows["test"]]).tolist() == [10, 4, 1]


def test_stratified_splits_follow_the_names_not_the_order():
    labels = np.arange(60) % 2
    names = [f"image{i}" for i in range(60)]
    rows = stratified(names, labels, {"val": 0.3}, 3, "here")
    back = np.arange(60)[::-1]
    turned = stratified([names[i] for i in back], labels[back], {"val": 0.3}, 3, "here")
    assert {names[i] for i in rows["val"]} == {names[back[i]] for i in turned["val"]}
    assert {names[i] for i in rows["val"]} != {names[i] for i in stratified(names, labels, {"val": 0.3}, 4, "h")["val"]}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"val": 0.0}, "task.validation = 0.0: .*between 0 and 1"),
        ({"val": 0.2, "test": 1.5}, "task.test = 1.5: .*between 0 and 1"),
        ({"val": 0.5, "test": 0.5}, r"task.validation \+ task.test = 1: leaves nothing to train on"),
    ],
)
def test_impossible_fractions_are_refused(fractions, message):
    with pytest.raises(UserError, match=message):
        stratified(list("abcdef"), np.arange(6) % 2, fractions, 0, "here")


def test_a_class_with_too_few_images_is_named():
    labels = np.array([0] * 9 + [1] * 2)
    with pytest.raises(UserError, match=r"here: class 1 has 2 images.*at least 3"):
        stratified([str(i) for i in range(11)], labels, {"val": 0.2, "test": 0.2}, 0, "here")
