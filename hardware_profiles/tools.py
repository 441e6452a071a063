"""Benchmark programs that other devices run: their command lines, and what they print, read into one form.

The forms were taken from the programs' sources and from outputs that people published; `tests/hardware_profiles/
transcripts/` holds those outputs with where they come from.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hardware_profiles.meter import OperatorTime
from hardware_profiles.profile_sections import WATTS
from hardware_profiles.subprocesses import ToolError
from search_spaces.errors import nearest

# Nothing that loads and runs a network is quicker than a tenth of a microsecond, and nobody waits for one inference
# longer than a day.
_SHORTEST_MS = 1e-4
_LONGEST_MS = 24 * 3600 * 1e3

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))"

_LINE_END = re.compile(r"[^\S\n]*(?:\n|\Z)")


def implausible(latency_ms: float, energy_mj: float | None = None) -> str:
    """What no inference takes or draws, in words; empty where the figures may be true."""
    if not _SHORTEST_MS <= latency_ms <= _LONGEST_MS:
        return f"{latency_ms:.4g} ms, which no inference takes"
    if energy_mj is not None and not WATTS[0] <= (watts := energy_mj / latency_ms) <= WATTS[1]:
        return f"{energy_mj:.4g} mJ in {latency_ms:.4g} ms, which is {watts:.3g} W"
    return ""


@dataclass(frozen=True)
class Reading:
    """What one run of a benchmark program says.

    Args:
        samples_ms: milliseconds per inference: one value per inference where the program tells them, else the
            statistic that it gives.
        statistic: which one that is: `samples`, `median`, `mean`.
        count: inferences that the program says it timed (0: it does not say).
        energy_mj, peak_memory_bytes, operators, version, notes: as in a measurement, where the program tells.
        throttled: the program or the device complains that its clock was not steady; the reason is in `notes`.
    """

    samples_ms: tuple[float, ...]
    statistic: str = "samples"
    count: int = 0
    energy_mj: float | None = None
    peak_memory_bytes: int | None = None
    operators: tuple[OperatorTime, ...] = field(default=(), repr=False)
    version: str = ""
    notes: str = ""
    throttled: bool = False

    def check(self, seconds: float) -> Reading:
        """Itself, if every figure can be true of a run that took `seconds` in all.

        Raises:
            ToolError: no samples, or a value that is not finite, not positive or not plausible.
        """
        if not self.samples_ms:
            raise ToolError("it gave no latency")
        for value in self.samples_ms:
            if why := implausible(value):
                raise ToolError(f"it gave {why}; milliseconds per inference are expected")
        mean = sum(self.samples_ms) / len(self.samples_ms)
        # The runs cannot have taken longer than the program: the surest sign of microseconds called milliseconds. A
        # factor three, as copies of one inference may overlap with the arithmetic of the next.
        count = max(self.count, len(self.samples_ms))
        if count * mean > 3 * 1000 * seconds:
            raise ToolError(
                f"it gave {count} latencies of {mean:.4g} ms, but ran for {1000 * seconds:.4g} ms only; "
                "milliseconds per inference are expected"
            )
        if why := implausible(mean, self.energy_mj):
            raise ToolError(f"it gave {why}; mJ per inference are expected")
        if self.peak_memory_bytes is not None and self.peak_memory_bytes <= 0:
            raise ToolError(f"it gave a peak memory of {self.peak_memory_bytes} bytes, which is not positive")
        return self


class Tool(ABC):
    """A benchmark program: how it is called, and how its output is read.

    Args:
        name: as in a profile's `[meter]` section.
        format: of the files that it takes: `onnx` or `tflite`.
        binary: where it is found if the profile does not say.
    """

    name: str
    format: str
    binary: str

    @abstractmethod
    def arguments(self, artifact: str, values: dict[str, Any]) -> list[str]:
        """Its arguments for one file; `values` has precision, threads, batch, warmup, repeats."""

    @abstractmethod
    def parse(self, stdout: str, stderr: str = "") -> Reading:
        """What it printed.

        Raises:
            ToolError: not what this program prints; says what was missing.
        """


class JsonTool(Tool):
    """Any program that prints one JSON object: `{"latency_ms": [1.2, 1.3], "energy_mj": 3.4, ...}`.

    It begins a line; other lines may say anything. `latency_ms` is a number or a list with one value per inference;
    `energy_mj`, `peak_memory_bytes`, `runtime_version`, `notes` and `operators` (`[{"name", "kind", "latency_ms"}]`)
    may be absent.
    """

    name = "json"
    format = "onnx"
    binary = ""
    keys = ("latency_ms", "energy_mj", "peak_memory_bytes", "runtime_version", "operators", "notes")

    def arguments(self, artifact: str, values: dict[str, Any]) -> list[str]:
        return [artifact]

    def parse(self, stdout: str, stderr: str = "") -> Reading:
        result = _result(stdout)
        for key in result:
            if key not in self.keys:
                raise ToolError(f"its JSON has an unknown key {key!r}. {nearest(key, self.keys)}")
        if "latency_ms" not in result:
            raise ToolError(f"its JSON has no key 'latency_ms', only {', '.join(result) or 'none'}")
        latency = result["latency_ms"]
        samples = latency if isinstance(latency, list) else [latency]
        memory = _number(result, "peak_memory_bytes")
        operators = result.get("operators", [])
        if not isinstance(operators, list) or not all(isinstance(o, dict) and "name" in o for o in operators):
            raise ToolError("its JSON key 'operators' must be a list of {name, kind, latency_ms}")
        return Reading(
            tuple(_float(v, "latency_ms") for v in samples),
            "samples" if len(samples) > 1 else "value",
            len(samples),
            energy_mj=_number(result, "energy_mj"),
            peak_memory_bytes=None if memory is None else int(memory),
            operators=tuple(
                OperatorTime(
                    str(o["name"]), str(o.get("kind", "")), _float(o.get("latency_ms"), "operators.latency_ms")
                )
                for o in operators
            ),
            version=str(result.get("runtime_version", "")),
            notes=str(result.get("notes", "")),
        )


def _result(text: str) -> dict[str, Any]:
    """The JSON object with a latency among lines that may say anything; the last object where none has one.

    A line that begins as an object and is none is taken for one of a log, if it ends what it begins and has no latency.
    What follows a damaged object may be part of it, so nothing is looked for there.
    """
    text = text.strip()
    objects: list[dict[str, Any]] = []
    damage, end = "", 0
    for match in re.finditer(r"^\{.*", text, re.MULTILINE):
        if match.start() < end:  # inside the object before
            continue
        try:
            found, end = json.JSONDecoder().raw_decode(text, match.start())
            if not _LINE_END.match(text, end):
                raise json.JSONDecodeError("Extra data", text, end)
            objects.append(found)
        except json.JSONDecodeError as error:
            damage = f"it printed JSON that breaks off or is damaged: {error}"
            line = match[0]
            whole = error.pos < match.end() and line.count("{") <= line.count("}")
            if not whole or '"latency_ms"' in line:
                raise ToolError(damage) from error
        except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
            raise ToolError(f"it printed JSON that cannot be read: {error}") from error
    results = [found for found in objects if "latency_ms" in found]
    if len(results) > 1:
        raise ToolError(
            f"it printed {len(results)} JSON objects with 'latency_ms', where the result of one network is expected; "
            'several inferences go into one list, as in {"latency_ms": [1.2, 1.3]}'
        )
    if results:
        return results[0]
    if damage or not objects:
        raise ToolError(damage or (f"it printed no JSON object, but {text[-120:]!r}" if text else "it printed nothing"))
    return objects[-1]


def _float(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ToolError(f"its {key!r} is {value!r}, where a number was expected")
    try:
        return float(value)
    except OverflowError as error:
        raise ToolError(f"its {key!r} is a number of {len(str(value))} digits") from error


def _number(values: dict[str, Any], key: str) -> float | None:
    found = None if values.get(key) is None else _float(values[key], key)
    if found is not None and not math.isfinite(found):
        raise ToolError(f"its {key!r} is {found}, which is not finite")
    return found


class BenchmarkModel(Tool):
    """`benchmark_model` of TensorFlow Lite and LiteRT, as run on phones and single-board computers."""

    name = "benchmark_model"
    format = "tflite"
    binary = "/data/local/tmp/benchmark_model"

    def arguments(self, artifact: str, values: dict[str, Any]) -> list[str]:
        return [
            f"--graph={artifact}",
            f"--num_threads={values['threads']}",
            f"--warmup_runs={values['warmup']}",
            f"--num_runs={values['repeats']}",
            f"--use_xnnpack={str(values.get('use_xnnpack', True)).lower()}",
        ]

    def parse(self, stdout: str, stderr: str = "") -> Reading:
        text = f"{stdout}\n{stderr}"
        # Two such lines: warm-up, then the timed runs. The profiler's own has its times in it, so it is not counted.
        lines = re.findall(r"^(?!.*Timings \(microseconds\)).*\bcount=(\d+) +(\S.*)$", text, re.MULTILINE)
        # One run has neither minimum nor mean, only `curr`.
        timed = [(int(count), dict(re.findall(rf"(\w+)={_NUMBER}", rest))) for count, rest in lines]
        final = re.search(rf"Inference \(avg\): {_NUMBER}", text) or re.search(rf"no stats: {_NUMBER}", text)
        if final is None and len(timed) < 2:
            raise ToolError("benchmark_model printed no 'Inference timings in us' line; it did not get to its end")
        count, stats = timed[-1] if timed else (0, {})
        statistic = "median" if "median" in stats else "mean"
        us = (
            float(stats["median"]) if "median" in stats else float(final.group(1) if final else stats.get("avg", "nan"))
        )
        memory = re.search(rf"peak memory footprint[^:]*: {_NUMBER}", text, re.IGNORECASE)
        overall = re.search(rf"Memory footprint delta.*overall={_NUMBER}", text)
        peak = memory or overall
        notes = [f"{key} {float(stats[key]) / 1e3:.4g} ms" for key in ("min", "max") if key in stats]
        if "std" in stats:
            notes.append(f"std {float(stats['std']) / 1e3:.3g} ms")
        if re.search(r"will be partially executed by the delegate", text):
            notes.append("some operators did not run on the delegate")
        return Reading(
            (us / 1e3,),
            f"{statistic} of {count or 'all'} runs",
            count,
            peak_memory_bytes=int(float(peak.group(1)) * 2**20) if peak and float(peak.group(1)) > 0 else None,
            operators=self._operators(text),
            notes=", ".join(notes),
        )

    def _operators(self, text: str) -> tuple[OperatorTime, ...]:
        """The last table 'Run Order' of --enable_op_profiling: that of the timed runs; one before is of start-up."""
        tables = re.split(r"=+ Run Order =+", text)
        if len(tables) < 2:
            return ()
        rows = re.split(r"=+ Top by Computation Time =+|Number of nodes executed", tables[-1])[0].splitlines()
        header = next((r for r in rows if "[node type]" in r), "")
        column = [c.strip() for c in header.strip().split("\t")]
        if "[avg ms]" not in column:
            return ()
        at = column.index("[avg ms]")
        found = []
        for row in rows[rows.index(header) + 1 :]:
            cells = [c.strip() for c in row.strip().split("\t")]
            if len(cells) == len(column):
                found.append(OperatorTime(cells[-1].strip("[]"), cells[0], float(cells[at])))
        return tuple(found)


class Trtexec(Tool):
    """`trtexec` of TensorRT 8 and 10, as on Jetsons.

    Args:
        statistic: `latency` counts the copies between host and device, `gpu_compute` does not.
    """

    name = "trtexec"
    format = "onnx"
    binary = "/usr/src/tensorrt/bin/trtexec"

    def __init__(self, statistic: str = "latency") -> None:
        self.statistic = statistic

    def arguments(self, artifact: str, values: dict[str, Any]) -> list[str]:
        precision = {"fp32": [], "fp16": ["--fp16"], "int8": ["--int8", "--fp16"]}[values["precision"]]
        return [
            f"--onnx={artifact}",
            *precision,
            # trtexec's warm-up is in milliseconds: 10 of them for each run that was asked for.
            f"--warmUp={10 * values['warmup']}",
            f"--iterations={values['repeats']}",
            "--avgRuns=10",
        ]

    def parse(self, stdout: str, stderr: str = "") -> Reading:
        text = f"{stdout}\n{stderr}"
        if "&&&& FAILED" in text:
            errors = re.findall(r"\[E\] (.*)", text)
            raise ToolError(f"trtexec failed: {errors[0] if errors else 'it gives no reason'}")
        name = {"latency": "Latency", "gpu_compute": "GPU Compute Time"}[self.statistic]
        # `H2D Latency` and `End-to-End Host Latency` end alike, so the name must begin the line or follow `[I] `.
        line = re.search(rf"(?:^|\[I\] ){name}: (min = .*)$", text, re.MULTILINE)
        if line is None:
            raise ToolError(f"trtexec printed no line '{name}: min = ...'; it did not get to its summary")
        stats = dict(re.findall(rf"([\w()%]+) = {_NUMBER} ms", line.group(1)))
        if "median" not in stats:
            raise ToolError(f"trtexec's line '{name}' has no median: {line.group(1)[:100]}")
        queries = re.search(r"Timing trace has (\d+) queries", text)
        version = re.search(r"TensorRT\.trtexec \[TensorRT v(\d+)\]", text) or re.search(
            r"TensorRT version: ([\d.]+)", text
        )
        unsteady = re.search(r"GPU compute time is unstable, with coefficient of variance = ([\d.]+)%", text)
        notes = [f"{key} {float(stats[key]):.4g} ms" for key in stats if key != "median"]
        if unsteady:
            notes.append(f"GPU compute time unstable, coefficient of variance {unsteady.group(1)} %")
        return Reading(
            (float(stats["median"]),),
            f"median of {name}",
            int(queries.group(1)) if queries else 0,
            operators=self._layers(text),
            version=_tensorrt_version(version.group(1)) if version else "",
            notes=", ".join(notes),
            throttled=bool(unsteady) and float(unsteady.group(1)) > 10 if unsteady else False,
        )

    def times(self, exported: str) -> tuple[float, ...]:
        """Milliseconds of every inference, from the file that `--exportTimes` writes.

        Raises:
            ToolError: not that file's form.
        """
        key = {"latency": "latencyMs", "gpu_compute": "computeMs"}[self.statistic]
        try:
            return tuple(float(entry[key]) for entry in json.loads(exported))
        except (ValueError, KeyError, TypeError) as error:
            raise ToolError(f"trtexec's exported times are damaged or have no {key!r}: {error}") from error

    def _layers(self, text: str) -> tuple[OperatorTime, ...]:
        """The table of --dumpProfile. TensorRT 8.0 and 8.2 write the layer first, later ones last."""
        found = []
        parts = re.split(r"=== Profile \(\d+ iterations ?\) ===", text)
        for row in parts[-1].splitlines()[1:] if len(parts) > 1 else []:
            row = re.sub(r"^\[[\d/:-]+\] \[I\] ", "", row)
            late = re.match(r"\s*[\d.]+\s+([\d.]+)\s+[\d.]+\s+[\d.]+\s+(\S.*)$", row)
            early = re.match(r"\s*(\S.*?)\s+[\d.]+\s+([\d.]+)\s+[\d.]+\s*$", row)
            if late:
                name, mean = late.group(2), late.group(1)
            elif early:
                name, mean = early.group(1), early.group(2)
            else:
                continue
            if name.strip() not in ("Total", "Layer"):
                found.append(OperatorTime(name.strip(), "", float(mean)))
        return tuple(found)


def _tensorrt_version(text: str) -> str:
    """`8401` is 8.4.1, `100300` is 10.3.0."""
    if "." in text:
        return text
    if len(text) <= 4:
        return ".".join((text[:1], text[1:2], str(int(text[2:]))))
    return ".".join((text[:-4], str(int(text[-4:-2])), str(int(text[-2:]))))


class BenchmarkApp(Tool):
    """OpenVINO's `benchmark_app`, of 2021.4 to today; the older ones drive Myriad sticks.

    Args:
        device: OpenVINO's name of it: `CPU`, `GPU`, `MYRIAD`.
    """

    name = "benchmark_app"
    format = "onnx"
    binary = "benchmark_app"

    def __init__(self, device: str = "CPU") -> None:
        self.device = device

    def arguments(self, artifact: str, values: dict[str, Any]) -> list[str]:
        threads = ["-nthreads", str(values["threads"])] if self.device == "CPU" else []
        return ["-m", artifact, "-d", self.device, "-api", "sync", "-niter", str(values["repeats"]), *threads]

    def parse(self, stdout: str, stderr: str = "") -> Reading:
        text = re.sub(r"^\[ INFO \] ?", "", f"{stdout}\n{stderr}", flags=re.MULTILINE)
        # 2021.4 gives the median behind `Latency:`, later ones name it on a line of its own.
        found = re.search(rf"^\s*Median:\s+{_NUMBER} ms", text, re.MULTILINE) or re.search(
            rf"^Latency:\s+{_NUMBER} ms", text, re.MULTILINE
        )
        if found is None:
            failed = re.search(r"\[ ERROR \] (.*)", text)
            raise ToolError(
                f"benchmark_app gave no latency: {failed.group(1) if failed else 'it did not get to its end'}"
            )
        count = re.search(r"^Count:\s+(\d+) iterations", text, re.MULTILINE)
        build = re.search(r"Build\s*\.+\s*(\S+)", text)
        minimum = re.search(rf"^\s*(?:Min|MIN):\s+{_NUMBER} ms", text, re.MULTILINE)
        return Reading(
            (float(found.group(1)),),
            "median, synchronous",
            int(count.group(1)) if count else 0,
            version=build.group(1) if build else "",
            notes=f"min {float(minimum.group(1)):.4g} ms" if minimum else "",
        )


def tool(name: str, statistic: str = "latency", device: str = "CPU") -> Tool:
    """The tool of that name."""
    if name == "trtexec":
        return Trtexec(statistic)
    if name == "benchmark_app":
        return BenchmarkApp(device)
    return {"json": JsonTool, "benchmark_model": BenchmarkModel}[name]()


def tegrastats_power(lines: Sequence[str]) -> tuple[float, ...]:
    """Milliwatts of the whole module, one per line of `tegrastats`.

    Nano and TX2 write `POM_5V_IN 1750/1628` and `VDD_IN 3140/3208` (present and mean), Xavier NX, Orin Nano and Orin NX
    `VDD_IN 4761mW/4777mW`. The AGX boards have no rail for all: there the rails add up, without those that
    `VIN_SYS_5V0` feeds itself.
    """
    total = []
    for line in lines:
        rails = {
            name: int(now) for name, now in re.findall(r"([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?![\d.Mk@])", line)
        }
        whole = rails.get("VDD_IN", rails.get("POM_5V_IN"))
        if whole is None and rails:
            whole = sum(mw for name, mw in rails.items() if name not in ("NC", "VDDQ_VDD2_1V8AO"))
        if whole:
            total.append(float(whole))
    return tuple(total)
