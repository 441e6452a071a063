"""NAS-Bench-201: the space of cells with four nodes whose every network was trained."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from search_spaces.base import Archs, Block, Catalog, Knob, Published, SearchSpace
from search_spaces.errors import UserError, nearest
from search_spaces.operators import Tensor, Workload, WorkloadBuilder

if TYPE_CHECKING:
    from search_spaces.nasbench201_network import NASBench201
    from search_spaces.nasbench201_supernet import MixtureNASBench201, SuperNASBench201

NODES = 4
# (from, to), in the order of the benchmark's architecture strings.
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
KNOBS = tuple(Knob(f"{a}->{b}", OPERATIONS) for a, b in EDGES)
NONE, SKIP = OPERATIONS.index("none"), OPERATIONS.index("skip_connect")
STAGES = 3

# All ways from the cell's input to its output, as indices into `EDGES`.
_PATHS = ((3,), (0, 4), (1, 5), (0, 2, 5))
_CONVS = tuple(OPERATIONS.index(name) for name in ("nor_conv_1x1", "nor_conv_3x3"))
# A sequence of up to three of three operations is a number in base 3 with a leading one; its column among the 40.
_SEQUENCES = 1 + 3 + 9 + 27
_SEQUENCE_OF = np.full(2 * 27, -1)
_SEQUENCE_OF[[first + i for first in (1, 3, 9, 27) for i in range(first)]] = np.arange(_SEQUENCES)

_RADIX = len(OPERATIONS) ** np.arange(len(EDGES) - 1, -1, -1)
_CELLS = len(OPERATIONS) ** len(EDGES)
# The benchmark enumerates the cells, the last edge fastest, and shuffles them with this seed once for all (Dong and
# Yang, `generate_meta_info` of their AutoDL-Projects).
_SHUFFLE_SEED = 88


def into(node: int) -> tuple[int, ...]:
    """Indices into `EDGES` of the edges that end in a node, in order."""
    return tuple(e for e, (_, b) in enumerate(EDGES) if b == node)


class NASBench201Space(SearchSpace):
    """The 15,625 networks of NAS-Bench-201 (Dong and Yang, ICLR 2020).

    A 3x3 stem, three stages of equal cells with 16, 32 and 64 channels, a residual block of stride 2 between stages, a
    last normalisation, pooling and a classifier. A cell has four nodes; each of the six edges between them is nothing,
    the identity, a convolution (ReLU, convolution, normalisation) or 3x3 average pooling, and a node is the sum of the
    edges that end in it. A node in which none ends is zero: its predecessor times zero, as the benchmark's code has it.
    All rows are kept, isomorphic cells and those that cut the output off from the input too, and everything that a cell
    has counts, whether its output depends on it or not: as in the benchmark's own tables.

    Knobs: one per edge, `0->1`, `0->2`, `1->2`, `0->3`, `1->3`, `2->3`. Architectures have the benchmark's string
    (`to_string`, `from_string`) and official index (`official_index`, `from_official_index`).

    Args:
        in_channels, num_classes: of the task.
        resolution: height and width of the input in pixels, a multiple of 4, at least 8.
        channels: of the first stage.
        cells: per stage.
        name: what the space is called in messages.

    Raises:
        UserError: a value that makes no sense.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        resolution: int = 32,
        channels: int = 16,
        cells: int = 5,
        name: str = "nasbench201",
    ) -> None:
        self.name = name
        given = {"in_channels": in_channels, "num_classes": num_classes, "channels": channels, "cells": cells}
        for key, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}: {key}: must be a whole number, at least 1, got {value!r}")
        if not isinstance(resolution, int) or resolution < 8 or resolution % 4:
            raise UserError(f"{name}: resolution: must be a multiple of 4, at least 8, got {resolution!r}")
        self.in_channels = in_channels
        self.resolution = resolution
        self.channels = channels
        self.cells = cells
        self._classes = num_classes

    @property
    def knobs(self) -> tuple[Knob, ...]:
        return KNOBS

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.resolution, self.resolution

    @property
    def num_classes(self) -> int:
        return self._classes

    @property
    def references(self) -> dict[str, Archs]:
        """The cells that the benchmark's code names: a residual network's, and those with one operation everywhere."""
        named = {
            "resnet": "|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|none~1|skip_connect~2|",
            "all_conv_3x3": _everywhere("nor_conv_3x3"),
            "all_conv_1x1": _everywhere("nor_conv_1x1"),
            "all_identity": _everywhere("skip_connect"),
        }
        return {name: self.from_string(text)[0] for name, text in named.items()}

    @property
    def published(self) -> dict[str, Published]:
        costs = {
            "resnet": (78_561_920, 559_386),
            "all_conv_3x3": (220_119_680, 1_531_546),
            "all_conv_1x1": (31_376_000, 241_306),
            "all_identity": (7_783_040, 73_306),
        }
        source = "the benchmark's figures for CIFAR-10 (Dong and Yang, ICLR 2020)"
        its = {"num_classes": 10, "in_channels": 3, "resolution": 32, "channels": 16, "cells": 5}
        options = {key: value for key, value in its.items() if getattr(self, key) != value}
        return {name: Published(macs, params, source, options) for name, (macs, params) in costs.items()}

    def to_string(self, archs: Archs) -> list[str]:
        """The benchmark's string of each of `(n, 6)` architectures.

        >>> NASBench201Space().to_string([[3, 3, 3, 3, 3, 3]])[0]
        '|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|'
        """
        return [
            "+".join(
                "|" + "".join(f"{OPERATIONS[row[e]]}~{EDGES[e][0]}|" for e in into(node)) for node in range(1, NODES)
            )
            for row in self.check(archs).tolist()
        ]

    def from_string(self, strings: str | Iterable[str]) -> Archs:
        """`(n, 6)` architectures of the benchmark's strings; the inverse of `to_string`.

        Raises:
            UserError: a string that names none of the 15,625 cells.
        """
        strings = [strings] if isinstance(strings, str) else list(strings)
        return np.array([self._parse(text) for text in strings], dtype=self.dtype).reshape(-1, len(EDGES))

    def official_index(self, archs: Archs) -> NDArray[np.int64]:
        """The benchmark's index `(n,)` of `(n, 6)` architectures: the row of its tables."""
        return _official_order()[1][self.check(archs).astype(np.int64) @ _RADIX]

    def from_official_index(self, indices: NDArray[np.integer] | Iterable[int]) -> Archs:
        """`(n, 6)` architectures with the given indices `(n,)`; the inverse of `official_index`.

        Raises:
            UserError: an index outside 0..15,624.
        """
        indices = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        if len(bad := indices[(indices < 0) | (indices >= _CELLS)]):
            raise UserError(f"{self.name}: official indices are 0..{_CELLS - 1}, got {bad[0]}")
        return (_official_order()[0][indices, None] // _RADIX % len(OPERATIONS)).astype(self.dtype)

    @property
    def catalog(self) -> Catalog:
        return self._catalog

    @cached_property
    def _catalog(self) -> Catalog:
        return Catalog(int(self._first_id[-1]), self._make_block)

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """(stage, node) of every position; node 0 is what a stage begins with, (3, 0) the head."""
        cell = list(range(1, NODES))
        return [place for s in range(STAGES) for place in [(s, 0), *((s, n) for n in cell * self.cells)]] + [
            (STAGES, 0)
        ]

    @cached_property
    def _first_id(self) -> NDArray[np.int64]:
        """First id of each (stage, node), then of the head, then the number of ids."""
        plans, _ = _node_plans()
        counts = [1, *(len(p) for p in plans)] * STAGES + [1]
        return np.concatenate([[0], np.cumsum(counts)])

    def blocks(self, archs: Archs) -> NDArray[np.int32]:
        """Positions: the stem, three nodes per cell of each stage, the residual blocks between stages, the head."""
        _, of_cell = _node_plans()
        codes = np.asarray(archs).astype(np.int64) @ _RADIX
        local = np.concatenate([np.zeros((len(codes), 1), dtype=np.int64), of_cell[codes]], axis=1)
        ids = [self._first_id[s * NODES + n] + local[:, n] for s, n in self._places]
        return np.stack(ids, axis=1).astype(np.int32)

    @property
    def block_knobs(self) -> tuple[tuple[int, ...], ...]:
        """All edges for every node: which tensors are kept while it is computed is settled by later edges, too."""
        return tuple(tuple(range(len(EDGES))) if n else () for _, n in self._places)

    def descriptors(self, archs: Archs) -> tuple[NDArray[np.float32], ...]:
        """What the output depends on: edges that lead nowhere, or come from nowhere, change no accuracy.

        How often each operation is on a path from input to output, `(n, 4)`; the form of the cell, `(n, 6)`: most
        convolutions and 3x3 convolutions on a path, fewest convolutions on one, paths, paths with a convolution, and
        those that are the identity; how many paths are each sequence of operations, identities left out, `(n, 40)`:
        the path encoding of BANANAS (White, Neiswanger & Savani, AAAI 2021), with counts, of which the square root.
        """
        archs = np.asarray(archs).astype(np.int64)
        live = np.zeros(archs.shape, dtype=bool)
        sequences = np.zeros((len(archs), _SEQUENCES), dtype=np.float32)
        per_path = []
        for path in _PATHS:
            operations = archs[:, path]
            there = (operations != NONE).all(1)
            live[:, path] |= there[:, None]
            # A number in base 3 with a leading one per sequence: no two lengths share one.
            code = np.ones(len(archs), dtype=np.int64)
            for operation in operations.T:
                code = np.where(operation > SKIP, 3 * code + operation - (SKIP + 1), code)
            sequences[np.arange(len(archs)), _SEQUENCE_OF[code]] += there
            convs, wide = np.isin(operations, _CONVS).sum(1), (operations == _CONVS[-1]).sum(1)
            fewest = np.where(there, convs, NODES)
            identity = (operations == SKIP).all(1)
            per_path.append([there, convs * there, wide * there, fewest, (convs > 0) & there, identity])
        there, convs, wide, fewest, convolved, identity = np.array(per_path, dtype=np.float32).transpose(1, 0, 2)
        counts = np.stack([((archs == o) & live).sum(1) for o in range(1, len(OPERATIONS))], axis=1)
        form = [convs.max(0), wide.max(0), fewest.min(0), there.sum(0), convolved.sum(0), 2 * identity.sum(0)]
        return 0.7 * counts.astype(np.float32), np.stack(form, axis=1), np.sqrt(sequences)

    def build(self, arch: Archs) -> NASBench201:
        from search_spaces.nasbench201_network import NASBench201, operation

        row = self.check(arch)[0]
        return NASBench201(self, lambda channels, edge: operation(OPERATIONS[row[edge]], channels))

    def supernet(self) -> SuperNASBench201:
        from search_spaces.nasbench201_supernet import SuperNASBench201

        return SuperNASBench201(self)

    def mixture_supernet(self) -> MixtureNASBench201:
        from search_spaces.nasbench201_supernet import MixtureNASBench201

        return MixtureNASBench201(self)

    def _parse(self, text: str) -> list[int]:
        words = text.replace("+", "").strip("|").split("|")
        names = [w.rpartition("~")[0] for w in words if w]
        expected = "+".join("|" + "".join(f"OPERATION~{EDGES[e][0]}|" for e in into(n)) for n in range(1, NODES))
        for name in names:
            if name not in OPERATIONS:
                raise UserError(f"{self.name}: {text!r}: unknown operation {name!r}. {nearest(name, OPERATIONS)}")
        arch = [OPERATIONS.index(name) for name in names]
        if len(arch) != len(EDGES) or self.to_string(np.array([arch]))[0] != text:
            raise UserError(f"{self.name}: an architecture's string is {expected}, got {text!r}")
        return arch

    def _make_block(self, index: int) -> Block:
        place = int(np.searchsorted(self._first_id, index, side="right")) - 1
        stage, node = divmod(place, NODES)
        channels, size = self.channels << min(stage, STAGES - 1), self.resolution >> min(stage, STAGES - 1)
        if node:
            plan = _node_plans()[0][node - 1][index - int(self._first_id[place])]
            return Block(f"stage{stage}.node{node}", _node_workload(plan, Tensor((channels, size, size))))
        if stage == STAGES:
            return Block("head", _head_workload(channels, size, self._classes))
        if stage:
            return Block(f"reduction{stage}", _reduction_workload(channels, size))
        return Block("stem", _stem_workload(self.in_channels, channels, size))


def _everywhere(operation: str) -> str:
    return "+".join("|" + "".join(f"{operation}~{EDGES[e][0]}|" for e in into(n)) for n in range(1, NODES))


@lru_cache(maxsize=1)
def _official_order() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cell's number of every official index, and the reverse, `(15625,)` each."""
    order = list(range(_CELLS))
    random.Random(_SHUFFLE_SEED).shuffle(order)
    numbers = np.array(order)
    return numbers, np.argsort(numbers)


# A node's operations by edge; which tensor each edge reads; the tensors that exist before and that are still needed
# after it, as bits. Tensor 0 is the cell's input, tensor n the one that node n makes.
_Plan = tuple[tuple[int, ...], tuple[int, ...], int, int]


@lru_cache(maxsize=1)
def _node_plans() -> tuple[list[list[_Plan]], NDArray[np.int64]]:
    """The distinct ways to compute node 1, 2 and 3, and which of them each cell takes, `(15625, 3)`."""
    cells = np.arange(_CELLS)[:, None] // _RADIX % len(OPERATIONS)
    # A node that is but the identity of another is that tensor.
    tensor = np.zeros((_CELLS, NODES), dtype=np.int64)
    needed = np.zeros((NODES, _CELLS), dtype=np.int64)  # what a node reads, as bits
    for node in range(1, NODES):
        edges = into(node)
        operations = cells[:, edges]
        there = operations != NONE
        sources = np.where(there, tensor[:, [EDGES[e][0] for e in edges]], -1)
        alias = (there.sum(1) == 1) & (operations == SKIP).any(1)
        tensor[:, node] = np.where(alias, sources.max(1), node)
        read = np.where(there.any(1), np.bitwise_or.reduce(np.where(there, 1 << sources.clip(0), 0), axis=1),
                        1 << tensor[:, node - 1])  # fmt: skip
        needed[node] = np.where(alias, 0, read)
    alive = np.zeros((NODES, _CELLS), dtype=np.int64)  # after node n
    alive[NODES - 1] = 1 << tensor[:, NODES - 1]
    for node in range(NODES - 2, -1, -1):
        later = alive[node + 1] | needed[node + 1]
        alive[node] = later & ((1 << (node + 1)) - 1)
    plans, which = [], []
    for node in range(1, NODES):
        edges = into(node)
        operations = cells[:, edges]
        sources = np.where(operations != NONE, tensor[:, [EDGES[e][0] for e in edges]], 0)
        before = tensor[:, node - 1]  # what an empty node is a zero of
        sources[:, 0] = np.where((operations == NONE).all(1), before, sources[:, 0])
        rows = np.column_stack([operations, sources, alive[node - 1], alive[node]])
        distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
        count = len(edges)
        plans.append([(tuple(r[:count]), tuple(r[count : 2 * count]), r[-2], r[-1]) for r in distinct.tolist()])
        which.append(inverse.reshape(-1))
    return plans, np.stack(which, axis=1)


def _node_workload(plan: _Plan, tensor: Tensor) -> Workload:
    operations, sources, before, after = plan
    builder = WorkloadBuilder()
    made = {t: builder.input(tensor) for t in range(NODES) if before >> t & 1}
    node = len(operations)  # as many edges end in a node as there are nodes before it
    here: int | None = None
    terms = [(op, source) for op, source in zip(operations, sources, strict=True) if op != NONE]
    if [op for op, _ in terms] == [SKIP]:
        terms = []
    elif not terms:
        made[node] = builder.add("mul", [made[sources[0]]], tensor.shape)
    for operation, source in terms:
        term = _operation(builder, OPERATIONS[operation], made[source])
        here = made[node] = term if here is None else builder.add("add", [here, term], tensor.shape)
    return builder.build([made[t] for t in range(NODES) if after >> t & 1])


def _operation(builder: WorkloadBuilder, operation: str, source: int) -> int:
    """One edge's operators; returns the tensor that they write."""
    shape = builder.tensors[source].shape
    if operation == "skip_connect":
        return source
    if operation == "avg_pool_3x3":
        return builder.add("avg_pool2d", [source], shape, kernel=(3, 3), stride=(1, 1))
    return _relu_conv_norm(builder, source, shape[0], 1 if operation == "nor_conv_1x1" else 3)


def _conv(builder: WorkloadBuilder, source: int, channels: int, kernel: int, stride: int = 1) -> int:
    cin, size, _ = builder.tensors[source].shape
    shape = (channels, -(-size // stride), -(-size // stride))
    return builder.add(
        "conv2d", [source], shape, kernel=(kernel, kernel), stride=(stride, stride), params=cin * channels * kernel**2
    )


def _norm(builder: WorkloadBuilder, source: int) -> int:
    shape = builder.tensors[source].shape
    return builder.add("batch_norm", [source], shape, params=2 * shape[0])


def _relu_conv_norm(builder: WorkloadBuilder, source: int, channels: int, kernel: int, stride: int = 1) -> int:
    here = builder.add("relu", [source], builder.tensors[source].shape)
    return _norm(builder, _conv(builder, here, channels, kernel, stride))


def _stem_workload(in_channels: int, channels: int, size: int) -> Workload:
    builder = WorkloadBuilder()
    source = builder.input(Tensor((in_channels, size, size)))
    return builder.build([_norm(builder, _conv(builder, source, channels, 3))])


def _reduction_workload(channels: int, size: int) -> Workload:
    """From half the channels at twice the size."""
    builder = WorkloadBuilder()
    source = builder.input(Tensor((channels // 2, 2 * size, 2 * size)))
    here = _relu_conv_norm(builder, source, channels, 3, 2)
    here = _relu_conv_norm(builder, here, channels, 3)
    pooled = builder.add("avg_pool2d", [source], (channels // 2, size, size), kernel=(2, 2), stride=(2, 2))
    shape = (channels, size, size)
    return builder.build([builder.add("add", [here, _conv(builder, pooled, channels, 1)], shape)])


def _head_workload(channels: int, size: int, classes: int) -> Workload:
    builder = WorkloadBuilder()
    here = _norm(builder, builder.input(Tensor((channels, size, size))))
    here = builder.add("relu", [here], (channels, size, size))
    here = builder.add("global_avg_pool", [here], (channels, 1, 1))
    linear = builder.add("linear", [here], (classes,), params=(channels + 1) * classes, inputs=[Tensor((channels,))])
    return builder.build([linear])
