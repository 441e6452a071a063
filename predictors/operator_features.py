"""What the operator model sees of a network: the kernels that a runtime would run, and their sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import log2, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from predictors.base import Array
from search_spaces import Operator, Workload

# Kinds of kernels with speeds of their own: macs, values and params of an operator cost what its group's do.
GROUPS = (
    "pointwise",  # 1x1 convolutions on maps
    "dense",  # other convolutions
    "grouped",  # convolutions in groups of so many channels that they fill vectors
    "narrow",  # convolutions in groups of several channels that do not
    "depthwise",  # of whole vectors of 16 channels
    "depthwise_8",  # of whole vectors of 8, which some int8 kernels take twice the time for
    "depthwise_4",
    "ragged",  # depthwise convolutions of a number of channels that no vector of four divides
    "multiplied",  # and those of several outputs for each channel
    "transposed",
    "vector",  # linear layers of one vector
    "pixel",  # convolutions on single pixels, as gates of channels have them
    "linear",  # linear layers of many rows
    "matmul",
    "norm",  # normalisation that no convolution takes in
    "layer_norm",  # and that by statistics of its input
    "clamp",  # relu and the like, likewise
    "leaky_relu",
    "hard_swish",  # and hard-sigmoid
    "sigmoid",  # and tanh
    "silu",
    "gelu",
    "add",
    "trailing_leaky_relu",  # these of what one convolution or linear layer wrote, whose kernel may do it as it writes
    "trailing_hard_swish",
    "trailing_sigmoid",
    "trailing_silu",
    "trailing_gelu",
    "trailing_add",
    "trailing_transpose",
    "mul",
    "softmax",
    "pool",
    "average_pool",
    "planar_pool",  # both of maps that lie channel by channel, where others lie position by position
    "planar_average_pool",
    "reduction",  # pooling over everything: its input must be complete before anything follows
    "concat",
    "resize",
    "resample",  # resizing by other than whole factors
    "slice",
    "transpose",
    "result",  # a map that the network returns, in the order that the caller reads
    "crowded_result",  # one whose channels fall on the same lines of the cache
    "other",
)
# What the quantities of a group cost to begin with, as multiples of a dense kernel's; measurements decide.
COSTLIER = {
    ("depthwise", "macs"): 4.0,
    ("depthwise_8", "macs"): 4.0,
    ("depthwise_4", "macs"): 4.0,
    ("ragged", "macs"): 10.0,
    ("multiplied", "macs"): 10.0,
    ("grouped", "macs"): 1.5,
    ("narrow", "macs"): 3.0,
    ("hard_swish", "values"): 2.0,
    ("sigmoid", "values"): 2.0,
    ("silu", "values"): 2.0,
    ("gelu", "values"): 2.0,
    ("softmax", "values"): 5.0,
    ("norm", "values"): 2.0,
    ("layer_norm", "values"): 4.0,
    ("pool", "values"): 2.0,
    ("average_pool", "values"): 2.0,
    ("planar_pool", "values"): 2.0,
    ("planar_average_pool", "values"): 2.0,
    ("resize", "values"): 3.0,
    ("resample", "values"): 6.0,
    ("transpose", "values"): 3.0,
    ("trailing_transpose", "values"): 3.0,
}
# Beside the sizes of an operator, multiply-accumulates that some runtimes pay for and others do not: `starts` of the
# innermost loop, those of the `idle` ends of vectors of channels, and those of depthwise windows too `wide` to unroll.
# `values` are all that are read or written, and those `written` may cost more. `ends` are positions of pooled maps with
# channels behind the last whole vector.
QUANTITIES = (
    "kernels", "macs", "values", "params", "starts", "idle_outputs", "idle_inputs", "wide", "written", "ends",
)  # fmt: skip
COORDINATES = (
    "inputs", "outputs", "positions", "kernel", "stride", "input_multiple", "output_multiple", "parts", "signed",
)  # fmt: skip

# Convolutions compute whole vectors of channels: of 16 with AVX-512 (ORT's NCHWc, OpenVINO's nChw16c).
_VECTOR = 16
# Pooling in int8 takes vectors of 32 channels with AVX2. OpenVINO needs 400 ns a position to write the channels behind
# the last whole one, whatever the window; all of a position of whole ones takes 30 to 90.
_POOLED_VECTOR = 32
# Images are read as they are, by kernels of their own.
_IMAGE_CHANNELS = 3
# XNNPACK has depthwise kernels for windows of up to 5 x 5; LiteRT takes 8 to 12 times as long for a tap of larger ones.
_UNROLLED = 25
# Bytes this far apart compete for the same lines of a core's first cache, of which it has as many as ways. OpenVINO
# puts a map of 21 x 320 x 320 values (channels 100 times as far apart) into order at 3.8 ns a value, one of
# 19 x 444 x 444 at .6 ns.
_PAGE_BYTES, _WAYS = 4096, 8
# How far apart products of what may be negative and of what may not are, in factors of two of a size. Where kernels
# multiply unsigned values (as AVX2 does), signed ones take OpenVINO 7 % longer in pointwise convolutions, 25 % in dense
# ones, 40 % in depthwise ones, and transposed convolutions 2.5 times as long.
_SIGN = 1.5
# A core's own cache is this much smaller than the last one.
_NEARER = 10.0
# Positions that a weight is used at, at 50 GMAC/s, in the time that its 4 bytes take to come from memory at 12 GB/s.
_USES = 16
_TOUCHED = [QUANTITIES.index(name) for name in ("values", "params")]
_PARAMS = QUANTITIES.index("params")
_POSITIONS = COORDINATES.index("positions")

_DEPTHWISE = {16: "depthwise", 8: "depthwise_8", 4: "depthwise_4", 2: "ragged", 1: "ragged"}
_CONVOLUTIONS = frozenset({"conv2d", "depthwise_conv2d", "conv_transpose2d"})
_PRODUCTS = _CONVOLUTIONS | {"linear"}
_CLAMPS = frozenset({"relu", "relu6", "clamp"})
_POOLS = frozenset({"max_pool2d", "avg_pool2d"})
# What is never negative, and what is not where none of what it reads is.
_POSITIVE = frozenset({"relu", "relu6", "sigmoid", "hard_sigmoid", "softmax"})
_SIGN_KEPT = _POOLS | {"global_avg_pool", "mean", "concat", "resize", "slice", "transpose", "add", "mul"}
_GROUP_OF = {
    "conv_transpose2d": "transposed",
    "matmul": "matmul",
    "batch_norm": "norm",
    **dict.fromkeys(("layer_norm", "group_norm"), "layer_norm"),
    **dict.fromkeys(_CLAMPS, "clamp"),
    "leaky_relu": "leaky_relu",
    **dict.fromkeys(("hard_swish", "hard_sigmoid"), "hard_swish"),
    **dict.fromkeys(("sigmoid", "tanh"), "sigmoid"),
    "silu": "silu",
    "gelu": "gelu",
    **dict.fromkeys(("add", "sub"), "add"),
    "mul": "mul",
    **dict.fromkeys(("softmax", "log_softmax"), "softmax"),
    "max_pool2d": "pool",
    "avg_pool2d": "average_pool",
    **dict.fromkeys(("global_avg_pool", "mean"), "reduction"),
    "concat": "concat",
    "slice": "slice",
    "transpose": "transpose",
    "result": "result",
}
# What a kernel may apply to its own result, and the kinds of what it then is.
_TRAILING = {kind: f"trailing {kind}" for kind, group in _GROUP_OF.items() if f"trailing_{group}" in GROUPS}
_GROUP_OF |= {trailing: f"trailing_{_GROUP_OF[kind]}" for kind, trailing in _TRAILING.items()}
_PLANAR = {kind: f"planar {kind}" for kind in _POOLS}
_GROUP_OF |= {planar: f"planar_{_GROUP_OF[kind]}" for kind, planar in _PLANAR.items()}
_POOLED = _POOLS.union(_PLANAR.values())
_SIGNED = {kind: f"signed {kind}" for kind in _PRODUCTS}
_UNSIGNED = {signed: kind for kind, signed in _SIGNED.items()}


def kernels(workload: Workload) -> Counter[Operator]:
    """The operators of a network (or block) that a runtime runs as kernels, each with how often it occurs.

    Normalisation and multiplication by a constant disappear into the convolution or linear layer whose result they
    alone read, and a clamp into that, into a sum or into normalisation that stayed. What has no parameters and was
    computed of the same tensors before is not computed again. All runtimes do so (graph optimisations of ONNX Runtime,
    LiteRT, OpenVINO and TensorRT). Other activations and sums stay, but as kinds of their own where they could be fused
    likewise: whether a runtime does, and what it gains, measurements tell. So are transpositions of maps in the order
    in which convolutions write them (channels last, in blocks), which is kept until the first one; pooling of maps that
    transposed convolutions wrote, which may lie channel by channel; and convolutions and linear layers of what may be
    negative, which int8 kernels of unsigned values need more steps for.

    A network costs what its blocks do: what a block reads counts as written by a convolution with a ReLU, in no
    particular order, and so do the seams of a chain of blocks.
    """
    return _kernels(workload, signed=set())


def network_kernels(workload: Workload) -> Counter[Operator]:
    """Those of a whole network: with the maps that it returns, which a runtime may have to put into order.

    What a network reads may be negative, unless it is a chain of blocks.
    """
    found = _kernels(workload, signed=set() if workload.seams else set(workload.inputs))
    for tensor in (workload.tensors[t] for t in workload.outputs):
        if len(tensor.shape) == 3 and _positions(tensor.shape) > 1:
            found[Operator("result", (tensor,), tensor)] += 1
    return found


def _kernels(workload: Workload, signed: set[int]) -> Counter[Operator]:
    """Those of a network or block, of which some inputs may be negative."""
    steps, seams = _once(workload), set(workload.seams)
    readers = Counter(t for _, reads, _ in steps for t in reads)
    # Tensors -> kinds of the kernels that write them last, and those that these can apply nothing more to.
    writers: dict[int, str] = {}
    closed: set[int] = set()
    # Tensors in the order in which convolutions write them: theirs, and maps made of such alone; and those that
    # transposed convolutions write, likewise. Beside them those that may be negative.
    ordered: set[int] = set()
    planar: set[int] = set()
    found: Counter[Operator] = Counter()
    for moving, reads, write in steps:
        found.update(_moved(moving, not ordered.isdisjoint(reads)))
        if any(m.kind == "transpose" for m in moving.moved):
            ordered.difference_update(reads)
        op = _still(moving)
        open_ends = [writers.get(t, "") if readers[t] == 1 and t not in closed else "" for t in reads]
        source = open_ends[0] if reads else ""
        if source in _PRODUCTS and _scales(op):
            writers[write] = source
        elif source and op.kind in _CLAMPS:
            writers[write] = source
            closed.add(write)
        else:
            kind = op.kind
            if any(end in _PRODUCTS for end in open_ends):
                kind = _TRAILING.get(kind, kind)
            if reads and planar.issuperset(reads):
                kind = _PLANAR.get(kind, kind)
            if not signed.isdisjoint(reads) and _channels(op.inputs[0].shape) > _IMAGE_CHANNELS:
                kind = _SIGNED.get(kind, kind)
            found[replace(op, kind=kind)] += 1
            if op.kind in _PRODUCTS or op.kind in ("add", "batch_norm"):
                writers[write] = op.kind
        if write in seams:
            continue
        kept = len(op.output.shape) == 3 and bool(reads) and ordered.issuperset(reads)
        if kept or writers.get(write) in _CONVOLUTIONS:
            ordered.add(write)
        if op.kind == "conv_transpose2d" or (op.kind not in _PRODUCTS and reads and planar.issuperset(reads)):
            planar.add(write)
        if op.kind not in _POSITIVE and not (op.kind in _SIGN_KEPT and signed.isdisjoint(reads)):
            signed.add(write)
    return found


def _moved(op: Operator, of_product: bool) -> list[Operator]:
    """The copies before an operator. A product reads matrices whose sides are swapped as they are."""
    swaps = op.kind == "matmul"
    moves = [m for m in op.moved if not (swaps and m.kind == "transpose" and _swapped(m))]
    return [replace(m, kind=_TRAILING[m.kind]) if of_product and m.kind in _TRAILING else m for m in moves]


def _still(op: Operator) -> Operator:
    """The operator alone, as a kernel that moves nothing first."""
    return replace(op, moved=()) if op.moved else op


def _unsigned(op: Operator) -> Operator:
    """The operator, whatever the signs of what it reads."""
    return replace(op, kind=_UNSIGNED[op.kind]) if op.kind in _UNSIGNED else op


def _scales(op: Operator) -> bool:
    """Whether an operator does no more than what a product's weights can do: scale channels, and shift them."""
    return op.kind == "batch_norm" or (op.kind == "mul" and len(op.inputs) == 1)


