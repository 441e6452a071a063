"""Tasks from the user's own images: a folder per class, or arrays in an `.npz` file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from nasbench.tasks.array_task import ArrayTask, Dataset, stratified, to_split
from nasbench.tasks.base import Split, SplitName
from search_spaces.errors import UserError, nearest

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"})
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
Files = list[tuple[Path, int]]  # with labels


class ImageFolder(ArrayTask):
    """Images in one folder per class, `class/name.png`, or below `train/`, `val/` and `test/` folders.

    Without such folders, and for `val/` or `test/` where only `train/` exists, splits are cut off by a hash of the file
    names, stratified by class. Every image is scaled so that its shorter side fits, and cropped to the central square.
    Grey images of 16 bits are scaled to 8.

    Args:
        path: the folder.
        size: height and width in pixels of the stored images.
        channels: 3 for colour, 1 for grey.
        validation: share of the images for validation, where no `val/` exists.
        test: share of the images for the test, where no `test/` exists.
        seed: of the splits.
        shift: largest random shift of a training image in pixels.
        flip: mirror training images at random.
    """

    name = "folder"

    def __init__(
        self,
        *,
        path: str,
        size: int = 96,
        channels: Literal[1, 3] = 3,
        validation: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        shift: int = 4,
        flip: bool = True,
    ) -> None:
        super().__init__(shift=shift, flip=flip)
        if size < 1:
            raise UserError(f"task.size: pixels must be 1 or more, got {size}")
        if channels not in (1, 3):
            raise UserError(f"task.channels: 1 (grey) or 3 (colour), got {channels}")
        self.path = Path(path).expanduser()
        self.size = size
        self.channels = channels
        self.fractions: dict[SplitName, float] = {"val": validation, "test": test}
        self.seed = seed

    def load(self) -> Dataset:
        if not self.path.is_dir():
            raise UserError(f"task.path: {self.path} is not a directory; expected folders of images, class/name.png")
        presplit = (self.path / "train").is_dir()
        classes = _folders(self.path / "train" if presplit else self.path)
        if len(classes) < 2:
            raise UserError(f"task.path: {self.path} holds {len(classes)} class folders; at least two are needed")
        files: dict[SplitName, Files] = {"train": _files(self.path, "train" if presplit else "", classes)}
        if presplit:
            for name in SPLITS[1:]:
                if (self.path / name).is_dir():
                    files[name] = _files(self.path, name, classes)
        missing = {name: fraction for name, fraction in self.fractions.items() if name not in files}
        if missing:
            pool = files["train"]
            names = [f"{classes[label]}/{file.name}" for file, label in pool]
            rows = stratified(names, np.array([label for _, label in pool]), missing, self.seed, str(self.path))
            files |= {name: [pool[i] for i in rows[name]] for name in rows}
        return Dataset(self._decode({name: files[name] for name in SPLITS}), classes)

    def _decode(self, files: dict[SplitName, Files]) -> dict[SplitName, Split]:
        bad: list[str] = []
        splits: dict[SplitName, Split] = {}
        for name, members in files.items():
            images = np.empty((len(members), self.channels, self.size, self.size), np.uint8)
            for row, (file, _) in enumerate(members):
                try:
                    with Image.open(file) as image:
                        small = ImageOps.fit(
                            _eight_bits(image).convert("RGB" if self.channels == 3 else "L"),
                            (self.size, self.size),
                            Image.Resampling.BILINEAR,
                        )
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    bad.append(f"{file} ({error})")
                    continue
                pixels = np.asarray(small)
                images[row] = pixels.transpose(2, 0, 1) if self.channels == 3 else pixels
            splits[name] = to_split(images, np.array([label for _, label in members]))
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"unreadable images: {'; '.join(bad[:3])}{more}; repair or remove them")
        return splits


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel, since Pillow's `convert` cuts off what is brighter. Raises ValueError."""
    # Pillow before 11 reads PNGs of 16 bits as "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}), whose range is unknown; save them with 8 or 16")
    return image


