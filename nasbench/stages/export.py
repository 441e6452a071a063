"""Export: a network as a file of a runtime, checked against the network on real images."""

from __future__ import annotations

from dataclasses import replace

from nasbench.exporting import LEAST_CALIBRATION_IMAGES, Fallback, Format, export_network, export_target
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from search_spaces.errors import UserError


class Export(Stage):
    """Writes a float network in a runtime's format and compares both on validation images; what differs is not kept.

    Beside the file `NAME-PRECISION.SUFFIX` lies a manifest: task, classes, preprocessing, input shape, versions,
    hashes, largest difference. An operator that the target does not run refuses the network, by name and layer.

    Args:
        format: of the file; the target's own where none is given, ONNX where there is no target either.
        target: `device` or `device:operating-point` that the file is for; this machine where empty.
        precision: `fp32`, `fp16` or `int8`; the target's own where empty.
        tolerance: largest difference of an output, relative to the network's largest; for int8 root mean square,
            relative to the network's. By default that of the precision.
        images: validation images to compare on.
        calibration_images: training images that int8 ranges are taken from.
        fallback: `allow` keeps operators that a device leaves to the CPU of its host; they are named in the manifest.
    """

    accepts = frozenset({Form.FLOAT})
    produces = Form.ARTIFACT

    def __init__(
        self,
        *,
        format: Format | None = None,
        target: str = "",
        precision: str = "",
        tolerance: float | None = None,
        images: int = 200,
        calibration_images: int = 256,
        fallback: Fallback = "refuse",
    ) -> None:
        if tolerance is not None and not tolerance > 0:
            raise UserError(f"tolerance = {tolerance}: expected above 0")
        for key, value, least in (
            ("images", images, 1),
            ("calibration_images", calibration_images, LEAST_CALIBRATION_IMAGES),
        ):
            if value < least:
                raise UserError(f"{key} = {value}: expected {least} or more")
        self.target = export_target(format, target, precision)
        self.tolerance = tolerance
        self.images = images
        self.calibration_images = calibration_images
        self.fallback = fallback

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate as an artifact in the context's directory.

        Raises:
            UserError: the network cannot be converted or run there, or the file's output differs from the network's.
        """
        from hardware_profiles import converter_for

        assert candidate.network is not None
        target, suffix = self.target, converter_for(self.target).format
        exported = export_network(
            candidate.network,
            context.input_shape,
            context.directory / f"{candidate.name}-{target.precision}.{suffix}",
            target,
            task=context.task,
            images=self.images,
            calibration=self.calibration_images,
            tolerance=self.tolerance,
            fallback=self.fallback,
            measure=False,  # the runner measures every step, in turn with the others
            seed=context.seed,
        )
        return replace(candidate, form=Form.ARTIFACT, network=None, artifact=exported.artifact, metrics={})
