"""Measuring on this machine: many open networks timed in turn, pass after pass."""

from __future__ import annotations

import gc
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil

from hardware_profiles.extras import quiet, reason, require
from hardware_profiles.host import host_fingerprint
from hardware_profiles.isolation import can_isolate, measure_isolated
from hardware_profiles.meter import Artifact, Measurement, Meter, Protocol
from hardware_profiles.profile import Target
from search_spaces.errors import UserError

Array = np.ndarray[Any, Any]

PROFILED_RUNS = 30
# What artifacts of a few milliseconds take to be measured in five passes, so that most are confirmed.
SECONDS_EACH = 0.35


class Session(ABC):
    """An artifact opened by a runtime: `feed` once, then `run` any number of times on that input."""

    @abstractmethod
    def feed(self, x: Array) -> None:
        """Give the input `(batch, channels, height, width)` float32; brought into the file's own layout and type."""

    @abstractmethod
    def run(self) -> list[Array]:
        """One inference: its outputs as float32, in the network's own layout. This is what is timed."""


@dataclass
class _Running:
    """An open session and what it has measured so far."""

    artifact: Artifact
    run: Callable[[], object] | None
    error: str = ""
    samples_ms: list[float] = field(default_factory=list)
    best_of_pass: list[float] = field(default_factory=list)

    def repeated(self, tolerance: float) -> bool:
        """Whether two passes came within `tolerance` of the best: then the best was no accident."""
        return len(self.best_of_pass) > 1 and sorted(self.best_of_pass)[1] <= (1 + tolerance) * min(self.best_of_pass)


