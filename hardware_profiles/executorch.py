"""ExecuTorch with XNNPACK on this machine's CPU: conversion to `.pte`, and the meter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles.conversion import Array, CheckedConverter, folded
from hardware_profiles.extras import load
from hardware_profiles.meter import Artifact
from hardware_profiles.passes import InProcessMeter, Session
from hardware_profiles.profile import Target

if TYPE_CHECKING:
    from torch import nn

EXTRA = "executorch"


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


class ExecuTorchMeter(InProcessMeter):
    """Measures `.pte` files with ExecuTorch on this machine's CPU; see `InProcessMeter`.

    The number of threads is the process's, not the file's: opening a file sets it for all that are open. The Python
    package is built without XNNPACK's profiler, so there are no times of single operators.
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
        runtime = load(EXTRA, "executorch.runtime")
        bindings = load(EXTRA, "executorch.extension.pybindings.portable_lib")
        if bindings._threadpool_get_thread_count() != target.threads:
            bindings._unsafe_reset_threadpool(target.threads)
        program = runtime.Runtime.get().load_program(artifact.path)
        return _ExecuTorchSession(program.load_method("forward"))


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
