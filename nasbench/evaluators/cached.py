"""Evaluations kept for other strategies and other runs."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.paths import sha256_of
from nasbench.archive import arch_text
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status, Wrapped
from search_spaces import SearchSpace, UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    settings TEXT NOT NULL,        -- hash of all that a value depends on beside the next two
    arch TEXT NOT NULL,            -- choice indices, separated by blanks
    fidelity TEXT NOT NULL,        -- JSON
    vals TEXT NOT NULL,            -- JSON: metric -> value
    PRIMARY KEY (settings, arch, fidelity)
) WITHOUT ROWID
"""


class Cache:
    """Values by settings, canonical architecture and fidelity, in a SQLite file that many processes may use at a time.

    The file must lie on a disk of this machine: SQLite's write-ahead log needs shared memory. Once open, a file that
    cannot be read or written (a full disk) costs no run: there is one warning, and values are evaluated anew.

    Raises:
        UserError: the file is no cache, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(_SCHEMA)
            self._db.execute("SELECT settings, arch, fidelity, vals FROM evaluations LIMIT 1")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"evaluator.cache = {str(path)!r}: cannot be used as a cache: {error}") from error

    def get(self, settings: str, arch: str, fidelity: str) -> dict[str, float]:
        """Known values by metric; empty where there are none, or the file cannot be read."""
        try:
            row = self._db.execute(
                "SELECT vals FROM evaluations WHERE settings = ? AND arch = ? AND fidelity = ?",
                (settings, arch, fidelity),
            ).fetchone()
        except sqlite3.DatabaseError as error:
            self._warn(error)
            return {}
        return json.loads(row[0]) if row else {}

    def put(self, settings: str, arch: str, fidelity: str, values: Mapping[str, float]) -> None:
        """Keep values if the file can be written; where another process was first, its own stay."""
        try:
            self._db.execute(
                "INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?)", (settings, arch, fidelity, json.dumps(values))
            )
        except sqlite3.DatabaseError as error:
            self._warn(error)

    def _warn(self, error: sqlite3.DatabaseError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"evaluator.cache = {str(self.path)!r}: cannot be read or written ({error}). The run goes on, but what "
                "it evaluates may not be kept for other runs.",
                stacklevel=3,
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()


class CachedEvaluator(Wrapped):
    """Asks the cache first; what it does not have is evaluated, and put there if it went well.

    Args:
        space: whose canonical architectures are the keys.
        evaluator: asked for what is missing; parts of it whose metrics are known may leave them out.
        cache: closed with this evaluator.
        parts: settings (see `settings_key`), asked for when they are first needed, and metrics of each part of the
            evaluator.
    """

    def __init__(
        self,
        space: SearchSpace,
        evaluator: Evaluator,
        cache: Cache,
        parts: Sequence[tuple[Callable[[], str], tuple[str, ...]]],
    ) -> None:
        super().__init__(evaluator)
        self.space = space
        self.cache = cache
        self._parts = tuple(parts)

    @cached_property
    def parts(self) -> list[tuple[str, tuple[str, ...]]]:
        """Settings and metrics of each part; a supernet's weights are known only once it is trained."""
        return [(settings(), metrics) for settings, metrics in self._parts]

    def stream(self, parts: Iterable[Proposals]) -> Iterator[tuple[Proposals, Evaluation]]:
        found: list[tuple[Proposals, Evaluation]] = []

        def missing() -> Iterator[Proposals]:
            for part in parts:
                known = self._known(part)
                complete = ~np.isnan(known).any(axis=1)
                if complete.any():
                    rows = np.flatnonzero(complete)
                    found.append((part[rows], Evaluation(known[rows], np.zeros(len(rows), dtype=np.uint8))))
                if not complete.all():
                    rows = np.flatnonzero(~complete)
                    columns = {m: known[rows, i] for i, m in enumerate(self.metrics)}
                    yield replace(part[rows], known=columns)

        for part, result in self.evaluator.stream(missing()):
            self._keep(part, result)
            yield part, result
            while found:
                yield found.pop()
        yield from found

    def _keys(self, proposals: Proposals) -> list[tuple[str, str]]:
        archs = self.space.canonical(proposals.archs)
        return [(arch_text(arch), json.dumps(proposals.fidelity_of(row))) for row, arch in enumerate(archs)]

    def _known(self, proposals: Proposals) -> np.ndarray:
        known = np.full((len(proposals), len(self.metrics)), np.nan)
        for row, key in enumerate(self._keys(proposals)):
            values: dict[str, float] = {}
            for settings, _ in self.parts:
                values |= self.cache.get(settings, *key)
            known[row] = [values.get(metric, np.nan) for metric in self.metrics]
        return known

    def _keep(self, proposals: Proposals, result: Evaluation) -> None:
        for row, key in enumerate(self._keys(proposals)):
            if result.status[row] == Status.OK:
                values = dict(zip(self.metrics, result.values[row].tolist(), strict=True))
                for settings, metrics in self.parts:
                    self.cache.put(settings, *key, {metric: values[metric] for metric in metrics})

    def close(self) -> None:
        super().close()
        self.cache.close()


def settings_key(*parts: Any) -> str:
    """A hash of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def file_key(path: Path) -> str:
    """A hash of a file's content; empty where there is none."""
    return sha256_of(path)[:32] if path.is_file() else ""
