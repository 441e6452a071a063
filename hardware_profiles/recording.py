"""Measurements kept in a file and given back later, so that those of a toolchain that is gone remain usable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from hardware_profiles.meter import Artifact, Interrupted, Measurement, Meter, OperatorTime, Protocol
from hardware_profiles.out_of_process import OutOfProcessMeter, file_digest
from hardware_profiles.paths import locked
from hardware_profiles.profile import Target
from hardware_profiles.records import KeptRecord, Record
from search_spaces.errors import UserError, nearest

# Of one command's output; the tail, where the results stand, is kept.
OUTPUT_KEPT = 20_000

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Command(Record):
    """A command that ran, and what it printed."""

    command: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float


class RecordedMeasurement(Record):
    """A measurement of one file on one target."""

    artifact: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    format: str
    precision: str
    input_shape: tuple[int, ...]
    target: str
    measured: datetime
    latency_ms: Positive
    samples_ms: Annotated[tuple[Positive, ...], Field(min_length=1)]
    protocol: Protocol
    throttled: bool = False
    note: str = ""
    energy_mj: Positive | None = None
    peak_memory_bytes: int | None = None
    operators: tuple[tuple[str, str, float], ...] = ()


class Recording(KeptRecord):
    """All measurements of a file, newest last, and the commands that gave them.

    Args:
        measurements: those that succeeded.
        commands: per `measure`, what ran; empty for a runtime on this machine.
    """

    kind = "recording"
    otherwise = "record again"

    format: int = 1
    measurements: tuple[RecordedMeasurement, ...] = ()
    commands: tuple[tuple[Command, ...], ...] = ()


class RecordingMeter(Meter):
    """Measures with another meter and writes what it gave, with the commands and their output, to a file.

    Args:
        meter: any.
        path: a JSON file; measurements are added to those that it holds.

    Raises:
        UserError: the file is there and is no recording.
    """

    def __init__(self, meter: Meter, path: Path) -> None:
        self.meter = meter
        self.path = path
        _existing(path)

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """As the other meter; failed measurements are passed on, not recorded. What an interrupt left is recorded."""
        try:
            measured = self.meter.measure(artifacts, target)
        except Interrupted as stop:
            self._keep(stop.measured, target)
            raise
        self._keep(measured, target)
        return measured

    def _keep(self, measured: Sequence[Measurement], target: Target) -> None:
        now = datetime.now(UTC)
        new = tuple(_record(m, target, now) for m in measured if not m.error)
        commands: tuple[Command, ...] = ()
        if isinstance(self.meter, OutOfProcessMeter):
            commands = tuple(
                Command(
                    command=c.command,
                    returncode=c.returncode,
                    stdout=c.stdout[-OUTPUT_KEPT:],
                    stderr=c.stderr[-OUTPUT_KEPT:],
                    seconds=c.seconds,
                )
                for c in self.meter.transcript
            )
        with locked(self.path):  # another process may have added to it meanwhile
            before = _existing(self.path)
            Recording(
                measurements=before.measurements + new,
                commands=before.commands + ((commands,) if commands else ()),
            ).save(self.path)


def _existing(path: Path) -> Recording:
    """What a file holds; an empty recording where there is none."""
    return Recording.load(path) if path.exists() else Recording()


class ReplayMeter(Meter):
    """Gives recorded measurements back, by the file's contents and the target's name; refuses what it has never seen.

    Args:
        path: a recording.

    Raises:
        UserError: no such file, or one that is no recording.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        recording = Recording.load(path)
        self.known = {(m.target, m.sha256): m for m in recording.measurements}

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """One measurement per artifact, in order, the newest of each.

        Raises:
            UserError: the recording has nothing of this target.
        """
        targets = {t for t, _ in self.known}
        if target.name not in targets:
            raise UserError(
                f"{self.path}: nothing recorded of {target.name!r}. {nearest(target.name, targets) if targets else ''}"
            )
        return [self._one(a, target) for a in artifacts]

    def _one(self, artifact: Artifact, target: Target) -> Measurement:
        digest = file_digest(artifact.path) if artifact.path.is_file() else ""
        found = self.known.get((target.name, digest))
        if found is None:
            protocol = Protocol(
                target.runtime,
                "unknown",
                target.precision,
                target.threads,
                target.batch,
                0,
                0,
                0,
                "none",
                str(self.path),
            )
            reason = f"SHA-256 {digest[:16]} was never measured on {target.name}" if digest else "no such file"
            return Measurement(
                artifact, float("nan"), np.empty(0), protocol, error=f"{artifact.label}: {reason}, says {self.path}"
            )
        when = f"recorded {found.measured:%Y-%m-%d}"
        return Measurement(
            artifact,
            found.latency_ms,
            np.array(found.samples_ms),
            found.protocol,
            throttled=found.throttled,
            note=f"{found.note}; {when}" if found.note else when,
            energy_mj=found.energy_mj,
            peak_memory_bytes=found.peak_memory_bytes,
            operators=tuple(OperatorTime(*o) for o in found.operators),
        )


def _record(m: Measurement, target: Target, now: datetime) -> RecordedMeasurement:
    return RecordedMeasurement(
        artifact=m.artifact.path.name,
        sha256=file_digest(m.artifact.path),
        format=m.artifact.format,
        precision=m.artifact.precision,
        input_shape=m.artifact.input_shape,
        target=target.name,
        measured=now,
        latency_ms=m.latency_ms,
        samples_ms=tuple(m.samples_ms.tolist()),
        protocol=m.protocol,
        throttled=m.throttled,
        note=m.note,
        energy_mj=m.energy_mj,
        peak_memory_bytes=m.peak_memory_bytes,
        operators=tuple((o.name, o.kind, o.latency_ms) for o in m.operators),
    )
