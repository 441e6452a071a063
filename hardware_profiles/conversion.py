"""Conversion that is checked: a file must compute what the network computes, or it is not written."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles.extras import quiet, reason, require
from hardware_profiles.meter import Artifact, Converter
from hardware_profiles.passes import LocalMeter
from hardware_profiles.paths import atomic
from hardware_profiles.profile import Target
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, Any]

NOISE_IMAGES = 8

# Largest difference of an output from the network's, by the precision of the file. fp32 and fp16: of any value,
# relative to the largest. int8: root mean square, relative to the outputs' own: a file with more error than signal is
# refused. Freshly initialised networks, which are enough to measure a latency, came to 0.45; a wrong layout gives 1.4.
TOLERANCE = {"fp32": 1e-3, "fp16": 3e-2, "int8": 1.0}


class CheckedConverter(Converter):
    """Writes a torch module in a runtime's format, runs the file with that runtime, and compares.

    A subclass says how the file is written and which meter runs it.

    Raises:
        UserError: the runtime's converter is not installed.
    """

    title: str  # the format's name for people
    meter: type[LocalMeter]
    precisions: tuple[str, ...] = ("fp32", "int8")
    extra: str = ""

    def __init__(self) -> None:
        require(self.extra)

    def convert(
        self,
        network: nn.Module,
        target: Target,
        input_shape: tuple[int, ...],
        path: Path,
        images: Array | None = None,
    ) -> Artifact:
        """Write `network` in eval mode with the target's batch size and precision; see `Converter.convert`.

        The module itself is left as it was, its training flags included.
        """
        import torch

        name = type(network).__name__
        self._check_precision(target)
        batches = calibration_batches(images, target.batch, input_shape)
        with evaluating(network), torch.no_grad():
            return self._checked(
                name,
                self._artifact(target, input_shape, path, batches, images),
                target,
                batches,
                expected=lambda: _outputs(network(torch.from_numpy(batches[0])), name),
                write=lambda temporary: self._write(network, target, batches, temporary),
            )

    def _check_precision(self, target: Target) -> None:
        if target.precision not in self.precisions:
            known = " or ".join(self.precisions)
            raise UserError(f"{target.name}: a torch module becomes {known} {self.title} only, not {target.precision}")

    def _artifact(
        self, target: Target, input_shape: tuple[int, ...], path: Path, batches: list[Array], images: Array | None
    ) -> Artifact:
        """What will be at `path`."""
        precision, note = self.file_precision(target), ""
        if precision == "int8":
            source = f"{len(batches) * target.batch} images"
            note = f"int8 ranges calibrated on {source if images is not None else f'{source} of seeded noise'}"
        return Artifact(path, self.format, precision, tuple(input_shape), note)

    def _checked(
        self,
        name: str,
        artifact: Artifact,
        target: Target,
        batches: list[Array],
        expected: Callable[[], list[Array]],
        write: Callable[[Path], None],
    ) -> Artifact:
        """The artifact once `write` has written it and it gives the `expected` outputs for the first batch."""
        path, precision = artifact.path, artifact.precision
        with contextlib.ExitStack() as stack, atomic(path) as temporary:
            for made in self._beside(temporary):
                stack.callback(made.unlink, missing_ok=True)
            try:
                with quiet():
                    wanted = expected()
                    write(temporary)
            except (UserError, OSError):
                raise
            except Exception as error:  # converters raise whatever the layers below them raise
                raise UserError(f"{name}: cannot be written as {self.title}: {reason(error)}") from error
            found = self.meter().opened(replace(artifact, path=temporary, name=name), target, batches[0]).run()
            difference = _difference(found, wanted, precision)
            if not difference <= TOLERANCE[precision]:
                raise UserError(
                    f"{name}: the {precision} {self.title} file differs from the network by {difference:.2g} of its "
                    f"output, more than {TOLERANCE[precision]:g}; {path} was not written"
                )
            stack.pop_all()
            for made, final in zip(self._beside(temporary), self._beside(path), strict=True):
                made.replace(final)
        return artifact

    def file_precision(self, target: Target) -> str:
        """Precision of the file for a target; a runtime may lower it as it builds the network on the device."""
        return target.precision

    @abstractmethod
    def _write(self, network: nn.Module, target: Target, batches: list[Array], path: Path) -> None:
        """Write a network that is in eval mode; `batches` are `(target.batch, c, h, w)` each, for ranges and shapes."""

    def _beside(self, path: Path) -> list[Path]:
        """Further files that belong to the one at `path`."""
        return []


class StagedConverter(CheckedConverter):
    """Writes an fp32 file first and makes the target's of it; or begins with such a file. A subclass says how.

    Its `source` runs the fp32 file, in the first of its formats.
    """

    source: type[LocalMeter]

    def convert_file(self, file: Artifact, target: Target, path: Path, images: Array | None = None) -> Artifact:
        """As `convert`, from an fp32 file of `source`'s format and the target's batch size.

        Raises:
            UserError: as `convert`.
        """
        self._check_precision(target)
        batches = calibration_batches(images, target.batch, file.input_shape)
        return self._checked(
            file.label,
            self._artifact(target, file.input_shape, path, batches, images),
            target,
            batches,
            expected=lambda: self.source().opened(file, target, batches[0]).run(),
            write=lambda temporary: self._lower(file.path, target, batches, temporary),
        )

    def _write(self, network: nn.Module, target: Target, batches: list[Array], path: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"fp32.{self.source.formats[0]}"
            self._write_fp32(network, batches[0], file)
            self._lower(file, target, batches, path)

    @abstractmethod
    def _write_fp32(self, network: nn.Module, x: Array, path: Path) -> None:
        """Write a network that is in eval mode in fp32, with the static shape of `x`."""

    @abstractmethod
    def _lower(self, file: Path, target: Target, batches: list[Array], path: Path) -> None:
        """Write the target's file from an fp32 one; `batches` as in `_write`."""