def _folders(path: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _files(root: Path, split: str, classes: tuple[str, ...]) -> Files:
    """The image files of a folder with their labels, in a fixed order."""
    folder = root / split
    extra = set(_folders(folder)) - set(classes)
    if extra:
        raise UserError(
            f"{folder}: class {min(extra)!r} is not among the classes of training. {nearest(min(extra), classes)}"
        )
    found: Files = []
    for label, name in enumerate(classes):
        here = folder / name
        images = sorted(p for p in here.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
        if not images:
            raise UserError(f"{here}: no images; expected files such as {name}/name.png")
        found += [(p, label) for p in images]
    return found


class NpzArrays(ArrayTask):
    """Arrays in an `.npz` file.

    Either `x_train`, `y_train`, `x_test`, `y_test` and perhaps `x_val`, `y_val` (else cut off the training images), or
    `images` and `labels`, split by a hash of the row number, stratified by class. Images are uint8, or floating point
    in 0..1, of shape `(n, h, w)`, `(n, c, h, w)` or `(n, h, w, c)`; labels are integers from 0.

    Args:
        path: the file.
        layout: `nchw` or `nhwc` where the shape alone does not tell.
        class_names: names of the classes in label order; the numbers by default.
        validation: share of the images for validation, where the file has none.
        test: share of the images for the test, where the file has none.
        seed: of the splits.
        shift: largest random shift of a training image in pixels.
        flip: mirror training images at random.
    """

    name = "npz"

    def __init__(
        self,
        *,
        path: str,
        layout: Literal["auto", "nchw", "nhwc"] = "auto",
        class_names: tuple[str, ...] = (),
        validation: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        shift: int = 2,
        flip: bool = False,
    ) -> None:
        super().__init__(shift=shift, flip=flip)
        self.path = Path(path).expanduser()
        self.layout = layout
        self.given_names = tuple(class_names)
        self.fractions: dict[SplitName, float] = {"val": validation, "test": test}
        self.seed = seed

    def load(self) -> Dataset:
        arrays = self._read()
        parts: dict[SplitName, tuple[NDArray[np.uint8], NDArray[np.int64]]]
        if "images" in arrays:
            parts = {"train": self._part(arrays, "images", "labels")}
            fractions = self.fractions
        else:
            parts = {name: self._part(arrays, f"x_{name}", f"y_{name}") for name in SPLITS if f"x_{name}" in arrays}
            fractions = {"val": self.fractions["val"]} if "val" not in parts else {}
        if fractions:
            x, y = parts["train"]
            rows = stratified([str(i) for i in range(len(y))], y, fractions, self.seed, str(self.path))
            parts |= {name: (x[picked], y[picked]) for name, picked in rows.items()}
        names = self._class_names(parts["train"][1])
        for split, (x, y) in parts.items():
            if y.max() >= len(names):
                raise UserError(
                    f"{self.path}: {split} label {y.max()} is beyond the {len(names)} classes (0..{len(names) - 1})"
                )
            if x.shape[1:] != parts["train"][0].shape[1:]:
                raise UserError(
                    f"{self.path}: {split} images are {x.shape[1:]}, those of training {parts['train'][0].shape[1:]}"
                )
        return Dataset({name: to_split(*parts[name]) for name in SPLITS}, names)

    def _read(self) -> dict[str, NDArray[Any]]:
        try:
            loaded = np.load(self.path, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise UserError(
                    f"{self.path}: is a single array (.npy); an .npz file with images and labels was expected, as "
                    "numpy.savez(file, images=..., labels=...) writes it"
                )
            with loaded as file:
                wanted = ("images", "labels") if "images" in file.files else ("x_train", "y_train", "x_test", "y_test")
                for key in wanted:
                    if key not in file.files:
                        raise UserError(
                            f"{self.path}: array {key!r} is missing; it holds {', '.join(file.files) or 'nothing'}. "
                            "Expected x_train, y_train, x_test, y_test (and x_val, y_val), or images, labels"
                        )
                optional = ("x_val", "y_val") if "x_val" in file.files and "images" not in wanted else ()
                return {key: file[key] for key in (*wanted, *optional)}
        except FileNotFoundError as error:
            raise UserError(f"task.path: {self.path} does not exist") from error
        except KeyError as error:
            raise UserError(f"{self.path}: x_val is there but y_val is missing") from error
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{self.path}: cannot be read as an .npz file of plain arrays ({error}); no objects, no .npy"
            ) from error

    def _part(
        self, arrays: dict[str, NDArray[Any]], x_key: str, y_key: str
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        x, y = self._images(arrays[x_key], x_key), self._labels(arrays[y_key], y_key)
        if len(x) != len(y) or not len(x):
            raise UserError(
                f"{self.path}: {x_key} has {len(x)} images, {y_key} {len(y)} labels; equal and not 0 expected"
            )
        return x, y

    def _images(self, x: NDArray[Any], key: str) -> NDArray[np.uint8]:
        where = f"{self.path}: {key}"
        if x.dtype.kind == "f":
            if not np.isfinite(x).all():
                raise UserError(f"{where} holds NaN or infinite values")
            if x.size and (x.min() < 0 or x.max() > 1):
                raise UserError(f"{where} lies in {x.min():g}..{x.max():g}; floating point images must lie in 0..1")
            x = np.rint(x * 255).astype(np.uint8)
        elif x.dtype != np.uint8:
            raise UserError(f"{where} is {x.dtype}; expected uint8, or floating point in 0..1")
        if x.ndim == 3:
            return x[:, None]
        if x.ndim != 4:
            raise UserError(f"{where} has shape {x.shape}; expected (n, h, w), (n, c, h, w) or (n, h, w, c)")
        first, last = x.shape[1] in (1, 3, 4), x.shape[3] in (1, 3, 4)
        if self.layout == "auto" and first == last:
            raise UserError(
                f'{where} has shape {x.shape}, which does not tell its channels; set task.layout = "nchw" or "nhwc"'
            )
        return x.transpose(0, 3, 1, 2) if self.layout == "nhwc" or (self.layout == "auto" and last) else x

    def _labels(self, y: NDArray[Any], key: str) -> NDArray[np.int64]:
        where = f"{self.path}: {key}"
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1 or y.dtype.kind not in "iu":
            raise UserError(f"{where} is {y.dtype} of shape {y.shape}; expected integers of shape (n,)")
        if y.size and y.min() < 0:
            raise UserError(f"{where}: label {y.min()} is negative; classes count from 0")
        return y.astype(np.int64)

    def _class_names(self, labels: NDArray[np.int64]) -> tuple[str, ...]:
        counts = np.bincount(labels)
        if len(counts) < 2:
            raise UserError(f"{self.path}: only one class; at least two are needed")
        if (counts == 0).any():
            raise UserError(
                f"{self.path}: no training image has label {int(np.argmin(counts))}; labels must be 0..k-1, all used"
            )
        if self.given_names and len(self.given_names) != len(counts):
            raise UserError(f"task.class_names: {len(self.given_names)} names for {len(counts)} classes")
        if twice := [name for name in self.given_names if self.given_names.count(name) > 1]:
            raise UserError(f"task.class_names: {twice[0]!r} is given to two classes; each needs its own")
        return self.given_names or tuple(str(i) for i in range(len(counts)))