class LocalMeter(Meter):
    """A runtime on this machine, called from Python. A subclass says how a file is opened, no more.

    All sessions are open at once and measured in turn, pass after pass, each pass in another order, so that a drift of
    the clock or a busy neighbour falls on all of them alike. The figure is the minimum over all passes: interference
    only ever adds time, and on a shared machine, where the clock was seen to flip between two speeds 1.5 times apart,
    minima of two runs agree far better than medians do. After `passes` passes, networks whose best time no
    second pass has confirmed are measured again, up to `max_passes` and within `budget_s`; what stays unconfirmed is
    flagged as throttled.

    Args:
        passes, max_passes: over all artifacts.
        pass_ms: time spent on one artifact in one pass, which sets the repeats (at least 3, at most 50).
        warmup: untimed runs of an artifact at the start of each of its turns.
        tolerance: how near a second pass must come to the best.
        budget_s: no further pass begins after this many seconds, or `SECONDS_EACH` per artifact where that is more.
        open_mb: sessions are opened in groups of at most this many MB of files, to bound memory; None means a quarter
            of what is free. Within one group, slow minutes of the machine fall on all networks alike.
        seed: of the input values and of the orders.
        isolated: measure in a process of its own, so that neither what this one did before counts (OpenVINO takes up to
            17 % longer where many networks were closed) nor a runtime that crashes on a file takes it along. A class
            that only this process knows, of a script or a notebook, measures here.
        progress: called with (done, total) passes; unconfirmed networks may take more passes than planned.

    Raises:
        UserError: the runtime is not installed, or passes that make no sense.
    """

    title: str  # the runtime's name for people
    package: str  # the distribution whose version is the runtime's
    formats: tuple[str, ...]
    extra: str = ""  # of this project, that brings the runtime; empty: the base
    modules: tuple[str, ...] = ()  # of it, that running takes; converting may take more
    notes: str  # for the protocol: what exactly is timed, with which options

    def __init__(
        self,
        *,
        passes: int = 8,
        max_passes: int = 24,
        pass_ms: float = 12.0,
        warmup: int = 2,
        tolerance: float = 0.02,
        budget_s: float = 60.0,
        open_mb: float | None = None,
        seed: int = 0,
        isolated: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if passes < 2 or max_passes < passes:
            raise UserError(f"a meter needs at least 2 passes and max_passes >= passes, got {passes} and {max_passes}")
        require(self.extra, *self.modules)
        self.passes = passes
        self.max_passes = max_passes
        self.pass_ms = pass_ms
        self.warmup = warmup
        self.tolerance = tolerance
        self.budget_s = budget_s
        self.open_mb = open_mb
        self.seed = seed
        self.isolated = isolated
        self.progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"progress": None}  # which another process cannot call

    @abstractmethod
    def open(self, artifact: Artifact, target: Target) -> Session:
        """Open a file with the target's threads and batch.

        Raises:
            Exception: whatever the runtime raises; it becomes the measurement's error.
        """

    def runtime_version(self) -> str:
        """Version of the installed runtime."""
        return version(self.package)

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """One measurement per artifact, in order; a file that cannot be run gets one with an error.

        Raises:
            UserError: the target is another runtime or machine.
        """
        self._check_target(target)
        # In any order, so that a clock that differs from group to group falls on all kinds of networks alike.
        order = np.random.default_rng(self.seed).permutation(len(artifacts))
        most = psutil.virtual_memory().available / 4 if self.open_mb is None else self.open_mb * 1e6
        groups = [[int(order[i]) for i in g] for g in _groups([artifacts[i] for i in order], most)]
        budget_s = max(self.budget_s, SECONDS_EACH * len(artifacts))
        results: dict[int, Measurement] = {}
        measure = partial(measure_isolated, self) if self._apart else self.measure_open
        for number, group in enumerate(groups):
            done = measure([artifacts[i] for i in group], target, (self.seed, number), budget_s / len(groups))
            results.update(zip(group, done, strict=True))
        return [results[i] for i in range(len(artifacts))]

    @property
    def _apart(self) -> bool:
        return self.isolated and can_isolate(self)

    def measure_open(
        self,
        artifacts: Sequence[Artifact],
        target: Target,
        seed: tuple[int, ...],
        budget_s: float,
        reached: Callable[[int], None] | None = None,
    ) -> list[Measurement]:
        """One measurement per artifact, in order, all open at once in this process.

        Args:
            seed: of inputs and orders.
            budget_s: no further pass begins after this many seconds.
            reached: called with the place of an artifact before it is opened and before each of its turns.
        """
        rng = np.random.default_rng(seed)
        reached = reached or (lambda _: None)
        runs = []
        for i, artifact in enumerate(artifacts):
            reached(i)
            runs.append(self._start(artifact, target, rng))
        alive = [i for i, r in enumerate(runs) if r.run is not None]
        end = time.perf_counter() + budget_s
        passes = 0
        collecting = gc.isenabled()
        gc.disable()
        try:
            todo = alive
            while todo and passes < self.max_passes and (passes < 2 or time.perf_counter() < end):
                for i in rng.permutation(todo):
                    reached(int(i))
                    self._take(runs[i])
                passes += 1
                if self.progress:
                    self.progress(passes, max(passes, self.passes))
                if passes >= self.passes:
                    todo = [i for i in alive if not runs[i].repeated(self.tolerance)]
        finally:
            if collecting:
                gc.enable()
        return [self._result(r, target, passes) for r in runs]

    def failed(self, artifact: Artifact, target: Target, error: str) -> Measurement:
        """The measurement of a file that cannot be run."""
        return self._result(_Running(artifact, None, error), target, 0)

    def opened(self, artifact: Artifact, target: Target, x: Array) -> Session:
        """The artifact open, fed with `x` and run once.

        Raises:
            UserError: a missing or broken file, another format, or an input shape that it does not take.
        """
        if artifact.format not in self.formats:
            raise UserError(
                f"{artifact.label}: format {artifact.format!r}, this meter runs {' or '.join(self.formats)} only"
            )
        if not artifact.path.is_file():
            raise UserError(f"{artifact.label}: no such file")
        try:
            with quiet():
                session = self.open(artifact, target)
                session.feed(x)
                session.run()
        except UserError:
            raise
        except Exception as error:  # runtimes have no common base of their errors
            raise UserError(f"{artifact.label}: {self.title} cannot run this file: {reason(error)}") from error
        return session

    def _profiled_input(self, artifact: Artifact, target: Target) -> Array:
        """Random input for `per_operator`, with which the file is known to run."""
        self._check_target(target)
        x = np.random.default_rng(self.seed).standard_normal((target.batch, *artifact.input_shape), dtype=np.float32)
        self.opened(artifact, target, x)
        return x

    def _check_target(self, target: Target) -> None:
        if target.runtime != self.runtime or not target.profile.local:
            raise UserError(f"{target.name}: this meter measures {self.title} on this machine only")

    def _start(self, artifact: Artifact, target: Target, rng: np.random.Generator) -> _Running:
        x = rng.standard_normal((target.batch, *artifact.input_shape), dtype=np.float32)
        try:
            return _Running(artifact, self.opened(artifact, target, x).run)
        except UserError as error:
            return _Running(artifact, None, str(error))

    def _take(self, r: _Running) -> None:
        """One turn of one artifact: warm-up, then as many timed runs as fit `pass_ms`."""
        assert r.run is not None
        for _ in range(self.warmup):
            r.run()
        guess = min(r.best_of_pass) if r.best_of_pass else _timed_ms(r.run)
        repeats = max(3, min(50, math.ceil(self.pass_ms / guess)))
        samples = [_timed_ms(r.run) for _ in range(repeats)]
        r.samples_ms += samples
        r.best_of_pass.append(min(samples))

    def _result(self, r: _Running, target: Target, passes: int) -> Measurement:
        samples = np.array(r.samples_ms)
        where = "in a process of its own" if self._apart else "in the process that asked"
        protocol = Protocol(
            runtime=self.runtime,
            runtime_version=self.runtime_version(),
            precision=r.artifact.precision,
            threads=target.threads,
            batch=target.batch,
            warmup=self.warmup,
            passes=len(r.best_of_pass),
            repeats=len(samples) // max(1, len(r.best_of_pass)),
            statistic="minimum over interleaved passes",
            host=host_fingerprint(),
            notes="; ".join(n for n in (self.notes, where, r.artifact.note) if n),
        )
        if not len(samples):
            return Measurement(r.artifact, float("nan"), samples, protocol, error=r.error)
        confirmed = r.repeated(self.tolerance)
        best, second = sorted(r.best_of_pass)[:2]
        note = "" if confirmed else (
            f"the best time was not repeated: {best:.3f} ms, next best pass {second:.3f} ms of {passes} passes; "
            "the machine was busy or its clock changed"
        )  # fmt: skip
        return Measurement(r.artifact, best, samples, protocol, throttled=not confirmed, note=note)


def _timed_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    run()
    return (time.perf_counter_ns() - start) / 1e6


def _groups(artifacts: Sequence[Artifact], limit_bytes: float) -> list[list[int]]:
    """Indices of the artifacts in runs of at most `limit_bytes` of files (or a single one)."""
    groups: list[list[int]] = []
    total = math.inf
    for i, artifact in enumerate(artifacts):
        size = artifact.file_bytes if artifact.path.is_file() else 0
        if total + size > limit_bytes:
            groups.append([])
            total = 0.0
        groups[-1].append(i)
        total += size
    return groups or [[]]
