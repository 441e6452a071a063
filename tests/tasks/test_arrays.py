"""A folder of images, and arrays in a file: real data in, clear words for bad ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nasbench.tasks.arrays import ImageFolder, NpzArrays
from search_spaces import UserError


def write_images(folder, count, shade, size=(20, 16), mode="RGB"):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(shade)
    for i in range(count):
        pixels = np.clip(rng.normal(shade, 5, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    for name, shade in (("dark", 40), ("light", 200), ("medium", 120)):
        write_images(tmp_path / "images" / name, 20, shade)
    return tmp_path / "images"


def test_a_folder_per_class_becomes_three_splits(folder):
    task = ImageFolder(path=str(folder), size=12)
    assert task.class_names == ("dark", "light", "medium")
    assert task.input_shape == (3, 12, 12)
    assert {n: len(task.split(n)) for n in ("train", "val", "test")} == {"train": 42, "val": 9, "test": 9}
    for name in ("train", "val", "test"):
        split = task.split(name)
        shades = [split.images[split.labels == c].float().mean() for c in range(3)]
        np.testing.assert_allclose(shades, [40, 200, 120], atol=3)


def test_splits_do_not_depend_on_files_coming_and_going_elsewhere(folder):
    before = ImageFolder(path=str(folder), size=8).split("val")
    write_images(folder / "white", 10, 250)
    after = ImageFolder(path=str(folder), size=8).split("val")
    old = after.labels < 3
    assert torch.equal(after.images[old], before.images)


def test_folders_of_splits_are_taken_as_they_are(tmp_path):
    for split, count in (("train", 10), ("val", 4), ("test", 3)):
        for name, shade in (("a", 30), ("b", 220)):
            write_images(tmp_path / split / name, count, shade)
    task = ImageFolder(path=str(tmp_path), size=8)
    assert [len(task.split(n)) for n in ("train", "val", "test")] == [20, 8, 6]


def test_a_missing_validation_folder_is_cut_off_training(tmp_path):
    for split, count in (("train", 20), ("test", 3)):
        for name, shade in (("a", 30), ("b", 220)):
            write_images(tmp_path / split / name, count, shade)
    task = ImageFolder(path=str(tmp_path), size=8, validation=0.25)
    assert [len(task.split(n)) for n in ("train", "val", "test")] == [30, 10, 6]


def test_grey_images_and_mixed_modes(folder):
    write_images(folder / "pale", 8, 230, mode="L")
    assert ImageFolder(path=str(folder), size=8, channels=1).split("train").images.shape[1] == 1
    assert ImageFolder(path=str(folder), size=8, channels=3).split("train").images.shape[1] == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_images_of_16_bits_are_scaled_not_clipped(tmp_path, channels):
    for name, suffix in (("a", "png"), ("b", "tif")):
        (tmp_path / name).mkdir()
        for i in range(4):
            pixels = np.full((8, 8), 257 * 100, np.uint16)
            pixels[:4] = 65535
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{suffix}")
    images = ImageFolder(path=str(tmp_path), size=8, channels=channels).split("train").images
    assert (images[:, :, :4] == 255).all()
    assert (images[:, :, 4:] == 100).all()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_images_whose_range_is_not_known_are_named(folder, dtype):
    Image.fromarray(np.ones((8, 8), dtype)).save(folder / "dark" / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif \(pixels of 32 bits \(mode [FI]\)"):
        ImageFolder(path=str(folder), size=8).split("train")


def test_images_are_cropped_at_the_centre_not_squeezed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = np.zeros((10, 30), np.uint8)
            pixels[:, 10:20] = 255  # the central square is white
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    assert ImageFolder(path=str(tmp_path), size=10, channels=1).split("train").images.min() > 250


def test_corrupt_images_are_named(folder):
    (folder / "dark" / "broken.png").write_bytes(b"not a picture")
    good = (folder / "light" / "3.png").read_bytes()
    (folder / "light" / "3.png").write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match=r"unreadable images: .*") as error:
        ImageFolder(path=str(folder), size=8).split("train")
    assert "broken.png" in str(error.value)
    assert "3.png" in str(error.value)


def test_other_files_are_left_alone(folder):
    (folder / "dark" / "notes.txt").write_text("x")
    (folder / ".cache").mkdir()
    (folder / "dark" / "._0.png").write_bytes(b"finder litter")
    assert len(ImageFolder(path=str(folder), size=8).split("train")) == 42


def test_bad_folders_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="is not a directory"):
        ImageFolder(path=str(tmp_path / "absent")).split("train")
    (tmp_path / "lonely" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="1 class folders; at least two"):
        ImageFolder(path=str(tmp_path / "lonely")).split("train")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no images"):
        ImageFolder(path=str(folder)).split("train")
    (folder / "empty").rmdir()
    write_images(folder / "rare", 2, 10)
    with pytest.raises(UserError, match=r"has 2 images, too few for 3 splits"):
        ImageFolder(path=str(folder)).split("train")


def test_a_class_that_training_lacks_is_named(tmp_path):
    for split, names in (("train", ("cat", "dog")), ("test", ("cat", "dgo"))):
        for name in names:
            write_images(tmp_path / split / name, 4, 100)
    with pytest.raises(UserError, match=r"class 'dgo' is not among the classes of training.*'dog'"):
        ImageFolder(path=str(tmp_path)).split("train")


@pytest.mark.parametrize(("key", "value"), [("size", 0), ("channels", 2)])
def test_bad_folder_options_are_named(tmp_path, key, value):
    with pytest.raises(UserError, match=f"task.{key}"):
        ImageFolder(path=str(tmp_path), **{key: value})


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (60, 3, 10, 8), dtype=np.uint8)
    return {"images": x, "labels": np.arange(60) % 3}


def save(path, arrays):
    np.savez(path / "a.npz", **arrays)
    return str(path / "a.npz")


def test_images_and_labels_are_split(arrays, tmp_path):
    task = NpzArrays(path=save(tmp_path, arrays), class_names=("x", "y", "z"))
    assert {n: len(task.split(n)) for n in ("train", "val", "test")} == {"train": 42, "val": 9, "test": 9}
    assert task.class_names == ("x", "y", "z")
    original = {image.tobytes(): label for image, label in zip(arrays["images"], arrays["labels"], strict=True)}
    for name in ("train", "val", "test"):
        split = task.split(name)
        assert all(original.pop(i.numpy().tobytes()) == y for i, y in zip(split.images, split.labels, strict=True))
    assert not original


def test_layouts_and_types_give_the_same_images(arrays, tmp_path):
    x, y = arrays["images"], arrays["labels"]
    expected = NpzArrays(path=save(tmp_path, arrays)).split("test").images
    for images, labels in (
        (x.transpose(0, 2, 3, 1), y),
        (x / 255.0, y[:, None]),
        ((x / 255).astype(np.float16), y.astype(np.uint8)),
    ):
        found = NpzArrays(path=save(tmp_path, {"images": images, "labels": labels})).split("test").images
        assert (found.int() - expected.int()).abs().max() <= (1 if images.dtype == np.float16 else 0)
    grey = NpzArrays(path=save(tmp_path, {"images": x[:, 0], "labels": y}))
    assert grey.input_shape == (1, 10, 8)


def test_given_splits_are_taken_as_they_are(arrays, tmp_path):
    x, y = arrays["images"], arrays["labels"]
    parts = {"x_train": x[:30], "y_train": y[:30], "x_test": x[40:], "y_test": y[40:]}
    task = NpzArrays(path=save(tmp_path, parts), validation=0.2)
    assert [len(task.split(n)) for n in ("train", "val", "test")] == [24, 6, 20]
    assert torch.equal(task.split("test").images, torch.from_numpy(x[40:]))
    task = NpzArrays(path=save(tmp_path, parts | {"x_val": x[30:40], "y_val": y[30:40]}))
    assert [len(task.split(n)) for n in ("train", "val", "test")] == [30, 10, 20]


def test_an_ambiguous_layout_asks(arrays, tmp_path):
    path = save(tmp_path, {"images": np.zeros((60, 3, 10, 3), np.uint8), "labels": arrays["labels"]})
    with pytest.raises(UserError, match=r'task.layout = "nchw" or "nhwc"'):
        NpzArrays(path=path).split("train")
    assert NpzArrays(path=path, layout="nhwc").input_shape == (3, 3, 10)
    assert NpzArrays(path=path, layout="nchw").input_shape == (3, 10, 3)


X, Y = np.zeros((60, 1, 8, 8), np.uint8), np.arange(60) % 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"image": X, "labels": Y}, "array 'x_train' is missing; it holds image, labels"),
        ({"images": X}, "array 'labels' is missing"),
        ({"images": X, "labels": Y[:59]}, "60 images, labels 59 labels"),
        ({"images": X.astype(np.float32) + np.nan, "labels": Y}, "NaN"),
        ({"images": X + 2.0, "labels": Y}, r"lies in 2\.\.2; floating point images must lie in 0\.\.1"),
        ({"images": X.astype(np.int32), "labels": Y}, "int32; expected uint8"),
        ({"images": X[:, 0, 0], "labels": Y}, r"shape \(60, 8\); expected"),
        ({"images": X, "labels": Y + 0.5}, "expected integers"),
        ({"images": X, "labels": Y - 1}, "label -1 is negative"),
        ({"images": X, "labels": Y * 2}, "no training image has label 1"),
        ({"images": X, "labels": Y * 0}, "only one class"),
        ({"images": X, "labels": np.eye(3)[Y]}, r"float64 of shape \(60, 3\)"),
        ({"images": X, "labels": np.array(list("abc"))[Y]}, "expected integers"),
        ({"images": X, "labels": Y.astype(object)}, "no objects"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1}, r"test label 3 is beyond the 3 classes"),
        ({"x_train": X, "y_train": Y, "x_test": X[..., :7], "y_test": Y}, "test images are"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y, "x_val": X}, "y_val is missing"),
    ],
)  # fmt: skip
def test_bad_arrays_are_named(arrays, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        NpzArrays(path=save(tmp_path, arrays)).split("train")
    assert "a.npz" in str(error.value)


def test_files_that_are_no_npz_are_named(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UserError, match="does not exist"):
        NpzArrays(path=str(path)).split("train")
    path.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(UserError, match="cannot be read as an .npz file"):
        NpzArrays(path=str(path)).split("train")
    np.save(tmp_path / "b.npy", X)
    with pytest.raises(UserError, match=r"b.npy: is a single array .*numpy.savez"):
        NpzArrays(path=str(tmp_path / "b.npy")).split("train")


def test_class_names_must_fit(tmp_path):
    with pytest.raises(UserError, match="2 names for 3 classes"):
        NpzArrays(path=save(tmp_path, {"images": X, "labels": Y}), class_names=("a", "b")).split("train")
    with pytest.raises(UserError, match="task.class_names: 'a' is given to two classes"):
        NpzArrays(path=save(tmp_path, {"images": X, "labels": Y}), class_names=("a", "b", "a")).split("train")


def test_tasks_are_built_from_configuration_values(tmp_path):
    from nasbench.registry import options, resolve

    found = resolve("task", "npz")
    given = options(found, {"path": "x.npz", "class_names": ["a", "b"], "layout": "nchw"}, "task")
    assert found(**given).given_names == ("a", "b")
    with pytest.raises(UserError, match=r"task: unknown key 'pth'.*'path'"):
        options(found, {"pth": "x.npz"}, "task")
    with pytest.raises(UserError, match="layout"):
        options(found, {"path": "x", "layout": "hwc"}, "task")
