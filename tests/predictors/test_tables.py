"""Measured tables: what is read means what the file says, and what is wrong is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from predictors import MeasuredTable, TableLookup
from predictors.table_features import table_features, workload_totals
from predictors.tables import nasbench201_knobs
from search_spaces import MobileNetV3Space, NASBench201Space, UserError, load_space


@pytest.fixture(scope="module")
def space() -> MobileNetV3Space:
    found = load_space("quickstart", 1, 10)
    assert isinstance(found, MobileNetV3Space)
    return found


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


HELP = "arch_idx,arch_str,op_code,macs_cifar10,params_cifar10,phone,board_2"


def test_help_layout_is_read_and_survives_a_save(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", HELP, "0,x,421211,1,1,10.5,3", "1,x,334131,1,1,12.5,4", "2,x,000000,1,1,9,2")
    table = MeasuredTable.from_help(path)
    assert table.devices == ("phone", "board_2")
    assert table.column("board_2").tolist() == [3, 4, 2]
    assert table.rows(np.array([[0] * 6, [4, 2, 1, 2, 1, 1], [1] * 6])).tolist() == [2, 0, -1]
    table.save(tmp_path / "t.npz")
    again = MeasuredTable.load(tmp_path / "t.npz")
    assert again.knobs == table.knobs
    assert np.array_equal(again.archs, table.archs)
    assert np.array_equal(again.latency_ms, table.latency_ms)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0,x,421211,1,1,nan,3", "1,x,334131,1,1,2,4"], ["line 2", "'phone'", "positive number", "nan"]),
        (["0,x,421211,1,1,2,3", "1,x,334131,1,1,0,4"], ["line 3", "'phone'", "positive number", "0"]),
        (["0,x,421211,1,1,2,3", "1,x,334131,1,1,2,-4"], ["line 3", "'board_2'", "-4"]),
        (["0,x,421211,1,1,2,fast", "1,x,334131,1,1,2,4"], ["line 2", "'board_2'", "'fast'"]),
        (["0,x,421271,1,1,2,3", "1,x,334131,1,1,2,4"], ["line 2", "'op_code'", "0..4", "421271"]),
        (["0,x,42121,1,1,2,3", "1,x,334131,1,1,2,4"], ["line 2", "6 choice indices", "42121"]),
        (["0,x,421211,1,1,2", "1,x,334131,1,1,2,4"], ["line 2", "6 values for 7 columns"]),
        (["0,x,421211,1,1,2,3", "1,x,421211,1,1,2,4"], ["line 3", "line 2", "'board_2'", "4 instead of 3"]),
        (["0,x,421211,1,1,2,3"], ["at least 2"]),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[str], words: list[str]) -> None:
    path = write(tmp_path / "bad.csv", HELP, *rows)
    with pytest.raises(UserError) as error:
        MeasuredTable.from_help(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("choice", [-1, 5, 0.5, np.nan])
def test_choices_that_a_knob_does_not_have_are_named(choice: float) -> None:
    knobs = nasbench201_knobs()
    archs = np.array([[0] * 6, [0, 0, choice, 0, 0, 0]])
    with pytest.raises(UserError, match=rf"x: row 1, knob '{knobs[2].name}': choice {choice} is none of 0\.\.4"):
        MeasuredTable("x", knobs, archs, ("d",), np.array([[1.0], [2.0]]))


def test_csv_of_architectures_in_any_unit(tmp_path: Path, space: MobileNetV3Space) -> None:
    archs = np.unique(space.sample(5, np.random.default_rng(0)), axis=0)
    indices = ["_".join(map(str, arch)) for arch in archs]
    as_json = ['"' + json.dumps(space.decode(arch)).replace('"', '""') + '"' for arch in archs]
    rows = [f"{a},{1000 + i},{i + 1}" for i, a in enumerate(indices)]
    by_name = write(tmp_path / "a.csv", "arch,phone_us,latency_s,price_US", *(f"{row},3" for row in rows))
    by_column = write(
        tmp_path / "b.csv",
        "arch,latency,unit",
        *(f"{a},{1000 + i},{'us' if i else 'US'}" for i, a in enumerate(as_json)),
    )
    first, second = MeasuredTable.from_csv(by_name, space), MeasuredTable.from_csv(by_column, space)
    assert first.devices == ("phone", "latency")
    assert np.array_equal(first.archs, archs)
    assert np.array_equal(second.archs, archs)
    assert np.allclose(first.column("phone"), 1 + np.arange(len(archs)) / 1000)
    assert np.allclose(first.column("latency"), 1000 * (1 + np.arange(len(archs))))
    assert np.allclose(second.column("latency"), first.column("phone"))
    given = MeasuredTable.from_csv(by_name, space, columns={"p": "price_US", "l": "latency_s"}, unit="us")
    assert np.allclose(given.column("l"), first.column("latency") / 1e6)  # whatever the name seems to say
    capitals = write(tmp_path / "c.csv", "arch,phone_MS", *(f"{a},{i + 1}" for i, a in enumerate(indices)))
    assert MeasuredTable.from_csv(capitals, space).column("phone")[0] == 1


def test_helps_layout_read_as_any_csv_says_how_to_read_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="read by from_help"):
        MeasuredTable.from_csv(write(tmp_path / "h.csv", "op_code,pixel3", "000000,3"))


def test_csv_units_must_be_there_and_one(tmp_path: Path, space: MobileNetV3Space) -> None:
    a, b = ("_".join(map(str, arch)) for arch in np.unique(space.sample(9, np.random.default_rng(0)), axis=0)[:2])
    for lines, word in [
        (["arch,latency", f"{a},1", f"{b},2"], "no unit"),
        (["arch,latency,unit", f"{a},1,ms", f"{b},2,us"], "mixed units"),
        (["arch,latency_ms,target", f"{a},1,pixel_3", f"{b},2,pixel_4"], "line 3, column 'target': mixed targets"),
        (["arch,latency,unit", f"{a},1,sec", f"{b},2,sec"], "unknown unit 'sec'"),
        (["arch,latency_us,unit", f"{a},1,ms", f"{b},2,ms"], "by its name"),
        (["arch,phone_ms,phone_us", f"{a},1,1000", f"{b},2,2000"], "'phone_ms' and 'phone_us' are of one device"),
        (["net,latency_ms", f"{a},1", f"{b},2"], "'arch' or 'onnx'"),
        (["arch,latency_ms", "{oops,1", f"{b},2"], "not valid JSON"),
        (["arch,latency_ms", '"{""colour"": 3}",1', f"{b},2"], "unknown knob 'colour'"),
    ]:
        with pytest.raises(UserError, match=word):
            MeasuredTable.from_csv(write(tmp_path / "u.csv", *lines), space)


def test_repeated_equal_rows_count_once(tmp_path: Path, space: MobileNetV3Space) -> None:
    a, b = ("_".join(map(str, arch)) for arch in np.unique(space.sample(9, np.random.default_rng(0)), axis=0)[:2])
    table = MeasuredTable.from_csv(write(tmp_path / "r.csv", "arch,latency_ms", f"{a},1", f"{b},2", f"{a},1"), space)
    assert len(table) == 2


def test_lookup_is_exact_and_refuses_what_was_not_measured(tmp_path: Path, space: MobileNetV3Space) -> None:
    archs = np.unique(space.sample(8, np.random.default_rng(1)), axis=0)
    lines = [f"{'_'.join(map(str, arch))},{i + 1}" for i, arch in enumerate(archs[:-1])]
    lookup = TableLookup.from_csv(write(tmp_path / "l.csv", "arch,latency_ms", *lines), space)
    bound = lookup.bind(space)
    order = np.arange(len(archs) - 1)[::-1]
    assert bound.predict(archs[order]).mean.tolist() == (order + 1.0).tolist()
    with pytest.raises(UserError, match="never measured"):
        bound.predict(archs)
    with pytest.raises(UserError, match="tied"):
        lookup.predict([space.workload(archs[0])])
    with pytest.raises(UserError, match="tied"):
        lookup.bind(load_space("mobile96"))


def test_no_pickle_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", about=np.array([{"a": 1}], dtype=object))
    other = tmp_path / "other.npz"
    np.savez(other, a=np.zeros(3))
    for path in (tmp_path / "evil.npz", tmp_path / "absent.npz", write(tmp_path / "x.npz", "text"), other):
        with pytest.raises(UserError, match="cannot be read as a measured table"):
            MeasuredTable.load(path)


def test_totals_of_workloads_add_up(space: MobileNetV3Space) -> None:
    workloads = [space.workload(arch) for arch in space.sample(3, np.random.default_rng(0))]
    totals = workload_totals(workloads).reshape(3, -1, 4)
    assert np.allclose(totals[:, :, 1].sum(1) * 1e6, [w.macs for w in workloads])
    assert np.array_equal(workload_totals(workloads[1:2])[0], totals[1].ravel())


def test_nasbench201_features_agree_with_the_benchmark(data_dir: Path) -> None:
    import pandas as pd

    path = data_dir / "nb201_latency_help.csv.gz"
    table = MeasuredTable.from_help(path, ["pixel3"])
    features = table_features(table, table.archs)
    frame = pd.read_csv(path, usecols=["macs_cifar10"])
    assert np.allclose(np.exp(features.places["size"][:, 0]), frame["macs_cifar10"])
    assert features.cut.sum() == 341
    assert features.executed is not None
    assert (table.rows(features.executed) >= 0).all()
    # Dropping what the output does not depend on is done once and for all, and cuts nothing.
    again = table_features(table, features.executed)
    assert again.executed is not None
    assert np.array_equal(again.executed, features.executed)
    assert np.array_equal(again.cut, features.cut)


def test_measured_nasbench201_serves_the_space_itself(data_dir: Path) -> None:
    table = MeasuredTable.from_help(data_dir / "nb201_latency_help.csv.gz", ["raspi4"])
    space = NASBench201Space()
    assert table.belongs_to(space)
    bound = TableLookup(table).bind(space)
    archs = space.from_official_index([0, 7, 15_624])
    assert (bound.predict(archs).mean == table.column("raspi4")[[0, 7, 15_624]]).all()
