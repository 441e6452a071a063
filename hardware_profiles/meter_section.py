"""The `[meter]` section of a profile: how networks are measured on that device, as data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from search_spaces.errors import nearest

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
ToolName = Literal["json", "benchmark_model", "trtexec", "benchmark_app"]
PLACEHOLDERS = ("artifact", "batch", "power_mode", "precision", "repeats", "threads", "warmup")


def fill(command: str | Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """A command line with its placeholders filled; braces that hold no word are left as they are.

    A line is taken apart as a shell would, before filling, so a path with blanks stays one argument.

    Raises:
        ValueError: an unknown placeholder (with the nearest known), or a quote that is never closed.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"unknown placeholder {match[0]}. {nearest(match[1], PLACEHOLDERS)}")
        return str(values[match[1]])

    parts = shlex.split(command) if isinstance(command, str) else command
    return [re.sub(r"\{(\w+)\}", value, part) for part in parts]


class _Section(BaseModel):
    """What all kinds share.

    Args:
        format: of the file that the device takes; the tool's own by default.
        timeout_s: of one run of one network, its preparation on the device included.
        retries: further tries after a timeout or a lost connection.
        passes: rounds over all networks, each in another order.
        warmup, repeats: untimed and timed inferences of a run, as far as the tool can be told.
        identity: text that the device's own name must contain, so that another one is not measured in its place.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["", "onnx", "tflite"] = ""
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    retries: Annotated[int, Field(ge=0, le=10)] = 1
    passes: Count = 1
    warmup: Annotated[int, Field(ge=0)] = 10
    repeats: Count = 50
    identity: str = ""


class CommandSection(_Section):
    """Any program, run here, that prints what `tool` says: one JSON object unless told otherwise.

    Args:
        command: program and arguments, a line or a list, with `{artifact}` and the other `PLACEHOLDERS`. No shell.
        identity_command: prints which device is there; its output must contain `identity`.
        device: for `benchmark_app`, OpenVINO's name of the device.
    """

    kind: Literal["command"]
    command: str | tuple[str, ...]
    identity_command: str | tuple[str, ...] = ()
    tool: ToolName = "json"
    device: str = "CPU"

    @model_validator(mode="after")
    def _check(self) -> CommandSection:
        if not any(
            "{artifact}" in part for part in ([self.command] if isinstance(self.command, str) else self.command)
        ):
            raise ValueError("command must have {artifact} where the network's file goes")
        for key, line in (("command", self.command), ("identity_command", self.identity_command)):
            if line and not " ".join(fill(line, dict.fromkeys(PLACEHOLDERS, "x"))[:1]).strip():
                raise ValueError(f"{key} names no program")
        if self.identity and not self.identity_command:
            raise ValueError("identity needs an identity_command, whose output is looked at")
        return self


class AdbSection(_Section):
    """`benchmark_model` on an Android device.

    Args:
        serial: as `adb devices` lists it; may be left out where one device is connected.
        binary: of `benchmark_model` on the device.
        folder: on the device, for the networks.
        taskset: mask of the cores to run on, as `f0`; all where empty.
        arguments: further ones of `benchmark_model`.
        profile_operators: times per operator; they cost some time themselves.
        adb: the program.
    """

    kind: Literal["adb"]
    serial: str = ""
    binary: Text = "/data/local/tmp/benchmark_model"
    folder: Text = "/data/local/tmp"
    taskset: Annotated[str, Field(pattern=r"^[0-9a-fA-F]*$")] = ""
    arguments: tuple[str, ...] = ()
    profile_operators: bool = False
    adb: Text = "adb"


class SshSection(_Section):
    """A benchmark program on a device that `ssh` reaches without asking.

    Args:
        host: as `ssh` takes it, with user and port from its own configuration.
        tool: the program; `json` is one of yours that prints JSON.
        binary: of it on the device; the tool's usual place where empty.
        folder: on the device, for the networks.
        arguments: further ones of the tool.
        statistic: of `trtexec`: `latency` counts copies between host and device, `gpu_compute` does not.
        device: of `benchmark_app`.
        energy: reads the module's power with `tegrastats` while networks run.
        profile_operators: times per layer, in a run of their own.
        ssh, scp: the programs.
    """

    kind: Literal["ssh"]
    host: Annotated[str, Field(pattern=r"^[^-\s]\S*$")]
    tool: ToolName = "trtexec"
    binary: str = ""
    folder: Text = "/tmp"
    arguments: tuple[str, ...] = ()
    statistic: Literal["latency", "gpu_compute"] = "latency"
    device: str = "CPU"
    energy: bool = True
    profile_operators: bool = False
    ssh: Text = "ssh"
    scp: Text = "scp"

    @model_validator(mode="after")
    def _check(self) -> SshSection:
        if self.tool == "json" and not self.binary:
            raise ValueError("tool 'json' needs binary, your program on the device")
        return self


MeterSection = Annotated[CommandSection | AdbSection | SshSection, Field(discriminator="kind")]
