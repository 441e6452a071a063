"""Meters that run another program, here or on a device: what they share."""

from __future__ import annotations

import hashlib
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.host import host_fingerprint
from hardware_profiles.meter import Artifact, Interrupted, Measurement, Meter, OperatorTime, Protocol
from hardware_profiles.meter_section import AdbSection, CommandSection, SshSection
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Finished, Runner, ToolError, run
from hardware_profiles.tools import Reading, Tool
from search_spaces.errors import UserError


class DeviceGone(ToolError):
    """The device itself does not answer: nothing can be measured on it until it does."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=True)


@dataclass
class _Running:
    """One artifact and what it gave so far."""

    artifact: Artifact
    readings: list[Reading] = field(default_factory=list)
    error: str = ""


class OutOfProcessMeter(Meter):
    """Runs a benchmark program for each artifact and reads what it prints.

    Before the first network the device is asked who it is. Each network is copied to the device, run, checked and
    removed; one that fails gets a measurement with an error and the others keep theirs. A timeout or a lost connection
    is tried again, `retries` times; once a device does not come back, the rest is not waited for one by one.

    Args:
        section: the profile's `[meter]`.
        tool: what is run.
        progress: called with (done, total) runs.
        runner: runs commands; a test or a recording gives its own.

    Attributes:
        transcript: all commands of the last `measure`, with what they printed.
    """

    def __init__(
        self,
        section: CommandSection | AdbSection | SshSection,
        tool: Tool,
        progress: Callable[[int, int], None] | None = None,
        runner: Runner = run,
    ) -> None:
        self.section = section
        self.tool = tool
        self.progress = progress
        self.runner = runner
        self.transcript: list[Finished] = []

    def programs(self, target: Target) -> list[str]:
        """The programs that it runs on this machine, as far as they are looked for before anything else is done."""
        return []

    def missing(self, target: Target) -> str:
        program = next((p for p in self.programs(target) if p and shutil.which(p) is None), "")
        return f"no program {program!r}{'' if os.path.dirname(program) else ' on the PATH'}" if program else ""

    @abstractmethod
    def identify(self, target: Target) -> str:
        """Who answers, in a few words.

        Raises:
            ToolError: nobody, or another device than the profile means.
        """

    def stage(self, artifact: Artifact) -> str:
        """Bring a file to the device, whole or not at all; its path there."""
        return str(artifact.path)

    @abstractmethod
    def benchmark(self, where: str, target: Target) -> Reading:
        """Run one network and read the result."""

    def remove(self, where: str) -> None:
        """Remove what `stage` brought; errors do not matter."""

    def values(self, target: Target) -> dict[str, Any]:
        """What command lines are filled with."""
        return {
            "threads": target.threads,
            "batch": target.batch,
            "precision": target.precision,
            "power_mode": target.point.power_mode,
            "warmup": self.section.warmup,
            "repeats": self.section.repeats,
            "use_xnnpack": bool(target.point.options.get("use_xnnpack", True)),
        }

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """One measurement per artifact, in order.

        Raises:
            UserError: the device is not there, or is another one.
            Interrupted: on Ctrl-C; holds what was measured before.
        """
        self.transcript = []
        if not artifacts:
            return []
        self.runtime = target.runtime
        try:
            device = self._retried(lambda: self.identify(target))
        except ToolError as error:
            raise UserError(f"{target.name}: {error}") from error
        running = [_Running(a, error=self._refusal(a)) for a in artifacts]
        rng = np.random.default_rng(0)
        total, done = self.section.passes * len(running), 0
        gone = ""
        try:
            for _ in range(self.section.passes):
                for i in rng.permutation(len(running)) if self.section.passes > 1 else range(len(running)):
                    one = running[i]
                    if gone:
                        one.error = one.error or gone
                    elif not one.error:
                        gone = self._take(one, target)
                    done += 1
                    if self.progress:
                        self.progress(done, total)
        except KeyboardInterrupt as stop:
            finished = [r for r in running if r.readings and not r.error]
            raise Interrupted([self._result(r, target, device) for r in finished]) from stop
        return [self._result(r, target, device) for r in running]

    def per_operator(self, artifact: Artifact, target: Target) -> list[OperatorTime]:
        """Times per operator, from a run of their own where the tool can profile.

        Raises:
            UserError: the device cannot run the file, or its tool tells no times per operator.
        """
        section = self.section
        if not isinstance(section, CommandSection):
            self.section = section.model_copy(update={"profile_operators": True})
        try:
            (measured,) = self.measure([artifact], target)
        finally:
            self.section = section
        if measured.error or not measured.operators:
            raise UserError(measured.error or f"{target.name}: {self.tool.name} told no times of single operators")
        return list(measured.operators)

    def call(self, command: Sequence[str], timeout_s: float | None = None, check: bool = True) -> Finished:
        """Run a command and keep it in the transcript.

        Raises:
            ToolError: it did not run to its end, or (with `check`) ended with another exit code than 0.
        """
        done = self.runner(list(command), timeout_s or self.section.timeout_s)
        self.transcript.append(done)
        if check and done.returncode:
            self.explain(done)
            raise ToolError(f"{_short(command)}: {done.ending}")
        return done

    def explain(self, done: Finished) -> None:
        """Raise `DeviceGone` where a failed command means that; the base class knows of none."""

    def _refusal(self, artifact: Artifact) -> str:
        wanted = self.section.format or self.tool.format
        if artifact.format != wanted:
            return f"{artifact.label}: format {artifact.format!r}, where this device takes {wanted!r}"
        return "" if artifact.path.is_file() else f"{artifact.label}: no such file"

    def _take(self, one: _Running, target: Target) -> str:
        """One run of one artifact. Returns why the device is given up, if it is."""

        def attempt() -> Reading:
            where = self.stage(one.artifact)
            try:
                before = len(self.transcript)
                reading = self.benchmark(where, target)
                return reading.check(sum(c.seconds for c in self.transcript[before:]))
            finally:
                self.remove(where)

        try:
            one.readings.append(self._retried(attempt))
        except DeviceGone as error:
            one.error = f"{one.artifact.label}: {error}"
            return f"not measured: the device was lost before: {error}"
        except ToolError as error:
            one.error = f"{one.artifact.label}: {error}"
        return ""

    def _retried(self, attempt: Callable[[], Any]) -> Any:
        for _ in range(self.section.retries):
            try:
                return attempt()
            except ToolError as error:
                if not error.transient:
                    raise
        return attempt()

    def _result(self, r: _Running, target: Target, device: str) -> Measurement:
        readings = r.readings
        samples = np.array([s for reading in readings for s in reading.samples_ms])
        statistic = readings[0].statistic if readings else "none"
        if statistic == "samples" or len(readings) > 1:
            statistic = f"median of {'samples' if statistic == 'samples' else f'passes, each {statistic}'}"
        protocol = Protocol(
            runtime=target.runtime,
            runtime_version=next((x.version for x in readings if x.version), "unknown"),
            precision=target.precision,
            threads=target.threads,
            batch=target.batch,
            warmup=self.section.warmup,
            passes=len(readings),
            repeats=(readings[0].count or len(readings[0].samples_ms)) if readings else 0,
            statistic=statistic,
            host=device,
            notes=f"driven by {self.section.kind} from {host_fingerprint()}",
        )
        if r.error or not readings:
            return Measurement(r.artifact, float("nan"), samples[:0], protocol, error=r.error)
        energies = [x.energy_mj for x in readings if x.energy_mj is not None]
        memory = [x.peak_memory_bytes for x in readings if x.peak_memory_bytes is not None]
        return Measurement(
            r.artifact,
            float(np.median(samples)),
            samples,
            protocol,
            throttled=any(x.throttled for x in readings),
            note="; ".join(dict.fromkeys(x.notes for x in readings if x.notes)),
            energy_mj=float(np.median(energies)) if energies else None,
            peak_memory_bytes=max(memory) if memory else None,
            operators=readings[-1].operators,
        )


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remote_name(artifact: Artifact) -> str:
    """A name for the file on a device that no other file has."""
    return f"nasbench-{file_digest(artifact.path)[:16]}{artifact.path.suffix}"


def noted(reading: Reading, *notes: str) -> Reading:
    """The reading with further notes."""
    return replace(reading, notes=", ".join(n for n in (reading.notes, *notes) if n))


def _short(command: Sequence[str]) -> str:
    text = " ".join(command)
    return text if len(text) < 120 else f"{text[:117]}..."
