"""The contracts of conversion and measurement: networks become artifacts, artifacts become measurements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from hardware_profiles.profile import Target


@dataclass(frozen=True)
class Artifact:
    """A network in a runtime's own file format.

    Args:
        path: the file.
        format: `onnx`, `tflite`, `xml` (OpenVINO's, with its weights beside it in a `.bin`), `pte` (ExecuTorch's).
        precision: `fp32`, `fp16`, `int8`.
        input_shape: `(channels, height, width)` per sample, whatever the file's own layout.
        note: what a reader of its numbers should know, such as the images that int8 ranges come from.
        name: what the network is called, where its file is a temporary one.
    """

    path: Path
    format: str
    precision: str
    input_shape: tuple[int, ...]
    note: str = ""
    name: str = ""

    @property
    def label(self) -> str:
        """What errors call it: the network's name, else the file."""
        return self.name or str(self.path)

    @property
    def file_bytes(self) -> int:
        """Size of the file, of the weights beside it too where the format has them there."""
        files = [self.path, *([self.path.with_suffix(".bin")] if self.format == "xml" else [])]
        return sum(file.stat().st_size for file in files if file == self.path or file.is_file())


class Converter(ABC):
    """Turns a network into the file format of one runtime. Conversion lives beside the meter of that runtime."""

    format: str

    @abstractmethod
    def convert(
        self,
        network: nn.Module,
        target: Target,
        input_shape: tuple[int, ...],
        path: Path,
        images: np.ndarray[Any, Any] | None = None,
    ) -> Artifact:
        """Write `network` (in eval mode, batch as the target says) to `path`, atomically.

        Args:
            images: `(n, channels, height, width)` float32, prepared as the network takes them: int8 ranges are
                calibrated on them. None means seeded noise, which is enough to measure a latency but not to keep an
                accuracy; the artifact's note says so.

        Raises:
            UserError: an operator or precision that the runtime does not take, or a file that does not compute what
                the network does.
        """


@dataclass(frozen=True)
class Protocol:
    """How a number was measured, complete enough to repeat or distrust it."""

    runtime: str
    runtime_version: str
    precision: str
    threads: int
    batch: int
    warmup: int
    passes: int
    repeats: int
    statistic: str
    host: str
    notes: str = ""


@dataclass(frozen=True)
class OperatorTime:
    """What one operator took, as the runtime itself reports it.

    Args:
        name: the runtime's name of it: of a layer of the network, or of several that it fused.
        kind: the runtime's word for what it is; empty where it says none.
        latency_ms: milliseconds per inference, the mean or the least of several as the meter says. Profiling costs
            time too, so the sum may exceed the latency.
    """

    name: str
    kind: str
    latency_ms: float


@dataclass(frozen=True)
class Measurement:
    """All samples of one artifact, and what they were taken with.

    Args:
        samples_ms: milliseconds per inference (one batch), in the order taken.
        latency_ms: the protocol's statistic of them: the figure to use.
        throttled: the machine slowed down or was disturbed while this was measured; the reason is in `note`.
        error: why there is no number (then `latency_ms` is NaN), else empty.
        energy_mj: energy per inference (one batch), mJ; None where nothing measures it.
        peak_memory_bytes: what the process took at its peak, as far as the runtime tells; else None.
        cycles: of the accelerator's clock per inference, where a compiler reckons in them; else None.
        operators: times per operator, in the order run, where the runtime tells and was asked.
    """

    artifact: Artifact
    latency_ms: float
    samples_ms: np.ndarray[Any, Any] = field(repr=False)
    protocol: Protocol
    throttled: bool = False
    note: str = ""
    error: str = ""
    energy_mj: float | None = None
    peak_memory_bytes: int | None = None
    cycles: int | None = None
    operators: tuple[OperatorTime, ...] = field(default=(), repr=False)

    @property
    def median_ms(self) -> float:
        """Median of the samples."""
        return float(np.median(self.samples_ms)) if len(self.samples_ms) else float("nan")

    def percentile_ms(self, q: float) -> float:
        """The `q`-th percentile (0..100) of the samples."""
        return float(np.percentile(self.samples_ms, q)) if len(self.samples_ms) else float("nan")

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return (self.percentile_ms(75) - self.percentile_ms(25)) / self.median_ms


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while networks were measured, with what was finished before."""

    def __init__(self, measured: Sequence[Measurement]) -> None:
        super().__init__()
        self.measured = tuple(measured)


class Meter(ABC):
    """Runs artifacts on one runtime and returns measurements.

    Before networks are built for it, `missing` tells whether it can run at all.
    `measure` takes many artifacts at once so that passes over them can be interleaved: a drift of the clock then falls
    on all of them alike. One that fails gets a measurement with an error; the others keep theirs.
    """

    runtime: str

    @abstractmethod
    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        """One measurement per artifact, in order."""

    def missing(self, target: Target) -> str:
        """What it needs on this machine and does not find, in words; empty where nothing is known to be missing."""
        return ""

    def per_operator(self, artifact: Artifact, target: Target) -> list[OperatorTime]:
        """The time of each operator as the runtime runs it (fused, in order), where the runtime tells.

        Raises:
            UserError: the runtime does not tell, or cannot run the file.
        """
        raise UserError(f"{self.runtime}: this runtime gives no times of single operators")

    def runtime_version(self) -> str:
        """Version of the runtime that `measure` would use, as the protocol records it; empty where it is not known."""
        return ""
