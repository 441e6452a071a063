"""Vela, the compiler for Arm Ethos-U: what it reckons that a network takes on a configuration of the NPU.

No device is needed, and none is measured. The compiler schedules the network block by block and adds up cycles of
arithmetic and of memory traffic; its figures are estimates and every measurement says so.
"""

from __future__ import annotations

import csv
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.extras import require
from hardware_profiles.meter import Artifact, Measurement, Meter, OperatorTime, Protocol
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Runner, ToolError, run
from search_spaces.errors import UserError

TIMEOUT_S = 300.0


class VelaMeter(Meter):
    """Compiles int8 `.tflite` files for an Ethos-U and reads the compiler's performance report.

    The target's options say what for: `accelerator` (such as `ethos-u55-128`), and optionally `system` and `memory`, a
    system configuration and a memory mode of the compiler's own `Arm/vela.ini`. Operators that the NPU does not take
    would run on the CPU beside it; the compiler gives no time for them, so a note names them.

    Args:
        progress: called with (done, total) networks.
        runner: runs the compiler; a test gives its own.
        timeout_s: of one network.

    Raises:
        UserError: the compiler is not installed.
    """

    runtime = "vela"

    def __init__(
        self,
        *,
        progress: Callable[[int, int], None] | None = None,
        runner: Runner = run,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        require("ethos-u")
        self.progress = progress
        self.runner = runner
        self.timeout_s = timeout_s

    def runtime_version(self) -> str:
        """Version of the compiler."""
        return version("ethos-u-vela")

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """One estimate per artifact, in order, with peak memory of the SRAM and times of single operators.

        Raises:
            UserError: a target of another runtime, or one whose options do not name an accelerator.
        """
        command = self._command(target)
        results = []
        for artifact in artifacts:
            try:
                results.append(self._estimate(artifact, target, command))
            except UserError as error:
                nothing = np.array([])
                results.append(
                    Measurement(artifact, math.nan, nothing, self._protocol(artifact, target, ""), error=str(error))
                )
            if self.progress:
                self.progress(len(results), len(artifacts))
        return results

    def per_operator(self, artifact: Artifact, target: Target) -> list[OperatorTime]:
        """The compiler's cycles of each operator on the NPU as a time; one that was fused into another has 0.

        Raises:
            UserError: the file cannot be compiled.
        """
        (result,) = self.measure([artifact], target)
        if result.error:
            raise UserError(result.error)
        return list(result.operators)

    def _command(self, target: Target) -> list[str]:
        options = {key: str(value) for key, value in target.point.options.items()}
        if target.runtime != self.runtime or not options.get("accelerator"):
            raise UserError(
                f'{target.name}: this meter estimates for operating points with runtime = "vela" and an '
                'accelerator in their options, such as { accelerator = "ethos-u55-128" }'
            )
        command = [sys.executable, "-m", "ethosu.vela", "--accelerator-config", options["accelerator"]]
        if options.get("system"):
            command += ["--config", "Arm/vela.ini", "--system-config", options["system"]]
        if options.get("memory"):
            command += ["--memory-mode", options["memory"]]
        return [*command, "--verbose-performance"]

    def _estimate(self, artifact: Artifact, target: Target, command: Sequence[str]) -> Measurement:
        if artifact.format != "tflite":
            raise UserError(f"{artifact.label}: format {artifact.format!r}, this meter compiles tflite only")
        if not artifact.path.is_file():
            raise UserError(f"{artifact.label}: no such file")
        with tempfile.TemporaryDirectory(prefix="nasbench-vela-") as folder:
            try:
                done = self.runner([*command, "--output-dir", folder, str(artifact.path)], self.timeout_s)
            except ToolError as error:
                raise UserError(f"{artifact.label}: {error}") from error
            if done.returncode != 0:
                raise UserError(f"{artifact.label}: vela cannot compile this file: {done.complaint}")
            (summary,) = _table(folder, "*_summary_*.csv", artifact)[:1]
            layers = _table(folder, "*_per-layer.csv", artifact)
        latency_ms = _number(summary, "inference_time", artifact) * 1e3
        hertz = _number(summary, "core_clock", artifact)
        on_npu = [row for row in layers if row.get("Target", "NPU") == "NPU"]
        elsewhere = sorted({_kind(row) for row in layers if row.get("Target", "NPU") != "NPU"})
        if not on_npu or not (latency_ms > 0 and hertz > 0):
            what = f"{artifact.precision} file; it takes int8"
            raise UserError(f"{artifact.label}: nothing of this network runs on the NPU ({what})")
        operators = tuple(
            OperatorTime(row.get("Name", "").strip("; "), _kind(row), _number(row, "Op Cycles", artifact) / hertz * 1e3)
            for row in on_npu
        )
        note = f"runs on the CPU and is not in the figure: {', '.join(elsewhere)}" if elsewhere else ""
        return Measurement(
            artifact,
            latency_ms,
            np.array([latency_ms]),
            self._protocol(artifact, target, f"{hertz / 1e6:g} MHz"),
            note=note,
            peak_memory_bytes=round(_number(summary, "sram_memory_used", artifact) * 1024),
            cycles=round(latency_ms / 1e3 * hertz),
            operators=operators,
        )

    def _protocol(self, artifact: Artifact, target: Target, clock: str) -> Protocol:
        options = target.point.options
        configuration = ", ".join(str(options[key]) for key in ("accelerator", "system", "memory") if options.get(key))
        return Protocol(
            runtime=self.runtime,
            runtime_version=self.runtime_version(),
            precision=artifact.precision,
            threads=target.threads,
            batch=target.batch,
            warmup=0,
            passes=1,
            repeats=1,
            statistic="estimate of the compiler",
            host=", ".join(part for part in (f"no device: {configuration}", clock) if part),
            notes="; ".join(n for n in ("estimated cycles of the NPU, nothing was run", artifact.note) if n),
        )


def _kind(row: dict[str, str]) -> str:
    """The operator's kind in the first column, which releases of the compiler call by different names."""
    return next(iter(row.values()), "").strip()


def _table(folder: str, pattern: str, artifact: Artifact) -> list[dict[str, str]]:
    """The rows of the one report that matches; never empty."""
    files = sorted(Path(folder).glob(pattern))
    rows: list[dict[str, str]] = []
    if files:
        with files[0].open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{artifact.label}: vela ended well but wrote no report {pattern}")
    return rows


def _number(row: dict[str, Any], key: str, artifact: Artifact) -> float:
    try:
        value = float(row[key])
    except (KeyError, ValueError) as error:
        raise UserError(f"{artifact.label}: vela's report has no number {key!r}: {row.get(key, '')!r}") from error
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{artifact.label}: vela's report has {key} = {value}")
    return value
