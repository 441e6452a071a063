"""A space small enough to enumerate, with everything that makes spaces hard: depths, inactive knobs, absent blocks."""

from __future__ import annotations

import hashlib
import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from search_spaces import Block, Catalog, Knob, SearchSpace, Tensor, UserError, WorkloadBuilder
from search_spaces.base import Archs


class TinySpace(SearchSpace):
    """A chain of stages: `resolution`, then per stage a depth and per block a kernel and an expansion.

    The channels are the same everywhere: a block depends on resolution, depth (present or not) and its own two knobs.
    """

    name = "tiny"

    def __init__(
        self,
        max_depths: tuple[int, ...] = (2, 3),
        resolutions: tuple[int, ...] = (8, 16),
        kernels: tuple[int, ...] = (3, 5),
        expansions: tuple[int, ...] = (2, 4),
    ) -> None:
        knobs = [Knob("resolution", resolutions)]
        self.slots: list[tuple[int, int, int]] = []  # depth knob, place in the stage, first own knob
        for stage, most in enumerate(max_depths):
            depth = len(knobs)
            knobs.append(Knob(f"depth{stage}", tuple(range(1, most + 1))))
            for place in range(most):
                self.slots.append((depth, place, len(knobs)))
                knobs.append(Knob(f"kernel{stage}.{place}", kernels))
                knobs.append(Knob(f"expansion{stage}.{place}", expansions))
        self._knobs = tuple(knobs)
        self.shape = (len(resolutions), len(kernels), len(expansions))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return self._knobs

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (3, int(max(self.knobs[0].choices)), int(max(self.knobs[0].choices)))

    @property
    def num_classes(self) -> int:
        return 10

    @property
    def size(self) -> int:
        total = self.shape[0]
        per_block = self.shape[1] * self.shape[2]
        for depth in sorted({slot[0] for slot in self.slots}):
            total *= sum(per_block ** int(d) for d in self.knobs[depth].choices)
        return total

    def active(self, archs: Archs) -> NDArray[np.bool_]:
        archs = np.asarray(archs)
        out = np.ones(archs.shape, dtype=bool)
        for depth, place, first in self.slots:
            out[:, first : first + 2] = (archs[:, depth] >= place)[:, None]
        return out

    @cached_property
    def catalog(self) -> Catalog:
        resolutions, kernels, expansions = self.shape
        return Catalog(resolutions + resolutions * len(self.slots) * kernels * expansions, self._block)

    def _block(self, index: int) -> Block:
        resolutions = self.shape[0]
        builder = WorkloadBuilder()
        if index < resolutions:
            size = int(self.knobs[0].choices[index])
            image = builder.input(Tensor((3, size, size)))
            out = builder.add("conv2d", [image], (8, size, size), kernel=(3, 3), stride=(1, 1), params=8 * 27)
            return Block(f"stem@{size}", builder.build([out]))
        r, slot, k, e = np.unravel_index(index - resolutions, (resolutions, len(self.slots), *self.shape[1:]))
        size = int(self.knobs[0].choices[r])
        first = self.slots[slot][2]
        kernel, wide = int(self.knobs[first].choices[k]), 8 * int(self.knobs[first + 1].choices[e])
        x = builder.input(Tensor((8, size, size)))
        y = builder.add("conv2d", [x], (wide, size, size), kernel=(1, 1), params=8 * wide)
        y = builder.add(
            "depthwise_conv2d", [y], (wide, size, size), kernel=(kernel,) * 2, groups=wide, params=wide * kernel**2
        )
        y = builder.add("conv2d", [y], (8, size, size), kernel=(1, 1), params=8 * wide)
        return Block(f"{slot}:{kernel}x{wide}@{size}", builder.build([y]))

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        archs = np.asarray(archs).astype(np.int64)
        out = np.full((len(archs), 1 + len(self.slots)), -1, dtype=np.int32)
        out[:, 0] = archs[:, 0]
        for slot, (depth, place, first) in enumerate(self.slots):
            present = archs[:, depth] >= place
            where = (archs[:, 0], np.full(len(archs), slot), archs[:, first], archs[:, first + 1])
            ids = np.ravel_multi_index(where, (self.shape[0], len(self.slots), *self.shape[1:])) + self.shape[0]
            out[:, 1 + slot] = np.where(present, ids, -1)
        return out

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        return ((0,), *((0, depth, first, first + 1) for depth, _, first in self.slots))

    def build(self, arch: Archs) -> Any:
        raise UserError("the tiny space builds no networks")

    def everything(self) -> Archs:
        """All architectures, `(size, K)` canonical."""
        rows = np.array(list(itertools.product(*(range(c) for c in self.cardinalities))), dtype=self.dtype)
        return np.unique(self.canonical(rows), axis=0)


@pytest.fixture
def make_space() -> type[TinySpace]:
    """The class, for tests that need other sizes."""
    return TinySpace


@pytest.fixture
def space() -> TinySpace:
    """3,360 architectures, 12 knobs."""
    return TinySpace()


class Scored:
    """Experiments whose evaluator is a function, `parts:score`, that tells architectures apart and costs nothing."""

    PARTS = """
import hashlib, json

def score(choices, **fidelity):
    text = json.dumps(choices, sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 0xFFFFFF
"""
    EXPERIMENT = """
name = "scored"
seed = 5
[task]
name = "npz"
path = "images.npz"
[space]
name = "space.toml"
[objectives.accuracy]
[objectives.macs]
[evaluator]
name = "parts:score"
samples = 0
"""

    def __init__(self, files: Path) -> None:
        self.files = files

    def lay_out(self, folder: Path, keys: str, parts: str = "") -> Path:
        """Write the experiment into a folder.

        Args:
            keys: of its evaluator, and further sections.
            parts: further functions of its module.
        """
        for name in ("images.npz", "space.toml"):
            (folder / name).write_bytes((self.files / name).read_bytes())
        (folder / "parts.py").write_text(self.PARTS + parts)
        (folder / "scored.toml").write_text(self.EXPERIMENT + keys)
        return folder / "scored.toml"

    def scores(self, space: SearchSpace, archs: Archs) -> NDArray[np.float64]:
        """What `score` says of architectures."""
        texts = [json.dumps(space.decode(arch), sort_keys=True) for arch in archs]
        return np.array([int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 0xFFFFFF for text in texts])


@pytest.fixture(scope="session")
def scored(tiny_experiment: Path) -> Scored:
    return Scored(tiny_experiment.parent)
