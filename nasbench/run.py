"""A run: the directory of one execution of an experiment."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import socket
import sqlite3
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from hardware_profiles.paths import atomic, write_text
from nasbench.archive import Archive
from nasbench.config import Config, dump_config, load_config
from nasbench.objectives import Objective, make_objective
from search_spaces.errors import UserError

CONFIG, STATE, ARCHIVE = "config.toml", "run.json", "archive.sqlite"
_TIME = "%Y-%m-%dT%H:%M:%S%z"  # in `run.json`


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested JSON-able values and numpy arrays to one `.npz` file, atomically and without pickles."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def outline(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            arrays[f"a{len(arrays)}"] = value
            return {"__array__": f"a{len(arrays) - 1}"}
        if isinstance(value, Mapping):
            return {str(k): outline(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [outline(v) for v in value]
        return value.item() if isinstance(value, np.generic) else value

    text = json.dumps(outline(state))
    with atomic(path) as temporary:
        np.savez(temporary, **{"outline": np.frombuffer(text.encode(), dtype=np.uint8), **arrays})  # type: ignore[arg-type]


def load_state(path: Path) -> dict[str, Any]:
    """The inverse of `save_state`; tuples come back as lists.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {k: data[k] for k in data.files}

        def fill(value: Any) -> Any:
            if isinstance(value, dict):
                return arrays[value["__array__"]] if "__array__" in value else {k: fill(v) for k, v in value.items()}
            return [fill(v) for v in value] if isinstance(value, list) else value

        state: dict[str, Any] = fill(json.loads(arrays["outline"].tobytes()))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); delete it to repeat that part of the run") from error
    return state


@dataclass
class Run:
    """The directory of one execution, open for writing by one process at a time.

    Files: `config.toml` (resolved), `run.json` (state, versions), `archive.sqlite`, `calibration/`,
    `supernet.safetensors` (of a gradient search `mixture.safetensors` too), `search.npz`, `front.csv`, `stages/`,
    `figures/`, `report.html`. All are readable at any moment.
    """

    path: Path
    config: Config
    archive: Archive
    lock: IO[str] = field(repr=False)

    @classmethod
    def create(cls, path: Path, config: Config) -> Run:
        """A new run directory.

        Raises:
            UserError: it exists already and holds something, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / CONFIG).exists():
                raise UserError(
                    f"{path}: a run is there already; continue it with `nasbench run --resume {path}`, "
                    "or name another directory with --output"
                )
            # What a process that was killed while it made this directory may have left is no reason to refuse it.
            started = {STATE, ".lock", *(ARCHIVE + end for end in ("", "-wal", "-shm"))}
            if any(p.name not in started and not p.name.startswith(f".{CONFIG}") for p in path.iterdir()):
                raise UserError(f"{path}: the directory is not empty; name a new one with --output")
            with _locked(path) as lock:
                state = {"status": "started", "created": now(), "versions": versions()}
                write_text(path / STATE, json.dumps(state, indent=2))
                archive = Archive(path / ARCHIVE)
                # The configuration is written last: a directory with one is a run that can be resumed.
                write_text(path / CONFIG, dump_config(config))
                return cls(path, config, archive, lock)
        except OSError as error:
            raise UserError(f"{path}: cannot write the run there: {error.strerror}") from error

    @classmethod
    def resume(cls, path: Path) -> Run:
        """An existing run, to be continued.

        Raises:
            UserError: no run there, its archive is damaged, or another process is running it.
        """
        config = load_run_config(path)
        try:
            with _locked(path) as lock:
                return cls(path, config, Archive(path / ARCHIVE), lock)
        except OSError as error:
            raise UserError(f"{path}: cannot write to this run: {error.strerror}") from error

    def close(self) -> None:
        """Close the archive and let other processes run this run."""
        self.archive.close()
        self.lock.close()

    def freeze(self, hashes: Mapping[str, str]) -> None:
        """Keep the hashes of data that all results depend on; where the run has them, they must be the same.

        Args:
            hashes: by the names that the data have in the configuration.

        Raises:
            UserError: one has changed since the run began.
        """
        frozen = self.state.get("inputs", {})
        for name in frozen.keys() & hashes.keys():
            if frozen[name] != hashes[name]:
                raise UserError(
                    f"{name}: has changed since {self.path} began, whose results so far are of it as it was; "
                    "put that back, or begin a new run"
                )
        self.mark(inputs={**hashes, **frozen})

    def mark(self, **entries: Any) -> None:
        """Update `run.json`."""
        write_text(self.path / STATE, json.dumps(self.state | entries, indent=2))

    @property
    def state(self) -> dict[str, Any]:
        """Contents of `run.json`."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text())
        return state

    def directory(self, name: str) -> Path:
        """A sub-directory, made when absent."""
        (self.path / name).mkdir(exist_ok=True)
        return self.path / name

    @contextmanager
    def phase(self, name: str, unit: str) -> Iterator[list[int]]:
        """Account for a part of the work in the ledger, also when it is interrupted.

        Yields a one-element list: set its entry to how many of `unit` were done.
        """
        done = [0]
        wall, cpu = time.perf_counter(), _cpu_seconds()

        def spend() -> None:
            self.archive.spend(name, time.perf_counter() - wall, _cpu_seconds() - cpu, done[0], unit)

        try:
            yield done
        except BaseException:
            # On a full disk the ledger entry fails as well; the first error is the one to tell.
            with suppress(UserError, sqlite3.Error):
                spend()
            raise
        spend()


