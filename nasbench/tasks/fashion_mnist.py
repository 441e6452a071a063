"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747; Zalando SE, MIT licence): the default task."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import struct
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware_profiles.paths import atomic, sha256_of, user_data_dir
from nasbench.tasks.array_task import ArrayTask, Dataset, content_sha256, to_split
from search_spaces.errors import UserError

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# The four original files with their SHA-256: the same in every mirror.
FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
EMBEDDED = Path(__file__).parent / "data" / "fashion_mnist_16k.npz"
EMBEDDED_SHA256 = "9ed8af5cbedbad87bc79c0e03f33d5d0171e04ffd0376519455154cd372f1ea2"
FULL_VALIDATION_PER_CLASS = 500


class FashionMNIST(ArrayTask):
    """28x28 grey images of ten kinds of clothing.

    The embedded default has 12,000 training and 2,000 validation images from the original training set and 2,000 test
    images from the original test set, all balanced (`tools/make_fashion_mnist_subset.py` made it). With `path` or
    `download` it is all 70,000: 55,000 training images, 5,000 for validation (the last 500 of every class of the
    original training set) and the 10,000 original test images.

    Args:
        path: directory with the four original `.gz` files; empty for the embedded images.
        download: fetch the four files into the user's data directory, once, and use them.
        url: where to download from; any mirror will do, since checksums are pinned.
        shift: largest random shift of a training image in pixels. The garments are centred: shifting them helps long
            training only (after 3 epochs, 2 pixels cost a network of 6 M MACs 2.5 points of accuracy).
        flip: mirror training images at random.
    """

    name = "fashion_mnist"

    def __init__(
        self, *, path: str = "", download: bool = False, url: str = URL, shift: int = 0, flip: bool = True
    ) -> None:
        super().__init__(shift=shift, flip=flip)
        if path and download:
            raise UserError("task: give either path or download = true, not both")
        self.path = Path(path).expanduser() if path else None
        self.download = download
        self.url = url

    def load(self) -> Dataset:
        if self.download:
            self.path = user_data_dir() / "datasets" / "fashion-mnist"
            fetch(self.path, self.url)
        arrays = embedded() if self.path is None else original(self.path)
        splits = {
            name: to_split(arrays[f"x_{name}"][:, None], arrays[f"y_{name}"]) for name in ("train", "val", "test")
        }
        return Dataset(splits, CLASS_NAMES)  # type: ignore[arg-type]


def embedded(path: Path = EMBEDDED) -> dict[str, NDArray[np.uint8]]:
    """The arrays `x_*` `(n, 28, 28)` and `y_*` `(n,)` uint8 of the embedded subset.

    Raises:
        UserError: the file is missing or differs from the one that was released.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: the embedded Fashion-MNIST images cannot be read ({error}); reinstall") from error
    if content_sha256(arrays) != EMBEDDED_SHA256:
        raise UserError(f"{path}: the embedded Fashion-MNIST images differ from the released ones; reinstall")
    return arrays


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped IDX file of unsigned bytes (format: http://yann.lecun.com/exdb/mnist).

    Raises:
        UserError: missing, truncated or not such a file.
    """
    try:
        with gzip.open(path) as file:
            data = file.read()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; the directory must hold {', '.join(FILES)} (task.download = true fetches them)"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a gzip file ({error}); its SHA-256 should be {FILES[path.name]}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise UserError(f"{path}: not an IDX file of bytes; its SHA-256 should be {FILES[path.name]}")
    dimensions = data[3]
    header = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}I", data[4:header]) if len(data) >= header else ()
    if not shape or int(np.prod(shape)) != len(data) - header:
        raise UserError(f"{path}: {len(data)} bytes do not match its header; its SHA-256 should be {FILES[path.name]}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def original(directory: Path) -> dict[str, NDArray[np.uint8]]:
    """The full data set from its four files, split into 55,000 / 5,000 / 10,000 images.

    Raises:
        UserError: a file that is missing, corrupt or of another shape.
    """
    x, y, x_test, y_test = (read_idx(directory / name) for name in FILES)
    for images, labels, name in ((x, y, "train"), (x_test, y_test, "t10k")):
        if images.ndim != 3 or images.shape[1:] != (28, 28) or labels.shape != (len(images),) or labels.max() > 9:
            raise UserError(
                f"{directory}: the {name} files hold images {images.shape} and labels {labels.shape}; "
                "expected (n, 28, 28) and (n,) with classes 0..9"
            )
    held_out = [np.flatnonzero(y == c)[-FULL_VALIDATION_PER_CLASS:] for c in range(len(CLASS_NAMES))]
    validation = np.zeros(len(y), dtype=bool)
    validation[np.concatenate(held_out)] = True
    return {
        "x_train": x[~validation], "y_train": y[~validation],
        "x_val": x[validation], "y_val": y[validation],
        "x_test": x_test, "y_test": y_test,
    }  # fmt: skip


def fetch(directory: Path, url: str = URL) -> None:
    """Download what is missing of the four files, each checked before it gets its name.

    Raises:
        UserError: no connection, or a file with another checksum.
    """
    for name, sha256 in FILES.items():
        target = directory / name
        if target.exists() and sha256_of(target) == sha256:
            continue
        source = f"{url.rstrip('/')}/{name}"
        with atomic(target) as temporary:
            try:
                with temporary.open("wb") as file:
                    found = _copy(source, file)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise UserError(
                    f"cannot download {source}: {error}; set task.url to a mirror, or task.path to a directory "
                    "that holds the four files"
                ) from error
            if found != sha256:
                raise UserError(f"{source}: SHA-256 is {found}, expected {sha256}; not kept, try another mirror")


def _copy(source: str, file: Any) -> str:
    """Copy a URL into an open file with a progress line on stderr; returns its SHA-256."""
    digest = hashlib.sha256()
    done = 0
    with urllib.request.urlopen(source, timeout=30) as response:
        total = int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(1 << 18):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            if sys.stderr.isatty():
                share = f" of {total / 1e6:.1f}" if total else ""
                print(f"\rDownloading {source}: {done / 1e6:.1f}{share} MB", end="", file=sys.stderr)
    print(f"\rDownloaded {source}: {done / 1e6:.1f} MB", file=sys.stderr)
    return digest.hexdigest()
