"""The meter that a profile's `[meter]` section asks for, and the files it takes."""

from __future__ import annotations

from collections.abc import Callable

from hardware_profiles.meter import Meter
from hardware_profiles.meter_section import AdbSection, CommandSection, SshSection
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Runner, run
from hardware_profiles.tools import tool
from search_spaces.errors import UserError


def device_meter(target: Target, progress: Callable[[int, int], None] | None = None, runner: Runner = run) -> Meter:
    """The meter of a target whose profile has a `[meter]` section.

    Args:
        progress: called with (done, total) runs.
        runner: runs the commands.
    """
    section = target.profile.meter
    if isinstance(section, CommandSection):
        from hardware_profiles.command import CommandMeter

        return CommandMeter(section, progress, runner)
    if isinstance(section, AdbSection):
        from hardware_profiles.adb import AdbMeter

        return AdbMeter(section, progress, runner)
    if isinstance(section, SshSection):
        from hardware_profiles.ssh import SshMeter

        return SshMeter(section, progress, runner)
    raise UserError(f"{target.name}: its profile has no [meter] section, which says how to measure there")


def device_format(target: Target) -> str:
    """Format of the files that the device's tool takes: `onnx` or `tflite`."""
    section = target.profile.meter
    assert section is not None
    return section.format or tool("benchmark_model" if isinstance(section, AdbSection) else section.tool).format
