"""Weight-only quantisation of transformers: products read 4- or 8-bit weights, activations stay fp32."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from hardware_profiles.meter import Artifact
from hardware_profiles.onnx_quantization import quantize_weights, weight_layers
from hardware_profiles.paths import atomic
from nasbench.stages.artifacts import run_artifact, write_manifest
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from nasbench.stages.quantize import CHECK_IMAGES, float_onnx
from nasbench.training.evaluation import fixed_subset
from search_spaces.errors import UserError


class WeightOnly(Stage):
    """Keeps the weights of a transformer's products in few bits, by ONNX Runtime's block-wise quantiser.

    Needs no calibration, for activations are not touched. What it shrinks is the file and the traffic of weights; it
    is for products of tokens (`MatMul`), and refuses networks without any, such as convolutional ones.

    Args:
        bits: 4 or 8.
        block: weights that share a scale; a power of two of 16 or more. Smaller ones keep more accuracy.
    """

    accepts = frozenset({Form.FLOAT, Form.ARTIFACT})
    produces = Form.ARTIFACT
    once = True

    def __init__(self, *, bits: int = 4, block: int = 32) -> None:
        if bits not in (4, 8):
            raise UserError(f"bits = {bits}: expected 4 or 8")
        if block < 16 or block & (block - 1):
            raise UserError(f"block = {block}: expected a power of two, 16 or more")
        self.bits = bits
        self.block = block

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate as an artifact `NAME-w4.onnx` (or `-w8`) in the context's directory; it computes in fp32.

        Raises:
            UserError: an artifact that is not fp32 ONNX, or a network without such products.
        """
        path = context.directory / f"{candidate.name}-w{self.bits}.onnx"
        with tempfile.TemporaryDirectory() as folder:
            source = float_onnx(candidate, context, Path(folder), "weight_only")
            with atomic(path) as temporary:
                done = quantize_weights(source.path, temporary, bits=self.bits, block=self.block)
            artifact = Artifact(path, "onnx", "fp32", source.input_shape, note=f"weights in {self.bits} bits")
            check = fixed_subset(context.task.split("val"), CHECK_IMAGES, context.seed).images
            expected, found = (run_artifact(a, context.task, check) for a in (source, artifact))
        said = {"bits": self.bits, "block": self.block, "layers": done}
        said["float_layers"] = [layer.name for layer in weight_layers(path)]
        agreement = float((expected.argmax(1) == found.argmax(1)).mean())
        check_entry = {"images": len(check), "agreement_with_fp32": agreement}
        write_manifest(artifact, context.task, {"weight_only": said, "check": check_entry})
        return replace(candidate, form=Form.ARTIFACT, network=None, artifact=artifact, metrics={})
