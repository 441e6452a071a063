"""A meter by a word, for devices whose profile ships without one: where your board is, only you know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from hardware_profiles.meter import Meter
from hardware_profiles.meter_section import AdbSection, MeterSection, SshSection
from hardware_profiles.paths import read_toml
from hardware_profiles.profile import Target, explain_fields
from hardware_profiles.runtimes import meter_for, own_meter
from search_spaces.errors import UserError, nearest

# What measures networks of a runtime on a device that ssh reaches.
_OVER_SSH = {
    "tensorrt": "trtexec",
    "openvino": "benchmark_app",
    "tflite": "benchmark_model",
    "litert": "benchmark_model",
}


def with_meter(target: Target, spec: str, progress: Callable[[int, int], None] | None = None) -> tuple[Target, Meter]:
    """A target that is measured as `spec` says, and the meter that does.

    Args:
        spec: `adb` or `adb:SERIAL`; `ssh:HOST`; a TOML file with the keys of a `[meter]` section; `replay:FILE` of
            recorded measurements; `module:Class` of a meter of one's own, made as `Class(progress=...)`.
        progress: as the meter's.

    Raises:
        UserError: a spec that names nothing, or a file with wrong keys.
    """
    kind, _, rest = spec.partition(":")
    if kind == "replay":
        from hardware_profiles.recording import ReplayMeter

        return target, ReplayMeter(Path(rest))
    if spec.endswith(".toml"):
        return _section(target, _read(Path(spec)), spec, progress)
    if kind == "adb":
        # What the profile says of its phone stays: which model it must be, its cores.
        said = target.profile.meter.model_dump() if isinstance(target.profile.meter, AdbSection) else {}
        return _section(target, {**said, "kind": "adb", **({"serial": rest} if rest else {})}, spec, progress)
    if kind == "ssh":
        if isinstance(target.profile.meter, SshSection):
            return _section(target, target.profile.meter.model_dump() | {"host": rest}, spec, progress)
        tool = _OVER_SSH.get(target.runtime)
        if tool is None:
            raise UserError(
                f"{target.name}: which program measures runtime {target.runtime!r} over ssh? Write it into a TOML file "
                "with kind, host, tool and binary, and name that"
            )
        # OpenVINO's name of the device; the profiles of Myriad devices say which.
        device = {"device": str(target.point.options.get("device", "CPU"))} if tool == "benchmark_app" else {}
        return _section(target, {"kind": "ssh", "host": rest, "tool": tool, **device}, spec, progress)
    if ":" not in spec:
        known = ("adb", "adb:SERIAL", "ssh:HOST", "replay:FILE", "module:Class", "FILE.toml")
        raise UserError(f"unknown meter {spec!r}. {nearest(spec, known)}")
    return target, own_meter(spec, target, progress)


def _section(
    target: Target, table: dict[str, Any], where: str, progress: Callable[[int, int], None] | None
) -> tuple[Target, Meter]:
    adapter: TypeAdapter[MeterSection] = TypeAdapter(MeterSection)
    try:
        section = adapter.validate_python(table)
    except ValidationError as error:
        raise UserError(explain_fields(error, AdbSection, where)) from error
    profile = target.profile.model_copy(update={"meter": section})
    target = Target(profile, target.operating_point)
    return target, meter_for(target, progress)


def _read(path: Path) -> dict[str, Any]:
    """The keys of a section: all that a file holds, or its one table `[meter]`."""
    table = read_toml(path)
    if not isinstance(section := table.get("meter", table), dict):
        raise UserError(f"{path}: meter: is {section!r}, where a table [meter] is expected")
    if others := [key for key in table if section is not table and key != "meter"]:
        raise UserError(f"{path}: {others[0]}: unknown key beside [meter], which is all that a file for --meter holds")
    return section
