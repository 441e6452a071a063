"""Post-training quantisation to int8 with ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnxruntime import quantization as ortq
from onnxruntime.quantization.shape_inference import quant_pre_process

from hardware_profiles import OnnxConverter, load_target
from hardware_profiles.meter import Artifact
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
        calibration: Literal["minmax", "entropy", "percentile"] = "minmax",
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
                self._quantize(source, temporary, _Images(source, context.task, images))
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

    def _quantize(self, source: Artifact, path: Path, reader: ortq.CalibrationDataReader) -> None:
        prepared = path.with_name(f"{path.name}.prepared")
        try:
            # The tools print their progress and warn on the root logger; a failure comes as an exception.
            with contextlib.redirect_stdout(io.StringIO()), _quiet_root_logger():
                # Shapes only: the converter has folded normalisation, and the runtime's own optimisation would split
                # hard-swish in two, each half then quantised (5 % slower). Shapes are static: no symbolic pass.
                quant_pre_process(str(source.path), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
                ortq.quantize_static(
                    str(prepared),
                    str(path),
                    reader,
                    quant_format=ortq.QuantFormat.QDQ,
                    activation_type=ortq.QuantType.QUInt8,
                    weight_type=ortq.QuantType.QInt8,
                    per_channel=self.per_channel,
                    reduce_range=self.reduce_range,
                    calibrate_method={
                        "minmax": ortq.CalibrationMethod.MinMax,
                        "entropy": ortq.CalibrationMethod.Entropy,
                        "percentile": ortq.CalibrationMethod.Percentile,
                    }[self.calibration],
                )
        except Exception as error:  # the tools raise whatever onnx, numpy and the runtime raise
            raise UserError(f"{source.path}: cannot be quantised: {str(error).strip().splitlines()[0]}") from error
        finally:
            prepared.unlink(missing_ok=True)


class _Images(ortq.CalibrationDataReader):
    """Feeds prepared images in the batch size of the model (what is left over is not used)."""

    def __init__(self, source: Artifact, task: Any, images: Any) -> None:
        import onnx

        node = onnx.load(str(source.path), load_external_data=False).graph.input[0]
        self.size = node.type.tensor_type.shape.dim[0].dim_value or 1
        self.name = node.name
        self.feeds = self._all(batches(task, images, self.size, source.input_shape))

    def _all(self, prepared: Iterator[Any]) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for batch in prepared:
            if len(batch) == self.size:
                yield {self.name: batch.contiguous().numpy()}

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self.feeds, None)


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
