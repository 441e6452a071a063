"""Which converter and meter a target needs."""

from __future__ import annotations

from collections.abc import Callable

from hardware_profiles.meter import Converter, Meter
from hardware_profiles.profile import Target
from search_spaces.errors import UserError


def converter_for(target: Target) -> Converter:
    """The converter to the file format of the target's runtime.

    Raises:
        UserError: this version cannot convert for that runtime.
    """
    if target.runtime == "onnxruntime":
        from hardware_profiles.onnx_runtime import OnnxConverter

        return OnnxConverter()
    raise UserError(f"{target.name}: cannot convert for runtime {target.runtime!r}; this version writes ONNX only")


def meter_for(target: Target, progress: Callable[[int, int], None] | None = None) -> Meter:
    """The meter of a target that can be measured on this machine.

    Args:
        progress: called with (done, total) passes while it measures.

    Raises:
        UserError: the device is another machine, or this version cannot drive its runtime; says what to do instead.
    """
    recipe = f" To measure there: {target.profile.measure}" if target.profile.measure else ""
    if not target.profile.local:
        raise UserError(f"{target.name}: this is not the machine we run on, so it cannot be measured here.{recipe}")
    if target.runtime == "onnxruntime":
        from hardware_profiles.onnx_runtime import OnnxRuntimeMeter

        return OnnxRuntimeMeter(progress=progress)
    raise UserError(f"{target.name}: cannot measure with runtime {target.runtime!r}; known here: onnxruntime.{recipe}")
