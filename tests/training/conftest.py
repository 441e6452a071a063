"""A space of 24 tiny networks with a real supernet, and a part of the embedded images: enough to train in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nasbench.evaluators.supernet import SupernetEvaluator
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.tasks.array_task import Dataset
from nasbench.tasks.base import Split
from nasbench.tasks.fashion_mnist import FashionMNIST
from search_spaces import Block, Catalog, Knob, SearchSpace, Supernet, WorkloadBuilder
from search_spaces import Tensor as TensorShape
from search_spaces.base import Archs
from search_spaces.supernet import NormStats

WIDTHS, KERNELS, DEPTHS, RESOLUTIONS = CHOICES = (4, 8), (1, 3, 5), (1, 2), (16, 32)


def _choices(arch: Archs) -> tuple[int, ...]:
    return tuple(c[i] for c, i in zip(CHOICES, arch, strict=True))


class TinySupernet(Supernet):
    """Stem, one or two separable blocks, head; widths are leading channels, kernels are centred crops."""

    def __init__(self) -> None:
        super().__init__()
        wide = max(WIDTHS)
        self.stem = nn.Parameter(torch.randn(wide, 1, 3, 3) * 0.3)
        self.depthwise = nn.ParameterList([torch.randn(wide, 1, 5, 5) * 0.2 for _ in DEPTHS])
        self.pointwise = nn.ParameterList([torch.randn(wide, wide, 1, 1) * 0.3 for _ in DEPTHS])
        self.scale = nn.ParameterList([torch.ones(wide) for _ in range(1 + len(DEPTHS))])
        self.shift = nn.ParameterList([torch.zeros(wide) for _ in range(1 + len(DEPTHS))])
        self.head = nn.Linear(wide * 16, 10)

    def forward(
        self, x: Tensor, arch: Archs, stats: NormStats | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self._run(x, arch, stats, None)

    def _run(self, x: Tensor, arch: Archs, stats: NormStats | None, seen: dict[str, list[Tensor]] | None) -> Tensor:
        width, kernel, depth, size = _choices(arch)
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)

        def norm(x: Tensor, layer: int) -> Tensor:
            name = f"norm{layer}"
            if seen is not None:
                seen.setdefault(name, []).append(torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)]))
            mean, var = (None, None) if stats is None else (stats.mean[name], stats.var[name])
            scale, shift = self.scale[layer][:width], self.shift[layer][:width]
            return F.batch_norm(x, mean, var, scale, shift, training=stats is None)

        x = F.relu(norm(F.conv2d(x, self.stem[:width], stride=2, padding=1), 0))
        for i in range(depth):
            cut = (5 - kernel) // 2
            weight = self.depthwise[i][:width, :, cut : 5 - cut, cut : 5 - cut]
            y = F.conv2d(x, weight, padding=kernel // 2, groups=width)
            x = x + F.relu(norm(F.conv2d(y, self.pointwise[i][:width, :width]), i + 1))
        x = F.avg_pool2d(x, x.shape[-1] // 4).flatten(1)
        return F.linear(x, self.head.weight[:, : width * 16], self.head.bias)

    def calibrate(self, arch: Archs, batches: Iterable[Tensor]) -> NormStats:
        seen: dict[str, list[Tensor]] = {}
        for batch in batches:
            self._run(batch, arch, None, seen)
        pooled = {name: torch.stack(parts) for name, parts in seen.items()}
        mean = {name: p[:, 0].mean(0) for name, p in pooled.items()}
        var = {name: p[:, 1].mean(0) + p[:, 0].var(0, unbiased=False) for name, p in pooled.items()}
        return NormStats(mean, var)

    def extract(self, arch: Archs, stats: NormStats) -> nn.Module:
        width, kernel, depth, size = _choices(arch)
        network = TinyNetwork(width, kernel, depth, size)
        cut = (5 - kernel) // 2
        with torch.no_grad():
            network.stem.weight.copy_(self.stem[:width])
            network.head.weight.copy_(self.head.weight[:, : width * 16])
            network.head.bias.copy_(self.head.bias)
            for i in range(depth):
                network.depthwise[i].weight.copy_(self.depthwise[i][:width, :, cut : 5 - cut, cut : 5 - cut])
                network.pointwise[i].weight.copy_(self.pointwise[i][:width, :width])
            for i, norm in enumerate(network.norms):
                norm.weight.copy_(self.scale[i][:width])
                norm.bias.copy_(self.shift[i][:width])
                norm.running_mean.copy_(stats.mean[f"norm{i}"])
                norm.running_var.copy_(stats.var[f"norm{i}"])
        return network.eval()


class TinyNetwork(nn.Module):
    def __init__(self, width: int, kernel: int, depth: int, size: int) -> None:
        super().__init__()
        self.input_shape = (1, size, size)
        self.stem = nn.Conv2d(1, width, 3, 2, 1, bias=False)
        self.depthwise = nn.ModuleList(
            nn.Conv2d(width, width, kernel, 1, kernel // 2, groups=width, bias=False) for _ in range(depth)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(1 + depth))
        self.pool = nn.AvgPool2d(size // 8)
        self.head = nn.Linear(width * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.stem(x)))
        for i, (depthwise, pointwise) in enumerate(zip(self.depthwise, self.pointwise, strict=True)):
            x = x + F.relu(self.norms[i + 1](pointwise(depthwise(x))))
        return self.head(self.pool(x).flatten(1))


class TinySpace(SearchSpace):
    name = "tiny"
    knobs = (Knob("width", WIDTHS), Knob("kernel", KERNELS), Knob("depth", DEPTHS), Knob("resolution", RESOLUTIONS))
    input_shape = (1, 32, 32)
    num_classes = 10
    block_knobs = ((0, 1, 2, 3),)

    @cached_property
    def catalog(self) -> Catalog:
        return Catalog(self.size, self._whole)

    def _whole(self, index: int) -> Block:
        width, kernel, depth, size = _choices(np.unravel_index(index, self.cardinalities))
        builder, half = WorkloadBuilder(), size // 2
        x = builder.input(TensorShape((1, size, size)))
        x = builder.add("conv2d", [x], (width, half, half), kernel=(3, 3), stride=(2, 2))
        for _ in range(depth):
            x = builder.add("depthwise_conv2d", [x], (width, half, half), kernel=(kernel,) * 2, groups=width)
            x = builder.add("conv2d", [x], (width, half, half), kernel=(1, 1))
        return Block(str(index), builder.build([x]))

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        return np.ravel_multi_index(np.asarray(archs).T, self.cardinalities)[:, None].astype(np.int32)

    def build(self, arch: Archs) -> nn.Module:
        return TinyNetwork(*_choices(arch))

    def supernet(self) -> Supernet:
        return TinySupernet()


class FewImages(FashionMNIST):
    """The embedded images, the first of each split only."""

    def __init__(self, train: int = 640, val: int = 400, test: int = 200, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.counts = {"train": train, "val": val, "test": test}

    def load(self) -> Dataset:
        full = super().load()
        few = {n: Split(s.images[: self.counts[n]], s.labels[: self.counts[n]]) for n, s in full.splits.items()}
        return Dataset(few, full.class_names)


@pytest.fixture
def space() -> TinySpace:
    return TinySpace()


@pytest.fixture
def task() -> FewImages:
    return FewImages()


@pytest.fixture
def supernet() -> Supernet:
    torch.manual_seed(0)
    return TinySupernet()


@pytest.fixture(scope="session")
def trained() -> Supernet:
    """A supernet after a few epochs: well above chance."""
    from nasbench.training import train_supernet

    torch.manual_seed(0)
    supernet = TinySupernet()
    task = FewImages(train=2000)
    train_supernet(supernet, TinySpace(), task, epochs=3, batch_size=40, random_subnets=1, lr=0.1, validation_images=0)
    return supernet


@pytest.fixture
def context(space: TinySpace, task: FewImages, trained: Supernet, tmp_path: Path) -> StageContext:
    return StageContext(task, space, tmp_path, seed=0, supernet=trained, input_shape=(1, 32, 32))


@pytest.fixture
def candidate(space: TinySpace, task: FewImages, trained: Supernet) -> Candidate:
    """A network as the supernet has it."""
    arch = np.array([1, 1, 1, 1], dtype=space.dtype)
    return Candidate("knee", arch, Form.FLOAT, network=SupernetEvaluator(space, task, trained).extract(arch))


@pytest.fixture
def few_images() -> type[FewImages]:
    return FewImages


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
