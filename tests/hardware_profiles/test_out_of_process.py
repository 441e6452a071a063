"""Meters that drive other programs: against fakes of adb, ssh and a command that behave, and that misbehave."""

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w

from hardware_profiles import Artifact, Target, load_profile, meter_for
from hardware_profiles.meter_choice import with_meter
from hardware_profiles.out_of_process import OutOfProcessMeter
from hardware_profiles.profile import parse_profile
from hardware_profiles.subprocesses import ToolError, ending, run
from search_spaces import UserError

TRANSCRIPTS = Path(__file__).parent / "transcripts"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def profile(meter: dict[str, Any], **point: Any) -> dict[str, Any]:
    """A profile of nothing but a meter."""
    return {
        "name": "board",
        "title": "A board",
        "kind": "CPU",
        "default": "p",
        "meter": meter,
        "operating_points": {
            "p": {"precision": "fp16", "runtime": "any", "peak_gmacs": 1, "bandwidth_gbs": 1, "source": "test", **point}
        },
        "roofline": {"efficiency": {"other": 0.5}, "launch_us": 1, "source": "test"},
    }


def target(meter: dict[str, Any], **point: Any) -> Target:
    return parse_profile(profile(meter, **point), "board.toml").target()


def files(folder: Path, *names: str, suffix: str = "onnx") -> list[Artifact]:
    folder.mkdir(exist_ok=True)
    made = []
    for name in names:
        path = folder / f"{name}.{suffix}"
        path.write_text(name)
        made.append(Artifact(path, suffix, "fp16", (3, 8, 8)))
    return made


