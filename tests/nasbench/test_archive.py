"""The archive, the run directory, and the evaluator that records."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from nasbench.archive import Archive, arch_row, arch_text
from nasbench.cli import app
from nasbench.config import parse_config
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.recorded import RecordedEvaluator
from nasbench.execution.in_process import InProcess
from nasbench.objectives import make_objective
from nasbench.run import Run, latest_run, load_run, load_state, save_state
from search_spaces import UserError


def test_evaluations_come_back_as_recorded(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "a.sqlite")
    arch = np.array([3, 0, 12], dtype=np.uint8)
    archive.record_evaluation("sample", 7, arch, {"accuracy": 0.5, "latency_ms": math.nan}, status=1, message="why")
    frame = archive.evaluations()
    assert frame.loc[0, ["id", "arch", "status", "message"]].tolist() == [7, "3 0 12", 1, "why"]
    assert frame["accuracy"][0] == 0.5
    assert math.isnan(frame["latency_ms"][0])
    assert np.array_equal(arch_row(arch_text(arch)), arch)


def test_committed_rows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    code = (
        "import sys, numpy as np; from pathlib import Path; from nasbench.archive import Archive\n"
        "archive = Archive(Path(sys.argv[1]))\n"
        "for i in range(10**9):\n"
        "    archive.record_evaluation('search', i, np.array([i % 7]), {'accuracy': i / 10})\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = -1
    for line in process.stdout:
        last = int(line)
        if last > 200:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    finished = Archive(path).finished("search")
    assert set(range(last + 1)) <= finished.keys()
    assert finished[last] == (str(last % 7), 0, {"accuracy": last / 10})


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"a\.sqlite: cannot be used"):
        Archive(path)
    with pytest.raises(UserError, match="no archive there"):
        Archive(tmp_path / "none.sqlite", readonly=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda archive: archive.record_stage("net", 1, "x" * 100_000, "float", "net.onnx", {}),
        lambda archive: archive.record_event("net", 1, "prune", "note", 1, "x" * 100_000),
        lambda archive: archive.spend("x" * 100_000, 1.0, 1.0, 1, "things"),
    ],
)
def test_a_full_disk_is_said_whatever_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Archive], None]
) -> None:
    monkeypatch.setattr("nasbench.archive._WAITS_S", (0.0,))
    archive = Archive(tmp_path / "a.sqlite")
    archive._db.execute("PRAGMA max_page_count = 1")  # SQLite takes the pages there are, and gives no more
    with pytest.raises(UserError, match=r"a\.sqlite: cannot be written \(database or disk is full\)"):
        write(archive)


def test_state_round_trips_without_pickles(tmp_path: Path) -> None:
    state = {"a": np.arange(6, dtype=np.uint8).reshape(2, 3), "b": [1, 2.5, None, {"c": np.float32(3)}], "d": "text"}
    save_state(tmp_path / "s.npz", state)
    again = load_state(tmp_path / "s.npz")
    assert np.array_equal(again["a"], state["a"])
    assert again["a"].dtype == np.uint8
    assert again["b"] == [1, 2.5, None, {"c": 3.0}]
    (tmp_path / "s.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"s\.npz: damaged"):
        load_state(tmp_path / "s.npz")


def test_a_run_directory_is_never_taken_twice(tmp_path: Path) -> None:
    config = parse_config({})
    run = Run.create(tmp_path / "run", config)
    with pytest.raises(UserError, match="--resume"):
        Run.create(tmp_path / "run", config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        Run.create(tmp_path / "full", config)
    assert load_run(run.path).config == config
    with pytest.raises(UserError, match="no run there"):
        load_run(tmp_path / "nowhere")


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse_config({}))
    code = "import sys; from pathlib import Path; from nasbench.run import Run; Run.resume(Path(sys.argv[1]))"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert result.returncode != 0
    assert "another process is running this run" in result.stderr
    run.close()


def test_a_run_that_cannot_be_opened_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    Run.create(path, parse_config({})).close()
    good = (path / "archive.sqlite").read_bytes()
    (path / "archive.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="cannot be used as an archive"):
        Run.resume(path)
    (path / "archive.sqlite").write_bytes(good)
    Run.resume(path).close()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no room"):
        patch.setattr("nasbench.run.dump_config", raising(UserError("no room")))
        Run.create(tmp_path / "new", parse_config({}))
    Run.create(tmp_path / "new", parse_config({})).close()


def test_the_latest_run_is_the_one_that_finished_last(tmp_path: Path) -> None:
    for name, finished in (
        ("early", "2026-01-01T12:00:00+0000"),
        ("late", "2026-01-01T12:30:00-0100"),
        ("middle", "2026-01-01T13:00:00+0000"),
    ):
        run = Run.create(tmp_path / name, parse_config({}))
        run.mark(finished=finished)
        run.close()
        (run.path / "report.html").touch()  # the report of the first is written again last
    (tmp_path / "early" / "report.html").write_text("again")
    (tmp_path / "compare-strategies").mkdir()
    (tmp_path / "compare-strategies" / "report.html").touch()  # the report of a comparison, which is no run
    assert latest_run(tmp_path).path.name == "late"


def test_a_configuration_that_is_damaged_is_named(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", parse_config({})).close()
    file = tmp_path / "run" / "config.toml"
    file.write_bytes(file.read_bytes() + "# caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"run/config\.toml: not valid TOML"):
        load_run(tmp_path / "run")


def test_a_run_whose_process_was_killed_is_stopped(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from nasbench.config import parse_config; from nasbench.run import Run\n"
        "run = Run.create(Path(sys.argv[1]), parse_config({}))\n"
        "run.mark(status='running')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")])
    listed = CliRunner().invoke(app, ["runs", "--below", str(tmp_path)], env={"COLUMNS": "300"})
    assert "stopped" in listed.stdout
    (tmp_path / "run" / ".lock").unlink()  # as in a copy of it
    assert load_run(tmp_path / "run").status == "stopped"
    run = Run.resume(tmp_path / "run")
    assert load_run(run.path).status == "running"
    run.mark(status="failed")
    run.close()
    assert load_run(run.path).status == "failed"


def raising(error: Exception) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def test_a_run_is_closed_wherever_the_process_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.create(Path("run"), parse_config({}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run.close()
    Run.resume(tmp_path / "run").close()


def test_an_interrupted_phase_is_still_paid_for(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", parse_config({}))
    with pytest.raises(KeyboardInterrupt), run.phase("work", "things") as done:
        done[0] = 3
        time.sleep(0.01)
        raise KeyboardInterrupt
    ledger = run.archive.ledger()
    assert ledger["work"].tolist() == [3]
    assert ledger["wall_s"][0] >= 0.01


def test_what_ended_a_phase_is_told_though_its_ledger_entry_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nasbench.archive._WAITS_S", (0.0,))
    run = Run.create(tmp_path / "run", parse_config({}))
    run.archive._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(ValueError, match="the first"), run.phase("x" * 100_000, "things"):
        raise ValueError("the first")


class Counting(Evaluator):
    """Gives the sum of the choices, fails for sum 3, and counts its calls."""

    metrics = ("accuracy",)

    def __init__(self) -> None:
        self.calls = 0

    def evaluate(self, proposals: Proposals) -> Evaluation:
        self.calls += len(proposals)
        sums = proposals.archs.sum(axis=1).astype(float)[:, None]
        failed = sums[:, 0] == 3
        sums[failed] = np.nan
        status = np.where(failed, Status.FAILED, Status.OK).astype(np.uint8)
        return Evaluation(sums, status, messages=dict.fromkeys(np.flatnonzero(failed).tolist(), "three"))


def proposals(*rows: list[int]) -> Proposals:
    return Proposals(np.arange(len(rows), dtype=np.int64), np.array(rows, dtype=np.uint8))


def test_recorded_rows_are_never_evaluated_again(tmp_path: Path) -> None:
    archive, evaluator = Archive(tmp_path / "a.sqlite"), Counting()
    objectives = (make_objective("accuracy"),)
    asked = proposals([0, 1], [2, 1], [1, 1], [0, 1])
    first = RecordedEvaluator(objectives, evaluator, None, archive, "search").evaluate(asked)
    assert evaluator.calls == 3  # the fourth is the first again
    assert first.status.tolist() == [0, 1, 0, 0]
    assert first.messages == {1: "three"}
    again = RecordedEvaluator(objectives, evaluator, None, archive, "search").evaluate(asked)
    assert evaluator.calls == 3
    assert np.array_equal(first.values, again.values, equal_nan=True)
    assert np.array_equal(first.status, again.status)
    later = RecordedEvaluator(objectives, evaluator, None, archive, "verify").evaluate(proposals([1, 1], [5, 5]))
    assert evaluator.calls == 4  # known from the search
    assert later.values[:, 0].tolist() == [2.0, 10.0]


def test_an_archive_of_another_experiment_is_refused(tmp_path: Path) -> None:
    archive = Archive(tmp_path / "a.sqlite")
    objectives = (make_objective("accuracy"),)
    RecordedEvaluator(objectives, Counting(), None, archive, "search").evaluate(proposals([0, 1]))
    with pytest.raises(UserError, match="another configuration"):
        RecordedEvaluator(objectives, Counting(), None, archive, "search").evaluate(proposals([1, 1]))


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Run.create(tmp_path / "file" / "run", parse_config({}))


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: writes fail with an error of the system."""
    run = Run.create(tmp_path / "run", parse_config({}))
    code = (
        "import resource, signal, sys, numpy as np; from pathlib import Path\n"
        "from nasbench.run import save_state\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "save_state(Path(sys.argv[1]), {'a': np.zeros(100_000)})\n"
    )
    save_state(run.path / "search.npz", {"a": 1})
    result = subprocess.run([sys.executable, "-c", code, str(run.path / "search.npz")], capture_output=True, text=True)
    assert "File too large" in result.stderr
    assert load_state(run.path / "search.npz") == {"a": 1}
    assert not list(run.path.glob("*.tmp"))


def test_limit_values_of_an_evaluator_are_refused_since_nothing_records_them(tmp_path: Path) -> None:
    class Cautious(Counting):
        def evaluate(self, proposals: Proposals) -> Evaluation:
            found = super().evaluate(proposals)
            return replace(found, limit_values=found.values + 45)

    archive = Archive(tmp_path / "a.sqlite")
    for evaluator in (Cautious(), InProcess(Cautious())):
        recorded = RecordedEvaluator([make_objective("accuracy")], evaluator, None, archive, "search")
        with pytest.raises(UserError, match="limit_values, which a run does not record"):
            recorded.evaluate(proposals([0, 1]))
    archive.close()
