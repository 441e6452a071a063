"""The commands `nasbench devices ...` and `nasbench predict`, on a device whose measurements are known."""

import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hardware_profiles import Artifact, Measurement, Protocol, load_profile, load_target, user_data_dir
from nasbench.cli import app
from nasbench.measurements import Measured, append_measurements, named_in, read_measurements
from nasbench.networks import named_network, space_network, suite_networks
from predictors.calibration import Calibration, calibration_path, kept_calibration
from predictors.choice import METRICS
from search_spaces import UserError, load_space

# A board that takes 3 ns a byte and 0.2 ms at all, and fails on files with a name in its list.
BOARD = """
import json, os, pathlib, sys
refused = pathlib.Path(__file__).with_name("refused")
size = os.path.getsize(sys.argv[1])
if refused.exists() and size > int(refused.read_text()):
    sys.exit("out of memory")
slow = pathlib.Path(__file__).with_name("slow").exists()
ms = (0.2 + 3e-6 * size) * (1.5 if slow else 1)
import time; time.sleep(ms / 1000)
print(json.dumps({"latency_ms": [ms, ms * 1.01, ms * 0.99], "energy_mj": 2 * ms, "runtime_version": "board 1"}))
"""


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def good(*arguments: Any) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def bad(*arguments: Any) -> str:
    """The message of the error that a person sees."""
    result = call(*arguments)
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    return str(result.exception)


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """A device `board`, added by its command alone; the folder of its program."""
    (tmp_path / "board.py").write_text(BOARD)
    command = f"{sys.executable} {tmp_path / 'board.py'} {{artifact}}"
    good("devices", "new", "board", "--kind", "MCU", "--runtime", "boardlib", "--command", command)
    return tmp_path


@pytest.fixture
def space(tiny_space: Path) -> Path:
    return tiny_space


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--kind", "GPU", "--precision", "fp16", "--runtime", "tensorrt", "--ssh", "user@nano"],
        ["--kind", "CPU", "--precision", "int8", "--runtime", "tflite", "--adb", ""],
        ["--adb", "0123ABC", "--runtime", "tflite"],
        [
            "--ssh",
            "pi",
            "--runtime",
            "own",
            "--peak-gmacs",
            "5",
            "--bandwidth-gbs",
            "2",
            "--power-w",
            "3",
            "--source",
            "p. 3",
        ],
        ["--local", "--threads", "2", "--title", 'My "board" \\ of 2024'],
        ["--kind", "FPGA", "--command", "measure '{artifact}' -t {threads} \"x y\""],
    ],
)
def test_a_new_profile_is_valid_and_commented(options: list[str]) -> None:
    good("devices", "new", "my_board", *options)
    path = user_data_dir() / "devices" / "my_board.toml"
    profile = load_profile("my_board")
    assert path.read_text().count("#") > 8
    assert load_target("my_board").threads == (2 if "--threads" in options else 1)
    assert (profile.meter is not None) == any(o in options for o in ("--ssh", "--adb", "--command"))
    assert profile.local == ("--local" in options)
    assert profile.target().point.estimated == ("--peak-gmacs" not in options)
    assert "my_board" in good("devices", "list")
    assert tomllib.loads(good("devices", "show", "my_board", "--toml"))["name"] == "my_board"
    assert "a valid profile" in good("devices", "check", "my_board")
    before = path.read_bytes()
    assert "exists" in bad("devices", "new", "my_board")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["jetson_nano"], "'jetson_nano' exists"),
        (["host"], "'host' exists"),
        (["My Board"], "name: .*pattern"),
        (["../x"], "name: .*pattern"),
        (["b", "--kind", "TPU"], "kind: unknown value 'TPU'. Did you mean 'NPU'"),
        (["b", "--precision", "fp8"], "precision: unknown value 'fp8'"),
        (["b", "--threads", "0"], "threads: 0 is outside 1 to 4096"),
        (["b", "--peak-gmacs", "-1", "--bandwidth-gbs", "1"], "peak_gmacs: -1 is outside"),
        (
            ["b", "--peak-gmacs", "20e9", "--bandwidth-gbs", "1"],
            "peak_gmacs: 2e.10 is outside .*multiply-accumulates/s",
        ),
        (["b", "--command", "run it"], r"must have \{artifact\}"),
        (["b", "--command", "x {artifact}", "--local"], "give one of them"),
        (["b", "--command", ""], r"meter.command: .*must have \{artifact\}"),
        (["b", "--ssh", ""], "meter.ssh.host"),
    ],
)
def test_a_profile_that_would_be_wrong_is_not_written(options: list[str], message: str) -> None:
    assert re.search(message, bad("devices", "new", *options))
    assert files(user_data_dir()) == []


def test_check_tells_what_a_device_cannot_run() -> None:
    said = call("devices", "check", "edge_tpu", "mobilenet_v3_small", "mobilenet_v2")
    assert said.exit_code == 0
    assert "hard_swish" in said.output
    assert "runs all operators of mobilenet_v2" in said.output
    assert "measured from here: no" in said.output
    for more in ([], ["--arch", "largest"]):
        assert "hard_swish" in good("devices", "check", "edge_tpu", "--space", "mobilenet_v3_small", *more)
    assert "Did you mean 'mobilenet_v2'" in bad("devices", "check", "edge_tpu", "mobilnet_v2")


