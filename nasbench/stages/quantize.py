"""Post-training quantisation to int8 with ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles import OnnxConverter, load_target
from hardware_profiles.meter import Artifact
from hardware_profiles.onnx_quantization import CalibrationMethod, quantize_onnx
from hardware_profiles.paths import atomic
from nasbench.stages.artifacts import run_artifact, write_manifest
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from nasbench.training.evaluation import batches, fixed_subset
from search_spaces.errors import UserError

CHECK_IMAGES = 200


class Quantize(Stage):
    """Static int8 quantisation: unsigned activations, signed weights, ranges calibrated on training images.

    Takes a float network, or an fp32 ONNX artifact (of `export`). The result is an ONNX file in the
    quantise/dequantise form with a manifest beside it, which says how often it agrees with the float network.

    Args:
        images: training images for calibration.
        calibration: how the range of an activation follows from its values: `minmax`, `entropy` or `percentile`; the
            latter two keep all activations of all calibration images in memory.
        per_channel: one scale per output channel of a weight, instead of one per weight.
        reduce_range: 7 bits for weights. x86 processors without VNNI add pairs of 8-bit products in 16 bits, which
            overflow: there, 8 bits cost the logits of MobileNetV3-like networks 5 dB of signal-to-noise ratio (28 to
            22 dB) and gained no speed.
    """

    accepts = frozenset({Form.FLOAT, Form.ARTIFACT})
    produces = Form.ARTIFACT
    once = True

    def __init__(
        self,
        *,
        images: int = 256,
        calibration: CalibrationMethod = "minmax",
        per_channel: bool = True,
        reduce_range: bool = True,
    ) -> None:
        if images < 1:
            raise UserError(f"images = {images}: expected 1 or more")
        self.images = images
        self.calibration = calibration
        self.per_channel = per_channel
        self.reduce_range = reduce_range

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate as an int8 artifact `NAME-int8.onnx` in the context's directory.

        Raises:
            UserError: an artifact that is not fp32 ONNX, or a network that cannot be converted or quantised.
        """
        path = context.directory / f"{candidate.name}-int8.onnx"
        with tempfile.TemporaryDirectory() as folder:
            source = self._source(candidate, context, Path(folder))
            images = fixed_subset(context.task.split("train"), self.images, context.seed).images
            with atomic(path) as temporary:
                quantize_onnx(
                    source.path,
                    temporary,
                    _batches(source, context.task, images),
                    calibration=self.calibration,
                    per_channel=self.per_channel,
                    reduce_range=self.reduce_range,
                )
            artifact = Artifact(path, "onnx", "int8", source.input_shape)
            check = fixed_subset(context.task.split("val"), CHECK_IMAGES, context.seed).images
            expected, found = (run_artifact(a, context.task, check) for a in (source, artifact))
            agreement = float((expected.argmax(1) == found.argmax(1)).mean())
        options = {key: getattr(self, key) for key in ("images", "calibration", "per_channel", "reduce_range")}
        write_manifest(
            artifact,
            context.task,
            {"quantisation": options, "check": {"images": len(check), "agreement_with_fp32": agreement}},
        )
        return replace(candidate, form=Form.ARTIFACT, network=None, artifact=artifact, metrics={})

    def _source(self, candidate: Candidate, context: StageContext, folder: Path) -> Artifact:
        """The float network as an ONNX file."""
        if candidate.artifact is None:
            assert candidate.network is not None
            target = load_target("host:fp32")
            return OnnxConverter().convert(candidate.network.eval(), target, context.input_shape, folder / "fp32.onnx")
        if (candidate.artifact.format, candidate.artifact.precision) != ("onnx", "fp32"):
            raise UserError(
                f"{candidate.artifact.path}: quantize takes an fp32 ONNX file, this is {candidate.artifact.precision} "
                f"{candidate.artifact.format}"
            )
        return candidate.artifact


def _batches(source: Artifact, task: Any, images: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Prepared images in the batch size of the model (what is left over is not used)."""
    import onnx

    node = onnx.load(str(source.path), load_external_data=False).graph.input[0]
    size = node.type.tensor_type.shape.dim[0].dim_value or 1
    for batch in batches(task, images, size, source.input_shape):
        if len(batch) == size:
            yield batch.contiguous().numpy()