# Behaves as the file's contents say.
FAKE = """#!{python}
import json, os, sys, time
name = open(sys.argv[1]).read()
sys.stderr.write("a word on stderr\\n")
if name == "slow":
    if os.fork() == 0:
        time.sleep(60)
    time.sleep(60)
if name == "garbage":
    sys.stdout.buffer.write(b"\\xff\\xfe not json \\x00")
    sys.exit()
if name == "fails":
    sys.exit("out of memory on device")
if name == "huge":
    while True:
        sys.stdout.write("x" * 2**20)
if name == "partial":
    print('{{"latency_ms": [1.0, 1.1')
    sys.exit()
if name == "dead":
    os.kill(os.getpid(), 9)
time.sleep(0.01)
values = {{"nan": float("nan"), "negative": -1.0, "zero": 0.0, "microseconds": 9e6}}
print("warming up")
latency = values.get(name, [2.0, 1.0, 1.5])
rest = {{"energy_mj": 3.0, "peak_memory_bytes": 4096, "runtime_version": sys.argv[2]}}
print(json.dumps({{"latency_ms": latency, **rest}}))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    return executable(tmp_path / "fake", FAKE.format(python=sys.executable))


def test_a_command_that_misbehaves_costs_its_own_network_only(fake: Path, tmp_path: Path) -> None:
    names = [
        "good",
        "slow",
        "garbage",
        "fails",
        "huge",
        "partial",
        "dead",
        "nan",
        "negative",
        "zero",
        "microseconds",
        "fine",
    ]
    board = target(
        {"kind": "command", "command": f"{fake} {{artifact}} {{precision}}-{{threads}}", "timeout_s": 2, "retries": 0}
    )
    seen: list[tuple[int, int]] = []
    measured = meter_for(board, lambda done, total: seen.append((done, total))).measure(
        files(tmp_path / "n", *names), board
    )
    results = dict(zip(names, measured, strict=True))
    for name in ("good", "fine"):
        m = results[name]
        assert (m.error, m.latency_ms, m.samples_ms.tolist()) == ("", 1.5, [2.0, 1.0, 1.5])
        assert (m.energy_mj, m.peak_memory_bytes) == (3.0, 4096)
        assert (m.protocol.runtime_version, m.protocol.statistic) == ("fp16-1", "median of samples")
        assert m.protocol.repeats == 3
    expected = {
        "slow": "not finished after 2 s, killed; it last said: a word on stderr",
        "garbage": "no JSON object",
        "fails": "exited with code 1: a word on stderr | out of memory on device",
        "huge": "more than 16 MB",
        "partial": "breaks off",
        "dead": "was ended by SIGKILL (out of memory?): ",
        "nan": "nan ms",
        "negative": "-1 ms",
        "zero": "gave 0 ms",
        "microseconds": "milliseconds per inference are expected",
    }
    for name, message in expected.items():
        m = results[name]
        assert message in m.error, name
        assert m.error.startswith(f"{m.artifact.path}: ")
        assert len(m.samples_ms) == 0
        assert m.latency_ms != m.latency_ms
    assert seen[-1] == (len(names), len(names))
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(fake) in " ".join(p.info["cmdline"] or [])]


def test_timeouts_are_tried_again_a_bounded_number_of_times(fake: Path, tmp_path: Path) -> None:
    board = target({"kind": "command", "command": f"{fake} {{artifact}} x", "timeout_s": 0.3, "retries": 2})
    meter: Any = meter_for(board)
    calls: list[str] = []

    def counted(command: Any, timeout_s: float) -> Any:
        calls.append(Path(command[1]).stem)
        return run(command, timeout_s)

    meter.runner = counted
    meter.measure(files(tmp_path / "n", "slow", "fails"), board)
    assert calls == ["slow"] * 3 + ["fails"]


def test_passes_go_round_all_networks(fake: Path, tmp_path: Path) -> None:
    board = target({"kind": "command", "command": f"{fake} {{artifact}} x", "passes": 3})
    measured = meter_for(board).measure(files(tmp_path / "n", "a", "b"), board)
    assert [len(m.samples_ms) for m in measured] == [9, 9]
    assert all(m.protocol.passes == 3 for m in measured)


def test_files_that_the_device_cannot_take_are_not_sent(fake: Path, tmp_path: Path) -> None:
    board = target({"kind": "command", "command": f"{fake} {{artifact}} x"})
    good, bad = files(tmp_path / "n", "good"), files(tmp_path / "n", "bad", suffix="tflite")
    gone = Artifact(tmp_path / "gone.onnx", "onnx", "fp16", (3, 8, 8))
    errors = [m.error for m in meter_for(board).measure([*good, *bad, gone], board)]
    assert errors[0] == ""
    assert "format 'tflite', where this device takes 'onnx'" in errors[1]
    assert "no such file" in errors[2]


def test_another_device_than_meant_is_not_measured(fake: Path, tmp_path: Path) -> None:
    meter = {
        "kind": "command",
        "command": f"{fake} {{artifact}} x",
        "identity_command": "echo Board rev B",
        "identity": "rev A",
    }
    board = target(meter)
    with pytest.raises(UserError, match=r"board:p: the device says it is 'Board rev B', but the profile means 'rev A'"):
        meter_for(board).measure(files(tmp_path / "n", "good"), board)
    board = target({**meter, "identity": "rev B"})
    (m,) = meter_for(board).measure(files(tmp_path / "n", "good"), board)
    assert m.protocol.host == "Board rev B"
    board = target({**meter, "identity_command": "no-such-program-here"})
    with pytest.raises(UserError, match="cannot run 'no-such-program-here'.*is it installed"):
        meter_for(board).measure(files(tmp_path / "n", "good"), board)


def alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("returncode", "words"),
    [
        (0, "exited with code 0"),
        (3, "exited with code 3"),
        (-9, "was ended by SIGKILL (out of memory?)"),
        (-11, "was ended by SIGSEGV (Segmentation fault)"),
        (-35, "was ended by signal 35 (Real-time signal 1)"),
    ],
)
def test_how_a_process_ended_is_said_in_words(returncode: int, words: str) -> None:
    assert ending(returncode) == words


def test_nothing_that_a_program_started_outlives_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    started = time.monotonic()
    run(["sh", "-c", f"sleep 60 & echo $! > {note}"], 5)  # its child holds the output open
    with pytest.raises(ToolError, match="not finished"):
        run(["sh", "-c", f"sleep 61 & echo $! >> {note}; wait"], 0.3)
    assert time.monotonic() - started < 30
    killed = list(map(int, note.read_text().split()))
    assert len(killed) == 2
    deadline = time.monotonic() + 10  # a killed process ends when it is next scheduled
    while any(map(alive, killed)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("meter", "message"),
    [
        ({"kind": "command"}, r"meter.command.command: this key is missing"),
        ({"kind": "command", "command": "x"}, r"command must have \{artifact\}"),
        (
            {"kind": "command", "command": "x {artifact} {thread}"},
            r"unknown placeholder \{thread\}. Did you mean 'threads'",
        ),
        ({"kind": "command", "command": "x {artifact} 'y"}, "No closing quotation"),
        ({"kind": "command", "command": "x {artifact}", "identity": "y"}, "identity needs an identity_command"),
        ({"kind": "command", "command": "x {artifact}", "identity_command": "  "}, "identity_command names no program"),
        ({"kind": "command", "command": ["", "{artifact}"]}, "command names no program"),
        ({"kind": "adb", "serail": "x"}, r"meter.adb.serail: unknown key. Did you mean 'serial'"),
        ({"kind": "adb", "taskset": "f0; rm"}, r"meter.adb.taskset: .*pattern"),
        ({"kind": "ssh"}, r"meter.ssh.host: this key is missing"),
        ({"kind": "ssh", "host": "-oProxyCommand=x"}, r"meter.ssh.host: .*pattern"),
        ({"kind": "ssh", "host": "x", "tool": "json"}, "needs binary"),
        ({"kind": "ssh", "host": "x", "timeout_s": -1}, r"timeout_s: .*greater than 0, got -1"),
        ({"kind": "telnet"}, r"meter: needs kind = one of 'command', 'adb', 'ssh'"),
        ({"command": "x {artifact}"}, r"meter: needs kind"),
    ],
)
def test_a_wrong_meter_section_names_the_key(meter: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        target(meter)


def test_braces_without_a_word_reach_the_command(tmp_path: Path) -> None:
    printing = [sys.executable, "-c", "import json; print(json.dumps({'latency_ms': 0.5, 'notes': '{artifact}'}))"]
    board = target({"kind": "command", "command": printing})
    name = "with 'blanks'"
    (m,) = meter_for(board).measure(files(tmp_path / "n", "good"), board)
    assert m.note.endswith("good.onnx")
    assert name not in m.note


def test_a_profile_with_a_meter_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(tomli_w.dumps(profile({"kind": "ssh", "host": "nano", "tool": "trtexec"})))
    loaded = load_profile(path)
    assert loaded.meter is not None
    assert loaded.meter.kind == "ssh"


# A phone: its files lie in a folder, its programs answer from a script. `unplugged` is a file that cuts the cable.
ADB = """#!{python}
import os, pathlib, shutil, shlex, sys
phone = pathlib.Path({phone!r})
log = phone / "log"
args = sys.argv[1:]
with open(log, "a") as f:
    f.write(" ".join(args) + "\\n")