def _swapped(move: Operator) -> bool:
    before, after = move.inputs[0].shape, move.output.shape
    return after == (*before[:-2], *before[:-3:-1])


def _once(workload: Workload) -> list[tuple[Operator, tuple[int, ...], int]]:
    """The operators with what they read and write, bar those without parameters that repeat an earlier one."""
    same: dict[int, int] = {}
    known: dict[tuple[Operator, tuple[int, ...]], int] = {}
    steps = []
    for op, reads, write in zip(workload.operators, workload.reads, workload.writes, strict=True):
        reads = tuple(same.get(t, t) for t in reads)
        first = write if op.params else known.setdefault((_still(op), reads), write)
        if first == write:
            steps.append((op, reads, write))
        else:
            same[write] = first
    return steps


def group_of(op: Operator) -> str:
    """The member of `GROUPS` that an operator belongs to; `other` for kinds that are not known."""
    op = _unsigned(op)
    if op.kind == "conv2d":
        if _positions(op.output.shape) == 1:
            return "pixel"
        if op.groups > 1:
            sizes = _channels(op.inputs[0].shape) // op.groups, _channels(op.output.shape) // op.groups
            return "narrow" if any(size % _VECTOR for size in sizes) else "grouped"
        return "pointwise" if set(op.kernel) == {1} else "dense"
    if op.kind == "depthwise_conv2d":
        if _channels(op.output.shape) > _channels(op.inputs[0].shape):
            return "multiplied"
        return _DEPTHWISE[_multiple(_channels(op.output.shape))]
    if op.kind == "resize":
        sides = zip(op.inputs[0].shape[1:], op.output.shape[1:], strict=True)
        return "resample" if any(large % small for small, large in sides) else "resize"
    if op.kind == "result":
        plane = _positions(op.output.shape) * op.output.itemsize
        crowded = plane % _PAGE_BYTES == 0 and _channels(op.output.shape) > _WAYS
        return "crowded_result" if crowded else "result"
    if op.kind == "linear":
        return "vector" if _positions(op.output.shape) == 1 else "linear"
    return _GROUP_OF.get(op.kind, "other")