@pytest.mark.parametrize(
    ("how", "program"),
    [
        (["--command", "no-such-program {artifact}"], "'no-such-program' on the PATH"),
        (["--command", "/nowhere/measure {artifact}"], "'/nowhere/measure'$"),
        (["--adb", "1", "--runtime", "tflite"], "'adb' on the PATH"),
        (["--ssh", "nano", "--runtime", "tensorrt"], "'ssh' on the PATH"),
    ],
)
def test_a_missing_program_is_told_before_networks_are_built(
    how: list[str], program: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good("devices", "new", "board", *how)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("nasbench.networks.NamedNetwork.build", lambda _: pytest.fail("built"))
    expected = f"board:fp32: its meter finds no program {program}"
    assert re.search(f"measured from here: no: {expected}", good("devices", "check", "board"), re.MULTILINE)
    for command in (["measure", "board", "resnet18"], ["calibrate", "board"], ["validate", "board"]):
        assert re.search(f"^{expected}", bad("devices", *command, "--quiet"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate", "board", "--from", "m.csv", "--meter", "adb"], "--from and --meter exclude each other"),
        (["calibrate", "board", "--from", "m.csv", "--networks", 9], "--from and --networks exclude"),
        (["validate", "board", "--from", "m.csv", "--meter", "adb"], "--from and --meter exclude"),
        (["validate", "board", "--from", "m.csv", "--count", 3], "--from and --count exclude"),
        (["validate", "board", "resnet18", "--from", "m.csv"], "--from and networks exclude"),
        (["validate", "board", "resnet18", "--space", "quickstart"], "networks and --space exclude"),
        (["validate", "board", "--count", 3], "--count needs --space"),
        (["check", "board", "--arch", "largest"], "--arch 'largest' needs --space"),
        (["measure", "board", "resnet18", "--space", "quickstart"], "--space quickstart and resnet18, .* exclude"),
        (["measure", "board", "resnet18", "--meter", ""], "unknown meter ''"),
        (["measure", "board", "resnet18", "--meter", "os:path"], "'os:path' is no Meter"),
        (["measure", "board", "resnet18", "--meter", "builtins:int"], "'builtins:int' is no Meter"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments: list[Any], message: str, board: Path) -> None:
    assert re.search(message, bad("devices", *arguments))


def test_a_file_is_not_predicted_in_a_space(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").touch()
    said = bad("predict", tmp_path / "net.onnx", "--space", "quickstart", "--target", "jetson_nano")
    assert "--space quickstart and " in said
    assert "net.onnx, which is none of its architectures, exclude each other" in said


def test_a_refused_network_is_predicted_with_a_warning() -> None:
    said = good("predict", "mobilenet_v3_small", "--target", "ncs1")
    assert "latency_ms of mobilenet_v3_small on ncs1:fp16: " in said
    assert re.search(r"^warning: \d+ x hard_swish on ncs1:fp16: .*not supported; the network is refused$", said, re.M)


def test_measuring_keeps_a_table_and_a_recording(board: Path, space: Path) -> None:
    output, record = board / "m.csv", board / "r.json"
    arguments = ["--output", output, "--record", record, "--quiet"]
    good("devices", "measure", "board", "mobilenet_v3_small@32", *arguments)
    good("devices", "measure", "board", "--space", space, "--arch", "smallest", "--arch", "largest", *arguments)
    rows = read_measurements(output, load_target("board"))
    assert rows[0].network == "mobilenet_v3_small@32"
    assert named_network(rows[2].network).workload.macs > named_network(rows[1].network).workload.macs
    assert all(r.energy_mj == pytest.approx(2 * r.latency_ms, rel=0.02) for r in rows)

    (board / "board.py").unlink()  # the toolchain is gone; what it said is not
    again = board / "again.csv"
    good(
        "devices",
        "measure",
        "board",
        "mobilenet_v3_small@32",
        "--meter",
        f"replay:{record}",
        "--output",
        again,
        "--quiet",
    )
    assert read_measurements(again)[0].latency_ms == pytest.approx(rows[0].latency_ms)
    assert "never measured" in bad(
        "devices", "measure", "board", "squeezenet1_1@32", "--meter", f"replay:{record}", "--output", again, "--quiet"
    )


def test_one_network_that_fails_is_named_and_the_others_kept(board: Path, space: Path) -> None:
    (board / "refused").write_text("1000000")
    output = board / "m.csv"
    result = call(
        "devices", "measure", "board", "mobilenet_v3_small@32", f"{space}:smallest", "--output", output, "--quiet"
    )
    assert result.exit_code == 1
    assert "out of memory" in result.output
    assert "mobilenet_v3_small@32: " in result.output  # the network's name, not that of a temporary file
    assert len(read_measurements(output)) == 1
    assert "no network could be measured" in bad(
        "devices", "measure", "board", "mobilenet_v3_small@32", "--output", output
    )
    assert len(read_measurements(output)) == 1


def test_from_nothing_to_a_validated_predictor(board: Path, space: Path) -> None:
    profile = user_data_dir() / "devices" / "board.toml"
    before = profile.read_bytes()
    uncalibrated = good("predict", f"{space}:largest", "--target", "board")
    assert "roofline from datasheet figures" in uncalibrated
    assert good("predict", "largest", "--space", str(space), "--target", "board") == uncalibrated

    said = good("devices", "calibrate", "board", "--space", space, "--networks", "10", "--quiet")
    kept = kept_calibration(load_target("board"))
    assert kept is not None
    assert kept.models.keys() == {"latency_ms", "energy_mj"}
    assert f"{len(kept.rows)} networks measured" in said
    assert profile.read_bytes() == before
    for metric, unit in (("latency_ms", "ms"), ("energy_mj", "mJ")):
        said = good("predict", f"{space}:largest", "--target", "board", "--metric", metric)
        assert f" {unit} (90 % interval" in said
        assert f"of {len(kept.rows)} networks measured" in said

    said = good("devices", "validate", "board", "--space", space, "--count", "6", "--quiet")
    assert "median error" in said
    assert "in the 90 % interval" in said
    assert kept_calibration(load_target("board")) == kept

    (board / "slow").touch()
    slow = call("devices", "validate", "board", *[r.network for r in kept.rows[:3]], "--quiet", "--recalibrate")
    assert slow.exit_code == 0, slow.exception
    assert "now take +50%" in slow.output
    anew = kept_calibration(load_target("board"))
    assert anew is not None
    assert len(anew.rows) == len(kept.rows)
    assert {r.network for r in anew.rows} == {r.network for r in kept.rows}
    assert [r.latency_ms for r in anew.rows[-3:]] == pytest.approx(
        [1.5 * r.latency_ms for r in kept.rows[:3]], rel=0.02
    )


def test_a_handful_read_from_a_table_calibrates_a_device_that_is_not_here(space: Path, tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    text = 'network,latency_us\nmobilenet_v2,9000\nresnet18,40000\nsqueezenet1_1,"11000"\n'
    table.write_text(text, encoding="utf-8-sig")  # as spreadsheets write it
    output = tmp_path / "new" / "c.json"
    said = good("devices", "calibrate", "snapdragon_855", "--from", table, "--output", output, "--quiet")
    assert "of 3 networks measured" in said
    assert f"kept in {calibration_path(load_target('snapdragon_855'))} and in {output}\n" in said
    calibration = Calibration.load(output)
    assert calibration == kept_calibration(load_target("snapdragon_855"))
    assert sorted(r.latency_ms for r in calibration.rows) == [9.0, 11.0, 40.0]
    said = good("devices", "validate", "snapdragon_855", "--from", table, "--quiet")
    assert "3 networks" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs a column 'network'"),
        ("network\nresnet18\n", "needs a column 'latency_ms'"),
        ("network,latency\nresnet18,3\n", "needs a column 'latency_ms'. Did you mean 'latency'"),
        ("network,latency_ms,latency_us\nresnet18,3,3000\n", "the same in two units"),
        ("network,latency_ms\nresnet18,nan\n", "line 2: latency_ms is nan"),
        ("network,latency_ms\nresnet18,0\n", "line 2: latency_ms is 0, it must be positive"),
        ("network,latency_ms\nresnet18,-3\n", "positive and finite"),
        ("network,latency_ms\nresnet18,1e30\n", "line 2: latency_ms is 1e30, 1e+30 ms, which no inference takes"),
        ("network,latency_s\nresnet18,1e-9\n", "line 2: latency_s is 1e-9, 1e-06 ms, which no inference takes"),
        (
            "network,latency_ms,energy_mj\nresnet18,3,3e6\n",
            "line 2: energy_mj is 3e6, 3e+06 mJ in 3 ms, which is 1e+06 W",
        ),
        ("network,latency_ms\nresnet18,3 ms\n", "'3 ms', a number without unit"),
        ("network,latency_ms\nresnet18,3,4\n", "line 2: 3 values for 2 columns"),
        ("network,latency_ms\n,3\n", "line 2: network is empty"),
        ("network,latency_ms\nresnet19,3\n", "m.csv: line 2: no network 'resnet19'. Did you mean 'resnet1"),
        ("network,latency_ms\nresnet18,3\nquickstart:bigest,3\n", "m.csv: line 3: quickstart: 'bigest' is neither"),
        ("onnx,latency_ms\ngone.onnx,3\n", "gone.onnx: no such file"),
        ("network,latency_ms,enrgy_mj\nresnet18,3,4\n", "unknown column 'enrgy_mj'. Did you mean 'energy_mj'"),
        ("network,latency_ms,energy\nresnet18,3,4\n", "column 'energy'. Did you mean 'energy_mj' or 'energy_j' or"),
        ("network,latency_ms,energy mJ\nresnet18,3,4\n", "unknown column 'energy mJ'. Did you mean 'energy_mj'"),
        ("network,latency_ms,presicion\nresnet18,3,int8\n", "unknown column 'presicion'. Did you mean 'precision'"),
        ("network,latency_ms,thread\nresnet18,3,4\n", "unknown column 'thread'. Did you mean 'threads'"),
        ("network,latency_ms,unit\nresnet18,3000,us\n", "line 2: unit is 'us', but the column 'latency_ms' is in ms"),
        ("network,latency_ms,throttled\nresnet18,3,yes\n", "line 2: throttled is 'yes', 'true' or 'false'"),
        (
            "network,latency_ms,peak_memory_bytes\nresnet18,3,-4\n",
            "line 2: peak_memory_bytes is -4, it must be positive",
        ),
        ("network,latency_ms,peak_memory_bytes\nresnet18,3,4 MB\n", "line 2: peak_memory_bytes is '4 MB', a number"),
        (
            "network,latency_ms,precision\nresnet18,3,fp32\n",
            "line 2: precision is 'fp32', but jetson_nano:fp16-maxn has 'fp16' ('fp32' is that of jetson_nano:fp32-",
        ),
        ("network,latency_ms,precision\nresnet18,3,float\n", "is 'float', but jetson_nano:fp16-maxn has 'fp16'"),
        ("network,latency_ms,threads\nresnet18,3,4\n", "line 2: threads is '4', but jetson_nano:fp16-maxn has '1'"),
        ("network,latency_ms,batch\nresnet18,3,8\n", "line 2: batch is '8', but jetson_nano:fp16-maxn has '1'"),
        (
            "network,latency_ms\nresnet18,3\nresnet34,5\nresnet18,4\n",
            "line 4: resnet18 again, with 4 ms instead of 3 ms in line 2; keep one row",
        ),
        (
            "network,latency_ms,measured\nresnet18,3,2026-01-01\nresnet18,4,\n",
            "line 3: resnet18 again, with 4 ms instead of 3 ms in line 2; keep one row",
        ),
        (
            "network,target,latency_ms\nresnet18,pixel_3:fp32,3\n",
            "no measurements of jetson_nano:fp16-maxn; it has pixel_3:fp32",
        ),
    ],
)
def test_tables_of_measurements_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text(text)
    assert message in bad("devices", "calibrate", "jetson_nano", "--from", table, "--quiet")
    assert files(user_data_dir()) == []


def test_a_table_in_another_encoding_is_told_what_to_do(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_bytes("network,latency_ms,note\nresnet18,3,größer\n".encode("latin-1"))
    said = bad("devices", "calibrate", "jetson_nano", "--from", table)
    assert said == f"{table}: cannot be read: it is not UTF-8 (byte 0xf6 at position 37); save it as UTF-8"


def test_a_network_measured_again_counts_with_its_last_value(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text(
        "network,latency_ms,measured\nresnet18,3,2026-01-01\nresnet34,5,2026-01-01\nresnet18,4,2026-01-02\n"
    )
    rows = read_measurements(table)
    assert [(r.network, r.latency_ms) for r in rows] == [("resnet34", 5.0), ("resnet18", 4.0)]
    assert {r.family for r in rows} == {"resnet"}


def test_equal_rows_of_one_network_count_once_whatever_it_is_called(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    largest = ".".join(map(str, load_space("quickstart").references["largest"]))
    text = f"network,latency_ms\nquickstart:largest,3\nquickstart:{largest},"
    table.write_text(text + "3.0\n")
    assert len(read_measurements(table)) == 1
    table.write_text("network,latency_ms\nmobilenet_v2,3\nmobilenet_v2@224,3\nmobilenet_v2@160,2\n")
    assert len(read_measurements(table)) == 2
    table.write_text(text + "4\n")
    with pytest.raises(UserError, match="line 3: quickstart:.* again, with 4 ms instead of 3 ms in line 2"):
        read_measurements(table)


def test_one_network_may_be_measured_on_several_targets(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("network,target,latency_ms\nresnet18,pixel_4:fp32-1thread,3\nresnet18,jetson_nano:fp16-maxn,4\n")
    assert [r.latency_ms for r in read_measurements(table)] == [3, 4]
    assert [r.latency_ms for r in read_measurements(table, load_target("jetson_nano"))] == [4]


def test_a_device_alone_means_its_default_operating_point(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("network,target,latency_ms\nresnet18,jetson_nano,3\nresnet34,jetson_nano:fp32-maxn,4\n")
    assert [r.latency_ms for r in read_measurements(table, load_target("jetson_nano"))] == [3]
    assert [r.latency_ms for r in read_measurements(table, load_target("jetson_nano:fp32-maxn"))] == [4]


def test_rows_of_the_operating_point_are_taken_whatever_wrote_them(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    # As a data frame with gaps writes numbers and flags; meters may call themselves anything.
    table.write_text(
        "network,latency_ms,precision,threads,batch,runtime,throttled,unit,notes\n"
        "resnet18,3,FP32,4.0,1,TFLite,True,MS,a\nresnet34,5,,,,my stopwatch,False,,b\nresnet50,9,,,,,1,,c\n"
    )
    rows = read_measurements(table, load_target("pixel_4:fp32-4threads"))
    assert [r.throttled for r in rows] == [True, False, True]
    table.write_text("network,latency_ms,runtime\nresnet18,3,tflite\n")
    with pytest.raises(
        UserError, match=r"line 2: runtime is 'tflite', but .* has 'ncnn' .*raspberry_pi_4:fp32-xnnpack,"
    ):
        read_measurements(table, load_target("raspberry_pi_4:fp32-ncnn"))


def test_what_a_meter_of_ones_own_wrote_of_a_target_is_read_for_it(tmp_path: Path) -> None:
    table, target = tmp_path / "m.csv", load_target("pixel_4:fp32-4threads")
    protocol = Protocol("mine", "1", "fp16", 1, 1, 0, 1, 1, "median", "me")  # of 4 threads in fp32, it says
    measurement = Measurement(Artifact(Path("x"), "onnx", "fp32", (3,)), 3.0, np.array([3.0]), protocol)
    append_measurements(table, target, [Measured(named_network("resnet18"), measurement)])
    assert len(read_measurements(table, target)) == 1


def test_columns_that_mean_something_else_or_nothing_are_no_mistake(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("network,latency_ms,arch,hardest,peak_memory_bytes\nresnet18,3,arm64,conv1,0\nresnet34,5,,,0.0\n")
    assert [r.network for r in read_measurements(table)] == ["resnet18", "resnet34"]


def test_two_columns_that_name_a_network_must_agree(tmp_path: Path) -> None:
    space = load_space("quickstart")
    largest, smallest = ("_".join(map(str, space.references[n])) for n in ("largest", "smallest"))
    table = tmp_path / "m.csv"
    table.write_text(f"network,arch,latency_ms\nquickstart:largest,{largest},3\n,{smallest},2\n")
    rows = read_measurements(table, spaces={"quickstart": space})
    assert [named_network(r.network).arch for r in rows] == [
        space_network(space, n).arch for n in ("largest", "smallest")
    ]
    table.write_text(f"network,arch,latency_ms\nquickstart:largest,{smallest},3\n")
    with pytest.raises(UserError, match=f"line 2: network is 'quickstart:largest', but arch is '{smallest}', which is"):
        read_measurements(table, spaces={"quickstart": space})
    (tmp_path / "a.onnx").touch()
    table.write_text(f"network,onnx,latency_ms\n{tmp_path / 'a.onnx'},a.onnx,3\n")
    assert len(read_measurements(table)) == 1
    table.write_text("network,onnx,latency_ms\nresnet18,a.onnx,3\n,a.onnx,4\n")  # a file does not say what it is of
    assert [r.network for r in read_measurements(table)] == ["resnet18", str(tmp_path / "a.onnx")]
    (tmp_path / "b.onnx").touch()
    table.write_text(f"network,onnx,latency_ms\n{tmp_path / 'b.onnx'},a.onnx,3\n")
    with pytest.raises(UserError, match=r"line 2: network is '.*b.onnx', but onnx is 'a.onnx', which is another"):
        read_measurements(table)


def test_tables_name_networks_by_architecture_or_file_too(tmp_path: Path) -> None:
    space = load_space("quickstart")
    largest = space.references["largest"]
    rows = ["largest", "_".join(map(str, largest)), json.dumps(space.decode(largest)).replace('"', '""')]
    for text in rows:
        table = tmp_path / "m.csv"
        table.write_text(f'\ufeffarch,latency_us\n"{text}",3000\n', encoding="utf-8")  # the mark of a spreadsheet
        (row,) = read_measurements(table, spaces={"quickstart": space})
        assert row.network == "quickstart:" + ".".join(map(str, largest))
        assert row.latency_ms == pytest.approx(3)
    table.write_text("arch,latency_ms\nlargets,3\n")
    with pytest.raises(UserError, match=r"line 2: arch: .*Did you mean 'largest'"):
        read_measurements(table, spaces={"quickstart": space})
    with pytest.raises(UserError, match="needs one space"):
        read_measurements(table)
    table.write_text("onnx,latency_ms\nnets/a.onnx,3\n")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "a.onnx").touch()
    assert read_measurements(table)[0].network == str(tmp_path / "nets" / "a.onnx")


def test_a_profile_that_is_wrong_hides_no_other_from_the_list() -> None:
    path = user_data_dir() / "devices" / "mine.toml"
    path.parent.mkdir(parents=True)
    path.write_text("kind = CPU")
    said = good("devices", "list")
    assert "edge_tpu" in said
    assert "mine.toml: not valid TOML" in said


def test_one_network_in_another_unit_is_named(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    few = "network,latency_ms\nmobilenet_v2,20\nresnet18,120000\nmnasnet,22\n"
    for text in (few, few + "vgg16,900\nmobilenet_v1,28\n"):
        table.write_text(text)
        message = bad("devices", "calibrate", "jetson_nano", "--from", table, "--quiet")
        assert f"{table}: jetson_nano:fp16-maxn: latency_ms of resnet18 is 120000" in message
    assert files(user_data_dir()) == []


def test_one_network_is_not_said_to_judge_its_own_fit(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("network,latency_ms\nmobilenet_v2,20\n")
    said = good("devices", "calibrate", "pixel_4", "--from", table, "--quiet")
    assert "1 networks: too few to judge the fit" in said


def test_a_calibration_tells_what_it_replaces(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("network,latency_ms\nmobilenet_v2,20\nresnet18,60\n")
    command = ("devices", "calibrate", "pixel_4", "--from", table, "--quiet")
    assert "replaces" not in good(*command)
    kept = kept_calibration(load_target("pixel_4"))
    assert kept is not None
    table.write_text("network,latency_ms\nmobilenet_v2,21\n")
    assert f"; replaces one of 2 networks of {kept.created:%Y-%m-%d}" in good(*command)
    calibration_path(load_target("pixel_4")).write_text("{")
    assert "replaces" not in good(*command)


ADD = """
import sys
from pathlib import Path
import numpy as np
from hardware_profiles import Artifact, Measurement, Protocol, load_target
from nasbench.measurements import Measured, append_measurements
from nasbench.networks import NamedNetwork

protocol = Protocol("x", "1", "fp32", 1, 1, 0, 1, 1, "value", "nowhere")
path = Path(sys.argv[1])
for i in range(25):
    name = f"{sys.argv[2]}-{i}.onnx"
    measurement = Measurement(Artifact(Path(name), "onnx", "fp32", (3, 8, 8)), 1.0, np.array([1.0]), protocol)
    append_measurements(path, load_target("jetson_nano"), [Measured(NamedNetwork(name, name), measurement)])
"""


def test_two_processes_add_to_one_table_and_lose_nothing(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    both = [subprocess.Popen([sys.executable, "-c", ADD, str(table), who]) for who in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    expected = {f"{who}-{i}.onnx" for who in "ab" for i in range(25)}
    assert set(named_in(table)) == expected


def test_what_cannot_be_kept_is_not_measured_and_what_was_measured_is_shown(
    board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (board / "file").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr("nasbench.measurements.measure_networks", lambda *_, **__: pytest.fail("measured"))
        assert "cannot write there" in bad(
            "devices", "measure", "board", "squeezenet1_1@64", "--output", board / "file" / "m.csv"
        )
    tried = []

    def full(path: Path, target: Any, measured: list[Any]) -> int:
        tried.append(len(measured))
        if measured:
            raise UserError(f"{path}: No space left on device")
        return 0

    monkeypatch.setattr("nasbench.measurements.append_measurements", full)
    result = call("devices", "measure", "board", "squeezenet1_1@64")
    assert isinstance(result.exception, UserError)
    assert tried == [0, 1]
    assert "squeezenet1_1@64" in result.output


def test_an_onnx_file_is_kept_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "net.onnx").touch()
    protocol = Protocol("x", "1", "fp32", 1, 1, 0, 1, 1, "value", "nowhere")
    monkeypatch.chdir(tmp_path / "a")
    artifact = Artifact(Path("net.onnx"), "onnx", "fp32", (3, 8, 8))
    measured = Measured(named_network("net.onnx"), Measurement(artifact, 1.0, np.array([1.0]), protocol))
    append_measurements(tmp_path / "m.csv", load_target("jetson_nano"), [measured])
    monkeypatch.chdir(tmp_path / "b")  # where another file has that name
    assert named_in(tmp_path / "m.csv") == [str(tmp_path / "a" / "net.onnx")]


def test_measurements_are_not_added_to_another_table(board: Path) -> None:
    other = board / "notes.csv"
    other.write_text("a,b\n1,2\n")
    assert "name another file" in bad(
        "devices", "measure", "board", "mobilenet_v3_small@32", "--output", other, "--quiet"
    )
    assert other.read_text() == "a,b\n1,2\n"


def test_damaged_calibrations_are_told_and_nothing_else_is_used_instead(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    table.write_text("network,latency_ms\nresnet18,3\n")
    good("devices", "calibrate", "jetson_nano", "--from", table, "--quiet")
    path = calibration_path(load_target("jetson_nano"))
    whole = path.read_text()
    for change in (
        whole[:50],
        whole.replace('"latency_ms":3.0', '"latency_ms":-3.0').replace('"latency_ms": 3.0', '"latency_ms": -3.0'),
    ):
        path.write_text(change)
        assert "damaged" in bad("predict", "resnet18", "--target", "jetson_nano")
    path.write_text(json.dumps({**json.loads(whole), "format": 9}))
    assert "calibration format 9" in bad("predict", "resnet18", "--target", "jetson_nano")
    (path.parent / "targets").mkdir()
    path.rename(path.parent / "targets" / path.name)  # where an earlier version kept it
    said = bad("predict", "resnet18", "--target", "jetson_nano")
    assert "earlier version" in said
    assert "nasbench devices calibrate jetson_nano:fp16-maxn" in said
    good("devices", "calibrate", "jetson_nano", "--from", table, "--quiet")
    assert "scaled roofline of 1 networks" in good("predict", "resnet18", "--target", "jetson_nano")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "resnet18", "--target", "host"], "nasbench devices calibrate host:fp32"),
        (["predict", "resnet18", "--target", "jetson_nan"], "Did you mean 'jetson_nano'"),
        (["predict", "resnet18", "--target", "host", "--metric", "latency"], "Did you mean 'latency_ms'"),
        (["predict", "--target", "host"], "name a network"),
        (
            ["predict", "resnet18", "--space", "quickstart", "--arch", "largest", "--target", "jetson_nano"],
            "name one network",
        ),
        (["predict", "gone.onnx", "--target", "jetson_nano"], "gone.onnx: no such file"),
        (["predict", "resnet18@big", "--target", "jetson_nano"], "NAME@RESOLUTION"),
        (["predict", "--space", "quickstart", "--arch", "0 1", "--target", "jetson_nano"], "columns|knobs"),
        (
            ["predict", "--space", "quickstart", "--arch", "bigest", "--target", "jetson_nano"],
            "Did you mean 'largest'|neither",
        ),
        (["predict", "resnet18", "--target", "jetson_nano", "--predictor", "rofline"], "Did you mean 'roofline'"),
        (["predict", "resnet18", "--target", "jetson_nano", "--predictor", "scale"], "make them with"),
        (["predict", "resnet18", "--target", "jetson_nano", "--predictor", "nowhere:X"], "cannot import it"),
        (
            ["predict", "quickstart:largest", "--target", "jetson_nano", "--predictor", "few_shot:gone.npz"],
            "^gone.npz: cannot be read as a few-shot predictor: No such file or directory$",
        ),
        (["devices", "measure", "jetson_nano", "resnet18"], "cannot be measured here"),
        (["devices", "measure", "jetson_nano", "resnet18", "--meter", "telnet"], "unknown meter 'telnet'"),
        (["devices", "measure", "jetson_nano", "resnet18", "resnet18"], "named twice"),
        (["devices", "measure", "jetson_nano", "--arch", "largest"], "needs --space"),
        (
            ["devices", "calibrate", "jetson_nano", "--from", "gone.csv"],
            "gone.csv: cannot be read: No such file",
        ),
        (["devices", "calibrate", "jetson_nano", "--method", "magic"], "Known: auto"),
    ],
)
def test_what_a_person_can_mend_says_how(arguments: list[str], message: str) -> None:
    assert re.search(message, bad(*arguments))


def test_predictions_say_what_they_rest_on_and_what_they_doubt(tmp_path: Path) -> None:
    said = good("predict", "mobilenet_v3_large", "--target", "edge_tpu", "--metric", "latency_ms", "--metric", "macs")
    assert "latency_ms of mobilenet_v3_large on edge_tpu:int8" in said
    assert "hard_swish is not among the supported operators" in said
    assert "macs of mobilenet_v3_large on edge_tpu:int8: 2" in said
    (tmp_path / "m.csv").write_text("network,latency_ms\nmobilenet_v2,5\nmobilenet_v2@160,3\n")
    good("devices", "calibrate", "jetson_nano", "--from", tmp_path / "m.csv", "--quiet")
    said = good("predict", "vgg16", "--target", "jetson_nano")
    assert "latency_ms on jetson_nano:fp16-maxn: 1 of 1 networks lie outside the measured 3 to 5 ms\n" in said
    said = good("predict", "resnet18", "--target", "ncs2", "--metric", "energy_mj")
    assert "warning: ncs2:fp16: energy is latency times stated power\n" in said


@pytest.mark.parametrize("arguments", [("calibrate", "board", "--networks", 0), ("validate", "board", "--count", 0)])
def test_no_networks_are_not_taken_for_the_default(arguments: tuple[object, ...], board: Path) -> None:
    result = call("devices", *arguments)
    assert result.exit_code == 2
    assert "greater than or equal to 1" in result.output


def test_counts_are_told_whole_and_not_as_predictions() -> None:
    metrics = [m for m in METRICS if m not in ("latency_ms", "energy_mj")]
    lines = good("predict", "resnet18", "--target", "ncs2", *(w for m in metrics for w in ("--metric", m))).splitlines()
    said = {line.partition(" of ")[0]: line.partition(": ")[2] for line in lines}
    assert said.keys() == set(metrics)
    assert said["params"] == "11,689,512, an exact count"
    assert said["file_bytes"] == "23,379,024 bytes, an exact count"
    for metric, words in said.items():
        assert "predicted" not in words
        assert (" bytes, " in words) == metric.endswith("_bytes")


OWN = """
import numpy as np
from predictors.base import AdditivePredictor
class Mine(AdditivePredictor):
    def __init__(self, target, metric): self.metric = metric
    def block_features(self, workload): return np.array([workload.macs], dtype=float)
    def head(self, totals): return totals[:, 0] * 0 + 42.0
class Other:
    pass
"""


def test_ones_own_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_predictors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    said = good("predict", "resnet18", "--target", "host", "--predictor", "my_predictors:Mine")
    assert "42 ms, predicted: your my_predictors:Mine" in said
    assert "is no Predictor" in bad("predict", "resnet18", "--target", "host", "--predictor", "my_predictors:Other")


def test_names_of_networks_lead_back_to_them() -> None:
    for name in ("resnet18", "mobilenet_v2@96", "quickstart:smallest", suite_networks(24)[3].name):
        network = named_network(name)
        again = named_network(network.name)
        assert again.workload == network.workload
        assert again.family == network.family
    space = load_space("quickstart")
    assert named_network("quickstart:largest").workload == space.workload(space.references["largest"])
    assert math.prod(named_network("mobilenet_v2@96").input_shape) == 3 * 96 * 96


def test_a_table_is_looked_up_in_any_form_and_says_which_device_is_meant(space: Path, tmp_path: Path) -> None:
    from predictors import MeasuredTable

    loaded = load_space(str(space))
    archs = ["_".join(map(str, loaded.references[n])) for n in ("largest", "smallest")]
    rows = "".join(f"{a},{i + 1},{i + 3}\n" for i, a in enumerate(archs))
    table, target = tmp_path / "t.csv", ("--target", "jetson_nano", "--predictor")

    def write(*columns: str) -> None:
        table.write_text(f"arch,{','.join(columns)}\n{rows}")

    for columns, spec in [
        (("a_ms", "jetson_nano_ms"), ""),
        (("a_ms", "jetson_nano:fp16-maxn_ms"), ""),
        (("a_ms", "b_ms"), "@b"),
        (("a_ms", "b_ms"), "@b_ms"),
        (("latency_ms", "unmeasured"), ""),
    ]:
        write(*columns)
        said = good("predict", f"{space}:largest", *target, f"table:{table}{spec}")
        assert f": {1 if 'unmeasured' in columns else 3} ms, predicted: measured table of 2 networks" in said
    write("a_ms", "unmeasured")
    assert f"name one as table:{table}@a" in bad("predict", f"{space}:largest", *target, f"table:{table}")
    for columns, message in [
        ("target,latency_ms\n{},pixel_3,1\n{},pixel_3,2", "line 2: target is 'pixel_3', not jetson_nano:fp16-maxn"),
        ("threads,latency_ms\n{},1,1\n{},4,2", "line 3: threads is '4', but jetson_nano:fp16-maxn has '1'"),
    ]:
        table.write_text(f"arch,{columns}\n".format(*archs))
        assert message in bad("predict", f"{space}:largest", *target, f"table:{table}")
    table.write_text("arch,target,threads,latency_ms\n{},jetson_nano,4,1\n{},jetson_nano,4,2\n".format(*archs))
    assert ": 1 ms" in good("predict", f"{space}:largest", *target, f"table:{table}")
    write("a_ms", "b_ms")
    other = table.with_name("me@home.txt")
    other.write_bytes(table.read_bytes())
    assert ": 3 ms" in good("predict", f"{space}:largest", *target, f"table:{other}@b")
    assert "which of its devices" in bad("predict", f"{space}:largest", *target, f"table:{other}")
    MeasuredTable.from_csv(table, loaded).save(tmp_path / "t.npz")
    table.rename(tmp_path / "t@home.csv")
    for name in ("t@home.csv", "t.npz"):
        file = tmp_path / name
        assert "3 ms, predicted" in good("predict", f"{space}:largest", *target, f"table:{file}@b")
        assert bad("predict", f"{space}:largest", *target, f"table:{file}") == (
            f"{file}: which of its devices is jetson_nano:fp16-maxn? It has a, b; name one as table:{file}@a"
        )
        assert bad("predict", f"{space}:largest", *target, f"table:{file}@bb").startswith(
            f"{file}: no device 'bb'. Did you mean 'b'"
        )
        if name.endswith("npz"):
            assert str(file) in bad("predict", "quickstart:largest", *target, f"table:{file}@b")
    assert "gone.csv: cannot be read" in bad("predict", f"{space}:largest", *target, f"table:{tmp_path / 'gone.csv'}@b")
    table.write_text("op_code,phone\n000000,3\n111111,4\n")  # HELP's layout
    assert "4 ms, predicted" in good("predict", "nasbench201:1.1.1.1.1.1", *target, f"table:{table}@phone")


def test_tables_and_few_shot_transfer_predict_the_space_they_are_of(space: Path, tmp_path: Path) -> None:
    import numpy as np

    from predictors import Count, FewShot, MeasuredTable

    loaded = load_space(str(space))
    archs = np.unique(loaded.sample(60, np.random.default_rng(0)), axis=0)
    macs = Count("macs").bind(loaded).predict(archs).mean
    speeds = np.array([1e6, 3e6, 2e6])
    table = MeasuredTable(loaded.name, loaded.knobs, archs, ("a", "b", "jetson_nano"), macs[:, None] / speeds + 0.1)
    table.select(["jetson_nano"]).save(tmp_path / "table.npz")
    name = f"{space}:{'.'.join(map(str, archs[5]))}"
    said = good("predict", name, "--target", "jetson_nano", "--predictor", f"table:{tmp_path / 'table.npz'}")
    assert f"{macs[5] / 2e6 + 0.1:.4g} ms, predicted: measured table of {len(archs)} networks" in said

    learned = FewShot.learn(table.select(["a", "b"]))
    learned.save(tmp_path / "sources.npz")
    assert "not adapted" in bad(
        "predict", name, "--target", "jetson_nano", "--predictor", f"few_shot:{tmp_path / 'sources.npz'}"
    )
    learned.adapt(archs[::6], table.column("jetson_nano")[::6]).save(tmp_path / "adapted.npz")
    said = good("predict", name, "--target", "jetson_nano", "--predictor", f"few_shot:{tmp_path / 'adapted.npz'}")
    assert "few-shot transfer of" in said
    assert "cannot be read" in bad(
        "predict", name, "--target", "jetson_nano", "--predictor", f"table:{tmp_path / 'no.npz'}"
    )


def test_networks_finished_before_an_interrupt_are_kept(board: Path) -> None:
    program = (board / "board.py").read_text()
    calls = board / "calls"
    stop = f"""
import os, signal
with open({str(calls)!r}, "a") as file: file.write("x")
if os.path.getsize({str(calls)!r}) == 3:
    os.kill(os.getppid(), signal.SIGINT)
"""
    (board / "board.py").write_text(stop + program)
    names = ("mobilenet_v3_small@64", "squeezenet1_1@64", "resnet18@64", "mobilenet_v2@64")
    table, recording = board / "m.csv", board / "recording.json"
    command = ["devices", "measure", "board", *names, "--output", table, "--record", recording, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "nasbench", *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 130
    assert f"interrupted; 2 of 4 networks are kept in {table}; fit them with" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row.network for row in read_measurements(table)] == list(names[:2])
    assert len(json.loads(recording.read_text())["measurements"]) == 2
    # Before the first network is through there is nothing to keep, and nothing is made up.
    calls.write_text("xx")
    done = subprocess.run(
        [sys.executable, "-m", "nasbench", *map(str, command)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 130
    assert "interrupted; no network was finished" in done.stderr
    assert len(read_measurements(table)) == 2


def test_a_calibration_is_not_replaced_by_values_in_another_unit(tmp_path: Path) -> None:
    good("devices", "new", "guess", "--command", f"{sys.executable} x.py {{artifact}}")
    table = tmp_path / "m.csv"
    values = {"mobilenet_v2": 8.0, "resnet18": 30.0, "mnasnet": 9.0, "squeezenet1_1": 9.0}
    table.write_text("network,latency_ms\n" + "".join(f"{n},{ms}\n" for n, ms in values.items()))
    good("devices", "calibrate", "guess", "--from", table, "--quiet")
    before = files(user_data_dir())
    table.write_text("network,latency_ms\n" + "".join(f"{n},{1000 * ms}\n" for n, ms in values.items()))
    message = bad("devices", "validate", "guess", "--from", table, "--recalibrate", "--quiet")
    assert "times off what is predicted: is it in another unit?" in message
    assert files(user_data_dir()) == before
    assert "is it in another unit?" in good("devices", "validate", "guess", "--from", table)
    # What a calibration is doubted for is told with each prediction.
    good("devices", "calibrate", "guess", "--from", table, "--quiet")
    assert "which were guessed" in good("predict", "mobilenet_v2", "--target", "guess")


def test_energies_a_thousand_times_too_small_are_refused_where_the_power_is_known(tmp_path: Path) -> None:
    table = tmp_path / "m.csv"
    values = {"mobilenet_v2": 20.0, "resnet18": 60.0, "mnasnet": 22.0}
    table.write_text("network,latency_ms,energy_mj\n" + "".join(f"{n},{t},{t * 5e-3}\n" for n, t in values.items()))
    assert "energy_mj is" in bad("devices", "calibrate", "jetson_nano", "--from", table, "--quiet")
