"""Hardware: device profiles and targets, conversion to real runtimes, and meters that measure on them.

A profile is one TOML file in `devices/` (or in the user's data directory); `host` is detected. Predictors that turn
profiles and measurements into estimates live in `predictors`; nothing here knows search spaces beyond their operators.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hardware_profiles.adb import AdbMeter
    from hardware_profiles.command import CommandMeter
    from hardware_profiles.constraints import Finding, check_workload
    from hardware_profiles.executorch import ExecuTorchConverter, ExecuTorchMeter
    from hardware_profiles.host import host_fingerprint, host_name, host_profile
    from hardware_profiles.litert import LiteRTConverter, LiteRTMeter
    from hardware_profiles.meter import Artifact, Converter, Measurement, Meter, OperatorTime, Protocol
    from hardware_profiles.onnx_runtime import OnnxConverter, OnnxRuntimeMeter
    from hardware_profiles.openvino import OpenVINOConverter, OpenVINOMeter
    from hardware_profiles.passes import LocalMeter
    from hardware_profiles.paths import user_data_dir
    from hardware_profiles.profile import Profile, Target, list_profiles, load_profile, load_target
    from hardware_profiles.profile_sections import OperatingPoint
    from hardware_profiles.recording import RecordingMeter, ReplayMeter
    from hardware_profiles.runtimes import converter_for, meter_for
    from hardware_profiles.ssh import SshMeter
    from hardware_profiles.vela import VelaMeter

_LAZY = {
    "AdbMeter": "adb",
    "Artifact": "meter",
    "CommandMeter": "command",
    "Converter": "meter",
    "ExecuTorchConverter": "executorch",
    "ExecuTorchMeter": "executorch",
    "Finding": "constraints",
    "LiteRTConverter": "litert",
    "LiteRTMeter": "litert",
    "LocalMeter": "passes",
    "Measurement": "meter",
    "Meter": "meter",
    "OnnxConverter": "onnx_runtime",
    "OnnxRuntimeMeter": "onnx_runtime",
    "OpenVINOConverter": "openvino",
    "OpenVINOMeter": "openvino",
    "OperatingPoint": "profile_sections",
    "OperatorTime": "meter",
    "Profile": "profile",
    "Protocol": "meter",
    "RecordingMeter": "recording",
    "ReplayMeter": "recording",
    "SshMeter": "ssh",
    "Target": "profile",
    "VelaMeter": "vela",
    "check_workload": "constraints",
    "converter_for": "runtimes",
    "host_fingerprint": "host",
    "host_name": "host",
    "host_profile": "host",
    "list_profiles": "profile",
    "load_profile": "profile",
    "load_target": "profile",
    "meter_for": "runtimes",
    "user_data_dir": "paths",
}

__all__ = [
    "AdbMeter", "Artifact", "CommandMeter", "Converter", "ExecuTorchConverter", "ExecuTorchMeter", "Finding",
    "LiteRTConverter", "LiteRTMeter", "LocalMeter", "Measurement", "Meter", "OnnxConverter", "OnnxRuntimeMeter",
    "OpenVINOConverter", "OpenVINOMeter", "OperatingPoint", "OperatorTime", "Profile", "Protocol", "RecordingMeter",
    "ReplayMeter", "SshMeter", "Target", "VelaMeter", "check_workload", "converter_for", "host_fingerprint",
    "host_name", "host_profile", "list_profiles", "load_profile", "load_target", "meter_for", "user_data_dir",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"hardware_profiles.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
