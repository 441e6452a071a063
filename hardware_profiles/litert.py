"""LiteRT (TensorFlow Lite) with XNNPACK on this machine's CPU, as on phones: conversion to `.tflite`, and the meter."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware_profiles.conversion import Array, StagedConverter, folded
from hardware_profiles.extras import load
from hardware_profiles.meter import Artifact
from hardware_profiles.passes import LocalMeter, Session
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import run
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

EXTRA = "litert"


class _LiteRTSession(Session):
    def __init__(self, interpreter: Any) -> None:
        self.interpreter = interpreter
        self.input = interpreter.get_input_details()[0]
        self.outputs = interpreter.get_output_details()

    def feed(self, x: Array) -> None:
        # Files for this runtime are channels last; the interpreter refuses any other shape.
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x
        scale, zero = self.input["quantization"]
        kind = np.dtype(self.input["dtype"])
        if kind.kind in "iu":
            limits = np.iinfo(kind)
            x = np.clip(np.round(x / scale) + zero, limits.min, limits.max)
        self.interpreter.set_tensor(self.input["index"], x.astype(kind, copy=False))

    def run(self) -> list[Array]:
        self.interpreter.invoke()
        results = []
        for output in self.outputs:
            y = self.interpreter.get_tensor(output["index"])
            scale, zero = output["quantization"]
            results.append(y if y.dtype.kind == "f" else ((y.astype(np.float32) - zero) * scale).astype(np.float32))
        return results


class LiteRTMeter(LocalMeter):
    """Measures `.tflite` files with LiteRT and XNNPACK on this machine's CPU; see `LocalMeter`.

    The Python package gives no times of single operators (as of 2.3 it can have delegates profiled, but no call reads
    the profile); on a device, `benchmark_model --enable_op_profiling` does.
    """

    runtime = "litert"
    title = "LiteRT"
    package = "ai-edge-litert"
    formats = ("tflite",)
    extra = EXTRA
    modules = ("ai_edge_litert",)
    notes = "XNNPACK delegate; invoke and reading the outputs are timed, setting the input (channels last) is not"

    def open(self, artifact: Artifact, target: Target) -> Session:
        """An interpreter with its tensors allocated."""
        module = load(EXTRA, "ai_edge_litert.interpreter")
        interpreter = module.Interpreter(model_path=str(artifact.path), num_threads=target.threads)
        interpreter.allocate_tensors()
        return _LiteRTSession(interpreter)


class LiteRTConverter(StagedConverter):
    """Writes a torch module as `.tflite`: channels last, one static shape, int8 in full (input and output included).

    int8 is static: weights per channel, activations per tensor with ranges from the calibration images. Converting a
    MobileNetV3-like network takes 4 to 8 s, most of it in `torch.export`; the first one also imports jax.
    """

    format = "tflite"
    title = "LiteRT"
    meter = LiteRTMeter
    source = LiteRTMeter
    extra = EXTRA

    def _write_fp32(self, network: nn.Module, x: Array, path: Path) -> None:
        import torch

        litert_torch = load(EXTRA, "litert_torch")
        example = torch.from_numpy(x)
        # Folding normalisation first halves the graph that has to be decomposed and lowered.
        network = _with_cropping(folded(network))
        if example.ndim == 4:
            network, example = litert_torch.to_channel_last_io(network, args=[0]), example.permute(0, 2, 3, 1)
        litert_torch.convert(network, (example.contiguous(),)).export(str(path))

    def _lower(self, file: Path, target: Target, batches: list[Array], path: Path) -> None:
        if target.precision == "int8":
            quantize_tflite(file, path, batches)
        else:
            shutil.copyfile(file, path)
        _survived(path)


def _with_cropping(network: nn.Module) -> nn.Module:
    """The network, with transposed convolutions that LiteRT has no padding for run without any, and cropped.

    Its TRANSPOSE_CONV pads as TensorFlow does: not at all, or so that the output is the stride times the input.
    """
    from torch import nn

    from hardware_profiles.litert_layers import CroppedConvTranspose2d

    for name, child in list(network.named_modules()):
        if isinstance(child, nn.ConvTranspose2d) and CroppedConvTranspose2d.fits(child):
            network.set_submodule(name, CroppedConvTranspose2d(child))
    return network


def quantize_tflite(source: Path, path: Path, batches: list[Array]) -> None:
    """Quantise an fp32 `.tflite` file of one input to int8 in full, ranges calibrated on `batches` `(b, c, h, w)`.

    Raises:
        UserError: operators that have no int8 form, named; the file would not be int8 throughout.
    """
    quantizer, recipe = load(EXTRA, "ai_edge_quantizer.quantizer"), load(EXTRA, "ai_edge_quantizer.recipe")
    interpreter = load(EXTRA, "ai_edge_litert.interpreter").Interpreter(model_path=str(source))
    ((signature, names),) = interpreter.get_signature_list().items()
    feeds = [{names["inputs"][0]: np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x} for x in batches]
    static = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
    static.quantize(static.calibrate({signature: feeds})).export_model(str(path), overwrite=True)
    left = _float_operators(path)
    if left:
        raise UserError(f"operators without an int8 form: {', '.join(left)}")


# What the meter does with a file, in a process of its own.
_PROBE = """
import sys
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1], num_threads=1)
interpreter.allocate_tensors()
interpreter.invoke()
"""
_PROBE_S = 120.0


def _survived(path: Path) -> None:
    """Load and run a file in another process: some that the converter writes crash the runtime.

    Raises:
        UserError: it crashed, with what it last said.
    """
    finished = run([sys.executable, "-c", _PROBE, str(path)], _PROBE_S)
    if finished.returncode < 0:
        raise UserError(f"LiteRT crashes on this file: its process {finished.ending}")


def _float_operators(path: Path) -> list[str]:
    """Kinds of the operators of a file that read a floating point tensor."""
    interpreter = load(EXTRA, "ai_edge_litert.interpreter").Interpreter(
        model_path=str(path), experimental_op_resolver_type=_plain_kernels()
    )
    kinds = {t["index"]: np.dtype(t["dtype"]).kind for t in interpreter.get_tensor_details()}
    return sorted(
        {o["op_name"] for o in interpreter._get_ops_details() if any(kinds.get(int(i)) == "f" for i in o["inputs"])}
    )


def _plain_kernels() -> Any:
    """No delegates: then the operators of the file are those that are listed."""
    return load(EXTRA, "ai_edge_litert.interpreter").OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
