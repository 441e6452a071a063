"""Operators and workloads: what spaces and devices share, and all that they share.

A workload lists the primitive operators of one network in execution order, with the tensors between them. Shapes are
per sample (no batch dimension): `(channels, height, width)` for images, `(length, channels)` for sequences,
`(features,)` for vectors. Operators are as the network defines them; which of them a device fuses is the device's
business.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from search_spaces.errors import nearest

Shape = tuple[int, ...]

# Every kind of operator that spaces, reference networks and readers know, and the element-wise, reducing and indexing
# operators of PyTorch's core set (`torch.Tag.core`), which tracing calls by their aten names. Others keep a name of
# their own: in ONNX files, which begin with a capital there, and of modules with rare or home-made operators.
KINDS = frozenset(
    # products
    {"conv2d", "depthwise_conv2d", "conv_transpose2d", "linear", "matmul"}
    # activations
    | {"relu", "relu6", "leaky_relu", "prelu", "elu", "celu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh"}
    | {"hard_sigmoid", "hard_swish", "hardtanh", "clamp", "clip", "softmax", "log_softmax"}
    # normalisation, pooling, and what changes sizes or types
    | {"batch_norm", "layer_norm", "group_norm", "mean", "global_avg_pool", "avg_pool2d", "max_pool2d", "resize"}
    | {"pixel_shuffle", "pixel_unshuffle", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "quantize"}
    # of one value each, or of pairs
    | {"abs", "ceil", "cos", "erf", "exp", "expm1", "floor", "log", "log10", "log1p", "log2", "logical_not", "neg"}
    | {"reciprocal", "round", "rsqrt", "sign", "sin", "sqrt", "tan", "trunc", "isinf", "isnan", "acos", "acosh", "asin"}
    | {"asinh", "atan", "atanh", "cosh", "sinh", "bitwise_not", "add", "sub", "mul", "div", "pow", "maximum", "minimum"}
    | {"fmod", "remainder", "atan2", "eq", "ne", "ge", "gt", "le", "lt", "where", "logical_and", "logical_or"}
    | {"logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"}
    # of whole dimensions, and by indices
    | {"amax", "amin", "any", "argmax", "argmin", "cumsum", "max", "min", "prod", "sum", "var", "sort", "topk"}
    | {"embedding", "gather", "index", "index_put", "index_select", "masked_scatter", "scatter", "scatter_add"}
    | {"scatter_reduce", "select_scatter", "slice_scatter", "nonzero", "grid_sampler_2d"}
    | {"concat", "flip", "roll", "repeat"}
    # moves and views: no operators of a workload, but compilers' lists of what they run name them too
    | {"slice", "split", "transpose", "reshape"}
)
# Operators whose result may take the place of an input of equal size that nobody reads afterwards.
ELEMENTWISE = frozenset(
    {"add", "mul", "batch_norm", "relu", "relu6", "leaky_relu", "elu", "tanh", "sigmoid", "silu", "gelu"}
    | {"hard_sigmoid", "hard_swish"}
)
# Operators that a runtime folds into the convolution or linear operator before them, at no cost of their own.
FOLDED = frozenset({"batch_norm"})


def _is_torch(word: str) -> bool:
    """Whether tracing calls an operator so: by its aten name where it has no other."""
    import torch

    from search_spaces.tracing import _KINDS, _READERS

    return hasattr(torch.ops.aten, word) and word not in (*_KINDS, *_READERS)


def unknown_kind(word: str) -> str:
    """Why no workload has operators of a kind, and which may be meant; empty where one may have them.

    >>> unknown_kind("hardswish")
    "no network has operators of kind 'hardswish'. Did you mean 'hard_swish'? Kinds: search_spaces.operators.KINDS"
    """
    if word in KINDS or _is_torch(word):
        return ""
    hint = nearest(word, KINDS).partition("Known:")[0]
    if word[:1].isupper():
        from onnx.defs import has

        from search_spaces.onnx_reader import _KINDS, _READERS, _VIEWS

        # An ONNX operator that keeps its name: one of the standard (`CumSum`), or of a runtime unless it is like ours.
        ours = word.lower().replace("_", "") in {kind.replace("_", "") for kind in KINDS}
        if word not in (*_KINDS, *_READERS, *_VIEWS) and (has(word) or not ours):
            return ""
        hint = f"Of ONNX files it is read as {_KINDS[word]!r}. " if word in _KINDS else hint
    return f"no network has operators of kind {word!r}. {hint}Kinds: search_spaces.operators.KINDS"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of activations: shape per sample, and bytes per element."""

    shape: Shape
    itemsize: int = 4

    @property
    def size(self) -> int:
        """Elements per sample."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes per sample."""
        return self.size * self.itemsize


