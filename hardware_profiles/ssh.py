"""Devices that `ssh` reaches: `trtexec` on Jetsons, `benchmark_app`, `benchmark_model`, or a program of one's own."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hardware_profiles.meter import Artifact
from hardware_profiles.meter_section import SshSection
from hardware_profiles.out_of_process import DeviceGone, OutOfProcessMeter, noted, remote_name
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Finished, Runner, ToolError, run
from hardware_profiles.tools import Reading, Trtexec, tegrastats_power, tool

# ssh's own exit code; the remote command's codes are below it.
_SSH_FAILED = 255
# `timeout`'s exit code (coreutils).
_TIMED_OUT = 124
# Between readings of tegrastats.
INTERVAL_MS = 100
_POWER_MARK = "--- tegrastats ---"
_TIMES_MARK = "--- times ---"


class SshMeter(OutOfProcessMeter):
    """Measures on a device over ssh, without asking for passwords (`BatchMode`); host keys and users are ssh's affair.

    With `trtexec`, an engine is built first and timed in a second run, while `tegrastats` tells the module's power; the
    energy of an inference is mean power over throughput, idle power included. The power mode (`nvpmodel -q`) goes into
    the protocol and must be the operating point's; clocks are the user's to fix (`sudo jetson_clocks`).
    """

    section: SshSection

    def __init__(
        self,
        section: SshSection,
        progress: Callable[[int, int], None] | None = None,
        runner: Runner = run,
    ) -> None:
        super().__init__(section, tool(section.tool, section.statistic, section.device), progress, runner)
        self.binary = section.binary or self.tool.binary

    def shell(self, script: str, timeout_s: float | None = None, check: bool = True) -> Finished:
        """A script in the device's shell. It ends itself there, as killing ssh here would leave it running."""
        seconds = timeout_s or self.section.timeout_s
        guarded = f"timeout -k 5 {seconds:g} sh -c {shlex.quote(script)}"
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15"]
        done = self.call([self.section.ssh, *options, self.section.host, guarded], seconds + 20, check=False)
        if done.returncode == _TIMED_OUT:
            raise ToolError(f"{self.section.host}: not finished after {seconds:g} s: {script[:100]}", transient=True)
        if done.returncode == _SSH_FAILED:
            raise DeviceGone(f"ssh lost {self.section.host}: {done.complaint}")
        if check and done.returncode:
            self._refuse(done)
        return done

    def _refuse(self, done: Finished) -> None:
        if "&&&& FAILED" in done.stdout + done.stderr:
            self.tool.parse(done.stdout, done.stderr)  # says why
        raise ToolError(f"{self.binary} on {self.section.host}: {done.ending}")

    def programs(self, target: Target) -> list[str]:
        return [self.section.ssh, self.section.scp]

    def identify(self, target: Target) -> str:
        script = (
            "tr -d '\\0' < /proc/device-tree/model 2>/dev/null || uname -nm; echo; "
            "nvpmodel -q 2>/dev/null; cat /etc/nv_tegra_release 2>/dev/null | head -n 1; "
            f"command -v {shlex.quote(self.binary)} > /dev/null || echo 'no program'"
        )
        text = self.shell(script, 60).stdout
        name = text.strip().splitlines()[0].strip() if text.strip() else "a device that tells no name"
        if self.section.identity not in text:
            raise ToolError(f"the device says it is {name!r}, but the profile means {self.section.identity!r}")
        if "no program" in text:
            raise ToolError(f"{self.binary}: no such program on {self.section.host}; name it in [meter] binary")
        mode = re.search(r"NV Power Mode: *(\S+)\s+(\d+)?", text)
        wanted = target.point.power_mode
        number = target.point.options.get("nvpmodel")  # surer than names, which differ between releases
        same = str(number) == mode[2] if mode and mode[2] and number is not None else True
        if number is None and mode and wanted:
            same = _plain(wanted) in _plain(mode[1])
        if mode and not same:
            raise ToolError(
                f"the device is in power mode {mode[1]!r}, the operating point {target.operating_point!r} means "
                f"{wanted!r}; change it with nvpmodel -m {'' if number is None else number}".rstrip()
            )
        release = re.search(r"R(\d+) .*REVISION: ([\d.]+)", text)
        parts = [name, f"power mode {mode[1]}" if mode else "", f"L4T {release[1]}.{release[2]}" if release else ""]
        return ", ".join(p for p in parts if p)

    def stage(self, artifact: Artifact) -> str:
        where = f"{self.section.folder}/{remote_name(artifact)}"
        options = ["-q", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        try:
            done = self.call(
                [self.section.scp, *options, str(artifact.path), f"{self.section.host}:{where}.part"], check=False
            )
            if done.returncode:
                lost = re.search(
                    r"lost connection|connection (closed|refused|timed out|reset)|no route|resolve", done.stderr, re.I
                )
                message = f"scp to {self.section.host}: {done.complaint}"
                raise DeviceGone(message) if lost else ToolError(message)
            self.shell(f"mv {shlex.quote(where)}.part {shlex.quote(where)}", 60)
        except ToolError:
            self.remove(where)
            raise
        return where

    def remove(self, where: str) -> None:
        names = " ".join(shlex.quote(f"{where}{end}") for end in ("", ".part", ".engine", ".times", ".power"))
        # A device that is gone keeps the files; their names are the same next time.
        with contextlib.suppress(ToolError):
            self.shell(f"rm -f {names}", 30, check=False)

    def benchmark(self, where: str, target: Target) -> Reading:
        arguments = self.tool.arguments(where, self.values(target)) + list(self.section.arguments)
        if isinstance(self.tool, Trtexec):
            return self._trtexec(self.tool, where, arguments)
        done = self.shell(shlex.join([self.binary, *arguments]))
        return self.tool.parse(done.stdout, done.stderr)

    def _trtexec(self, trtexec: Trtexec, where: str, arguments: list[str]) -> Reading:
        engine, times, power = (f"{where}.{end}" for end in ("engine", "times", "power"))
        # --buildOnly became --skipInference; a run of one inference builds with every version.
        build = [a for a in arguments if not a.startswith(("--warmUp", "--iterations", "--avgRuns"))]
        self.shell(
            shlex.join([self.binary, *build, f"--saveEngine={engine}", "--iterations=1", "--warmUp=0", "--duration=0"])
        )
        timed = [a for a in arguments if not a.startswith("--onnx=")]
        command = shlex.join([self.binary, f"--loadEngine={engine}", *timed, f"--exportTimes={times}"])
        energy = (
            f"tegrastats --interval {INTERVAL_MS} > {shlex.quote(power)} 2>/dev/null & T=$!; "
            if self.section.energy
            else "T=; "
        )
        done = self.shell(
            f'{energy}{command}; R=$?; [ -z "$T" ] || kill $T 2>/dev/null; '
            f"echo; echo '{_TIMES_MARK}'; cat {shlex.quote(times)} 2>/dev/null; "
            f"echo '{_POWER_MARK}'; cat {shlex.quote(power)} 2>/dev/null; exit $R"
        )
        text, _, rest = done.stdout.partition(_TIMES_MARK)
        exported, _, watched = rest.partition(_POWER_MARK)
        reading = trtexec.parse(text, done.stderr)
        if exported.strip():
            samples = trtexec.times(exported)
            reading = replace(reading, samples_ms=samples, statistic="samples", count=len(samples))
        if self.section.energy:
            reading = _with_energy(reading, text, watched)
        if self.section.profile_operators:
            profiled = self.shell(
                shlex.join([self.binary, f"--loadEngine={engine}", *timed, "--dumpProfile", "--separateProfileRun"])
            )
            reading = replace(reading, operators=trtexec.parse(profiled.stdout, profiled.stderr).operators)
        return reading


def _with_energy(reading: Reading, summary: str, watched: str) -> Reading:
    """The reading with energy: mean power while it ran, over the inferences per second that it did."""
    power = tegrastats_power(watched.splitlines())
    rate = re.search(r"Throughput: ([\d.]+) qps", summary)
    if len(power) < 3 or rate is None or not float(rate[1]):
        return noted(reading, "no energy: tegrastats gave fewer than 3 readings")
    # Loading the engine comes first and draws less; the timed part, of known length, is the last.
    timed = re.search(r"Total Host Walltime: ([\d.]+) s", summary)
    last = max(3, int(float(timed[1]) * 1000 / INTERVAL_MS)) if timed else len(power)
    busy = float(np.mean(power[-last:]))
    heat = [float(t) for t in re.findall(r"(?:GPU|gpu)@([\d.]+)C", watched)]
    notes = [f"module power {busy / 1000:.2f} W (mean of {min(last, len(power))} tegrastats readings)"]
    if heat:
        notes.append(f"GPU up to {max(heat):g} C")
    return noted(replace(reading, energy_mj=busy / float(rate[1])), *notes)


def _plain(mode: str) -> str:
    return re.sub(r"[^a-z0-9]", "", mode.lower())