def describe(operators: Sequence[Operator]) -> tuple[NDArray[np.int64], Array, Array]:
    """Groups `(n,)` as indices into `GROUPS`, `QUANTITIES` `(n, 10)` in millions, and `COORDINATES` `(n, 9)`.

    Coordinates are logarithms to base 2, so that a distance of one is a factor of two in one size. Those of a kernel's
    size count more, as code differs by it, and those of the power of two that divides the channels (16 at most: what
    vector units need) count half. Reading signed values counts as a factor of three in a size.
    """
    plain = [_unsigned(op) for op in operators]
    groups = np.array([_INDEX[group_of(op)] for op in plain], dtype=np.int64)
    quantities = np.array([_quantities(op) for op in plain], dtype=float).reshape(len(operators), len(QUANTITIES))
    coordinates = np.array(
        [(*_coordinates(p), 0.0 if p is op else _SIGN) for p, op in zip(plain, operators, strict=True)], dtype=float
    )
    return groups, quantities, coordinates.reshape(len(operators), len(COORDINATES))


def footprints(quantities: Array) -> Array:
    """`(n,)` millions of values and parameters that operators of `QUANTITIES` `(n, 10)` touch."""
    touched: Array = quantities[:, _TOUCHED].sum(1)
    return touched


def strained(footprint: Any, cache: float) -> Any:
    """What a network's cost grows by a power of: 1 where a near cache holds all that it touches, 10 where none does.

    The larger a network, the less of what an operator reads is in a near cache from before: equal convolutions were
    seen to take 5 % longer in published networks than in small ones. Beyond the last cache nothing gets worse.

    Args:
        footprint: `(n,)` of networks, a numpy array or a torch tensor.
        cache: what the last cache holds, likewise in million values.
    """
    return (1 + footprint * (_NEARER / cache)) / (1 + footprint / cache)


