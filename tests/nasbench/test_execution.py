"""Evaluations on workers: equal results wherever they run, and nothing lost when workers or drivers die."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nasbench.archive import Archive
from nasbench.config import load_config, parse_config
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.execution.base import Backend, Died, Ready, Refused, Reply, Spread
from nasbench.execution.choice import _parts, executed
from nasbench.execution.in_process import InProcess
from nasbench.experiment import run_experiment
from nasbench.plan import make_plan
from nasbench.run import Run
from search_spaces import UserError

PARTS = """
import os, pathlib, signal, time

here = pathlib.Path(__file__).parent

def first_time(choices, what):
    name = hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:12]
    try:
        (here / f"{what}-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

def slow(choices):
    with (here / "log.txt").open("a") as log:
        log.write(json.dumps(choices, sort_keys=True) + "\\n")
    time.sleep(0.05)
    return score(choices)

def moody(choices):
    if score(choices) < 0.1:
        time.sleep(60)
    if score(choices) < 0.25 and first_time(choices, "died"):
        os.kill(os.getpid(), signal.SIGKILL)
    if score(choices) > 0.9:
        raise ValueError("never")
    if score(choices) > 0.6 and first_time(choices, "failed"):
        raise ValueError("not today")
    return score(choices)

def always_dies(choices):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("BROKEN_WORKERS") and os.environ["BROKEN_WORKERS"] != str(os.getpid()):
    raise RuntimeError("no such accelerator")
"""

KEYS = """
verify = 2

[strategy]
name = "regularized_evolution"
evaluations = 24
batch = 8
population_size = 10
sample_size = 3
"""


@pytest.fixture
def spread(scored: Any, tmp_path: Path) -> Path:
    """An experiment, whose evaluator may be any of the functions above."""
    return scored.lay_out(tmp_path, KEYS, PARTS)


def run(spread: Path, name: str, changes: Sequence[str] = ()) -> pd.DataFrame:
    """Evaluations of the search of a run, without what they took."""
    path = spread.parent / name
    run_experiment(load_config(spread, changes), path, where=spread.parent)
    return rows_of(path)


def rows_of(path: Path) -> pd.DataFrame:
    return Archive(path / "archive.sqlite", readonly=True).evaluations("search").drop(columns="seconds")


PROCESSES = ["execution.backend=processes", "execution.workers=2"]


@pytest.fixture(scope="module")
def calm(scored: Any, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The search's evaluations of a run in this process."""
    return run(scored.lay_out(tmp_path_factory.mktemp("calm"), KEYS, PARTS), "run", ["evaluator.name=parts:slow"])


def evaluate(scored: Any, spread: Path, changes: Sequence[str], count: int = 16) -> tuple[Evaluation, np.ndarray]:
    """What workers make of `count` architectures of all scores, and what they ought to: the function's own values."""
    plan = make_plan(load_config(spread, [*PROCESSES, *changes]), spread.parent)
    archs = np.unique(plan.space.sample(20 * count, np.random.default_rng(0)), axis=0)
    scores = scored.scores(plan.space, archs)
    picked = np.argsort(scores)[np.linspace(0, len(archs) - 1, count).astype(int)]
    archs, scores = archs[picked], scores[picked]
    with closing(executed(plan, plan.make_evaluator(None, None), spread.parent, spread.parent)) as evaluator:
        result = evaluator.evaluate(Proposals(np.arange(count), archs))
    return result, scores


def test_failures_are_repeated_dead_workers_replaced_and_endless_ones_stopped(scored: Any, spread: Path) -> None:
    changes = ["evaluator.name=parts:moody", "execution.retries=1", "execution.timeout_s=1.5"]
    result, scores = evaluate(scored, spread, changes)
    expected = np.select([scores < 0.1, scores > 0.9], [Status.TIMEOUT, Status.FAILED], Status.OK)
    assert set(expected.tolist()) == {Status.OK, Status.TIMEOUT, Status.FAILED}
    assert list(spread.parent.glob("died-*")), "no worker died"
    assert list(spread.parent.glob("failed-*")), "no evaluation failed"
    assert np.array_equal(result.status, expected)
    assert np.array_equal(result.values[:, 0], np.where(expected == Status.OK, scores, np.nan), equal_nan=True)
    said = {Status.TIMEOUT: "took longer than 1.5 s", Status.FAILED: "ValueError: never"}
    assert result.messages == {row: said[s] for row, s in enumerate(expected.tolist()) if s != Status.OK}


def test_an_evaluator_that_kills_every_worker_stops_the_run(scored: Any, spread: Path) -> None:
    with pytest.raises(UserError, match=r"workers died one after .*ended by SIGKILL \(out of memory\?\).*--resume"):
        evaluate(scored, spread, ["evaluator.name=parts:always_dies", "execution.workers=1"])


def test_a_worker_that_cannot_be_made_says_why(scored: Any, spread: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_WORKERS", str(os.getpid()))
    with pytest.raises(UserError, match=r"a worker cannot build the evaluator.*no such accelerator"):
        evaluate(scored, spread, ["execution.workers=1"])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_killed_driver_leaves_no_workers_and_loses_nothing(
    spread: Path, calm: pd.DataFrame, asynchronous: bool
) -> None:
    path = spread.parent / "run"
    changes = [*PROCESSES, "evaluator.name=parts:slow", f"execution.asynchronous={str(asynchronous).lower()}"]
    sets = [word for change in changes for word in ("--set", change)]
    start = [sys.executable, "-m", "nasbench", "run", str(spread), *sets, "--output", str(path), "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}
    driver = subprocess.Popen(start, env=environment, cwd=spread.parent)
    while driver.poll() is None and recorded(path) < 7:
        time.sleep(0.002)
    children = [int(pid) for pid in Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()]
    driver.kill()
    assert driver.wait() == -signal.SIGKILL, "it ended before it could be killed"
    before = rows_of(path)
    assert 7 <= len(before) < 24
    view = run_experiment(load_config(spread, changes), path, resume=True, where=spread.parent)
    assert view.state["status"] == "finished"
    rows = rows_of(path)
    assert len(rows) == 24
    assert rows["id"].is_unique
    kept = rows[rows["id"].isin(before["id"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, before)
    lines = pd.Series((spread.parent / "log.txt").read_text().splitlines())
    assert (lines.value_counts() - 1).sum() <= 2, "more was repeated than was under way"
    assert not [pid for pid in children if alive(pid)]
    if not asynchronous:
        pd.testing.assert_frame_equal(rows, calm)  # whatever ran where


def recorded(path: Path) -> int:
    """Rows in the archive of a run under way."""
    try:
        database = sqlite3.connect(f"file:{path / 'archive.sqlite'}?mode=ro", uri=True)
        return int(database.execute("SELECT count(*) FROM evaluations").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def alive(pid: int) -> bool:
    """Whether a process runs, zombies left out."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_cache_forgets_what_code_that_was_changed_gave(spread: Path) -> None:
    plan = make_plan(load_config(spread), spread.parent)
    key = lambda: [settings() for settings, _ in _parts(plan, spread.parent)]  # noqa: E731
    before = key()
    assert key() == before
    with (spread.parent / "parts.py").open("a") as parts:
        parts.write("\n# another way to score\n")
    assert key() != before


def test_a_second_driver_is_told_who_holds_the_run(tmp_path: Path) -> None:
    first = Run.create(tmp_path / "run", parse_config({}))
    with pytest.raises(UserError, match=rf"another process is running this run \(process {os.getpid()} on "):
        Run.resume(tmp_path / "run")
    first.close()
    Run.resume(tmp_path / "run").close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["execution.workers=4"], "workers = 4 needs backend"),
        (["execution.timeout_s=4"], "timeout_s needs workers"),
        (["execution.asynchronous=true"], "asynchronous needs workers"),
        (["execution.backend=proceses"], "'processes'"),
        (["execution.backend=processes", "execution.address=auto"], "address goes with"),
        (["execution.retries=-1"], "execution.retries = -1"),
    ],
)
def test_execution_keys_that_make_no_sense_are_refused(spread: Path, changes: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(spread, changes)


class Breaking(Evaluator):
    """Raises for a whole batch where one row is 13."""

    metrics = ("accuracy",)
    preferred_batch = 4

    def evaluate(self, proposals: Proposals) -> Evaluation:
        if (proposals.archs == 13).any():
            raise KeyError(13)
        return Evaluation(proposals.archs[:, :1] / 100, np.zeros(len(proposals), dtype=np.uint8))


def test_what_an_evaluator_raises_is_the_failure_of_one_row() -> None:
    archs = np.array([[11], [12], [13], [14], [15]])
    result = InProcess(Breaking(), retries=2).evaluate(Proposals(np.arange(5), archs))
    assert result.status.tolist() == [Status.OK, Status.OK, Status.FAILED, Status.OK, Status.OK]
    assert result.messages == {2: "KeyError: 13"}
    assert np.array_equal(result.values[:, 0], [0.11, 0.12, np.nan, 0.14, 0.15], equal_nan=True)


class AtOnce(Backend):
    """Workers 1, 2, ..., of which the first answers at the moment at which the second ends the run."""

    def __init__(self, last: Reply, workers: int) -> None:
        super().__init__(workers)
        self.last, self.started, self.rounds = last, 0, 0

    def start(self) -> int:
        self.started += 1
        return self.started

    def send(self, worker: int, proposals: Proposals) -> None: ...

    def wait(self, workers: Collection[int], timeout_s: float) -> list[tuple[int, Reply]]:
        self.rounds += 1
        if self.rounds == 1:
            return [(worker, Ready()) for worker in workers]
        others: list[tuple[int, Reply]] = [(worker, self.last) for worker in sorted(workers) if worker != 1]
        return [*others, (1, Evaluation(np.ones((1, 1)), np.zeros(1, dtype=np.uint8)))]

    def stop(self, worker: int) -> None: ...


@pytest.mark.parametrize(
    ("last", "workers", "words"), [(Refused("licence expired"), 2, "licence"), (Died("no power"), 9, "no power")]
)
def test_results_that_come_with_the_end_of_a_run_are_handed_on(last: Reply, workers: int, words: str) -> None:
    spread = Spread(Breaking(), AtOnce(last, workers))
    spread._deaths = 3 + 2 * workers - 1
    results = spread.stream([Proposals(np.arange(workers), np.zeros((workers, 1)))])
    _, result = next(results)
    assert result.values.tolist() == [[1.0]]
    with pytest.raises(UserError, match=words):
        next(results)
