"""Official files of NATS-Bench's topology search space (Dong et al., TPAMI 2021), read without running them.

The authors publish pickles, which can run anything when they are opened. Here they are opened by an unpickler that
knows plain values, `OrderedDict` and numbers of numpy, and refuses everything else: nothing in the file is called.

Two layouts are read: the directory `NATS-tss-v1_0-3ffb9-simple`, with `meta.pickle.pbz2` and one `000123.pickle.pbz2`
per network, and one file `NATS-tss-v1_0-3ffb9.pickle.pbz2` with the keys `meta_archs` and `arch2infos`.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import pickle  # only through the unpickler below; see tests/test_dependencies.py
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.importers.manifest import Imported
from search_spaces import NASBench201Space, UserError

EPOCHS = "200"  # the full training; the files have 12 epochs beside it
# Column -> data set and split of its last epoch, by the names in the files.
ACCURACIES = {
    "cifar10_valid_acc": ("cifar10-valid", "x-valid"),
    "cifar10_test_acc": ("cifar10", "ori-test"),
    "cifar100_valid_acc": ("cifar100", "x-valid"),
    "cifar100_test_acc": ("cifar100", "x-test"),
    "imagenet16_120_valid_acc": ("ImageNet16-120", "x-valid"),
    "imagenet16_120_test_acc": ("ImageNet16-120", "x-test"),
}
_SINGLE = ("meta_archs", "arch2infos")
_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
}
# Where numpy's makers of scalars and arrays live, by version of the numpy that wrote the file.
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")


class _Plain(pickle.Unpickler):
    """Refuses every name but those of plain containers and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in _NUMPY and name in ("scalar", "_reconstruct"):
            return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        raise pickle.UnpicklingError(f"it wants {module}.{name}, and only plain values are read")


def read_plain(data: bytes, where: str) -> Any:
    """The value of a pickle, compressed with bzip2 or not, if it is plain.

    Raises:
        UserError: it wants anything beside plain containers and numbers, or is damaged.
    """
    try:
        raw = bz2.decompress(data) if data[:3] == b"BZh" else data
        return _Plain(io.BytesIO(raw)).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{where}: not opened: {error}") from error
    except Exception as error:  # damaged files raise a dozen kinds
        raise UserError(f"{where}: cannot be read as a pickle: {type(error).__name__}: {error}") from error


def read_nats_bench(path: Path) -> Imported:
    """The 200-epoch results of every network in an official file or directory, mean over the seeds, in percent.

    Returns:
        Columns `arch_idx`, `op_code` (six digits, as in HELP's table), `arch_str`, the accuracies, and the seconds of
        training on CIFAR-10, `train_seconds`, where the file has them.

    Raises:
        UserError: it is none of the two layouts, is damaged, or a network is not as it should be.
    """
    space = NASBench201Space()
    digest = hashlib.sha256()
    rows = []
    for index, text, info in _networks(path, digest):
        where = f"{path}: network {index}"
        try:
            arch = space.from_string(text)[0]
            results = info[EPOCHS]
            values = {column: _accuracy(results, *source) for column, source in ACCURACIES.items()}
            seconds = _seconds(results)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"{where}: is not laid out as NATS-Bench's topology files are ({type(error).__name__}: {error})"
            ) from error
        rows.append([index, "".join(map(str, arch)), text, *values.values(), seconds])
    rows.sort()
    header = ["arch_idx", "op_code", "arch_str", *ACCURACIES, "train_seconds"]
    full = [c for c in range(len(header)) if any(row[c] is not None for row in rows)]
    source = (
        "NATS-Bench, topology search space (Dong et al., TPAMI 2021, arXiv:2009.00437), 200 epochs, mean over seeds"
    )
    return Imported(
        [header[c] for c in full], [[row[c] for c in full] for row in rows], source, digest.hexdigest(),
        units=dict.fromkeys(ACCURACIES, "percent") | {"train_seconds": "s, on CIFAR-10, 200 epochs"},
    )  # fmt: skip


def _networks(path: Path, digest: Any) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Index, string and results by epochs of every network; the digest takes in all that was read."""

    def value(file: Path) -> Any:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from error
        digest.update(data)
        return read_plain(data, str(file))

    if path.is_dir():
        if not (path / "meta.pickle.pbz2").is_file():
            raise UserError(f"{path}: no meta.pickle.pbz2 in it; NATS-tss-v1_0-3ffb9-simple has one")
        meta = value(path / "meta.pickle.pbz2")
        if not isinstance(meta, Mapping) or "meta_archs" not in meta:
            raise UserError(f"{path / 'meta.pickle.pbz2'}: has no 'meta_archs'")
        files = sorted(f for f in path.glob("*.pickle.pbz2") if f.name.partition(".")[0].isdecimal())
        if not files:
            raise UserError(f"{path}: no networks in it, such as 000000.pickle.pbz2")
        for file in files:
            index = int(file.name.partition(".")[0])
            if index >= len(meta["meta_archs"]):
                raise UserError(f"{file}: there are but {len(meta['meta_archs'])} networks in meta.pickle.pbz2")
            yield index, meta["meta_archs"][index], value(file)
        return
    whole = value(path)
    if not isinstance(whole, Mapping) or not set(_SINGLE) <= whole.keys():
        raise UserError(f"{path}: has no 'meta_archs' and 'arch2infos', as NATS-tss-v1_0-3ffb9.pickle.pbz2 has")
    for index, info in whole["arch2infos"].items():
        yield int(index), whole["meta_archs"][index], info


def _accuracy(results: Mapping[str, Any], dataset: str, split: str) -> float | None:
    """Mean over seeds of the last epoch's accuracy; None where the file has none."""
    found = []
    for (name, _), result in results["all_results"].items():
        if name == dataset:
            accuracies = result["eval_acc1es"]
            last = f"{split}@{int(result['epochs']) - 1}"
            if last in accuracies:
                found.append(float(accuracies[last]))
    return round(float(np.mean(found)), 4) if found else None


def _seconds(results: Mapping[str, Any]) -> float | None:
    """Mean over seeds of the seconds of training; None where the file has none."""
    found = []
    for (name, _), result in results["all_results"].items():
        times = result.get("train_times") if name == "cifar10" else None
        if times:
            found.append(sum(float(t) for t in (times.values() if isinstance(times, Mapping) else times)))
    return round(float(np.mean(found)), 2) if found else None
