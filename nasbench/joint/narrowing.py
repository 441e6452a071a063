"""The operators of a block with fewer channels inside: what pruning will leave, known before there is a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from search_spaces.operators import Operator, Tensor, Workload

# Operators after which a channel is still that channel.
_KEEP = frozenset(
    {"depthwise_conv2d", "batch_norm", "add", "mul", "global_avg_pool", "avg_pool2d", "max_pool2d"}
    | {"relu", "relu6", "leaky_relu", "elu", "tanh", "sigmoid", "silu", "gelu", "hard_sigmoid", "hard_swish"}
)
_MIX = frozenset({"conv2d", "linear"})

Count = Callable[[int], int]


def inner_channels(workload: Workload) -> list[tuple[int, frozenset[int]]]:
    """The numbers of channels that only the block itself knows of, each with its tensors, in execution order.

    Tensors belong together where channels go one to one; those that meet an input or output of the block, or an
    operator that is not known to keep or to mix whole channels, belong to no set.
    """
    owner = list(range(len(workload.tensors)))

    def find(t: int) -> int:
        while owner[t] != t:
            t = owner[t]
        return t

    fixed = {*workload.inputs, *workload.outputs}
    for op, reads, write in zip(workload.operators, workload.reads, workload.writes, strict=True):
        if op.kind in _KEEP:
            for t in reads:
                owner[find(t)] = find(write)
        elif op.kind not in _MIX or op.groups > 1 or len(op.output.shape) == 2:
            fixed |= {*reads, write}
        if any(v.shape[0] != workload.tensors[t].shape[0] for v, t in zip(op.inputs, reads, strict=True)):
            fixed |= set(reads)  # a view that mixes channels with places
    shut = {find(t) for t in fixed}
    sets: dict[int, set[int]] = {}
    for write in workload.writes:
        if find(write) not in shut:
            sets.setdefault(find(write), set()).add(write)
    return [(workload.tensors[min(tensors)].shape[0], frozenset(tensors)) for tensors in sets.values()]


def narrowed(workload: Workload, count: Count) -> Workload:
    """The workload with `count(channels)` channels in each of its `inner_channels`."""
    shapes = {t: count(channels) for channels, tensors in inner_channels(workload) for t in tensors}
    tensors = tuple(_with(tensor, shapes.get(t)) for t, tensor in enumerate(workload.tensors))
    operators = tuple(
        _narrow(op, [shapes.get(t) for t in reads], shapes.get(write))
        for op, reads, write in zip(workload.operators, workload.reads, workload.writes, strict=True)
    )
    return replace(workload, operators=operators, tensors=tensors)


def _with(tensor: Tensor, channels: int | None) -> Tensor:
    return tensor if channels is None else replace(tensor, shape=(channels, *tensor.shape[1:]))


def _narrow(op: Operator, reads: Sequence[int | None], write: int | None) -> Operator:
    inputs = tuple(_with(t, channels) for t, channels in zip(op.inputs, reads, strict=True))
    output = _with(op.output, write)
    before, after = op.output.shape[0], output.shape[0]
    if op.kind in _MIX:
        cin, fewer = op.inputs[0].shape[0], inputs[0].shape[0]
        per_pair, bias = divmod(op.params, cin * before) if op.groups == 1 else (0, 0)
        params = per_pair * fewer * after + bias // before * after if op.groups == 1 else op.params
        return replace(op, inputs=inputs, output=output, params=params)
    groups = after if op.kind == "depthwise_conv2d" else op.groups
    return replace(op, inputs=inputs, output=output, groups=groups, params=op.params // before * after)
