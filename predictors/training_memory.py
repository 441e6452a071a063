"""What training a network takes in memory: activations kept for the backward pass, gradients, optimiser state.

Counted from a workload, so for any network or architecture without building it, in two ways: as plain autograd does it,
and as `nasbench.ondevice.saving` does it, which keeps only what some trained weight really needs.
`measured_activations` asks autograd itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from predictors.base import AdditivePredictor, Array
from search_spaces import Operator, UserError, Workload

Optimizer = Literal["sgd", "momentum", "adam"]
Bytes = NDArray[np.int64]

# Values that an optimiser keeps per trained one.
STATE = {"sgd": 0, "momentum": 1, "adam": 2}
ITEM = 4  # bytes of a float32

_WEIGHTED = frozenset({"conv2d", "depthwise_conv2d", "conv_transpose2d", "linear"})
_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm"})
# Non-linearities whose slope is one of two constants, so that a bit an element tells it.
_TWO_SLOPES = frozenset({"relu", "relu6", "leaky_relu", "hard_sigmoid"})
# What plain autograd keeps of the others (torch's derivatives.yaml): the result, or else the input.
_BY_RESULT = frozenset({"relu", "sigmoid", "tanh", "softmax", "log_softmax"})
_NOTHING = frozenset({"add", "sub", "concat", "mean", "resize", "constant_pad_nd"})


@dataclass(frozen=True)
class Update:
    """What trains of an operator's parameters.

    Args:
        weights: share of the input channels whose weights train, 0..1. Of a normalisation or any operator but
            convolutions all train or none.
        bias: whether the bias trains, or the shift of a normalisation.
    """

    weights: float = 0.0
    bias: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weights <= 1:
            raise UserError(f"weights = {self.weights}: expected a share in 0..1")

    def __bool__(self) -> bool:
        return self.weights > 0 or self.bias


NOTHING, FULL = Update(), Update(1.0, True)


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one training step keeps, per operator `(n,)` int64.

    Args:
        activations: kept from the forward to the backward pass, for the whole batch.
        gradients: of the trained values.
        optimizer: state of the trained values.
        weights: all parameters, trained or not; no part of `total`, since inference has them too.
    """

    activations: Bytes
    gradients: Bytes
    optimizer: Bytes
    weights: Bytes

    @property
    def per_operator(self) -> Bytes:
        """Training memory of each operator."""
        return self.activations + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """Training memory: activations, gradients and optimiser state."""
        return int(self.per_operator.sum())


def training_memory(
    workload: Workload,
    updates: Update | Sequence[Update] = FULL,
    *,
    batch: int = 1,
    optimizer: Optimizer = "sgd",
    saving: bool = True,
    batch_statistics: bool = False,
    middle: bool = False,
) -> TrainingMemory:
    """The memory of training parts of a network.

    A tensor that several operators keep counts once, at the first. Operators before the first that trains keep nothing.

    Args:
        workload: of one sample.
        updates: per operator, or one for all.
        batch: samples a step.
        optimizer: `sgd` (no state), `momentum` or `adam`.
        saving: keep what trained weights need, as `saving.memory_saving` does: inputs of trained channels only, a bit
        for
            the slope of a ReLU, nothing for frozen normalisation. Else as plain autograd, which keeps every
            convolution's input and every normalisation's, whatever trains.
        batch_statistics: normalisation by the batch's own statistics, whose gradient needs its input; else it is
        frozen,
            a scale and a shift per channel.
        middle: the workload is a block that others come before and after: a gradient flows to its inputs, and what it
            puts out is kept by the block that reads it.

    Returns:
        Activations in float32, as the network runs in training.

    Raises:
        UserError: as many updates as operators were expected, or a batch below 1.
    """
    count = len(workload.operators)
    updates = [updates] * count if isinstance(updates, Update) else list(updates)
    if len(updates) != count:
        raise UserError(f"{len(updates)} updates given for {count} operators")
    if batch < 1:
        raise UserError(f"batch = {batch}: expected 1 or more")
    if optimizer not in STATE:
        raise UserError(f"optimizer = {optimizer!r}: expected one of {', '.join(STATE)}")
    activations, trained = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    flows = set(workload.inputs) if middle else set()  # tensors through which a gradient flows
    kept = dict.fromkeys(workload.outputs, 2**62) if middle else {}  # bytes kept of each tensor so far
    for step, (op, reads, write, update) in enumerate(
        zip(workload.operators, workload.reads, workload.writes, updates, strict=True)
    ):
        trained[step] = _trained_values(op, update)
        through = [t in flows for t in reads]
        if not (any(through) or trained[step]):
            continue
        flows.add(write)
        rule = _needed if saving else _plain
        for tensor, elements in rule(op, reads, write, through, update, batch_statistics):
            size = math.ceil((1 if tensor == _CONSTANT else batch) * elements * ITEM)
            before = kept.get(tensor, 0)
            activations[step] += max(size - before, 0)
            if tensor >= 0:
                kept[tensor] = max(size, before)
    gradients = trained * ITEM
    weights = np.array([op.params * ITEM for op in workload.operators], dtype=np.int64)
    return TrainingMemory(activations, gradients, gradients * STATE[optimizer], weights)


