"""Post-training quantisation to int8 with ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hardware_profiles import OnnxConverter, load_target
from hardware_profiles.conversion import Array
from hardware_profiles.meter import Artifact
from hardware_profiles.onnx_quantization import CalibrationMethod, OnnxQuantizer, weight_layers
from hardware_profiles.paths import atomic
from nasbench.exporting import LEAST_CALIBRATION_IMAGES
from nasbench.stages.artifacts import run_artifact, write_manifest
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from nasbench.tasks.base import Task
from nasbench.training.evaluation import batches, fixed_subset
from search_spaces.errors import UserError

CHECK_IMAGES = 200
Unquantizable = Literal["skip", "refuse"]


class Quantize(Stage):
    """Static int8 quantisation: unsigned activations, signed weights, ranges calibrated on training images.

    Takes a float network, or an fp32 ONNX artifact (of `export`). The result is an ONNX file in the
    quantise/dequantise form with a manifest beside it, which says how often it agrees with the float network and which
    layers stayed float.

    Args:
        images: training images for calibration, at least 16.
        calibration: how the range of an activation follows from its values: `minmax`, `entropy` or `percentile`; the
            latter two keep all activations of all calibration images in memory. `auto` tries all three and keeps the
            one with the best validation accuracy (the least difference from the float network where they tie).
        per_channel: one scale per output channel of a weight, instead of one per weight.
        reduce_range: 7 bits for weights. x86 processors without VNNI add pairs of 8-bit products in 16 bits, which
            overflow: there, 8 bits cost the logits of MobileNetV3-like networks 5 dB of signal-to-noise ratio (28 to
            22 dB) and gained no speed.
        weight_bits: 8, or 4 for weights that are stored in half the space; activations have 8 bits either way.
        exclude: nodes that stay float, by patterns of their names in the ONNX file, such as `*/head/*`.
        unquantizable: what becomes of a layer whose operator has no int8 form: `skip` leaves it float and names it in
            the manifest, `refuse` ends the stage.
    """

    accepts = frozenset({Form.FLOAT, Form.ARTIFACT})
    produces = Form.ARTIFACT
    once = True

    def __init__(
        self,
        *,
        images: int = 256,
        calibration: CalibrationMethod | Literal["auto"] = "minmax",
        per_channel: bool = True,
        reduce_range: bool = True,
        weight_bits: int = 8,
        exclude: Sequence[str] = (),
        unquantizable: Unquantizable = "skip",
    ) -> None:
        if images < LEAST_CALIBRATION_IMAGES:
            raise UserError(f"images = {images}: expected {LEAST_CALIBRATION_IMAGES} or more, to take ranges from")
        if weight_bits not in (4, 8):
            raise UserError(f"weight_bits = {weight_bits}: expected 4 or 8")
        known = (*get_args(CalibrationMethod), "auto")
        if calibration not in known:
            raise UserError(f"calibration = {calibration!r}: expected {', '.join(known)}")
        if unquantizable not in get_args(Unquantizable):
            raise UserError(f"unquantizable = {unquantizable!r}: expected {' or '.join(get_args(Unquantizable))}")
        self.images = images
        self.calibration = calibration
        self.per_channel = per_channel
        self.reduce_range = reduce_range
        self.weight_bits = weight_bits
        self.exclude = list(exclude)
        self.unquantizable = unquantizable

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate as an int8 artifact `NAME-int8.onnx` in the context's directory.

        Raises:
            UserError: an artifact that is not fp32 ONNX, too few images, or a network or layer that cannot be converted
                or quantised.
        """
        path = context.directory / f"{candidate.name}-int8.onnx"
        methods = get_args(CalibrationMethod) if self.calibration == "auto" else (self.calibration,)
        with tempfile.TemporaryDirectory() as folder:
            source = float_onnx(candidate, context, Path(folder), "quantize")
            feeds = calibration_feeds(source, context, self.images)
            check = fixed_subset(context.task.split("val"), 0 if len(methods) > 1 else CHECK_IMAGES, context.seed)
            expected = run_artifact(source, context.task, check.images)
            tried: dict[str, tuple[float, float]] = {}
            for method in methods:
                draft = Artifact(Path(folder) / f"{method}.onnx", "onnx", "int8", source.input_shape)
                self._write(source, feeds, method, draft.path)
                found = run_artifact(draft, context.task, check.images)
                tried[method] = _accuracy(context.task, found, check.labels), float(np.abs(found - expected).mean())
            best = max(tried, key=lambda m: (tried[m][0], -tried[m][1]))
            chosen = Path(folder) / f"{best}.onnx"
            found = run_artifact(replace(source, path=chosen), context.task, check.images)
            agreement = float((expected.argmax(1) == found.argmax(1)).mean())
            left = [layer.name for layer in weight_layers(chosen)]
            with atomic(path) as temporary:
                temporary.write_bytes(chosen.read_bytes())
        artifact = Artifact(path, "onnx", "int8", source.input_shape)
        keys = ("images", "per_channel", "reduce_range", "weight_bits", "exclude")
        options = {key: getattr(self, key) for key in keys} | {"calibration": best}
        accuracies = {m: a for m, (a, _) in tried.items()}
        write_manifest(
            artifact,
            context.task,
            {
                "quantisation": options | {"float_layers": left, "accuracy_by_calibration": accuracies},
                "check": {"images": len(check), "agreement_with_fp32": agreement},
            },
        )
        return replace(candidate, form=Form.ARTIFACT, network=None, artifact=artifact, metrics={})

    def _write(self, source: Artifact, feeds: list[Array], method: CalibrationMethod, path: Path) -> None:
        with OnnxQuantizer(source.path, feeds, method) as quantizer:
            exclude = quantizer.matching(self.exclude)
            small = [x.name for x in quantizer.layers if self.weight_bits == 4 and 4 in x.choices]
            quantizer.write(
                path,
                per_channel=self.per_channel,
                reduce_range=self.reduce_range,
                exclude=exclude,
                bits={name: 4 for name in small if name not in exclude},
            )
        left = [x for x in weight_layers(path) if x.name not in exclude]
        if left and self.unquantizable == "refuse":
            more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
            raise UserError(
                f"{path.stem}: layer {left[0].name!r} ({left[0].kind}) has no int8 form{more}; leave it float with "
                "exclude, or take unquantizable = 'skip'"
            )


