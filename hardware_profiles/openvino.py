"""OpenVINO on this machine's CPU: conversion to its IR, and the meter."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.conversion import Array
from hardware_profiles.extras import load, reason
from hardware_profiles.meter import Artifact, OperatorTime
from hardware_profiles.onnx_runtime import FromOnnxConverter
from hardware_profiles.passes import PROFILED_RUNS, LocalMeter, Session
from hardware_profiles.profile import Target

EXTRA = "openvino"


def _load(module: str) -> Any:
    # Both packages report usage over the network, without asking, where they find the package that does it.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return load(EXTRA, module)


@lru_cache(maxsize=1)
def _core() -> Any:
    """The one core of this process, never let go.

    Its CPU plug-in gives the thread a stack for signals and takes it away with the core. Of two cores that go in the
    order they came, the second puts back the stack of the first, which is no more, and the next signal, such as Ctrl-C,
    ends in a segmentation fault.
    """
    return _load("openvino").Core()


class _OpenVINOSession(Session):
    def __init__(self, request: Any) -> None:
        self.request = request
        self.input: Any = None
        self.x: Array | None = None
        self.outputs = [request.get_output_tensor(i).data for i in range(len(request.model_outputs))]

    def feed(self, x: Array) -> None:
        self.x = np.ascontiguousarray(x)  # the tensor shares its memory
        self.input = _load("openvino").Tensor(self.x, shared_memory=True)
        self.request.set_input_tensor(self.input)

    def run(self) -> list[Array]:
        self.request.infer()
        return [output.copy() for output in self.outputs]


class OpenVINOMeter(LocalMeter):
    """Measures OpenVINO IR (and ONNX files) with OpenVINO's CPU plug-in; see `LocalMeter`.

    Float operators run in f32, which is asked for: left to itself, the plug-in takes bf16 where the processor has it,
    and the number would be of another precision than it says.
    """

    runtime = "openvino"
    title = "OpenVINO"
    package = "openvino"
    formats = ("xml", "onnx")
    extra = EXTRA
    modules = ("openvino",)
    notes = "CPU plug-in, one stream, f32 asked for; infer and copying the outputs are timed, setting the input is not"

    def open(self, artifact: Artifact, target: Target) -> Session:
        """An infer request of one stream."""
        return self._request(artifact, target)

    def _request(self, artifact: Artifact, target: Target, **options: Any) -> _OpenVINOSession:
        options |= {
            "INFERENCE_NUM_THREADS": target.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled = _core().compile_model(str(artifact.path), "CPU", options)
        return _OpenVINOSession(compiled.create_infer_request())

    def per_operator(self, artifact: Artifact, target: Target) -> list[OperatorTime]:
        """Times of the nodes that the plug-in runs, in order: the least of 30 runs each, in whole microseconds.

        Nodes that were fused into another cost nothing of their own and are left out.
        """
        x = self._profiled_input(artifact, target)
        session = self._request(artifact, target, PERF_COUNT=True)
        session.feed(x)
        times: dict[str, OperatorTime] = {}
        for _ in range(PROFILED_RUNS):
            session.run()
            for node in session.request.get_profiling_info():
                ms = node.real_time.total_seconds() * 1e3
                if node.status == node.Status.EXECUTED and ms < getattr(times.get(node.node_name), "latency_ms", 1e9):
                    times[node.node_name] = OperatorTime(node.node_name, node.node_type, ms)
        return list(times.values())


class OpenVINOConverter(FromOnnxConverter):
    """Writes a torch module as OpenVINO IR, by way of ONNX: an `.xml` file and its weights in a `.bin` beside it.

    fp16 halves the weights' file; what the device computes in is its own choice (a Myriad X has nothing else). int8 is
    nncf's static quantisation.
    """

    format = "xml"
    title = "OpenVINO IR"
    meter = OpenVINOMeter
    precisions = ("fp32", "fp16", "int8")
    extra = EXTRA

    def _lower(self, file: Path, target: Target, batches: list[Array], path: Path) -> None:
        openvino = _load("openvino")
        model = openvino.convert_model(str(file))
        if target.precision == "int8":
            nncf = _load("nncf")
            model = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches))
        try:
            openvino.save_model(model, str(path), compress_to_fp16=target.precision == "fp16")
        except RuntimeError as error:
            if "iostream error" in str(error):  # all that C++ says of a full disk
                raise OSError(reason(error)) from error
            raise

    def _beside(self, path: Path) -> list[Path]:
        return [path.with_suffix(".bin")]
