"""From other devices' tables to a new device: `devices suggest`, `measure`, `calibrate --sources`, `predict`."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from hardware_profiles import load_target
from nasbench.cli import app
from nasbench.config import parse_config
from nasbench.experiment import run_experiment
from nasbench.run import load_run
from predictors import Count, FewShot, MeasuredTable
from predictors.choice import choose_predictor, few_shot_path
from search_spaces import UserError, load_space

# A board that takes 3 ns a byte of the model, and 0.2 ms at all.
BOARD = """
import json, os, sys
ms = 0.2 + 3e-6 * os.path.getsize(sys.argv[1])
print(json.dumps({"latency_ms": ms, "runtime_version": "board 1"}))
"""

SPACE = """
family = "mobilenet_v3"
description = "for tests"
resolutions = [16]
widths = [1.0]
stem_width = 8
stem_stride = 2
final_width = 32
feature_width = 32

[[stages]]
width = 16
stride = 2
depths = [1, 2, 3]
kernels = [3, 5]
expansions = [2, 4]
se = true
activation = "hard_swish"
"""


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments: Any) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def bad(*arguments: Any) -> str:
    """The message of the error that a person sees."""
    result = call(*arguments)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a space, tables of two other devices and of the board itself, and a device `board`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SPACE)
    (tmp_path / "board.py").write_text(BOARD)
    good("devices", "new", "board", "--command", f"{sys.executable} {tmp_path / 'board.py'} {{artifact}}")
    space = load_space("small.toml")
    archs = np.unique(space.sample(80, np.random.default_rng(0)), axis=0)
    costs = np.stack([Count(c).bind(space).predict(archs).mean / 1e5 for c in ("macs", "params")], axis=1)
    table = pd.DataFrame({"arch": ["_".join(map(str, a)) for a in archs]})
    for name, speeds in (("phone", (1.0, 0.5)), ("cpu", (0.3, 2.0)), ("board", (1.0, 1.0))):
        table[f"{name}_ms"] = 0.1 + costs @ speeds
    table.to_csv("others.csv", index=False)
    return tmp_path


FLOW = ("board", "--space", "small.toml", "--sources", "others.csv")


def test_from_other_devices_tables_to_predictions_and_a_run(folder: Path) -> None:
    good("devices", "suggest", *FLOW, "-n", 8, "--output", "next.csv")
    suggested = pd.read_csv("next.csv")
    assert list(suggested) == ["network", "latency_ms"]
    assert suggested.network.is_unique
    assert len(suggested) == 8
    assert suggested.latency_ms.isna().all()
    assert "not overwritten" in bad("devices", "suggest", *FLOW, "--output", "next.csv")

    good("devices", "measure", "board", "--from", "next.csv", "--output", "measured.csv", "--quiet")
    measured = pd.read_csv("measured.csv")
    assert list(measured.network) == list(suggested.network)
    # What comes next is another network.
    again = good("devices", "suggest", *FLOW, "-n", 8, "--from", "measured.csv").split()
    assert len(again) == 8
    assert not set(again) & set(measured.network)

    result = call("devices", "calibrate", *FLOW, "--from", "measured.csv", "--output", "board.npz")
    said = result.stdout
    assert "few-shot transfer of 8 measured networks from phone, cpu" in said  # and not from the board itself
    assert "8 networks, median error" in said
    assert "kept in" in result.stderr
    assert "replaces" not in result.stderr
    assert "do not rely" not in result.stderr
    repeated = call("devices", "calibrate", *FLOW, "--from", "measured.csv")
    assert "; replaces one of 8 networks\n" in repeated.stderr
    target, space = load_target("board"), load_space("small.toml")
    kept = FewShot.load(few_shot_path(target, space))
    assert np.allclose(np.sort(kept.latency_ms), np.sort(measured.latency_ms))

    name = measured.network[0]
    for options in ((), ("--predictor", "few_shot:board.npz")):
        said = good("predict", name, "--target", "board", *options)
        assert "few-shot transfer of 8 measured networks from phone, cpu" in said
    # What was calibrated last predicts.
    Path("few.csv").write_text("network,latency_ms\nresnet18,30\nmobilenet_v2,8\n")
    good("devices", "calibrate", "board", "--from", "few.csv", "--quiet")
    assert "scaled roofline of 2 networks" in good("predict", name, "--target", "board")
    good("devices", "calibrate", *FLOW, "--from", "measured.csv")
    assert "few-shot transfer of 8 measured networks" in good("predict", name, "--target", "board")
    # One of the values in another unit is named.
    wrong = measured.drop(columns="measured")
    wrong.loc[3, "latency_ms"] *= 1000
    wrong.to_csv("wrong.csv", index=False)
    assert "wrong.csv: " in bad("devices", "calibrate", *FLOW, "--from", "wrong.csv")
    # Latencies that have nothing to do with the networks are fitted, and the fit warns of itself.
    noise = measured.assign(latency_ms=[1.0, 30.0, 2.0, 40.0, 1.5, 20.0, 50.0, 1.2])
    noise.drop(columns="measured").to_csv("noise.csv", index=False)
    assert "do not rely on this fit" in call("devices", "calibrate", *FLOW, "--from", "noise.csv").stderr
    # Of other networks it says nothing; nor is it energy.
    assert "few-shot" not in good("predict", "mobilenet_v2", "--target", "board")
    assert not choose_predictor(target, "latency_ms").tied


def test_measuring_what_is_suggested_in_one_go(folder: Path) -> None:
    said = good("devices", "calibrate", *FLOW, "--networks", 6, "--quiet")
    assert "few-shot transfer of 6 measured networks" in said


def test_suggestions_without_sources(folder: Path) -> None:
    names = good("devices", "suggest", "board", "--space", "small.toml", "-n", 6).split()
    assert len(set(names)) == 6
    assert all(n.startswith("small.toml:") for n in names)


def test_tables_in_other_layouts_are_sources(folder: Path) -> None:
    space = load_space("small.toml")
    MeasuredTable.from_csv(Path("others.csv"), space).save(Path("others.npz"))
    from_npz = good("devices", "suggest", *FLOW[:-1], "others.npz", "-n", 5)
    assert from_npz == good("devices", "suggest", *FLOW, "-n", 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*FLOW, "--from", "two.csv"),
            "at least 3 measured architectures of 'small.toml', got 2; `nasbench devices suggest",
        ),
        (
            (*FLOW[:-1], "fewer.csv", "--from", "three.csv"),
            "fewer.csv: 14 networks measured on the sources; at least 15",
        ),
        (
            (*FLOW, "--from", "unit.csv"),
            r"unit.csv: few-shot predictor: measurement 1: [\d.]+ \(.*\): 20000 ms is .*more",
        ),
        ((*FLOW, "--from", "elsewhere.csv"), r"got 0 \(3 measured networks are none\)"),
        ((*FLOW, "--from", "blank.csv"), "blank.csv: line 2: latency_ms is ''"),
        ((*FLOW, "--column", "phon", "--from", "two.csv"), "Did you mean 'phone'"),
        ((*FLOW, "--column", "phone", "--from", "three.csv"), "at least two families"),
        ((*FLOW, "--column", "board", "--from", "two.csv"), "'board' is the device itself"),
        ((*FLOW, "--method", "roofline"), "gives a few-shot predictor"),
        (("board", "--sources", "others.csv"), "needs the one space"),
        (("board", "--column", "phone"), "--column needs --sources"),
        (("board", "--space", "mobile96", "--sources", "others.csv"), "others.csv: line 2, column 'arch'"),
        (
            ("board", "--space", "mobile96", "--sources", "others.npz"),
            "are those of 'small.toml', which has other knobs",
        ),
        ((*FLOW[:-1], "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_bad_input_is_explained(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    space = load_space("small.toml")
    archs = pd.read_csv("others.csv").arch.str.replace("_", ".")
    MeasuredTable.from_csv(Path("others.csv"), space).save(Path("others.npz"))
    Path("two.csv").write_text(f"network,latency_ms\nsmall.toml:{archs[0]},1\nsmall.toml:{archs[1]},2\n")
    Path("three.csv").write_text(Path("two.csv").read_text() + f"small.toml:{archs[2]},3\n")
    pd.read_csv("others.csv")[:14].to_csv("fewer.csv", index=False)
    Path("unit.csv").write_text(Path("three.csv").read_text().replace(",2\n", ",20000\n"))
    Path("elsewhere.csv").write_text("network,latency_ms\nresnet18,1\nresnet34,2\nmobilenet_v2,3\n")
    Path("blank.csv").write_text(f"network,latency_ms\nsmall.toml:{archs[0]},\n")
    assert re.search(message, bad("devices", "calibrate", *arguments))
    if "unit.csv" in arguments:
        assert re.search(message, bad("devices", "suggest", *arguments))
    assert not few_shot_path(load_target("board"), space).exists()


def test_nasbench201_sources_in_their_published_layout(data_dir: Path, tmp_path: Path) -> None:
    """The whole way with a published table: the unseen device is one of its columns."""
    path = data_dir / "nb201_latency_help.csv.gz"
    flow = ("raspberry_pi_4", "--space", "nasbench201", "--sources", path)
    flow += tuple(x for d in ("1080ti_1", "samsung_a50", "silver_4114") for x in ("--column", d))
    names = good("devices", "suggest", *flow, "-n", 10).split()
    table = MeasuredTable.from_help(path, ["raspi4"])
    rows = table.rows(np.array([[int(i) for i in n.partition(":")[2].split(".")] for n in names], dtype=np.uint8))
    pd.DataFrame({"network": names, "latency_ms": table.column("raspi4")[rows]}).to_csv(tmp_path / "m.csv", index=False)
    said = good("devices", "calibrate", *flow, "--from", tmp_path / "m.csv")
    assert "few-shot transfer of 10 measured networks from 1080ti_1, samsung_a50, silver_4114" in said


def test_a_run_keeps_the_few_shot_predictor_that_it_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "few_shot_parts"
    Path(f"{name}.py").write_text("def accuracy(choices):\n    return 0.5\n")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    np.savez("colours.npz", images=np.zeros((120, 3, 16, 16), dtype=np.uint8), labels=np.arange(120) % 3)
    table = pd.read_csv("others.csv")[::8]
    measured = pd.DataFrame({"arch": table.arch, "latency_ms": table.board_ms})
    measured.to_csv("measured.csv", index=False)
    good("devices", "calibrate", *FLOW, "--from", "measured.csv", "--output", "board.npz")
    config = parse_config(
        {
            "task": {"name": "npz", "path": str(folder / "colours.npz")},
            "space": {"name": "small.toml"},
            "evaluator": {"name": f"{name}:accuracy", "samples": 0, "verify": 2},
            "targets": {"devices": ["board"], "predictors": {"board": "few_shot:board.npz"}},
            "objectives": {"accuracy": {}, "latency_ms": {}},
            "strategy": {"name": "random", "evaluations": 6, "batch": 3},
        }
    )
    run_experiment(config, folder / "run", where=folder)
    kept = folder / "run" / "calibration" / "board-fp32.npz"
    assert kept.read_bytes() == Path("board.npz").read_bytes()
    assert not kept.with_suffix(".json").exists()  # so nothing was measured to calibrate
    assert load_run(folder / "run").front()["latency_ms"].gt(0).all()


def test_a_run_looks_up_the_column_that_it_names_in_its_own_copy_of_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "table_parts"
    Path(f"{name}.py").write_text("def accuracy(choices):\n    return 0.5\n")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    np.savez("colours.npz", images=np.zeros((120, 3, 16, 16), dtype=np.uint8), labels=np.arange(120) % 3)
    space = load_space("small.toml")
    archs = np.unique(space.sample(5000, np.random.default_rng(0)), axis=0)  # all there are
    table = pd.DataFrame({"arch": ["_".join(map(str, a)) for a in archs], "phone_ms": 1.0, "cpu_ms": 2.0})

    config = parse_config(
        {
            "task": {"name": "npz", "path": str(folder / "colours.npz")},
            "space": {"name": "small.toml"},
            "evaluator": {"name": f"{name}:accuracy", "samples": 0, "verify": 2},
            "targets": {"devices": ["board"], "predictors": {"board": "table:all.csv@cpu"}},
            "objectives": {"accuracy": {}, "latency_ms": {}},
            "strategy": {"name": "random", "evaluations": 6, "batch": 3},
        }
    )
    table.assign(cpu_ms="fast").to_csv("all.csv", index=False)
    with pytest.raises(UserError, match=r"^targets.predictors: board:fp32: .*/all.csv: line 2, column 'cpu_ms'"):
        run_experiment(config, folder / "run", where=folder)
    table.to_csv("all.csv", index=False)
    run_experiment(
        config, folder / "run", resume=True, where=folder
    )  # with the file as it is now, for a wrong one was not kept
    assert (folder / "run" / "calibration" / "board-fp32.csv").read_bytes() == Path("all.csv").read_bytes()
    front = load_run(folder / "run").front()
    assert (front["latency_ms_predicted"] == 2).all()