def weights_seldom_used(quantities: Array, coordinates: Array) -> Array:
    """`(n,)` millions of parameters that operators use at too few positions to hide how long memory takes."""
    seldom: Array = quantities[:, _PARAMS] * np.maximum(0.0, 1 - 2 ** coordinates[:, _POSITIONS] / _USES)
    return seldom


def streamed(footprint: Any, cache: float) -> Any:
    """Share of a network's parameters that comes from memory each time it runs: of a working set, what no cache holds.

    Linear layers of one vector take three times as long for each of their weights in networks beyond the last cache as
    in small ones, whose weights stay there from run to run.

    Args:
        footprint, cache: see `strained`.
    """
    return 1 - cache / footprint.clip(cache)


_INDEX = {name: i for i, name in enumerate(GROUPS)}


def _channels(shape: Sequence[int]) -> int:
    """Channels of `(channels, height, width)`, `(length, channels)` or `(features,)`."""
    return (shape[0] if len(shape) == 3 else shape[-1]) if shape else 1


def _positions(shape: Sequence[int]) -> int:
    return prod(shape) // max(1, _channels(shape))


def _quantities(op: Operator) -> tuple[float, ...]:
    values = sum(t.size for t in op.inputs) + op.output.size
    macs, computed = op.macs, _computed(op)
    wide = macs if op.kind == "depthwise_conv2d" and prod(op.kernel) > _UNROLLED else 0
    idle = computed - macs, computed * _idle_inputs(op)
    sizes = macs, values, op.params, computed / _strip(op), *idle, wide, op.output.size, _ends(op)
    return 1.0, *(size / 1e6 for size in sizes)


