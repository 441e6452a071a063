"""ONNX Runtime on this machine's CPU: conversion to ONNX, and the meter."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles.host import host_fingerprint
from hardware_profiles.meter import Artifact, Converter, Measurement, Meter, Protocol
from hardware_profiles.paths import atomic
from hardware_profiles.profile import Target
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

# The oldest opset with HardSwish (14) and the reductions in the form that torch writes; every recent runtime reads it.
OPSET = 17


class OnnxConverter(Converter):
    """Writes a torch module as ONNX, with batch normalisation folded into the convolutions.

    torch's older exporter is used while torch has it: it takes a tenth of the time of its successor (0.4 s against 4 s
    for a MobileNetV3-like network) and its graphs run equally fast.
    """

    format = "onnx"

    def convert(self, network: nn.Module, target: Target, input_shape: tuple[int, ...], path: Path) -> Artifact:
        """Write `network` in eval mode with the target's batch size. An int8 network must already be quantised.

        The module itself is left as it was, its training flags included.

        Raises:
            UserError: another precision than fp32, an operator without an ONNX form, or a path that cannot be written.
        """
        import torch

        if target.precision != "fp32":
            raise UserError(
                f"{target.name}: a torch module converts to fp32 ONNX only; "
                f"for {target.precision}, quantise the ONNX file"
            )
        example = torch.zeros(target.batch, *input_shape)
        modes = [(module, module.training) for module in network.modules()]
        network.eval()
        try:
            with atomic(path) as temporary, warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                self._export(network, example, temporary)
        finally:
            for module, training in modes:
                module.training = training
        return Artifact(path, self.format, "fp32", tuple(input_shape))

    def _export(self, network: nn.Module, example: Any, path: Path) -> None:
        import torch

        names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
        try:
            try:
                torch.onnx.export(network, (example,), path, opset_version=OPSET, dynamo=False, **names)
            except (TypeError, AttributeError):  # a torch without the older exporter
                torch.onnx.export(network, (example,), path, external_data=False, verbose=False, **names)
        except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{type(network).__name__}: cannot be written as ONNX: {reason}") from error


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


class OnnxRuntimeMeter(Meter):
    """Measures ONNX files with ONNX Runtime on this machine's CPU.

    All sessions are open at once and measured in turn, pass after pass, each pass in another order, so that a drift of
    the clock or a busy neighbour falls on all of them alike. The figure is the minimum over all passes: interference
    only ever adds time, and on a shared machine, where the clock was seen to flip between two speeds 1.5 times apart,
    minima of two runs agree far better than medians do. After `passes` passes, networks whose best time no
    second pass has confirmed are measured again, up to `max_passes` and within `budget_s`; what stays unconfirmed is
    flagged as throttled. What is timed is `session.run` with a numpy array, as a user would call it.

    Args:
        passes, max_passes: over all artifacts.
        pass_ms: time spent on one artifact in one pass, which sets the repeats (at least 3, at most 50).
        warmup: untimed runs of an artifact at the start of each of its turns.
        tolerance: how near a second pass must come to the best.
        budget_s: no further pass begins after this many seconds.
        open_mb: sessions are opened in groups of at most this many MB of files, to bound memory.
        seed: of the input values and of the orders.
        progress: called with (done, total) passes; unconfirmed networks may take more passes than planned.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        *,
        passes: int = 8,
        max_passes: int = 24,
        pass_ms: float = 12.0,
        warmup: int = 2,
        tolerance: float = 0.02,
        budget_s: float = 60.0,
        open_mb: float = 600.0,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if passes < 2 or max_passes < passes:
            raise UserError(f"a meter needs at least 2 passes and max_passes >= passes, got {passes} and {max_passes}")
        self.passes = passes
        self.max_passes = max_passes
        self.pass_ms = pass_ms
        self.warmup = warmup
        self.tolerance = tolerance
        self.budget_s = budget_s
        self.open_mb = open_mb
        self.seed = seed
        self.progress = progress

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """One measurement per artifact, in order; a file that cannot be run gets one with an error.

        Raises:
            UserError: the target is not ONNX Runtime on this machine.
        """
        if target.runtime != self.runtime or not target.profile.local:
            raise UserError(f"{target.name}: this meter measures ONNX Runtime on this machine only")
        rng = np.random.default_rng(self.seed)
        groups = _groups(artifacts, self.open_mb * 1e6)
        results: dict[int, Measurement] = {}
        for group in groups:
            done = self._measure_group([artifacts[i] for i in group], target, rng, self.budget_s / len(groups))
            results.update(zip(group, done, strict=True))
        return [results[i] for i in range(len(artifacts))]

    def _measure_group(
        self, artifacts: Sequence[Artifact], target: Target, rng: np.random.Generator, budget_s: float
    ) -> list[Measurement]:
        runs = [self._open(artifact, target, rng) for artifact in artifacts]
        alive = [r for r in runs if r.run is not None]
        end = time.perf_counter() + budget_s
        passes = 0
        collecting = gc.isenabled()
        gc.disable()
        try:
            todo = alive
            while todo and passes < self.max_passes and (passes < 2 or time.perf_counter() < end):
                for i in rng.permutation(len(todo)):
                    self._take(todo[i])
                passes += 1
                if self.progress:
                    self.progress(passes, max(passes, self.passes))
                if passes >= self.passes:
                    todo = [r for r in alive if not r.repeated(self.tolerance)]
        finally:
            if collecting:
                gc.enable()
        return [self._result(r, target, passes) for r in runs]

    def _open(self, artifact: Artifact, target: Target, rng: np.random.Generator) -> _Running:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = target.threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        # Pools of many open sessions that spin while they wait would take the cores from the one being measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if artifact.format != "onnx":
            return _Running(artifact, None, f"{artifact.path}: format {artifact.format!r}, this meter runs ONNX only")
        if not artifact.path.is_file():
            return _Running(artifact, None, f"{artifact.path}: no such file")
        try:
            session = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
            feed = {
                i.name: rng.standard_normal([target.batch, *artifact.input_shape]).astype(np.float32)
                for i in session.get_inputs()
            }
            session.run(None, feed)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return _Running(artifact, None, f"{artifact.path}: ONNX Runtime cannot run this file: {reason}")
        return _Running(artifact, lambda: session.run(None, feed))

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
        import onnxruntime as ort

        samples = np.array(r.samples_ms)
        protocol = Protocol(
            runtime=self.runtime,
            runtime_version=ort.__version__,
            precision=r.artifact.precision,
            threads=target.threads,
            batch=target.batch,
            warmup=self.warmup,
            passes=len(r.best_of_pass),
            repeats=len(samples) // max(1, len(r.best_of_pass)),
            statistic="minimum over interleaved passes",
            host=host_fingerprint(),
            notes="all graph optimisations, no spinning threads, session.run with numpy arrays",
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
