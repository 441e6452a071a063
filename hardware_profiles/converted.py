"""Converted networks kept in a directory, since converting many takes far longer than measuring them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware_profiles.conversion import StagedConverter
from hardware_profiles.meter import Artifact, Converter
from hardware_profiles.onnx_runtime import OnnxConverter
from hardware_profiles.paths import write_text
from hardware_profiles.profile import Target
from hardware_profiles.runtimes import converter_for, meter_for
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ConvertedFiles:
    """A directory of networks in the format of a target's runtime: each is converted once, by whoever asks first.

    What a file holds follows from its name: a digest of what the caller says identifies the network, of its input
    shape, of the target's precision and batch, and of the versions of torch and the runtime. Networks that cannot be
    converted are kept too, with the reason. Files of other versions stay; delete the directory to be rid of them.
    A file that could not be written, on a full disk say, is no refusal and is tried again.
    All runtimes that read ONNX share its fp32 files, and int8 files are made from fp32 files where there is a way.

    Args:
        folder: need not exist yet.
        target: what files are converted for.
    """

    folder: Path
    target: Target

    def convert(self, identity: str, build: Callable[[], nn.Module], input_shape: tuple[int, ...]) -> Artifact:
        """The artifact of a network, converted now if it never was.

        Args:
            identity: equal for equal networks and for no others, weights apart.
            build: makes the network.
            input_shape: `(channels, height, width)`.

        Raises:
            UserError: the runtime's converter refuses the network, now or earlier; or the directory cannot be written.
        """
        converter, path, note = self._place(identity, input_shape)
        found = _read(note)
        if found is not None and found["error"]:
            raise UserError(found["error"])
        if found is not None and path.is_file():
            return Artifact(path, converter.format, found["precision"], tuple(input_shape), found["note"])
        try:
            if isinstance(converter, StagedConverter) and (plain := self._fp32(converter)):
                file = ConvertedFiles(self.folder, plain).convert(identity, build, input_shape)
                artifact = converter.convert_file(file, self.target, path)
            else:
                artifact = converter.convert(build(), self.target, input_shape, path)
        except UserError as error:
            if not isinstance(error.__cause__, OSError):  # a full disk, say, is not the network's fault
                write_text(note, json.dumps({"error": str(error), "precision": "", "note": ""}))
            raise
        write_text(note, json.dumps({"error": "", "precision": artifact.precision, "note": artifact.note}))
        return artifact

    def has(self, identity: str, input_shape: tuple[int, ...]) -> bool:
        """Whether `convert` has nothing left to do: the network was converted, or the converter refused it."""
        _, path, note = self._place(identity, input_shape)
        found = _read(note)
        return found is not None and (bool(found["error"]) or path.is_file())

    def _place(self, identity: str, input_shape: tuple[int, ...]) -> tuple[Converter, Path, Path]:
        """What makes a network's file, the file, and the note on it."""
        converter, runtime = converter_for(self.target), meter_for(self.target)
        format, versions = self.target.runtime, [version("torch"), runtime.runtime_version()]
        if self.target.precision == "fp32" and "onnx" in getattr(runtime, "formats", ()):
            format, versions, converter = "onnx", versions[:1], OnnxConverter()
        what = [identity, input_shape, self.target.precision, self.target.batch, versions]
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
        stem = self.folder / f"{format}-{self.target.precision}-{digest}"
        return converter, stem.with_suffix(f".{converter.format}"), stem.with_suffix(".json")

    def _fp32(self, converter: StagedConverter) -> Target | None:
        """The device in fp32 with a runtime whose files the converter begins with; None if the target is that, or
        there is none."""
        if self.target.precision != "int8":
            return None
        profile, runtime = self.target.profile, converter.source.runtime
        for name, point in profile.operating_points.items():
            if (point.precision, point.batch, point.runtime) == ("fp32", self.target.batch, runtime):
                return Target(profile, name)
        return None


def _read(note: Path) -> dict[str, str] | None:
    """What is known of a file; None where that is nothing, or damaged."""
    try:
        found: Any = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    keys = {"error", "precision", "note"}
    sound = isinstance(found, dict) and found.keys() == keys and all(isinstance(v, str) for v in found.values())
    return found if sound else None
