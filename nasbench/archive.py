"""The archive of a run: one SQLite file, one row and one commit per expensive result, readable at any moment."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from search_spaces.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    phase TEXT NOT NULL,           -- sample, search, verify
    id INTEGER NOT NULL,           -- of the proposal, unique within the phase
    arch TEXT NOT NULL,            -- choice indices, separated by blanks
    fidelity TEXT NOT NULL,        -- JSON
    status INTEGER NOT NULL,       -- nasbench.evaluators.Status
    vals TEXT NOT NULL,            -- JSON: metric -> value, null where there is none
    seconds REAL NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (phase, id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measurements (
    network TEXT NOT NULL,         -- name of the network, or its architecture
    target TEXT NOT NULL,
    step TEXT NOT NULL,            -- verify, or the stage after which it was measured
    latency_ms REAL,
    median_ms REAL,
    spread REAL,
    samples TEXT NOT NULL,         -- JSON list of ms
    protocol TEXT NOT NULL,        -- JSON
    note TEXT NOT NULL,
    PRIMARY KEY (network, target, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stages (
    network TEXT NOT NULL,
    step INTEGER NOT NULL,         -- 0 is the network as taken from the search
    stage TEXT NOT NULL,
    form TEXT NOT NULL,
    file TEXT NOT NULL,            -- relative to the run directory
    metrics TEXT NOT NULL,         -- JSON
    PRIMARY KEY (network, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stage_events (
    network TEXT NOT NULL,
    step INTEGER NOT NULL,
    stage TEXT NOT NULL,
    kind TEXT NOT NULL,            -- note, stopped (by its condition), failed
    keeps INTEGER NOT NULL,        -- the step whose form the network keeps; its own for a note
    message TEXT NOT NULL,
    PRIMARY KEY (network, step, kind)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ledger (
    phase TEXT NOT NULL,
    wall_s REAL NOT NULL,
    cpu_s REAL NOT NULL,
    work INTEGER NOT NULL,         -- how many of `unit` were done
    unit TEXT NOT NULL
);
"""

# Seconds between attempts to write to a disk that refuses.
_WAITS_S = (0.1, 0.3, 1.0, 3.0, 10.0)


def arch_text(arch: np.ndarray[Any, Any]) -> str:
    """An architecture as text: choice indices separated by blanks."""
    return " ".join(str(int(i)) for i in arch)


def arch_row(text: str) -> np.ndarray[Any, Any]:
    """The inverse of `arch_text`, `(K,)` int64."""
    return np.array([int(i) for i in text.split()], dtype=np.int64)


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()})