def calibration_batches(images: Array | None, batch: int, input_shape: tuple[int, ...]) -> list[Array]:
    """Images in batches `(batch, *input_shape)` float32, at least one; None gives seeded normal noise.

    Images that do not fill the last batch are left out, and fewer than one batch are repeated.

    Raises:
        UserError: images of another shape, none at all, or values that are not finite.
    """
    if images is None:
        count = max(NOISE_IMAGES, batch)
        images = np.random.default_rng(0).standard_normal((count, *input_shape), dtype=np.float32)
    if images.ndim != 1 + len(input_shape) or images.shape[1:] != tuple(input_shape) or not len(images):
        raise UserError(f"calibration images: shape {images.shape}, expected (n, {', '.join(map(str, input_shape))})")
    images = images.astype(np.float32, copy=False)
    if not np.isfinite(images).all():
        raise UserError("calibration images: not all values are finite")
    if len(images) < batch:
        images = np.concatenate([images] * -(-batch // len(images)))
    return [np.ascontiguousarray(images[i : i + batch]) for i in range(0, len(images) - batch + 1, batch)]


def folded(network: nn.Module) -> nn.Module:
    """A copy with batch normalisation folded into the convolutions before it, where `torch.fx` can trace the network.

    One that it cannot trace keeps them: converters fold for themselves, it only takes them longer. Weights become
    contiguous, since exporters read a meaning into channels-last strides.
    """
    import torch
    from torch.fx.experimental.optimization import fuse

    try:
        network = fuse(network)
    except Exception:  # data-dependent code fails in tracing in many ways
        network = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return network


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in eval mode, and as it was afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _outputs(result: Any, name: str) -> list[Array]:
    import torch

    results = list(result) if isinstance(result, tuple | list) else [result]
    if not all(isinstance(r, torch.Tensor) for r in results):
        raise UserError(f"{name}: must return a tensor or a tuple of tensors to be converted")
    return [r.detach().float().numpy() for r in results]


def _difference(found: list[Array], expected: list[Array], precision: str) -> float:
    """The largest relative difference of any output; infinite where their number or shapes differ."""
    if [f.shape for f in found] != [e.shape for e in expected]:
        return float("inf")
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        error = f.astype(np.float64) - e
        size = np.abs if precision != "int8" else np.square
        reduce = np.max if precision != "int8" else np.mean
        share = float(reduce(size(error))) / max(float(reduce(size(e.astype(np.float64)))), 1e-30)
        share = share if precision != "int8" else share**0.5
        worst = share if not share <= worst else worst  # NaN stays
    return worst