assert args[:2] == ["-s", "SERIAL"], args
args = args[2:]
if (phone / "unplugged").exists():
    sys.stderr.write("adb: device 'SERIAL' not found\\n" if args[0] != "push" else
                     "adb: error: failed to get feature set: device offline\\n")
    sys.exit(1)
local = lambda p: phone / p.lstrip("/").replace("/", "_")
if args[0] == "get-state":
    print("device")
elif args[0] == "push":
    shutil.copy(args[1], local(args[2]))
    print("1 file pushed")
elif args[0] == "shell":
    words = shlex.split(args[1])
    if words[0] == "getprop":
        print({{"ro.product.manufacturer": "Google", "ro.product.model": "Pixel 4"}}.get(words[1], "12"))
    elif words[0] == "mv":
        os.rename(local(words[1]), local(words[2]))
    elif words[0] == "rm":
        local(words[2]).unlink(missing_ok=True)
    elif words[0] == "test":
        sys.exit(0 if (phone / "has_program").exists() else 1)
    elif words[0] == "dumpsys":
        hot = f"Thermal Status: {{(phone / 'hot').exists() * 3}}"
        print("  level: 87\\n  temperature: 305" if words[1] == "battery" else hot)
    elif words[0] in ("taskset", "/data/local/tmp/benchmark_model"):
        graph = next(w for w in words if w.startswith("--graph=")).removeprefix("--graph=")
        name = local(graph).read_text()
        if name == "unplug":
            (phone / "unplugged").touch()
            sys.stderr.write("adb: error: closed\\n")
            sys.exit(1)
        if name == "broken":
            print("ERROR: Failed to allocate tensors!\\nERROR: Benchmarking failed.")
            sys.exit(1)
        import time; time.sleep(0.5)
        print(open({transcript!r}).read())
    else:
        sys.exit(f"unknown command {{words}}")