class RunView:
    """A finished or running run, for notebooks: frames, never files.

    Args:
        path: the run directory.

    Raises:
        UserError: no run there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = load_run_config(self.path)
        self.archive = Archive(self.path / ARCHIVE, readonly=True)
        self.state: dict[str, Any] = json.loads((self.path / STATE).read_text())

    def front(self, target: str | None = None) -> pd.DataFrame:
        """The verified networks, one per row: predicted, evaluated and measured values in columns of their own.

        Args:
            target: of several devices, one: then only the networks on its own front, by its objectives and those of no
                device, within their limits; or `all`: those within the limits of all devices.

        Raises:
            UserError: the search has not finished, or no objective is of that device.
        """
        path = self.path / "front.csv"
        if not path.is_file():
            raise UserError(f"{self.path}: the search of this run has not finished yet (no front.csv)")
        frame = pd.read_csv(path)
        if target is None:
            return frame
        from nasbench.cross_device import ALL, front_of, of_target

        if target == ALL:
            return frame[(frame["violation"] == 0) & (frame["kind"] == "front")]
        return front_of(frame, of_target(self.objectives, target))

    def value_columns(self, front: pd.DataFrame) -> list[str]:
        """Columns of a front that say what their values are, by objective: predicted, evaluated, measured."""
        kinds = ("predicted", "evaluated", "measured")
        return [c for o in self.objectives for c in (f"{o.name}_{kind}" for kind in kinds) if c in front]

    @property
    def status(self) -> str:
        """Now: started, running, interrupted, failed or finished; stopped where a process ended without a last word."""
        held = _held(self.path)  # asked first: a process writes its last word before it lets go
        said: str = json.loads((self.path / STATE).read_text())["status"]
        return "stopped" if said in ("started", "running") and not held else said

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objectives of the run, as its resolved configuration has them."""
        return tuple(make_objective(name, **section.model_dump()) for name, section in self.config.objectives.items())

    def cross_device(self, measure: str = "cost_ratio") -> pd.DataFrame:
        """What a network specialised for one device (row) loses on another (column); see `nasbench.cross_device`."""
        from nasbench.cross_device import cross_device

        return cross_device(self.front(), self.objectives, measure)

    def plot_devices(self) -> Any:
        """The front of each device, and the same networks elsewhere (see `nasbench.report.devices.fronts_figure`)."""
        from nasbench.report.devices import fronts_figure

        return fronts_figure(self)

    def plot_cross_device(self, measure: str = "cost_ratio") -> Any:
        """`cross_device` as a heat map."""
        from nasbench.report.devices import cross_device_figure

        return cross_device_figure(self, measure)

    def rounds(self) -> pd.DataFrame:
        """How far predictions held, per round and measured objective; empty where nothing was measured."""
        path = self.path / "rounds.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame()

    def evaluations(self) -> pd.DataFrame:
        """All expensive evaluations, in order."""
        return self.archive.evaluations()

    def stages(self) -> pd.DataFrame:
        """The networks after each stage, a row each.

        `final` marks the form that a network ends with: of its last step, or of an earlier one where a condition or
        training that broke down stopped it; `note` says so, and what the stage left alone.
        """
        rows, events = self.archive.stages(), self.archive.stage_events()
        ends = rows.groupby("network")["step"].max().to_dict() if len(rows) else {}
        stops = events[events["kind"].isin(["stopped", "failed"])]
        ends |= dict(zip(stops["network"], stops["keeps"], strict=True))
        notes: dict[tuple[str, int], list[str]] = {}
        for event in events.to_dict("records"):
            # A stage that failed has no row of its own: the one before it tells.
            failed = event["kind"] == "failed"
            text = f"{event['stage']} failed: {event['message']}" if failed else event["message"]
            notes.setdefault((event["network"], event["keeps" if failed else "step"]), []).append(text)
        keys = list(zip(rows["network"], rows["step"], strict=True))
        rows["final"] = [ends.get(network) == step for network, step in keys]
        rows["note"] = ["; ".join(notes.get(key, ())) for key in keys]
        return rows

    def measurements(self) -> pd.DataFrame:
        """All measurements with samples and protocol."""
        return self.archive.measurements()

    def ledger(self) -> pd.DataFrame:
        """What the run cost."""
        return self.archive.ledger()

    def history(self) -> pd.DataFrame:
        """Training curves of the supernet; empty where none was trained."""
        path = self.path / "training.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame()

    def plot_front(self, **options: Any) -> Any:
        """The Pareto figure (see `nasbench.report.figures.pareto_figure`)."""
        from nasbench.report.figures import pareto_figure

        return pareto_figure(self, **options)

    def plot_stages(self, **options: Any) -> Any:
        """The networks after their stages over the front (see `nasbench.report.stage_figures.stages_figure`)."""
        from nasbench.report.stage_figures import stages_figure

        return stages_figure(self, **options)


