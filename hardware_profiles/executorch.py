"""ExecuTorch with XNNPACK on this machine's CPU: conversion to `.pte`, and the meter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles.conversion import Array, CheckedConverter, folded
from hardware_profiles.extras import load, quiet
from hardware_profiles.meter import Artifact, OperatorTime
from hardware_profiles.passes import PROFILED_RUNS, LocalMeter, Session
from hardware_profiles.profile import Target

if TYPE_CHECKING:
    from torch import nn

EXTRA = "executorch"
# Events of a profile that hold other events.
_AROUND = frozenset({"DELEGATE_CALL", "OPERATOR_CALL", "Method::execute"})


class _ExecuTorchSession(Session):
    def __init__(self, method: Any) -> None:
        self.method = method
        self.inputs: list[Any] = []

    def feed(self, x: Array) -> None:
        import torch

        self.inputs = [torch.from_numpy(np.ascontiguousarray(x))]

    def run(self) -> list[Array]:
        # The outputs lie in memory of the program, which the next run overwrites.
        return [y.numpy().copy() for y in self.method.execute(self.inputs)]


class ExecuTorchMeter(LocalMeter):
    """Measures `.pte` files with ExecuTorch on this machine's CPU; see `LocalMeter`.

    The number of threads is the process's, not the file's: opening a file sets it for all that are open.
    """

    runtime = "executorch"
    title = "ExecuTorch"
    package = "executorch"
    formats = ("pte",)
    extra = EXTRA
    modules = ("executorch",)
    notes = "XNNPACK delegate as far as it takes the operators; execute with a torch tensor, outputs copied"

    def open(self, artifact: Artifact, target: Target) -> Session:
        """The program's forward method."""
        return _ExecuTorchSession(_program(artifact, target).load_method("forward"))

    def per_operator(self, artifact: Artifact, target: Target) -> list[OperatorTime]:
        """Times of the operators that XNNPACK runs and of those left to ExecuTorch, in order: the mean of 30 runs each.

        XNNPACK tells its own in whole microseconds, rounded down, and an operator that takes less than one as nothing.
        """
        x = self._profiled_input(artifact, target)
        program = _program(artifact, target, enable_etdump=True)
        session = _ExecuTorchSession(program.load_method("forward"))
        session.feed(x)
        for _ in range(PROFILED_RUNS):
            session.run()
        with tempfile.TemporaryDirectory() as folder, quiet():
            dump = Path(folder) / "etdump"
            program.write_etdump_result_to_file(str(dump), str(Path(folder) / "buffers"))
            blocks = load(EXTRA, "executorch.devtools").Inspector(etdump_path=str(dump)).event_blocks
        times: list[OperatorTime] = []
        for event in (event for block in blocks if block.name == "Execute" for event in block.events):
            if event.name in _AROUND or event.perf_data is None:
                continue
            before = sum(t.name.partition(" of delegate ")[0] == event.name for t in times)
            name = f"{event.name} of delegate {before + 1}" if before else event.name
            kind = event.name.partition(" (")[0].removeprefix("native_call_")
            times.append(OperatorTime(name, kind, float(np.mean(event.perf_data.raw))))
        return times


def _program(artifact: Artifact, target: Target, **options: Any) -> Any:
    """The file loaded, with the process's threads set to the target's."""
    runtime = load(EXTRA, "executorch.runtime")
    bindings = load(EXTRA, "executorch.extension.pybindings.portable_lib")
    if bindings._threadpool_get_thread_count() != target.threads:
        bindings._unsafe_reset_threadpool(target.threads)
    return runtime.Runtime.get().load_program(artifact.path, **options)


class ExecuTorchConverter(CheckedConverter):
    """Writes a torch module as `.pte`, with everything that XNNPACK takes delegated to it.

    int8 is torchao's static quantisation by export, with XNNPACK's quantiser: weights per channel, activations per
    tensor; input and output stay fp32.
    """

    format = "pte"
    title = "ExecuTorch"
    meter = ExecuTorchMeter
    extra = EXTRA

    def _write(self, network: nn.Module, target: Target, batches: list[Array], path: Path) -> None:
        import torch

        example = (torch.from_numpy(batches[0]),)
        program = torch.export.export(folded(network), example)
        if target.precision == "int8":
            quantizer = load(EXTRA, "executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
            pt2e = load(EXTRA, "torchao.quantization.pt2e.quantize_pt2e")
            config = quantizer.get_symmetric_quantization_config(is_per_channel=True)
            prepared = pt2e.prepare_pt2e(program.module(), quantizer.XNNPACKQuantizer().set_global(config))
            for batch in batches:
                prepared(torch.from_numpy(batch))
            program = torch.export.export(pt2e.convert_pt2e(prepared), example)
        exir = load(EXTRA, "executorch.exir")
        partitioner = load(EXTRA, "executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner])
        path.write_bytes(lowered.to_executorch().buffer)