class Archive:
    """Everything that was evaluated or measured in a run.

    SQLite in WAL mode: readers never wait, and what `record_*` has returned from survives a kill of the process.

    Args:
        path: of the database file, made when absent.
        readonly: open without being able to write, for notebooks and reports.

    Raises:
        UserError: the file is no archive, or cannot be opened.
    """

    def __init__(self, path: Path, readonly: bool = False) -> None:
        self.path = path
        if readonly and not path.is_file():
            raise UserError(f"{path}: no archive there")
        try:
            self._db = sqlite3.connect(path, timeout=30, isolation_level=None)
            if readonly:
                self._db.execute("PRAGMA query_only = 1")
                self._db.execute("SELECT count(*) FROM evaluations")
            else:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: cannot be used as an archive: {error}") from error

    def close(self) -> None:
        """Close the file; committed rows are safe without it."""
        self._db.close()

    def record_evaluation(
        self,
        phase: str,
        id: int,
        arch: np.ndarray[Any, Any] | str,
        values: Mapping[str, float],
        *,
        status: int = 0,
        fidelity: Mapping[str, Any] | str = "{}",
        seconds: float = 0.0,
        message: str = "",
    ) -> None:
        """Commit the result of one proposal; architecture and fidelity may be given as they are written."""
        arch = arch if isinstance(arch, str) else arch_text(arch)
        fidelity = fidelity if isinstance(fidelity, str) else json.dumps(fidelity)
        self._commit(
            "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (phase, id, arch, fidelity, status, _json(values), seconds, message),
        )

    def _commit(self, statement: str, values: Sequence[Any]) -> None:
        """Run a statement in a transaction of its own; a disk that is full or away for a moment is tried again.

        Raises:
            UserError: it stays so.
        """
        for wait in (*_WAITS_S, None):
            try:
                self._db.execute(statement, values)
                return
            except sqlite3.OperationalError as error:
                if wait is None:
                    raise UserError(
                        f"{self.path}: cannot be written ({error}). What was committed is kept; when the disk is there "
                        f"again and has room, go on with: nasbench run --resume {self.path.parent}"
                    ) from error
                time.sleep(wait)

    def finished(self, phase: str) -> dict[int, tuple[str, int, dict[str, float]]]:
        """Per proposal id of `phase`: architecture, status and values (None read back as NaN)."""
        rows = self._db.execute("SELECT id, arch, status, vals FROM evaluations WHERE phase = ?", (phase,))
        return {
            id: (arch, status, {k: math.nan if v is None else v for k, v in json.loads(values).items()})
            for id, arch, status, values in rows
        }

    def known(self) -> dict[tuple[str, str], dict[str, float]]:
        """Values by architecture and fidelity, of all successful evaluations."""
        rows = self._db.execute("SELECT arch, fidelity, vals FROM evaluations WHERE status = 0")
        return {
            (arch, fidelity): {k: v for k, v in json.loads(values).items() if v is not None}
            for arch, fidelity, values in rows
        }

    def evaluations(self, phase: str | None = None) -> pd.DataFrame:
        """Evaluations as a frame: phase, id, arch, status, seconds, message, and a column per metric."""
        rows = pd.read_sql_query("SELECT * FROM evaluations ORDER BY phase, id", self._db)
        if phase is not None:
            rows = rows[rows["phase"] == phase].reset_index(drop=True)
        return _spread(rows, "vals")

    def record_measurement(
        self,
        network: str,
        target: str,
        step: str,
        figures: Mapping[str, Any],
        samples: Any,
        protocol: Mapping[str, Any],
    ) -> None:
        """Commit one measurement with all its samples (ms) and its protocol."""
        self._commit(
            "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                network,
                target,
                step,
                figures.get("latency_ms"),
                figures.get("median_ms"),
                figures.get("spread"),
                json.dumps([round(float(s), 6) for s in samples]),
                json.dumps(protocol),
                figures.get("note", ""),
            ),
        )

    def measurements(self) -> pd.DataFrame:
        """All measurements, one per row; `samples` and `protocol` are JSON texts."""
        return pd.read_sql_query("SELECT * FROM measurements ORDER BY step, network, target", self._db)

    def record_stage(
        self, network: str, step: int, stage: str, form: str, file: str, metrics: Mapping[str, float]
    ) -> None:
        """Commit what a network measured after a stage."""
        self._commit(
            "INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?, ?, ?)",
            (network, step, stage, form, file, _json(metrics)),
        )

    def record_event(self, network: str, step: int, stage: str, kind: str, keeps: int, message: str) -> None:
        """Commit what a person should know of a stage: a note, or why a network takes part in no later one."""
        self._commit(
            "INSERT OR REPLACE INTO stage_events VALUES (?, ?, ?, ?, ?, ?)",
            (network, step, stage, kind, keeps, message),
        )

    def stage_events(self) -> pd.DataFrame:
        """Events: network, step, stage, kind, keeps, message."""
        columns = ["network", "step", "stage", "kind", "keeps", "message"]
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'stage_events'").fetchone():
            return pd.DataFrame(columns=columns)  # an archive of an earlier version, open for reading
        return pd.read_sql_query("SELECT * FROM stage_events ORDER BY network, step, kind", self._db)

    def add_metrics(self, network: str, step: int, metrics: Mapping[str, float]) -> None:
        """Commit further metrics of a recorded stage result."""
        self._commit(
            "UPDATE stages SET metrics = json_patch(metrics, ?) WHERE network = ? AND step = ?",
            (_json(metrics), network, step),
        )

    def stages(self) -> pd.DataFrame:
        """Stage results: network, step, stage, form, file, and a column per metric."""
        rows = pd.read_sql_query("SELECT * FROM stages ORDER BY network, step", self._db)
        return _spread(rows, "metrics")

    def spend(self, phase: str, wall_s: float, cpu_s: float, work: int, unit: str) -> None:
        """Add an entry to the cost ledger."""
        self._commit("INSERT INTO ledger VALUES (?, ?, ?, ?, ?)", (phase, wall_s, cpu_s, work, unit))

    def ledger(self) -> pd.DataFrame:
        """Cost per phase, summed over interruptions: seconds of wall and processor time, and what was done."""
        rows = pd.read_sql_query("SELECT rowid, * FROM ledger ORDER BY rowid", self._db)
        return (
            rows.groupby(["phase", "unit"], sort=False)[["wall_s", "cpu_s", "work"]].sum().reset_index()
            if len(rows)
            else rows.drop(columns="rowid")
        )


def _spread(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Turn a column of JSON objects into columns."""
    values = pd.DataFrame([json.loads(text) for text in rows[column]], index=rows.index, dtype=float)
    return rows.drop(columns=column).join(values)
