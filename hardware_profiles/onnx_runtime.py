"""ONNX Runtime on this machine's CPU: conversion to ONNX, and the meter."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware_profiles.conversion import Array, StagedConverter
from hardware_profiles.host import has_int8_dot_product
from hardware_profiles.meter import Artifact, OperatorTime
from hardware_profiles.onnx_quantization import quantize_onnx
from hardware_profiles.passes import PROFILED_RUNS, LocalMeter, Session
from hardware_profiles.profile import Target

if TYPE_CHECKING:
    from torch import nn

# The oldest opset with HardSwish (14) and the reductions in the form that torch writes; every recent runtime reads it.
OPSET = 17


class _OnnxSession(Session):
    def __init__(self, session: Any) -> None:
        self.session = session
        self.inputs: dict[str, Array] = {}

    def feed(self, x: Array) -> None:
        self.inputs = {i.name: x for i in self.session.get_inputs()}

    def run(self) -> list[Array]:
        outputs: list[Array] = self.session.run(None, self.inputs)
        return outputs


class OnnxRuntimeMeter(LocalMeter):
    """Measures ONNX files with ONNX Runtime on this machine's CPU; see `LocalMeter`."""

    runtime = "onnxruntime"
    title = "ONNX Runtime"
    package = "onnxruntime"
    formats = ("onnx",)
    notes = "all graph optimisations, no spinning threads, session.run with numpy arrays"

    def open(self, artifact: Artifact, target: Target) -> Session:
        """A session of all optimisations."""
        import onnxruntime as ort

        return _OnnxSession(
            ort.InferenceSession(str(artifact.path), _options(target), providers=["CPUExecutionProvider"])
        )

    def per_operator(self, artifact: Artifact, target: Target) -> list[OperatorTime]:
        """Times of the nodes of the optimised graph, from the runtime's own profile: the least of 30 runs each.

        Their sum exceeds a measurement without profiling by what taking the times costs, a few microseconds a node.
        """
        import onnxruntime as ort

        x = self._profiled_input(artifact, target)
        options = _options(target)
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = _OnnxSession(
                ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
            )
            session.feed(x)
            for _ in range(PROFILED_RUNS):
                session.run()
            events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[str, OperatorTime] = {}
        for event in events:
            name = event["name"]
            if event.get("cat") == "Node" and name.endswith("_kernel_time"):
                name, ms = name.removesuffix("_kernel_time"), event["dur"] / 1000
                if name not in times or ms < times[name].latency_ms:
                    times[name] = OperatorTime(name, event["args"]["op_name"], ms)
        return list(times.values())


def _options(target: Target) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    # Pools of many open sessions that spin while they wait would take the cores from the one being measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class FromOnnxConverter(StagedConverter):
    """Writes a torch module by way of an fp32 ONNX file, or such a file itself. A subclass says what is made of it."""

    source = OnnxRuntimeMeter

    def _write_fp32(self, network: nn.Module, x: Array, path: Path) -> None:
        write_onnx(network, x, path)


class OnnxConverter(FromOnnxConverter):
    """Writes a torch module as ONNX, with batch normalisation folded into the convolutions; int8 by quantising that.

    torch's older exporter is used while torch has it: it takes a tenth of the time of its successor (0.4 s against 4 s
    for a MobileNetV3-like network) and its graphs run equally fast. For an fp16 target the file is fp32: the runtimes
    that take such a file (TensorRT) lower it when they build it on the device.
    """

    format = "onnx"
    title = "ONNX"
    meter = OnnxRuntimeMeter
    precisions = ("fp32", "fp16", "int8")

    def file_precision(self, target: Target) -> str:
        """As the target's, but fp32 for fp16."""
        return "fp32" if target.precision == "fp16" else target.precision

    def _lower(self, file: Path, target: Target, batches: list[Array], path: Path) -> None:
        if target.precision != "int8":
            shutil.copyfile(file, path)
            return
        overflows = target.profile.local and not has_int8_dot_product()
        quantize_onnx(file, path, batches, reduce_range=overflows)


def write_onnx(network: nn.Module, x: Array, path: Path) -> None:
    """Write a network in eval mode as ONNX with the static shape of `x`; raises whatever torch's exporter raises."""
    import torch

    names: dict[str, Any] = {"input_names": ["input"], "output_names": ["output"]}
    example = torch.from_numpy(x)
    try:
        torch.onnx.export(network, (example,), path, opset_version=OPSET, dynamo=False, **names)
    except (TypeError, AttributeError):  # a torch without the older exporter
        torch.onnx.export(network, (example,), path, external_data=False, verbose=False, **names)
