"""Any program that measures a network and prints the result: how any device is added from its profile alone."""

from __future__ import annotations

from collections.abc import Callable

from hardware_profiles.meter_section import CommandSection, fill
from hardware_profiles.out_of_process import OutOfProcessMeter
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Runner, ToolError, run
from hardware_profiles.tools import Reading, tool


class CommandMeter(OutOfProcessMeter):
    """Runs the profile's command for each network: one JSON object, or what the named tool prints.

    It serves a device behind a cable of its own, an evaluation board's own program, a worker with another Python (as a
    Myriad stick needs, whose last runtime is OpenVINO 2022.3), or a simulator.
    """

    section: CommandSection

    def __init__(
        self,
        section: CommandSection,
        progress: Callable[[int, int], None] | None = None,
        runner: Runner = run,
    ) -> None:
        super().__init__(section, tool(section.tool, device=section.device), progress, runner)

    def programs(self, target: Target) -> list[str]:
        values = self.values(target) | {"artifact": ""}
        return [fill(line, values)[0] for line in (self.section.command, self.section.identity_command) if line]

    def identify(self, target: Target) -> str:
        if not self.section.identity_command:
            return f"whatever {fill(self.section.command, self.values(target) | {'artifact': '...'})[0]} runs on"
        command = fill(self.section.identity_command, self.values(target) | {"artifact": ""})
        name = " ".join(self.call(command, 60).stdout.split())
        if self.section.identity not in name:
            raise ToolError(f"the device says it is {name[:80]!r}, but the profile means {self.section.identity!r}")
        return name

    def benchmark(self, where: str, target: Target) -> Reading:
        done = self.call(fill(self.section.command, self.values(target) | {"artifact": where}))
        return self.tool.parse(done.stdout, done.stderr)
