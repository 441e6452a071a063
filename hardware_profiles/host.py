"""The machine this runs on, as a device profile detected at run time."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

import psutil

from hardware_profiles.profile import Profile, parse_profile

# Instruction sets that decide how fast a core multiplies: name -> fp32 multiply-accumulates per cycle and core.
# Two fused multiply-add pipes of the register's width where the set has them (Agner Fog, "Instruction tables").
_MACS_PER_CYCLE = {"avx512f": 32, "avx2": 16, "avx": 8, "asimd": 8, "sse2": 4, "neon": 4}
_FLAGS = (*_MACS_PER_CYCLE, "fma", "f16c", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "asimdhp", "i8mm", "sve")

# Prefix of the operating points' names -> runtime.
HOST_RUNTIMES = {"": "onnxruntime", "litert-": "litert", "openvino-": "openvino", "executorch-": "executorch"}


@lru_cache(maxsize=1)
def _cpuinfo() -> tuple[str, frozenset[str], float]:
    """Model name, instruction set flags and highest clock in GHz (0 where unknown), as far as the system tells.

    The present clock would differ from call to call, and with it everything reckoned from it.
    """
    model, flags = "", frozenset[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("model name", "Model", "Hardware"):
                model = model or value
            elif key in ("flags", "Features"):
                flags = flags or frozenset(value.split())
    except OSError:
        pass
    if not flags and platform.machine().lower() in ("arm64", "aarch64"):
        flags = frozenset({"asimd"})
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):
        clock = None
    return model or platform.processor() or platform.machine(), flags, (clock.max if clock else 0.0) / 1000


def host_name() -> str:
    """One line that says which machine: CPU, cores, memory, system."""
    model, _, _ = _cpuinfo()
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def host_fingerprint() -> str:
    """What a calibration depends on: `host_name` and the instruction sets, the same until the machine changes."""
    flags = sorted(f for f in _cpuinfo()[1] if f in _FLAGS)
    return f"{host_name()}, {' '.join(flags) or 'unknown instruction sets'}"


def has_int8_dot_product() -> bool:
    """Whether this processor adds 8-bit products in 32 bits: any but an x86 one without VNNI, whose 16 overflow."""
    flags = _cpuinfo()[1]
    return "sse2" not in flags or bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})


def _channel_multiple(flags: frozenset[str]) -> dict[str, object]:
    """Channels that ONNX Runtime's convolutions take at a time; the other runtimes' vectors are as long."""
    wide = bool(flags & {"avx512f", "asimd"})
    source = "NchwcBlockSize in onnxruntime/core/mlas/lib/platform.cpp: 16 with AVX-512 and on 64-bit Arm, else 8"
    return {"multiple": 16 if wide else 8, "source": source}


def host_profile() -> Profile:
    """This machine: one thread, batch 1, at operating points `fp32` (default) and `int8` of ONNX Runtime (which is
    always there) and `RUNTIME-fp32`, `RUNTIME-int8` of the runtimes that extras bring (named, installed or not).

    Peaks are reckoned from clock and instruction set: good enough to rank networks before a calibration, not to report.
    """
    model, flags, ghz = _cpuinfo()
    per_cycle = next((v for k, v in _MACS_PER_CYCLE.items() if k in flags), 4)
    clock = ghz or 2.5
    reckoned = f"reckoned: {per_cycle} fp32 MAC per cycle x {clock:.2f} GHz; bandwidth a guess for one core"
    shared = {"bandwidth_gbs": 10.0, "estimated": True, "source": reckoned}
    points = {
        f"{prefix}{precision}": {**shared, "runtime": runtime, "precision": precision, "peak_gmacs": peak}
        for prefix, runtime in HOST_RUNTIMES.items()
        for precision, peak in (("fp32", per_cycle * clock), ("int8", 2 * per_cycle * clock))
    }
    return parse_profile(
        {
            "name": "host",
            "title": f"This machine ({host_name()})",
            "kind": "CPU",
            "default": "fp32",
            "local": True,
            "measure": "nasbench devices calibrate host",
            "datasheet": [
                {"name": "cores", "value": os.cpu_count() or 1, "unit": "cores", "source": "detected"},
                {"name": "memory", "value": psutil.virtual_memory().total / 1e9, "unit": "GB", "source": "detected"},
                *([{"name": "clock", "value": ghz, "unit": "GHz", "source": f"detected ({model})"}] if ghz else []),
            ],
            "operating_points": points,
            "channel_multiples": [_channel_multiple(flags)],
            "roofline": {
                "efficiency": {"pointwise": 0.6, "conv2d": 0.5, "depthwise_conv2d": 0.2, "other": 0.3},
                "launch_us": 2.0,
                "source": "guessed, to spread a calibration over cheap and dear networks",
            },
        },
        "host",
    )
