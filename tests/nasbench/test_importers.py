"""Tables of others: the official layout of NATS-Bench, made small here, and files that want to run something."""

from __future__ import annotations

import bz2
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import nasbench.cli as cli
from nasbench.evaluators.table import ArchitectureTable
from nasbench.importers.nats_bench import read_nats_bench, read_plain
from search_spaces import NASBench201Space, UserError

SPLITS = {"cifar10-valid": ["x-valid"], "cifar10": ["ori-test"], "cifar100": ["x-valid", "x-test"]}


def result(dataset: str, accuracy: float) -> dict:
    """As the official files have it, less what is not read; numbers as numpy's, as they are there."""
    return {
        "dataset": dataset,
        "epochs": 200,
        "eval_acc1es": {f"{s}@{e}": np.float64(accuracy + (e == 199)) for s in SPLITS[dataset] for e in (11, 199)},
        "train_times": OrderedDict((e, 2.0) for e in range(200)),
        "net_state_dict": None,
    }


def info(index: int) -> OrderedDict:
    results = {(d, seed): result(d, 50 + index + seed / 1000) for d in SPLITS for seed in (777, 888)}
    full = {"all_results": results, "dataset_seed": {d: [777, 888] for d in SPLITS}, "arch_str": "unused"}
    return OrderedDict([("12", {"all_results": {}}), ("200", full)])


@pytest.fixture
def strings() -> list[str]:
    space = NASBench201Space()
    return space.to_string(space.from_official_index(range(12)))


def squeezed(path: Path, value: object) -> None:
    path.write_bytes(bz2.compress(pickle.dumps(value)))


@pytest.fixture
def directory(tmp_path: Path, strings: list[str]) -> Path:
    folder = tmp_path / "NATS-tss-v1_0-3ffb9-simple"
    folder.mkdir()
    squeezed(folder / "meta.pickle.pbz2", {"meta_archs": strings, "total_archs": len(strings)})
    for index in (3, 0, 7):
        squeezed(folder / f"{index:06d}.pickle.pbz2", info(index))
    return folder


def test_both_official_layouts_become_a_table(directory, tmp_path, strings):
    out = tmp_path / "nats.csv"
    done = CliRunner().invoke(cli.app, ["tables", "import", str(directory), str(out)])
    assert done.exit_code == 0, done.output
    space = NASBench201Space()
    table = ArchitectureTable.read(out, space, columns={"accuracy": "cifar100_test_acc", "seconds": "train_seconds"},
                                   scale={"accuracy": 0.01})  # fmt: skip
    assert space.official_index(table.archs).tolist() == [0, 3, 7]
    # The last epoch's, mean of the two seeds.
    np.testing.assert_allclose(table.column("accuracy"), (51 + np.array([0, 3, 7]) + 0.8325) / 100)
    assert (table.column("seconds") == 400).all()
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["rows"] == 3
    assert len(record["sha256"]) == 64
    assert record["columns"]["cifar100_test_acc"] == "percent"
    assert "imagenet16_120_test_acc" not in record["columns"]  # nothing in the file, no empty column
    whole = tmp_path / "NATS-tss-v1_0-3ffb9.pickle.pbz2"
    squeezed(
        whole, {"meta_archs": strings, "arch2infos": {i: info(i) for i in (7, 3, 0)}, "evaluated_indexes": [0, 3, 7]}
    )
    assert read_nats_bench(whole).rows == read_nats_bench(directory).rows


class Hostile:
    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize(
    "hostile",
    [
        Hostile(os.system, "touch {}"),
        Hostile(eval, "open({!r}, 'w')"),
        Hostile(np.fromfile, "{}"),
        Hostile(np.load, "{}"),
        {"meta_archs": [Hostile(exec, "open({!r}, 'w')")]},
    ],
)
def test_nothing_in_a_file_is_executed(tmp_path, hostile):
    target = tmp_path / "touched"
    data = pickle.dumps(hostile).replace(b"{}", str(target).encode())
    with pytest.raises(UserError, match="not opened: it wants .* only plain values|cannot be read as a pickle"):
        read_plain(bz2.compress(data), "file")
    assert not target.exists()
    arrays = np.array([Hostile(os.system, "true")], dtype=object)
    with pytest.raises(UserError, match="not opened"):
        read_plain(pickle.dumps(arrays), "file")
    plain = {"a": np.arange(3.0), "b": [np.float32(2), (1, "x", None)], "c": OrderedDict(d=np.int64(1))}
    read = read_plain(pickle.dumps(plain), "file")
    np.testing.assert_array_equal(read["a"], plain["a"])
    assert read["b"] == plain["b"]


def test_what_is_no_such_file_is_told(directory, tmp_path, strings):
    with pytest.raises(UserError, match=r"no meta\.pickle\.pbz2 in it"):
        read_nats_bench(tmp_path)
    (tmp_path / "noise.pbz2").write_bytes(b"BZh9 and so on")
    with pytest.raises(UserError, match=r"noise\.pbz2: cannot be read as a pickle"):
        read_nats_bench(tmp_path / "noise.pbz2")
    squeezed(tmp_path / "other.pbz2", {"something": 1})
    with pytest.raises(UserError, match="no 'meta_archs' and 'arch2infos'"):
        read_nats_bench(tmp_path / "other.pbz2")
    squeezed(directory / "000001.pickle.pbz2", {"200": {"all_results": 3}})
    with pytest.raises(UserError, match="network 1: is not laid out as"):
        read_nats_bench(directory)
    squeezed(directory / "000001.pickle.pbz2", info(1))
    squeezed(directory / "meta.pickle.pbz2", {"meta_archs": [strings[0], "|nor_conv_3x3|", *strings[2:]]})
    with pytest.raises(UserError, match="network 1: .*nor_conv_3x3.*unknown operation"):
        read_nats_bench(directory)


def test_tables_in_the_layout_of_help(data_dir, tmp_path):
    out = tmp_path / "fbnet.csv"
    done = CliRunner().invoke(cli.app, ["tables", "import", str(data_dir / "fbnet_latency_help.csv.gz"), str(out)])
    assert done.exit_code == 0, done.output
    from search_spaces import load_space

    space = load_space("fbnet_32")
    table = ArchitectureTable.read(out, space, columns={"latency_ms@pixel3": "pixel3_ms"})
    assert len(table) == 5000
    assert table.column("latency_ms@pixel3")[0] > 0


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    for arguments, message in (
        ([str(tmp_path / "x"), "o.csv"], "no such file"),
        ([str(tmp_path), "o.xlsx"], "written as .csv"),
        ([str(tmp_path), "o.csv", "--layout", "hepl"], "--layout 'hepl'"),
    ):
        assert message in str(CliRunner().invoke(cli.app, ["tables", "import", *arguments]).exception)