@dataclass(frozen=True, slots=True)
class Operator:
    """One primitive with its shapes; equal operators compare and hash equal wherever they stand.

    Args:
        kind: one of `KINDS`, or its own name where a reader does not know it.
        inputs: the activation tensors it reads (weights are not among them), in the shape it sees them: a reshaped
            view is no operator of its own.
        output: the tensor it writes.
        kernel, stride: spatial, for convolutions and pooling; of resizing the window that a value is computed of.
        groups: of a convolution.
        params: learned values, bias included.
        moved: how what it reads came to be where it is: operators of kind `slice` and `transpose`, of one input each,
            that copy parts of tensors or reorder them. Each is named once, by its first reader, or by the writer of
            what a result of the workload is a view of. They are no operators of the workload, since many a runtime
            reads or writes in place instead.
    """

    kind: str
    inputs: tuple[Tensor, ...]
    output: Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    groups: int = 1
    params: int = 0
    moved: tuple["Operator", ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample of convolutions, linear layers and matrix products; 0 for all others."""
        if self.kind in ("conv2d", "depthwise_conv2d"):
            return self.output.size * (self.inputs[0].shape[0] // self.groups) * prod(self.kernel)
        if self.kind == "conv_transpose2d":
            return self.inputs[0].size * (self.output.shape[0] // self.groups) * prod(self.kernel)
        if self.kind in ("linear", "matmul"):
            return self.output.size * self.inputs[0].shape[-1]
        return 0

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written once each: inputs, parameters and output, at the output's bytes per element."""
        return sum(t.bytes for t in self.inputs) + self.params * self.output.itemsize + self.output.bytes

    def at(self, itemsize: int) -> "Operator":
        """The same with `itemsize` bytes per element."""
        return replace(
            self,
            inputs=tuple(replace(t, itemsize=itemsize) for t in self.inputs),
            output=replace(self.output, itemsize=itemsize),
            moved=tuple(op.at(itemsize) for op in self.moved),
        )


@dataclass(frozen=True)
class Workload:
    """The operators of one network with their tensors: a small graph in execution order.

    Args:
        operators: in execution order.
        reads: per operator, the indices into `tensors` of its inputs.
        writes: per operator, the index into `tensors` of its output.
        tensors: all activation tensors, graph inputs included.
        inputs, outputs: indices of the graph's own inputs and outputs.
        seams: indices of the tensors at which the parts meet that it was chained of; not compared.
    """

    operators: tuple[Operator, ...]
    reads: tuple[tuple[int, ...], ...]
    writes: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seams: tuple[int, ...] = field(default=(), compare=False)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(op.macs for op in self.operators)

    @cached_property
    def params(self) -> int:
        """Learned values, normalisation scales and shifts included."""
        return sum(op.params for op in self.operators)

    @cached_property
    def bytes_moved(self) -> int:
        """Sum of the operators' bytes moved."""
        return sum(op.bytes_moved for op in self.operators)

    @cached_property
    def peak_memory_bytes(self) -> int:
        """Activation bytes alive at once at the worst operator, in this execution order.

        A tensor lives from the operator that writes it to the last that reads it; element-wise operators write in
        place where their input dies. Weights, workspaces and alignment are not counted: an ideal lower bound.
        """
        last_read = {t: len(self.operators) for t in self.outputs}
        for step, reads in enumerate(self.reads):
            for t in reads:
                last_read[t] = max(last_read.get(t, step), step)
        live = {t: self.tensors[t].bytes for t in self.inputs}
        peak = sum(live.values())
        for step, (op, reads, write) in enumerate(zip(self.operators, self.reads, self.writes, strict=True)):
            dying = {t for t in reads if last_read[t] == step}
            in_place = op.kind in ELEMENTWISE and any(self.tensors[t].bytes == op.output.bytes for t in dying)
            peak = max(peak, sum(live.values()) + (0 if in_place else op.output.bytes))
            for t in dying:
                live.pop(t, None)
            if last_read.get(write, step) > step:
                live[write] = op.output.bytes
        return peak

    def at(self, itemsize: int) -> "Workload":
        """The same network with `itemsize` bytes per element (1 for int8, 2 for fp16, 4 for fp32)."""
        tensors = tuple(replace(t, itemsize=itemsize) for t in self.tensors)
        return replace(self, operators=tuple(op.at(itemsize) for op in self.operators), tensors=tensors)

    @staticmethod
    def chain(parts: Iterable["Workload"]) -> "Workload":
        """One workload from parts: the outputs of each feed the inputs of the next, in order.

        Raises:
            ValueError: no parts, or two neighbours whose tensors differ.
        """
        builder: WorkloadBuilder | None = None
        here: list[int] = []
        for part in parts:
            if builder is None:
                builder = WorkloadBuilder()
                here = [builder.input(part.tensors[t]) for t in part.inputs]
            else:
                builder.seams += here
            here = builder.extend(part, here)
        if builder is None:
            raise ValueError("a chain needs at least one part")
        return builder.build(here)


@dataclass
class WorkloadBuilder:
    """Builds a workload operator by operator; tensors are named by the index that each call returns."""

    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    seams: list[int] = field(default_factory=list)

    def input(self, tensor: Tensor) -> int:
        """Declare a graph input."""
        self.tensors.append(tensor)
        self.inputs.append(len(self.tensors) - 1)
        return self.inputs[-1]

    def add(
        self,
        kind: str,
        reads: Sequence[int],
        shape: Shape,
        *,
        kernel: tuple[int, ...] = (),
        stride: tuple[int, ...] = (),
        groups: int = 1,
        params: int = 0,
        inputs: Sequence[Tensor] | None = None,
        itemsize: int | None = None,
        moved: tuple[Operator, ...] = (),
    ) -> int:
        """Append an operator that reads the named tensors and writes a new one of `shape`; returns its index.

        Args:
            inputs: the tensors as the operator sees them, where it reads reshaped views; else as they were written.
            itemsize: bytes per element of the output; else those of the first input.
            moved: see `Operator`.
        """
        inputs = tuple(self.tensors[t] for t in reads) if inputs is None else tuple(inputs)
        output = Tensor(shape, itemsize or (inputs[0].itemsize if inputs else 4))
        return self.put(Operator(kind, inputs, output, kernel, stride, groups, params, moved), reads)

    def put(self, op: Operator, reads: Sequence[int]) -> int:
        """Append an operator as it is, which reads the named tensors; returns the index of what it writes."""
        self.operators.append(op)
        self.tensors.append(op.output)
        self.reads.append(tuple(reads))
        self.writes.append(len(self.tensors) - 1)
        return self.writes[-1]

    def move(self, tensor: int, moves: tuple[Operator, ...]) -> None:
        """Name moves behind a tensor, see `Operator.moved`; those of a graph input are its reader's alone."""
        if moves and tensor in self.writes:
            at = self.writes.index(tensor)
            self.operators[at] = replace(self.operators[at], moved=self.operators[at].moved + moves)

    def extend(self, part: Workload, sources: Sequence[int]) -> list[int]:
        """Append a whole workload, fed by one of the tensors `sources` per input; returns the indices of its outputs.

        An output that is an input of the part too is that very tensor.

        Raises:
            ValueError: tensors that the part does not expect.
        """
        expected, given = [part.tensors[t] for t in part.inputs], [self.tensors[t] for t in sources]
        if expected != given:
            raise ValueError(f"part expects {expected}, the chain has {given}")
        index = dict(zip(part.inputs, sources, strict=True))
        for op, reads, write in zip(part.operators, part.reads, part.writes, strict=True):
            index[write] = self.put(op, [index[t] for t in reads])
        self.seams += [index[t] for t in part.seams]
        return [index[t] for t in part.outputs]

    def build(self, outputs: Sequence[int]) -> Workload:
        """The finished, immutable workload."""
        return Workload(
            tuple(self.operators),
            tuple(self.reads),
            tuple(self.writes),
            tuple(self.tensors),
            tuple(self.inputs),
            tuple(outputs),
            tuple(dict.fromkeys(self.seams)),
        )