def weight_count(op: Operator) -> int:
    """Weights of an operator, without its bias or shift."""
    if op.kind in ("conv2d", "depthwise_conv2d"):
        return op.output.shape[0] * (op.inputs[0].shape[0] // op.groups) * math.prod(op.kernel)
    if op.kind == "conv_transpose2d":
        return op.inputs[0].shape[0] * (op.output.shape[0] // op.groups) * math.prod(op.kernel)
    if op.kind == "linear":
        return op.inputs[0].shape[-1] * op.output.shape[-1]
    return op.params // 2 if op.kind in _NORMS else op.params


def channels(share: float, count: int) -> int:
    """How many of an operator's input channels train: rounded, at least one."""
    return max(1, round(share * count)) if share > 0 else 0


def _share(op: Operator, update: Update) -> float:
    """The share of the input channels that train, as a whole number of channels."""
    if (
        not update.weights
        or op.kind not in ("conv2d", "depthwise_conv2d")
        or op.groups not in (1, op.inputs[0].shape[0])
    ):
        return float(update.weights > 0)
    cin = op.inputs[0].shape[0]
    return channels(update.weights, cin) / cin


def _trained_values(op: Operator, update: Update) -> int:
    if not op.params:
        return 0
    weights = min(weight_count(op), op.params)
    return round(weights * _share(op, update)) + (op.params - weights) * update.bias


# (tensor, elements kept per sample of it); a part of a tensor, or its slopes, is a copy that nothing else can share.
_Kept = list[tuple[int, float]]
_COPY, _CONSTANT = -1, -2  # in the place of a tensor; the latter's elements are of the whole batch


def _needed(
    op: Operator, reads: Sequence[int], write: int, through: Sequence[bool], update: Update, batch_statistics: bool
) -> _Kept:
    """What the gradients of trained values, and of inputs that a gradient flows through, really need."""
    if op.kind in _WEIGHTED and (len(reads) == 1):
        share = _share(op, update) if op.params else 0.0
        if not share:
            return []
        return [(reads[0] if share == 1 else _COPY, share * op.inputs[0].size)]
    if op.kind == "batch_norm" and not batch_statistics:
        scale = (_CONSTANT, float(op.params // 2))
        return [(reads[0], op.inputs[0].size), scale, scale] if update.weights else [scale]
    if op.kind in _TWO_SLOPES:
        return [(_COPY, op.output.size / 8 / ITEM)] if any(through) else []
    if op.kind in ("avg_pool2d", "global_avg_pool"):
        return []
    return _plain(op, reads, write, through, update, batch_statistics)


def _plain(
    op: Operator, reads: Sequence[int], write: int, through: Sequence[bool], update: Update, batch_statistics: bool
) -> _Kept:
    """What torch's autograd keeps once the operator is part of the graph."""
    inputs = dict(zip(reads, op.inputs, strict=True))
    if op.kind in _NOTHING:
        return []
    if op.kind == "linear" and len(reads) == 1:
        return [(reads[0], op.inputs[0].size)] if update.weights else []
    if op.kind in ("matmul", "mul", "div"):
        # Each factor is kept for the other's gradient.
        return [
            (t, inputs[t].size) for i, t in enumerate(reads) if any(flow for j, flow in enumerate(through) if j != i)
        ] or ([(reads[0], op.inputs[0].size)] if update.weights else [])
    if op.kind == "batch_norm":
        return [(reads[0], op.inputs[0].size), (_CONSTANT, float(op.params if batch_statistics else 0))]
    if op.kind in ("layer_norm", "group_norm"):
        rows = op.inputs[0].size // op.inputs[0].shape[-1] if op.kind == "layer_norm" else _groups(op)
        return [(reads[0], op.inputs[0].size), (_COPY, 2 * rows)]
    if op.kind == "max_pool2d":
        return [(reads[0], op.inputs[0].size), (_COPY, 2 * op.output.size)]  # and indices of 64 bits
    if op.kind in _BY_RESULT:
        return [(write, op.output.size)]
    return [(reads[0], op.inputs[0].size)] if reads else []


def _groups(op: Operator) -> int:
    return max(1, op.groups)


class TrainingMemoryCount(AdditivePredictor):
    """The training memory of whole populations: of training everything, or biases and the last layer alone.

    `full` is as plain autograd does it, with normalisation by batch statistics; `bias` as `nasbench.ondevice.saving`
    does it, with frozen normalisation (the weights of the last layer, a few kilobytes, are left out). Blocks add up;
    what they put out is counted where it is read, and the first block as if a gradient flowed to its input.

    Args:
        batch: samples a step.
        method: `full` or `bias`.
        optimizer: as in `training_memory`.

    Raises:
        UserError: another method, or no positive batch.
    """

    metric = "training_memory_bytes"

    def __init__(self, batch: int = 1, method: str = "full", optimizer: Optimizer = "momentum") -> None:
        if method not in ("full", "bias"):
            raise UserError(f"method = {method!r}: training memory is counted for 'full' and 'bias'")
        if batch < 1:
            raise UserError(f"batch = {batch}: expected 1 or more")
        self.batch, self.full, self.optimizer = batch, method == "full", optimizer

    def block_features(self, workload: Workload) -> Array:
        memory = training_memory(
            workload,
            FULL if self.full else Update(0.0, True),
            batch=self.batch,
            optimizer=self.optimizer,
            saving=not self.full,
            batch_statistics=self.full,
            middle=True,
        )
        return np.array([memory.total], dtype=float)

    def head(self, totals: Any) -> Any:
        return totals[:, 0]

    @property
    def coefficients(self) -> tuple[Array, float] | None:
        return np.ones(1), 0.0