"""


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    folder = tmp_path / "phone"
    folder.mkdir()
    (folder / "has_program").touch()
    transcript = str(TRANSCRIPTS / "benchmark_model_rpi.txt")
    executable(folder / "adb", ADB.format(python=sys.executable, phone=str(folder), transcript=transcript))
    return folder


def adb(phone: Path, **keys: Any) -> Target:
    return target({"kind": "adb", "adb": str(phone / "adb"), "serial": "SERIAL", "retries": 0, **keys}, threads=4)


def left_on(phone: Path) -> list[str]:
    return [p.name for p in phone.iterdir() if "nasbench" in p.name]


def test_a_phone_is_asked_filled_timed_and_cleaned(phone: Path, tmp_path: Path) -> None:
    board = adb(phone, identity="Pixel 4", taskset="f0", profile_operators=True)
    (m,) = meter_for(board).measure(files(tmp_path / "n", "net", suffix="tflite"), board)
    assert m.error == ""
    assert m.latency_ms == pytest.approx(2.781)
    assert m.protocol.host == "Google Pixel 4, Android 12"
    assert (m.protocol.threads, m.protocol.repeats) == (4, 337)
    assert "before: battery 87 % 30.5 C thermal status 0" in m.note
    assert not m.throttled
    assert left_on(phone) == []
    timed = next(line for line in (phone / "log").read_text().splitlines() if "--graph" in line)
    assert timed.startswith(
        "-s SERIAL shell taskset f0 /data/local/tmp/benchmark_model --graph=/data/local/tmp/nasbench-"
    )
    for option in (
        "--num_threads=4",
        "--num_runs=50",
        "--warmup_runs=10",
        "--use_xnnpack=true",
        "--enable_op_profiling=true",
    ):
        assert option in timed


def test_a_hot_phone_is_flagged(phone: Path, tmp_path: Path) -> None:
    (phone / "hot").touch()
    board = adb(phone)
    (m,) = meter_for(board).measure(files(tmp_path / "n", "net", suffix="tflite"), board)
    assert m.throttled
    assert "thermal status 3" in m.note


def test_a_phone_unplugged_in_the_middle_keeps_what_was_measured(phone: Path, tmp_path: Path) -> None:
    board = adb(phone)
    names = ("first", "broken", "unplug", "after", "last")
    measured = meter_for(board).measure(files(tmp_path / "n", *names, suffix="tflite"), board)
    first, broken, unplug, after, last = measured
    assert first.latency_ms == pytest.approx(2.781)
    assert "exited with code 1: ERROR: Failed to allocate tensors! | ERROR: Benchmarking failed." in broken.error
    assert "adb lost the device" in unplug.error
    assert "not measured: the device was lost before" in after.error
    assert "not measured" in last.error
    with pytest.raises(UserError, match="adb lost the device: adb: device 'SERIAL' not found"):
        meter_for(board).measure(files(tmp_path / "n", "first", suffix="tflite"), board)


def test_a_phone_that_is_another_or_has_no_program(phone: Path, tmp_path: Path) -> None:
    network = files(tmp_path / "n", "net", suffix="tflite")
    board = adb(phone, identity="Pixel 3")
    with pytest.raises(UserError, match="'Google Pixel 4, Android 12', but the profile means 'Pixel 3'"):
        meter_for(board).measure(network, board)
    (phone / "has_program").unlink()
    board = adb(phone)
    with pytest.raises(UserError, match="no such program on the device; push benchmark_model"):
        meter_for(board).measure(network, board)


# A Jetson: ssh runs the script here, with the board's programs first in PATH.
SSH = """#!/bin/sh
[ -e {board}/unplugged ] && {{ echo "ssh: connect to host nano port 22: No route to host" >&2; exit 255; }}
for last; do :; done
PATH={board}/bin:$PATH exec sh -c "$last"
"""
SCP = """#!{python}
import pathlib, shutil, sys
if pathlib.Path({board!r}, "unplugged").exists():
    sys.exit("ssh: connect to host nano port 22: No route to host\\nlost connection")
