import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from hardware_profiles import Artifact, OnnxRuntimeMeter, Target
from hardware_profiles.meter import Measurement
from hardware_profiles.passes import Session
from hardware_profiles.subprocesses import ToolError
from search_spaces import UserError

QUICK: dict[str, Any] = {"passes": 3, "max_passes": 3, "pass_ms": 0.1}


class Scripted(Session):
    """Does what the file says, and returns the process that it ran in."""

    def __init__(self, orders: str) -> None:
        self.orders = orders
        self.runs = 0

    def feed(self, x: np.ndarray[Any, Any]) -> None:
        pass

    def run(self) -> list[np.ndarray[Any, Any]]:
        self.runs += 1
        if self.orders == "crash" and self.runs == 3:
            print("the last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(0.05 if self.orders == "slow" else 1e-4)
        return []


class ScriptedMeter(OnnxRuntimeMeter):
    title = "Scripted"

    def open(self, artifact: Artifact, target: Target) -> Session:
        orders = artifact.path.read_text()
        if orders == "crash at opening":
            os.kill(os.getpid(), signal.SIGSEGV)
        if orders == "raise":
            raise ValueError("no such operator")
        return Scripted(orders)

    def _result(self, *args: Any) -> Measurement:
        found = super()._result(*args)
        if found.artifact.path.read_text() == "break":
            raise KeyError("of the meter itself")
        if found.artifact.path.read_text() == "refuse":
            raise UserError("the meter refuses")
        object.__setattr__(found, "cycles", os.getpid())
        return found


class UnsentError(Exception):
    def __init__(self, code: int, place: str) -> None:
        super().__init__(f"code {code} at {place}")  # from which alone it cannot be made again


class UnsentMeter(ScriptedMeter):
    def _result(self, *args: Any) -> Measurement:
        found = super()._result(*args)
        orders = found.artifact.path.read_text()
        if orders == "unsent":
            raise UnsentError(7, "the end")
        if orders == "holds a stream":
            object.__setattr__(found, "cycles", sys.stderr)
        if orders == "warn":
            warnings.warn("the clock is low", RuntimeWarning, stacklevel=1)
            warnings.warn(type("OwnWarning", (UserWarning,), {})("it is hot"), stacklevel=1)
        return found


class LostMeter(ScriptedMeter):
    def __setstate__(self, state: dict[str, Any]) -> None:
        raise ImportError("cannot be made there")


@pytest.fixture(autouse=True)
def found_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module, for other processes, by the name that pytest gave it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[__name__.count(".")]))


@pytest.fixture
def scripts(tmp_path: Path) -> Callable[..., list[Artifact]]:
    def make(*orders: str) -> list[Artifact]:
        artifacts = []
        for i, text in enumerate(orders):
            path = tmp_path / f"{i}.onnx"
            path.write_text(text)
            artifacts.append(Artifact(path, "onnx", "fp32", (3, 4, 4)))
        return artifacts

    return make


def test_networks_are_measured_in_another_process_which_tells_how_far_it_is(
    scripts: Callable[..., list[Artifact]], host: Target
) -> None:
    told: list[tuple[int, int]] = []
    meter = ScriptedMeter(**QUICK, progress=lambda *passes: told.append(passes))
    artifacts = scripts("slow", "slow")
    measured = meter.measure(artifacts, host)
    assert [m.artifact for m in measured] == artifacts
    assert {m.cycles for m in measured} & {os.getpid(), None} == set()
    assert told[-1] == (3, 3)
    assert told == sorted(told)
    assert all(m.latency_ms == pytest.approx(50, rel=0.5) and m.protocol.passes == 3 for m in measured)
    assert all("in a process of its own" in m.protocol.notes for m in measured)
    here = ScriptedMeter(**QUICK, isolated=False).measure(artifacts, host)
    assert {m.cycles for m in here} == {os.getpid()}
    assert all("in the process that asked" in m.protocol.notes for m in here)


def test_a_file_that_crashes_the_runtime_is_named_and_the_others_get_their_numbers(
    scripts: Callable[..., list[Artifact]], host: Target
) -> None:
    artifacts = scripts("fine", "crash at opening", "crash", "raise", "fine")
    measured = ScriptedMeter(**QUICK).measure(artifacts, host)
    assert [m.artifact for m in measured] == artifacts
    assert [bool(m.error) for m in measured] == [False, True, True, True, False]
    assert f"{artifacts[1].path}: Scripted ended on this file: its process was ended by SIGSEGV" in measured[1].error
    assert "(Segmentation fault): the last words" in measured[2].error
    assert "cannot run this file: no such operator" in measured[3].error
    assert measured[0].latency_ms > 0 < measured[4].latency_ms
    assert all(np.isnan(m.latency_ms) for m in measured[1:4])


def test_what_the_meter_raises_there_is_raised_here(scripts: Callable[..., list[Artifact]], host: Target) -> None:
    with pytest.raises(KeyError, match="of the meter itself"):
        ScriptedMeter(**QUICK).measure(scripts("fine", "break"), host)
    with pytest.raises(UserError, match="the meter refuses"):
        ScriptedMeter(**QUICK).measure(scripts("fine", "refuse"), host)
    with pytest.raises(ToolError, match=r"host:fp32: the process that measures exited with code 1: .*be made there"):
        LostMeter(**QUICK).measure(scripts("fine"), host)


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ("unsent", "UnsentError: code 7 at the end"),
        ("holds a stream", "TypeError: cannot pickle '_io.TextIOWrapper' object"),
    ],
)
def test_what_cannot_be_sent_from_there_is_not_blamed_on_a_file(
    orders: str, words: str, scripts: Callable[..., list[Artifact]], host: Target
) -> None:
    with pytest.raises((ToolError, TypeError)) as error:
        UnsentMeter(**QUICK).measure(scripts("fine", orders), host)
    assert words in f"{type(error.value).__name__}: {error.value}"


def test_warnings_of_the_meter_are_issued_here(scripts: Callable[..., list[Artifact]], host: Target) -> None:
    meter = UnsentMeter(**QUICK)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        meter.measure(scripts("warn"), host)
    assert [str(w.message) for w in warned] == ["the clock is low", "OwnWarning: it is hot"]
    assert [w.category for w in warned] == [RuntimeWarning, UserWarning]
    assert {w.filename for w in warned} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(RuntimeWarning, match="the clock is low"):
            meter.measure(scripts("warn"), host)


def test_a_class_that_only_this_process_knows_measures_here(
    scripts: Callable[..., list[Artifact]], host: Target
) -> None:
    class Local(ScriptedMeter):
        pass

    (m,) = Local(**QUICK).measure(scripts("fine"), host)
    assert m.cycles == os.getpid()
    assert "in the process that asked" in m.protocol.notes


KILLED = f"""
import sys
from pathlib import Path
from hardware_profiles import Artifact, load_target
from {__name__} import ScriptedMeter

meter = ScriptedMeter(passes=100_000, max_passes=100_000, pass_ms=0.1, budget_s=1000)
meter.progress = lambda *_: print("going", flush=True)
meter.measure([Artifact(Path(sys.argv[1]), "onnx", "fp32", (3, 4, 4))], load_target("host:fp32"))
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_the_process_ends_with_this_one(
    end: signal.Signals, scripts: Callable[..., list[Artifact]], host: Target
) -> None:
    (artifact,) = scripts("fine")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", KILLED, str(artifact.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"going\n"
        (child,) = psutil.Process(parent.pid).children()
        parent.send_signal(end)
        parent.wait(30)
        child.wait(30)
    assert not child.is_running()
