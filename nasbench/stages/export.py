"""Export: a network as a file of a runtime, checked against the network on real images."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from hardware_profiles import OnnxConverter, load_target
from hardware_profiles.meter import Artifact
from hardware_profiles.paths import atomic
from nasbench.stages.artifacts import run_artifact, write_manifest
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from nasbench.training.evaluation import fixed_subset, predict_logits
from search_spaces.errors import UserError


class Export(Stage):
    """Writes a float network as ONNX and compares both on validation images; a file that differs is not kept.

    Beside the file lies a manifest: task, classes, preprocessing, input shape, versions, SHA-256, largest difference.

    Args:
        format: of the file.
        tolerance: largest difference of a logit, relative to the largest logit of the network.
        images: validation images to compare on.
    """

    accepts = frozenset({Form.FLOAT})
    produces = Form.ARTIFACT

    def __init__(self, *, format: Literal["onnx"] = "onnx", tolerance: float = 1e-3, images: int = 200) -> None:
        if not tolerance > 0:
            raise UserError(f"tolerance = {tolerance}: expected above 0")
        if images < 1:
            raise UserError(f"images = {images}: expected 1 or more")
        self.format = format
        self.tolerance = tolerance
        self.images = images

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate as an fp32 artifact `NAME-fp32.onnx` in the context's directory.

        Raises:
            UserError: the network cannot be converted, or the file's output differs from the network's.
        """
        assert candidate.network is not None
        network, task = candidate.network.eval(), context.task
        path = context.directory / f"{candidate.name}-fp32.{self.format}"
        images = fixed_subset(task.split("val"), self.images, context.seed).images
        with atomic(path) as temporary:
            draft = OnnxConverter().convert(network, load_target("host:fp32"), context.input_shape, temporary)
            expected = predict_logits(network, task, images, context.input_shape).numpy()
            found = run_artifact(draft, task, images)
            difference = float(np.abs(found - expected).max() / np.abs(expected).max())
            if not difference <= self.tolerance:
                raise UserError(
                    f"{candidate.name}: the exported file differs from the network by {difference:.2g} of the largest "
                    f"logit, more than tolerance = {self.tolerance:g}; {path} was not written"
                )
        artifact = Artifact(path, self.format, "fp32", context.input_shape)
        write_manifest(artifact, task, {"check": {"images": len(images), "largest_relative_difference": difference}})
        return replace(candidate, form=Form.ARTIFACT, network=None, artifact=artifact, metrics={})