shutil.copy(sys.argv[-2], sys.argv[-1].split(":", 1)[1])
"""
TRTEXEC = """#!{python}
import pathlib, sys, time
options = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[1:])
pathlib.Path({board!r}, "log").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if "onnx" in options:
    name = pathlib.Path(options["onnx"]).read_text()
    if name == "broken":
        print("[E] ModelImporter.cpp: No importer registered for op: Foo")
        print("&&&& FAILED TensorRT.trtexec [TensorRT v8201]")
        sys.exit(1)
    pathlib.Path(options["saveEngine"]).write_text(name)
else:
    name = pathlib.Path(options["loadEngine"]).read_text()
    if name == "unplug":
        pathlib.Path({board!r}, "unplugged").touch()
        sys.exit(255)
    if name == "hangs":
        time.sleep(30)
    time.sleep(0.6)
    if "exportTimes" in options:
        rows = ", ".join('{{ "computeMs" : 3.0, "latencyMs" : %f }}' % (3.1 + i / 100) for i in range(5))
        pathlib.Path(options["exportTimes"]).write_text("[ " + rows + " ]")
print(open({transcript!r}).read())
if "dumpProfile" in options:
    print(open({profile!r}).read())
"""
TEGRASTATS = """#!/bin/sh
while true; do sed -n 4p {transcript}; sleep 0.05; done
"""


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    board = tmp_path / "board"
    (board / "bin").mkdir(parents=True)
    (board / "files").mkdir()
    names = {
        "python": sys.executable,
        "board": str(board),
        "transcript": str(TRANSCRIPTS / "trtexec_10_3.txt"),
        "profile": str(TRANSCRIPTS / "trtexec_profile.txt"),
    }
    executable(board / "ssh", SSH.format(board=board))
    executable(board / "scp", SCP.format(**names))
    executable(board / "bin" / "trtexec", TRTEXEC.format(**names))
    executable(board / "bin" / "tegrastats", TEGRASTATS.format(transcript=TRANSCRIPTS / "tegrastats.txt"))
    executable(board / "bin" / "nvpmodel", "#!/bin/sh\necho 'NV Power Mode: MAXN'; echo 0\n")
    return board


def over_ssh(board: Path, power_mode: str = "MAXN", **keys: Any) -> Target:
    programs = {"ssh": str(board / "ssh"), "scp": str(board / "scp"), "folder": str(board / "files")}
    meter = {"kind": "ssh", "host": "nano", "binary": "trtexec", "retries": 0, "timeout_s": 20, **programs, **keys}
    return target(meter, power_mode=power_mode)


def test_a_jetson_builds_times_and_tells_its_power(jetson: Path, tmp_path: Path) -> None:
    board = over_ssh(jetson, profile_operators=True)
    (m,) = meter_for(board).measure(files(tmp_path / "n", "net"), board)
    assert m.error == ""
    assert m.samples_ms.tolist() == pytest.approx([3.10, 3.11, 3.12, 3.13, 3.14])
    assert m.latency_ms == pytest.approx(3.12)
    assert m.protocol.runtime_version == "10.3.0"
    assert "power mode MAXN" in m.protocol.host
    # 6.626 W at 318 inferences a second.
    assert m.energy_mj == pytest.approx(6626 / 318.007)
    assert "GPU up to 50.562 C" in m.note
    assert len(m.operators) == 5
    assert list((jetson / "files").iterdir()) == []
    build, timed, profiled = (jetson / "log").read_text().splitlines()
    assert "--fp16" in build
    assert "--saveEngine=" in build
    assert "--loadEngine=" in timed
    assert "--warmUp=100 --iterations=50 --avgRuns=10" in timed
    assert "--dumpProfile" in profiled


def test_the_statistic_may_leave_out_copies(jetson: Path, tmp_path: Path) -> None:
    board = over_ssh(jetson, statistic="gpu_compute", energy=False)
    (m,) = meter_for(board).measure(files(tmp_path / "n", "net"), board)
    assert m.latency_ms == 3.0
    assert m.energy_mj is None


def test_a_jetson_in_another_power_mode_is_refused(jetson: Path, tmp_path: Path) -> None:
    board = over_ssh(jetson, power_mode="5W")
    with pytest.raises(
        UserError, match=r"power mode 'MAXN', the operating point 'p' means '5W'; change it with nvpmodel"
    ):
        meter_for(board).measure(files(tmp_path / "n", "net"), board)
    (jetson / "unplugged").touch()
    board = over_ssh(jetson)
    with pytest.raises(UserError, match="ssh lost nano: .*No route to host"):
        meter_for(board).measure(files(tmp_path / "n", "net"), board)


def test_a_jetson_that_fails_in_the_middle(jetson: Path, tmp_path: Path) -> None:
    board = over_ssh(jetson, energy=False, timeout_s=2)
    names = ("net", "broken", "hangs", "again", "unplug", "last")
    net, broken, hangs, again, unplug, last = meter_for(board).measure(files(tmp_path / "n", *names), board)
    assert net.latency_ms == again.latency_ms == pytest.approx(3.12)
    assert "No importer registered for op: Foo" in broken.error
    assert "not finished after 2 s" in hangs.error
    assert "ssh lost nano" in unplug.error
    assert "the device was lost before" in last.error


def test_a_program_of_ones_own_over_ssh(jetson: Path, tmp_path: Path) -> None:
    printed = json.dumps({"latency_ms": [1.0, 3.0, 2.0]})
    executable(jetson / "bin" / "mine", f"#!/bin/sh\ntest -f $1 && echo '{printed}'\n")
    board = over_ssh(jetson, tool="json", binary="mine")
    (m,) = meter_for(board).measure(files(tmp_path / "n", "net"), board)
    assert m.latency_ms == 2.0
    assert os.listdir(jetson / "files") == []


def test_a_meter_by_a_word_keeps_what_the_profile_says_of_its_device(phone: Path, jetson: Path) -> None:
    for board, word, key, value in (
        (adb(phone, identity="Pixel 4"), "adb:ANOTHER", "serial", "ANOTHER"),
        (over_ssh(jetson, identity="Nano"), "ssh:elsewhere", "host", "elsewhere"),
    ):
        said, meter = with_meter(board, word)
        assert said.profile.meter is not None
        assert board.profile.meter is not None
        assert said.profile.meter == board.profile.meter.model_copy(update={key: value})
        assert type(meter) is type(meter_for(board))
    with pytest.raises(UserError, match="which program measures runtime 'any' over ssh"):
        with_meter(adb(phone), "ssh:nano")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('kind = "adb"\ntimeout_s = -1', "adb.timeout_s: .*greater than 0, got -1"),
        ('kind = "adb"\ntimeout = 1', "adb.timeout: unknown key. Did you mean 'timeout_s'"),
        ('kind = "ssh"', "ssh.host: this key is missing"),
        ("timeout_s = 1", "needs kind = one of 'command', 'adb', 'ssh'"),
        ("kind = [", "not valid TOML"),
        ('name = "x"\n[meter]\nkind = "adb"', r"name: unknown key beside \[meter\]"),
        ('[meter]\nkind = "adb"\n[metre]\nserial = "x"', r"metre: unknown key beside \[meter\]"),
        ("meter = 3", r"meter: is 3, where a table \[meter\] is expected"),
    ],
)
def test_a_meter_in_a_file_is_checked_key_by_key(text: str, message: str, phone: Path, tmp_path: Path) -> None:
    path = tmp_path / "meter.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"meter.toml: {message}"):
        with_meter(adb(phone), str(path))


def test_a_meter_of_ones_own_need_not_say_which_programs_it_runs() -> None:
    assert OutOfProcessMeter.__abstractmethods__ == {"identify", "benchmark"}