def load_run(path: str | Path) -> RunView:
    """Open a run directory for reading."""
    return RunView(path)


def latest_run(below: str | Path = "runs") -> RunView:
    """The most recently finished run below a directory.

    Raises:
        UserError: none there.
    """
    finished = [p.parent for p in Path(below).glob("*/report.html") if (p.parent / STATE).is_file()]
    if not finished:
        raise UserError(f"{below}: no finished run there; make one with `nasbench run quickstart`")
    return RunView(max(finished, key=_finished_at))


def _finished_at(path: Path) -> tuple[float, float]:
    """When a run was finished, as far as `run.json` says so, and when its report was written, in seconds."""
    written = (path / "report.html").stat().st_mtime
    try:
        return datetime.strptime(json.loads((path / STATE).read_text())["finished"], _TIME).timestamp(), written
    except (ValueError, KeyError):
        return written, written


def load_run_config(path: Path) -> Config:
    """The resolved configuration of a run.

    Raises:
        UserError: no run there, or its configuration is damaged.
    """
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path}: no run there (no {CONFIG}); `nasbench runs` lists those below ./runs")
    return load_config(file)


def run_origin(path: Path) -> Path | None:
    """The directory of the experiment file that a run was started from, for user modules and relative paths."""
    where = json.loads((path / STATE).read_text()).get("where")
    return Path(where) if where else None


def now() -> str:
    """The time as `run.json` has it."""
    return time.strftime(_TIME)


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    names = ("nasbench-hw", "torch", "numpy", "onnxruntime", "onnx", "optuna")
    return {"python": sys.version.split()[0]} | {n: metadata.version(n) for n in names}


def peak_memory_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _cpu_seconds() -> float:
    """Processor time of this process and of its ended children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _held(path: Path) -> bool:
    """Whether a process runs this run; also where nobody can tell."""
    try:
        with (path / ".lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def _locked(path: Path) -> Iterator[IO[str]]:
    """Hold the directory for this process until the handle is closed, which it is here if the block fails.

    The system lets go when the process ends, however it ends.

    Raises:
        UserError: another one holds it; says which, and where.
    """
    handle = (path / ".lock").open("a+")
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip()
            raise UserError(
                f"{path}: another process is running this run" + (f" ({holder})" if holder else "") + "; "
                "wait for it or stop it"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        handle.flush()
        yield handle
    except BaseException:
        handle.close()
        raise