def float_onnx(candidate: Candidate, context: StageContext, folder: Path, stage: str) -> Artifact:
    """The float network of a candidate as an ONNX file, its own or one in `folder`.

    Raises:
        UserError: an artifact that is not fp32 ONNX, or a network that cannot be converted.
    """
    if candidate.artifact is None:
        assert candidate.network is not None
        target = load_target("host:fp32")
        return OnnxConverter().convert(candidate.network.eval(), target, context.input_shape, folder / "fp32.onnx")
    if (candidate.artifact.format, candidate.artifact.precision) != ("onnx", "fp32"):
        raise UserError(
            f"{candidate.artifact.path}: {stage} takes an fp32 ONNX file, this is {candidate.artifact.precision} "
            f"{candidate.artifact.format}"
        )
    return candidate.artifact


def calibration_feeds(source: Artifact, context: StageContext, images: int) -> list[np.ndarray[Any, Any]]:
    """Prepared training images in the batch size of the model; what does not fill a batch is left out.

    Raises:
        UserError: fewer training images than asked for, or than one batch.
    """
    split = context.task.split("train")
    if images > len(split):
        raise UserError(f"images = {images}: the training split of {context.task.name} has {len(split)}")
    chosen = fixed_subset(split, images, context.seed).images
    feeds = list(_batches(source, context.task, chosen))
    if not feeds:
        raise UserError(f"images = {images}: fewer than one batch of {source.path}")
    return feeds


def _batches(source: Artifact, task: Task, images: Any) -> Iterator[np.ndarray[Any, Any]]:
    import onnx

    node = onnx.load(str(source.path), load_external_data=False).graph.input[0]
    size = node.type.tensor_type.shape.dim[0].dim_value or 1
    for batch in batches(task, images, size, source.input_shape):
        if len(batch) == size:
            yield batch.contiguous().numpy()


def _accuracy(task: Task, logits: np.ndarray[Any, Any], labels: Any) -> float:
    import torch

    return task.accuracy(torch.from_numpy(logits), labels)
