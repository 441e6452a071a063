"""Android devices: TensorFlow Lite's `benchmark_model`, driven by `adb`."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable
from dataclasses import replace

from hardware_profiles.meter import Artifact
from hardware_profiles.meter_section import AdbSection
from hardware_profiles.out_of_process import DeviceGone, OutOfProcessMeter, noted, remote_name
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Finished, Runner, ToolError, run
from hardware_profiles.tools import Reading, tool

# What adb says when the cable, the device or the permission is gone (its own messages, adb.cpp and transport.cpp).
_GONE = re.compile(
    r"no devices/emulators found|device '[^']*' not found|device not found|device offline|device unauthorized|"
    r"more than one device|error: closed|protocol fault|connection reset|cannot connect to daemon",
    re.IGNORECASE,
)
# Android's own word for how hot the device is (PowerManager, THERMAL_STATUS_*), from 2 on it slows down.
_WARM = 2


class AdbMeter(OutOfProcessMeter):
    """Measures `.tflite` files on a phone with `benchmark_model`, which must be on the device (see its own README).

    Its figure is the median of the timed runs, or the mean where an older `benchmark_model` gives none. Battery,
    temperature and Android's thermal status before and after a run are noted; one that began or ended hot is flagged.
    """

    section: AdbSection

    def __init__(
        self,
        section: AdbSection,
        progress: Callable[[int, int], None] | None = None,
        runner: Runner = run,
    ) -> None:
        super().__init__(section, tool("benchmark_model"), progress, runner)

    def _adb(self, *arguments: str, timeout_s: float | None = None, check: bool = True) -> Finished:
        serial = ["-s", self.section.serial] if self.section.serial else []
        return self.call([self.section.adb, *serial, *arguments], timeout_s, check)

    def shell(self, *command: str, timeout_s: float | None = None, check: bool = True) -> Finished:
        """A command on the device. Every word is quoted, as adb joins them for the device's shell."""
        return self._adb("shell", shlex.join(command), timeout_s=timeout_s, check=check)

    def explain(self, done: Finished) -> None:
        text = f"{done.stderr}\n{done.stdout}"
        if re.search(r"^(adb: |error: )", text, re.MULTILINE) and _GONE.search(text):
            raise DeviceGone(f"adb lost the device: {done.complaint}")

    def programs(self, target: Target) -> list[str]:
        return [self.section.adb]

    def identify(self, target: Target) -> str:
        if (state := self._adb("get-state", timeout_s=60).stdout.strip()) != "device":
            raise DeviceGone(f"adb says the device is {state!r} instead of 'device'")
        names = [
            self.shell("getprop", key, timeout_s=60).stdout.strip()
            for key in ("ro.product.manufacturer", "ro.product.model", "ro.build.version.release")
        ]
        name = f"{names[0]} {names[1]}, Android {names[2]}"
        if self.section.identity not in name:
            raise ToolError(f"the device says it is {name!r}, but the profile means {self.section.identity!r}")
        if self.shell("test", "-x", self.section.binary, timeout_s=60, check=False).returncode:
            raise ToolError(
                f"{self.section.binary}: no such program on the device; push benchmark_model there and chmod +x it"
            )
        return name

    def stage(self, artifact: Artifact) -> str:
        where = f"{self.section.folder}/{remote_name(artifact)}"
        try:
            self._adb("push", str(artifact.path), f"{where}.part")
            self.shell("mv", f"{where}.part", where, timeout_s=60)
        except ToolError:
            self.remove(f"{where}.part")
            raise
        return where

    def remove(self, where: str) -> None:
        # A device that is gone keeps the file; its name is the same next time.
        with contextlib.suppress(ToolError):
            self.shell("rm", "-f", where, timeout_s=30, check=False)

    def benchmark(self, where: str, target: Target) -> Reading:
        command = [self.section.binary, *self.tool.arguments(where, self.values(target)), *self.section.arguments]
        if self.section.profile_operators:
            command.append("--enable_op_profiling=true")
        # The operating point may say which cores it means.
        if mask := str(target.point.options.get("taskset", self.section.taskset)):
            command = ["taskset", mask, *command]
        before = self._state()
        try:
            done = self.shell(*command)
        except ToolError as error:
            if error.transient:  # it may go on running there
                with contextlib.suppress(ToolError):
                    self.shell("pkill", "-f", where, timeout_s=30, check=False)
            raise
        after = self._state()
        reading = self.tool.parse(done.stdout, done.stderr)
        states = [s for s in (before, after) if s]
        hot = any(int(m[1]) >= _WARM for s in states if (m := re.search(r"thermal status (\d)", s)))
        return replace(
            noted(reading, *(f"{w}: {s}" for w, s in zip(("before", "after"), (before, after), strict=True) if s)),
            throttled=hot,
        )

    def _state(self) -> str:
        """Battery and thermal status in a few words, as far as the device tells."""
        found = []
        battery = self.shell("dumpsys", "battery", timeout_s=60, check=False).stdout
        if level := re.search(r"^\s*level: (\d+)", battery, re.MULTILINE):
            found.append(f"battery {level[1]} %")
        if heat := re.search(r"^\s*temperature: (\d+)", battery, re.MULTILINE):  # tenths of a degree
            found.append(f"{int(heat[1]) / 10:g} C")
        thermal = self.shell("dumpsys", "thermalservice", timeout_s=60, check=False).stdout
        if status := re.search(r"Thermal Status: (\d)", thermal):
            found.append(f"thermal status {status[1]}")
        return " ".join(found)
