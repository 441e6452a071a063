"""Which converter and meter a target needs: the built-in ones by runtime, and the user's own as `"module:Class"`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hardware_profiles.meter import Converter, Meter
from hardware_profiles.profile import Target
from search_spaces.errors import UserError, nearest


@dataclass(frozen=True)
class Runtime:
    """Where the classes of a runtime are, as `"module:Class"`; nothing is imported before it is used.

    Args:
        converter: writes the runtime's files.
        meter: measures where the device is the machine this runs on; empty: cannot be driven from here.
        remote: measures a device that is another machine, or estimates without one; empty: there is none.
    """

    converter: str = ""
    meter: str = ""
    remote: str = ""


_ONNX = "hardware_profiles.onnx_runtime:OnnxConverter"
_LITERT = "hardware_profiles.litert:LiteRTConverter"
_OPENVINO = "hardware_profiles.openvino:OpenVINOConverter"

# `runtime` of an operating point -> its classes. One line per runtime.
RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": Runtime(_ONNX, "hardware_profiles.onnx_runtime:OnnxRuntimeMeter"),
    "litert": Runtime(_LITERT, "hardware_profiles.litert:LiteRTMeter"),
    "tflite": Runtime(_LITERT),
    "edgetpu": Runtime(_LITERT),
    "openvino": Runtime(_OPENVINO, "hardware_profiles.openvino:OpenVINOMeter"),
    "executorch": Runtime(
        "hardware_profiles.executorch:ExecuTorchConverter", "hardware_profiles.executorch:ExecuTorchMeter"
    ),
    "tensorrt": Runtime(_ONNX),
    "vela": Runtime(_LITERT, remote="hardware_profiles.vela:VelaMeter"),
}


# File format that a profile's `[meter]` wants -> the runtime whose converter writes it.
_WRITERS = {"onnx": "onnxruntime", "tflite": "litert"}


def converter_for(target: Target) -> Converter:
    """The converter to the file format of the target's runtime.

    A user's own meter, named as the runtime, says by its attribute `converter` which class converts for it.

    Raises:
        UserError: no converter for that runtime, or its extra is not installed.
    """
    if target.profile.meter is not None:
        from hardware_profiles.device_meters import device_format

        format = device_format(target)
        return _made(_load(RUNTIMES[_WRITERS[format]].converter, target), target)
    if ":" in target.runtime:
        found = getattr(_load(target.runtime, target), "converter", None)
        if found is None:
            raise UserError(
                f"{target.name}: {target.runtime} has no attribute 'converter', a class that converts for it"
            )
        converter = _load(found, target) if isinstance(found, str) else found
    else:
        name = _runtime(target).converter
        if not name:
            raise UserError(f"{target.name}: no converter for runtime {target.runtime!r}")
        converter = _load(name, target)
    return _made(converter, target)


def meter_for(target: Target, progress: Callable[[int, int], None] | None = None) -> Meter:
    """The meter of a target that can be measured from this machine.

    Args:
        progress: called with (done, total) passes while it measures.

    Raises:
        UserError: the device is another machine, no meter drives its runtime, or an extra is not installed; says what
            to do instead.
    """
    if target.profile.meter is not None:
        from hardware_profiles.device_meters import device_meter

        return device_meter(target, progress)
    recipe = f" To measure there: {target.profile.measure}" if target.profile.measure else ""
    if ":" in target.runtime:
        return own_meter(target.runtime, target, progress)
    known = RUNTIMES.get(target.runtime, Runtime())
    name = known.meter if target.profile.local else known.remote
    if name:
        return _made(_load(name, target), target, progress=progress)
    if not target.profile.local:
        raise UserError(f"{target.name}: this is not the machine we run on, so it cannot be measured here.{recipe}")
    _runtime(target)
    here = ", ".join(name for name, runtime in RUNTIMES.items() if runtime.meter)
    raise UserError(f"{target.name}: cannot measure with runtime {target.runtime!r}; known here: {here}.{recipe}")


def own_meter(path: str, target: Target, progress: Callable[[int, int], None] | None = None) -> Meter:
    """A meter of the user's own, `"module:Class"`, made as `Class(progress=...)`.

    Raises:
        UserError: it cannot be imported or made, or is no Meter.
    """
    make = _load(path, target)
    try:
        may_be = issubclass(make, Meter) if isinstance(make, type) else callable(make)
        made = _made(make, target, progress=progress) if may_be else None
    except UserError:
        raise
    except Exception as error:  # whatever a user's module may raise
        raise UserError(f"{target.name}: {path!r} cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(made, Meter):
        raise UserError(f"{target.name}: {path!r} is no Meter, a class that extends hardware_profiles.Meter")
    return made


def _runtime(target: Target) -> Runtime:
    if target.runtime not in RUNTIMES:
        raise UserError(
            f"{target.name}: unknown runtime {target.runtime!r}. {nearest(target.runtime, RUNTIMES)} "
            'Your own: "module:Class" of a meter.'
        )
    return RUNTIMES[target.runtime]


def _load(path: str, target: Target) -> Any:
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module may raise
        raise UserError(f"{target.name}: cannot import {path!r}: {type(error).__name__}: {error}") from error


def _made(cls: Any, target: Target, **options: Any) -> Any:
    try:
        return cls(**options)
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from error
