"""The embedded images, the originals, and their download."""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from nasbench.tasks import fashion_mnist
from nasbench.tasks.fashion_mnist import EMBEDDED, FILES, FashionMNIST, embedded, fetch, original, read_idx
from search_spaces import UserError

ORIGINALS = Path(os.environ.get("NASBENCH_DATA", "absent")) / "fashion-mnist"
needs_originals = pytest.mark.skipif(not ORIGINALS.is_dir(), reason="$NASBENCH_DATA does not name the original files")


@pytest.fixture(scope="module")
def task():
    return FashionMNIST()


def test_the_embedded_splits_are_balanced_and_disjoint(task):
    counts = {"train": 1200, "val": 200, "test": 200}
    seen = set()
    for name, per_class in counts.items():
        split = task.split(name)
        assert split.images.shape == (10 * per_class, 1, 28, 28)
        assert split.images.dtype == torch.uint8
        assert torch.bincount(split.labels).tolist() == [per_class] * 10
        images = {image.numpy().tobytes() for image in split.images}
        assert not images & seen
        seen |= images
    assert (task.num_classes, task.input_shape) == (10, (1, 28, 28))


def test_labels_are_mixed_so_that_any_prefix_is_fair(task):
    first = torch.bincount(task.split("train").labels[:1000], minlength=10)
    assert first.min() > 60


def test_the_licence_lies_beside_the_images():
    text = (EMBEDDED.parent / "LICENSE.fashion_mnist").read_text()
    assert "Zalando" in text
    assert "MIT" in text
    assert EMBEDDED.stat().st_size < 8e6


def test_a_changed_embedded_file_is_refused(tmp_path):
    with np.load(EMBEDDED) as file:
        arrays = dict(file)
    arrays["y_test"] = arrays["y_test"][::-1]
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(UserError, match=r"changed.npz.*differ from the released"):
        embedded(tmp_path / "changed.npz")
    (tmp_path / "cut.npz").write_bytes(EMBEDDED.read_bytes()[:1_000_000])
    for name in ("cut.npz", "absent.npz"):
        with pytest.raises(UserError, match=f"{name}.*cannot be read"):
            embedded(tmp_path / name)


@needs_originals
def test_the_full_set_holds_the_embedded_one():
    arrays = original(ORIGINALS)
    assert {n: len(arrays[f"y_{n}"]) for n in ("train", "val", "test")} == {"train": 55000, "val": 5000, "test": 10000}
    assert (np.bincount(arrays["y_val"]) == 500).all()
    small = embedded()
    everything = {x.tobytes() for x in arrays["x_train"]} | {x.tobytes() for x in arrays["x_val"]}
    assert all(x.tobytes() in everything for x in small["x_train"][:500])
    test = {x.tobytes() for x in arrays["x_test"]}
    assert all(x.tobytes() in test for x in small["x_test"][:500])


@needs_originals
def test_a_path_gives_all_images():
    task = FashionMNIST(path=str(ORIGINALS))
    assert len(task.split("train")) == 55000


def test_missing_and_corrupt_originals_are_named(tmp_path):
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.gz does not exist.*download = true"):
        FashionMNIST(path=str(tmp_path)).split("train")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    good = gzip.compress(b"\0\0\x08\x03" + np.array([1, 28, 28], ">u4").tobytes() + bytes(784))
    path.write_bytes(good)
    assert read_idx(path).shape == (1, 28, 28)
    for bad, message in (
        (good[:-30], "not a gzip file"),
        (b"<html>not found</html>", "not a gzip file"),
        (gzip.compress(b"hello"), "not an IDX file"),
        (gzip.compress(gzip.decompress(good)[:-1]), "do not match its header"),
        (gzip.compress(b"\0\0\x08\x03\0"), "do not match its header"),
    ):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=f"train-images-idx3-ubyte.gz.*{message}.*SHA-256 should be b0564c3e"):
            read_idx(path)


def test_path_and_download_exclude_each_other():
    with pytest.raises(UserError, match="not both"):
        FashionMNIST(path="x", download=True)


@pytest.fixture
def server(tmp_path):
    """A local web server; yields its directory, its address and the paths asked for."""
    root = tmp_path / "served"
    root.mkdir()
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{httpd.server_address[1]}", asked
        httpd.shutdown()


def test_a_download_with_another_checksum_is_not_kept(server, tmp_path):
    root, url, _ = server
    for name in FILES:
        (root / name).write_bytes(gzip.compress(b"something else"))
    with pytest.raises(UserError, match=r"SHA-256 is [0-9a-f]{64}, expected b0564c3e"):
        fetch(tmp_path / "data", url)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_download_that_fails_says_what_to_do(server, tmp_path):
    _, url, _ = server
    for address in (url, "http://127.0.0.1:9", "nonsense"):
        with pytest.raises(UserError, match=r"cannot download .*set task.url to a mirror, or task.path"):
            fetch(tmp_path / "data", address)
    assert list((tmp_path / "data").iterdir()) == []


def test_files_are_fetched_once_and_checked(server, tmp_path, monkeypatch, capsys):
    """With small files in the originals' place, their checksums pinned for the test."""
    import hashlib

    root, url, asked = server
    shapes = ((40, 28, 28), (40,), (20, 28, 28), (20,))
    pinned = {}
    for name, shape in zip(FILES, shapes, strict=True):
        values = np.arange(int(np.prod(shape))) % (10 if len(shape) == 1 else 256)
        header = b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, ">u4").tobytes()
        data = gzip.compress(header + values.astype(np.uint8).tobytes())
        (root / name).write_bytes(data)
        pinned[name] = hashlib.sha256(data).hexdigest()
    monkeypatch.setattr(fashion_mnist, "FILES", pinned)
    monkeypatch.setattr(fashion_mnist, "FULL_VALIDATION_PER_CLASS", 1)
    monkeypatch.setenv("NASBENCH_HOME", str(tmp_path / "home"))
    task = FashionMNIST(download=True, url=url)
    assert {n: len(task.split(n)) for n in ("train", "val", "test")} == {"train": 30, "val": 10, "test": 20}
    assert len(asked) == 4
    assert capsys.readouterr().err.count("Downloaded") == 4
    # The second time nothing is asked for, and a file that was damaged on disk is fetched again.
    folder = tmp_path / "home" / "datasets" / "fashion-mnist"
    FashionMNIST(download=True, url=url).split("train")
    assert len(asked) == 4
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    FashionMNIST(download=True, url=url).split("train")
    assert asked[4:] == ["/t10k-labels-idx1-ubyte.gz"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(pinned)


@needs_originals
def test_the_originals_pass_the_pinned_checksums(tmp_path, monkeypatch):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=ORIGINALS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        fetch(tmp_path, f"http://127.0.0.1:{httpd.server_address[1]}")
        httpd.shutdown()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)


@needs_originals
def test_the_script_makes_the_embedded_arrays(tmp_path, monkeypatch):
    import runpy

    module = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_fashion_mnist_subset.py"))
    module["main"].__globals__["EMBEDDED"] = tmp_path / "made.npz"
    module["main"](ORIGINALS)
    made = embedded(tmp_path / "made.npz")
    assert all(np.array_equal(made[k], v) for k, v in embedded().items())
