"""Mixed precision: bits of every layer's weights, chosen by a search under a budget (HAQ: Wang et al., CVPR 2019)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hardware_profiles.meter import Artifact
from hardware_profiles.onnx_quantization import CalibrationMethod, OnnxQuantizer, WeightLayer
from hardware_profiles.paths import atomic
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.exporting import LEAST_CALIBRATION_IMAGES
from nasbench.objectives import Objective
from nasbench.registry import options, resolve
from nasbench.search import search
from nasbench.stages.artifacts import run_artifact, write_manifest
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from nasbench.stages.quantize import calibration_feeds, float_onnx
from nasbench.strategies.base import GradientStrategy
from nasbench.tasks.base import Split, Task
from nasbench.training.evaluation import fixed_subset
from search_spaces import Archs, Block, Catalog, Knob, SearchSpace, UserError, WorkloadBuilder
from search_spaces import Tensor as TensorShape


class LayerBits(SearchSpace):
    """One knob per layer: how many bits its weights have. There are no operators to count: cost is `bytes`."""

    name = "layer_bits"

    def __init__(self, layers: Sequence[WeightLayer], choices: Sequence[int]) -> None:
        self.layers = list(layers)
        self._knobs = tuple(Knob(x.name, tuple(b for b in choices if b in x.choices) or (32,)) for x in layers)
        sizes = [[x.bytes_at(int(b)) for b in k.choices] for x, k in zip(layers, self._knobs, strict=True)]
        width = max(len(row) for row in sizes)
        self._sizes = np.array([row + [0.0] * (width - len(row)) for row in sizes])

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (1, 1, 1)

    @property
    def num_classes(self) -> int:
        return 1

    block_knobs: Any = ()

    @cached_property
    def catalog(self) -> Catalog:
        builder = WorkloadBuilder()
        return Catalog(1, lambda _: Block("none", builder.build([builder.input(TensorShape((1,)))])))

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        return np.zeros((len(archs), 1), dtype=np.int32)

    def build(self, arch: Archs) -> Any:
        raise UserError("bits of layers are no network by themselves")

    def bytes(self, archs: Archs) -> NDArray[np.float64]:
        """Of all weights, `(n,)`."""
        return np.asarray(self._sizes[np.arange(len(self.knobs)), np.asarray(archs, dtype=np.int64)].sum(axis=1))

    def bits(self, arch: Archs) -> dict[str, int]:
        """By layer."""
        return {k.name: int(k.choices[int(i)]) for k, i in zip(self.knobs, arch, strict=True)}

    def filled(self, most: float, n: int, rng: np.random.Generator) -> Archs:
        """`n` rows that fill a budget of bytes: from the fewest bits, layers in random order get what still fits."""
        archs = np.repeat(self.uniform(0)[None], n, axis=0)
        for arch in archs:
            left = most - float(self.bytes(arch[None])[0])
            for layer in rng.permutation(len(self.knobs)):
                gains = self._sizes[layer] - self._sizes[layer, 0]
                fitting = np.flatnonzero(gains[: len(self.knobs[layer].choices)] <= left)
                choice = int(rng.choice(fitting))
                arch[layer], left = choice, left - gains[choice]
        return archs

    def uniform(self, bits: int) -> Archs:
        """All layers at so many bits, or the nearest above that they have."""
        rows = [next((i for i, b in enumerate(k.choices) if int(b) >= bits), len(k.choices) - 1) for k in self.knobs]
        return np.array(rows, dtype=self.dtype)


class _Judge(Evaluator):
    """Writes the file of every proposal and runs it on validation images: what is judged is what would be deployed."""

    metrics = ("accuracy", "weight_bytes")

    def __init__(
        self, space: LayerBits, quantizer: OnnxQuantizer, source: Artifact, task: Task, images: Split, **writing: Any
    ) -> None:
        self.space, self.quantizer, self.source, self.task = space, quantizer, source, task
        self.images, self.writing = images, writing
        self.known: dict[bytes, float] = {}

    def accuracy(self, arch: Archs) -> float:
        """On the validation images; asked once."""
        key = arch.tobytes()
        if key not in self.known:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "mixed.onnx"
                self.quantizer.write(path, bits=self.space.bits(arch), **self.writing)
                logits = run_artifact(replace(self.source, path=path), self.task, self.images.images)
            self.known[key] = self.task.accuracy(torch.from_numpy(logits), self.images.labels)
        return self.known[key]

    def evaluate(self, proposals: Proposals) -> Evaluation:
        values = np.stack([np.array([self.accuracy(a) for a in proposals.archs]), self.space.bytes(proposals.archs)], 1)
        return Evaluation(values, np.full(len(proposals), Status.OK, dtype=np.uint8))


class MixedPrecision(Stage):
    """Chooses 4, 8 or 32 bits for every layer by a search strategy, for the best accuracy within a budget of bytes.

    Layers of 8 bits compute in int8. Those of 4 are unpacked when the file is loaded and those of 32 are left alone:
    both compute in fp32, so a budget of bytes is one of storage, and the runner's measurement tells the time. Every
    proposal is judged by the very file that it would be, on validation images; nothing is trained. Beside the file
    `NAME-mixed.onnx` lies a manifest with the bits of each layer, and what the same bits throughout would have given.

    Args:
        budget: share of the bytes that the weights take in fp32, above 0 up to 1.
        choices: bits to choose from, of 4, 8 and 32.
        evaluations: files judged; each takes from one second up, as the network's size is.
        strategy: a strategy of `nasbench strategies`, or one's own.
        images: validation images to judge by; 0 for all.
        calibration_images: training images for ranges, at least 16.
        calibration: as in `quantize`.
        per_channel, reduce_range: as in `quantize`.
    """

    accepts = frozenset({Form.FLOAT, Form.ARTIFACT})
    produces = Form.ARTIFACT
    once = True

    def __init__(
        self,
        *,
        budget: float = 0.25,
        choices: Sequence[int] = (4, 8, 32),
        evaluations: int = 60,
        strategy: str = "regularized_evolution",
        images: int = 500,
        calibration_images: int = 128,
        calibration: CalibrationMethod = "minmax",
        per_channel: bool = True,
        reduce_range: bool = True,
    ) -> None:
        if not 0 < budget <= 1:
            raise UserError(f"budget = {budget}: expected a share of the fp32 weights, above 0 up to 1")
        if not choices or len(set(choices)) != len(choices) or not set(choices) <= {4, 8, 32}:
            raise UserError(f"choices = {list(choices)}: expected some of 4, 8 and 32, each once")
        for key, value, least in (
            ("evaluations", evaluations, 1),
            ("images", images, 0),
            ("calibration_images", calibration_images, LEAST_CALIBRATION_IMAGES),
        ):
            if value < least:
                raise UserError(f"{key} = {value}: expected {least} or more")
        self.strategy = resolve("strategy", strategy)
        if issubclass(self.strategy, GradientStrategy):
            raise UserError(f"strategy = {strategy!r}: trains a supernet; name one that proposes, such as nsga2")
        self.budget = budget
        self.choices = sorted(choices)
        self.evaluations = evaluations
        self.images = images
        self.calibration_images = calibration_images
        self.calibration: CalibrationMethod = calibration
        self.writing: dict[str, Any] = {"per_channel": per_channel, "reduce_range": reduce_range}

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate as an artifact `NAME-mixed.onnx` in the context's directory.

        Raises:
            UserError: a budget that no choice of bits keeps, with the least there is; too few images; or a network that
                cannot be quantised.
        """
        path = context.directory / f"{candidate.name}-mixed.onnx"
        images = fixed_subset(context.task.split("val"), self.images, context.seed)
        with tempfile.TemporaryDirectory() as folder:
            source = float_onnx(candidate, context, Path(folder), "mixed_precision")
            feeds = calibration_feeds(source, context, self.calibration_images)
            with OnnxQuantizer(source.path, feeds, self.calibration) as quantizer:
                if not quantizer.layers:
                    raise UserError(f"{candidate.name}: no layer with weights to choose bits for")
                space = LayerBits(quantizer.layers, self.choices)
                whole = sum(layer.bytes_at(32) for layer in space.layers)
                least = float(space.bytes(space.uniform(0)[None])[0])
                if least > self.budget * whole:
                    raise UserError(
                        f"budget = {self.budget:g}: with {self.choices[0]} bits throughout the weights of "
                        f"{candidate.name} still take {least / whole:.3g} of their fp32 bytes; that is the least"
                    )
                judge = _Judge(space, quantizer, source, context.task, images, **self.writing)
                uniform = {b: space.uniform(b) for b in self.choices}
                best = self._search(space, judge, self.budget * whole, context.seed)
                with atomic(path) as temporary:
                    quantizer.write(temporary, bits=space.bits(best), **self.writing)
                said = {
                    "bits": space.bits(best),
                    "budget": self.budget,
                    "share_of_fp32_bytes": float(space.bytes(best[None])[0]) / whole,
                    "accuracy": judge.accuracy(best),
                    "judged_on": len(images),
                    "files_judged": len(judge.known),
                    "uniform": {
                        f"{b} bits": {
                            "accuracy": judge.accuracy(arch),
                            "share_of_fp32_bytes": float(space.bytes(arch[None])[0]) / whole,
                        }
                        for b, arch in uniform.items()
                    },
                }
        artifact = Artifact(path, "onnx", "int8", source.input_shape, note="bits chosen per layer")
        write_manifest(artifact, context.task, {"mixed_precision": said})
        return replace(candidate, form=Form.ARTIFACT, network=None, artifact=artifact, metrics={})

    def _search(self, space: LayerBits, judge: _Judge, most: float, seed: int) -> Archs:
        """The bits of the best accuracy within the budget, the fewest bytes where several have it."""
        population = max(4, min(20, self.evaluations // 3))
        uniform = [space.uniform(b) for b in self.choices]
        possible = np.stack([a for a in uniform if space.bytes(a[None])[0] <= most])
        initial = np.concatenate([possible, space.filled(most, population, np.random.default_rng(seed))])[:population]
        known = options(self.strategy, {}, "strategy")
        sizes = {"population_size": population, "sample_size": max(2, population // 4)}
        strategy = self.strategy(space, seed, initial, **(known | {k: v for k, v in sizes.items() if k in known}))
        objectives = (
            Objective("accuracy", "accuracy", maximise=True),
            Objective("weight_bytes", "weight_bytes", limit=most, unit="bytes"),
        )
        search(strategy, judge, objectives, evaluations=self.evaluations, batch=population)
        tried = np.stack([np.frombuffer(key, dtype=space.dtype) for key in judge.known])
        lowest = space.uniform(0)
        judge.accuracy(lowest)
        tried = np.concatenate([tried, lowest[None]])
        sizes_of = space.bytes(tried)
        kept = np.flatnonzero(sizes_of <= most)
        accuracies = np.array([judge.accuracy(tried[i]) for i in kept])
        return np.asarray(tried[kept[np.lexsort((sizes_of[kept], -accuracies))[0]]])