def _strip(op: Operator) -> float:
    """Positions that the innermost loop of a convolution runs over, at a cost for its start and its ends: a row of
    the map, or all of it where no neighbours are looked at. Infinite for what is no convolution."""
    if op.kind not in _CONVOLUTIONS:
        return math.inf
    pointwise = set(op.kernel) == {1} and set(op.stride) == {1}
    return _positions(op.output.shape) if pointwise else op.output.shape[-1]


def _computed(op: Operator) -> float:
    """Multiply-accumulates with those of the unused ends of vectors of output channels."""
    outputs = _channels(op.output.shape)
    if op.kind not in ("conv2d", "depthwise_conv2d") or group_of(op) in ("pixel", "narrow", "ragged", "multiplied"):
        return float(op.macs)
    return op.macs * (1 + _idle(outputs))


def _idle_inputs(op: Operator) -> float:
    """Share that the unused ends of vectors of input channels add."""
    if op.kind != "conv2d" or op.groups > 1:
        return 0.0
    inputs = _channels(op.inputs[0].shape)
    return _idle(inputs) if inputs > _IMAGE_CHANNELS else 0.0


def _idle(channels: int) -> float:
    return -channels % _VECTOR / channels


def _ends(op: Operator) -> int:
    """Positions of a pooled map whose last channels fill no vector, behind ones that do."""
    channels = _channels(op.output.shape)
    ragged = channels > _POOLED_VECTOR and channels % _POOLED_VECTOR
    return _positions(op.output.shape) if ragged and op.kind in _POOLED else 0


def _coordinates(op: Operator) -> tuple[float, ...]:
    inputs = _channels(op.inputs[0].shape) if op.inputs else 1
    outputs = _channels(op.output.shape)
    depthwise = op.kind == "depthwise_conv2d"
    parts = len(op.inputs) if op.kind == "concat" else 1 if depthwise else op.groups
    return (
        log2(max(1, inputs // (1 if depthwise else op.groups))),
        log2(max(1, outputs)),
        log2(max(1, _positions(op.output.shape))),
        1.5 * log2(max(1, prod(op.kernel) if op.kernel else _together(op)) ** 0.5),
        log2(max(1, prod(op.stride)) ** 0.5),
        0.5 * log2(_multiple(inputs)),
        0.5 * log2(_multiple(outputs)),
        log2(max(1, parts)),
    )


def _together(op: Operator) -> int:
    """Values in a row that a transposition leaves next to each other; 1 for all else."""
    if op.kind not in ("transpose", _TRAILING["transpose"]):
        return 1
    run = 1
    for before, after in zip(reversed(op.inputs[0].shape), reversed(op.output.shape), strict=False):
        if before != after:
            break
        run *= before
    return run


def _multiple(channels: int) -> int:
    """The largest power of two up to 16 that divides."""
    return max(1, min(channels & -channels, 16))
