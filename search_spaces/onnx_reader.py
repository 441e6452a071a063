"""The workload of an ONNX model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import helper, numpy_helper, shape_inference

from search_spaces.errors import UserError
from search_spaces.movement import Moves, reorders
from search_spaces.onnx_shapes import infer
from search_spaces.operators import Shape, Tensor, Workload, WorkloadBuilder

# ONNX operator -> operator kind; those with shapes or weights to look at are in `_READERS`, others keep their name.
_KINDS = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "PRelu": "prelu",
    "Elu": "elu",
    "HardSwish": "hard_swish",
    "HardSigmoid": "hard_sigmoid",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Gelu": "gelu",
    "Swish": "silu",
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Exp": "exp",
    "Log": "log",
    "Sqrt": "sqrt",
    "Neg": "neg",
    "Abs": "abs",
    "Erf": "erf",
    "Pow": "pow",
    "Add": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Max": "maximum",
    "Min": "minimum",
    "CumSum": "cumsum",
    "Concat": "concat",
    "Pad": "constant_pad_nd",
    "SpaceToDepth": "pixel_unshuffle",
    "DepthToSpace": "pixel_shuffle",
    "GlobalAveragePool": "global_avg_pool",
    "BatchNormalization": "batch_norm",
    "LayerNormalization": "layer_norm",
    "GroupNormalization": "group_norm",
    "QuantizeLinear": "quantize",
}
_VIEWS = frozenset(
    {
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Identity",
        "Cast",
        "Dropout",
        "Slice",
        "Split",
        "Expand",
    }
)
# Input positions that hold learned values; of other operators, every constant that is no single number.
_LEARNED = {
    "BatchNormalization": (1, 2),
    "QLinearConv": (3, 8),
    "QLinearMatMul": (3,),
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "Gather": (0,),
    **dict.fromkeys(("Clip", "Resize", "Pad", "ReduceMean", "QuantizeLinear", "TopK", "Tile", "CumSum", "Pow"), ()),
}


def read_onnx(source: str | Path | onnx.ModelProto) -> Workload:
    """The operators of an ONNX model, per sample.

    The batch must be 1 or dynamic, every other size of the inputs fixed. Views, casts and what computes shapes are no
    operators, slices and transpositions are in `Operator.moved`. A product's bias belongs to it, and a sigmoid times
    its input is one `silu`. In a model with QuantizeLinear / DequantizeLinear pairs the tensors between two operators
    count in their quantised type and the pairs are no operators, as runtimes fuse them; quantisation of a graph input,
    or of a tensor that is also read unquantised, is an operator `quantize`. Weights count as the parameters of the
    operator that reads them first. Operators that ONNX does not know keep their name; the file must say how large what
    they write is.

    Raises:
        UserError: no such file, not an ONNX model, a size that is not fixed, or a batch above 1.
    """
    where = "ONNX model" if isinstance(source, onnx.ModelProto) else f"ONNX file {source}"
    return _Reader(_fixed_shapes(_load(source, where), where), where).read()


def _load(source: str | Path | onnx.ModelProto, where: str) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        model = onnx.ModelProto()
        model.CopyFrom(source)
    else:
        try:
            model = onnx.load(str(source))
        except FileNotFoundError as error:
            raise UserError(f"{where}: no such file: {error.filename or source}") from error
        except (OSError, DecodeError, ValueError, onnx.checker.ValidationError) as error:
            raise UserError(f"{where}: cannot be read as an ONNX model: {error}") from error
    if not model.graph.node:
        raise UserError(f"{where}: holds no operators; it is empty or not an ONNX model")
    model = onnx.inliner.inline_local_functions(model) if model.functions else model
    _unpack_products(model)
    return model


def _unpack_products(model: onnx.ModelProto) -> None:
    """Write ONNX Runtime's products with packed 4- or 8-bit weights as plain ones, whose shapes can be inferred.

    Of the weights only the shape is written: nothing here reads their values.
    """
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {a.name: a.i for a in node.attribute}
            weight = model.graph.initializer.add(name=f"{node.output[0]}/weight", data_type=onnx.TensorProto.FLOAT)
            weight.dims.extend([sizes["K"], sizes["N"]])
            node.op_type, node.domain = "MatMul", ""
            del node.input[1:], node.attribute[:]
            node.input.append(weight.name)


def _fixed_shapes(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model with batch 1 and the shape of every tensor inferred."""
    constants = {tensor.name for tensor in model.graph.initializer}
    batches: set[str] = set()
    for value in model.graph.input:
        if value.name in constants:
            continue
        batches.update(dim.dim_param for dim in value.type.tensor_type.shape.dim[:1])
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            fixed = dim.HasField("dim_value") and dim.dim_value > 0
            if axis == 0 and (not fixed or dim.dim_value == 1):
                dim.dim_value = 1
            elif axis == 0:
                raise UserError(
                    f"{where}: input {value.name!r} has batch {dim.dim_value}; export with batch 1 or dynamic"
                )
            elif not fixed:
                raise UserError(
                    f"{where}: input {value.name!r}: dimension {axis} is not fixed; export with fixed sizes"
                )
    # What was inferred for a dynamic batch would contradict batch 1; of operators that ONNX does not know nothing else
    # tells the sizes.
    foreign = {name for node in model.graph.node if not _is_known(node) for name in node.output}
    said = [value for value in model.graph.value_info if value.name in foreign]
    del model.graph.value_info[:]
    model.graph.value_info.extend(said)
    for value in (*model.graph.value_info, *model.graph.output):
        shape = value.type.tensor_type.shape
        if value.name not in foreign:
            value.type.tensor_type.ClearField("shape")
        elif shape.dim and shape.dim[0].dim_param in batches - {""}:
            shape.dim[0].dim_value = 1
    try:
        return infer(model)
    except (shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        raise UserError(f"{where}: shapes cannot be inferred: {str(error).strip().splitlines()[0]}") from error


def _is_known(node: onnx.NodeProto) -> bool:
    return bool(onnx.defs.has(node.op_type, node.domain))


@dataclass
class _Node:
    """One node with what a reader asks about it."""

    op: str
    inputs: list[str]
    attributes: dict[str, Any]
    shapes: dict[str, Shape]
    activations: dict[str, int]
    arrays: dict[str, np.ndarray[Any, Any]] = field(repr=False)

    def array(self, position: int) -> np.ndarray[Any, Any] | None:
        """Values of a constant input."""
        return self.arrays.get(self.inputs[position]) if position < len(self.inputs) else None


class _Reader:
    def __init__(self, model: onnx.ModelProto, where: str) -> None:
        self._graph, self._where = model.graph, where
        self._builder = WorkloadBuilder()
        self._types: dict[str, Tensor] = {}
        self._full_shape: dict[str, Shape] = {}
        for value in [*self._graph.input, *self._graph.value_info, *self._graph.output]:
            self._describe(value)
        self._sizes: dict[str, int] = {}  # learned tensors that no operator has been charged with yet
        self._from: dict[str, frozenset[str]] = {}  # constants, and the learned tensors that they come from
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        for tensor in self._graph.initializer:
            self._from[tensor.name] = frozenset({tensor.name})
            self._sizes[tensor.name] = prod(tensor.dims)
            self._full_shape[tensor.name] = tuple(tensor.dims)
            if prod(tensor.dims) <= 16:
                self._arrays[tensor.name] = numpy_helper.to_array(tensor)
        self._activations: dict[str, int] = {}  # name -> tensor that it is, or is a view of
        self._moves = Moves()  # by name
        self._products: set[str] = set()  # of an activation and weights
        self._gates: set[str] = set()  # sigmoids that only multiply their own input
        self._results = {value.name for value in self._graph.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def _describe(self, value: onnx.ValueInfoProto) -> None:
        kind = value.type.tensor_type
        if not kind.HasField("shape") or any(not d.HasField("dim_value") for d in kind.shape.dim):
            return
        shape = tuple(d.dim_value for d in kind.shape.dim)
        self._full_shape[value.name] = shape
        itemsize = helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        self._types[value.name] = Tensor(shape[1:] if len(shape) > 1 and shape[0] == 1 else shape, itemsize)

    def _type(self, name: str) -> Tensor:
        if name not in self._types:
            for node in self._graph.node:
                if name in node.output and not _is_known(node):
                    domain = f" of domain {node.domain!r}" if node.domain else ""
                    called = f" (node {node.name!r})" if node.name else ""
                    raise UserError(
                        f"{self._where}: ONNX knows no operator {node.op_type!r}{domain}{called}, and the file does "
                        f"not say how large the tensor {name!r} is that it writes; write that into the model's "
                        "value_info, or export with standard operators"
                    )
            raise UserError(f"{self._where}: the size of tensor {name!r} is not fixed; export with fixed sizes")
        return self._types[name]

    def read(self) -> Workload:
        for value in self._graph.input:
            if value.name not in self._from:
                self._activations[value.name] = self._builder.input(self._type(value.name))
        for node in self._graph.node:
            self._read_node(node)
        names = [value.name for value in self._graph.output if value.name in self._activations]
        for name in names:
            self._builder.move(self._activations[name], self._moves.name([name]))
        return self._builder.build(list(dict.fromkeys(self._activations[name] for name in names)))

    def _read_node(self, node: onnx.NodeProto) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            self._from[node.output[0]] = frozenset()
            if isinstance(value := attributes.get("value"), onnx.TensorProto) and prod(value.dims) <= 16:
                self._arrays[node.output[0]] = numpy_helper.to_array(value)
            return
        reads = [name for name in node.input if name in self._activations]
        if not reads or node.op_type == "Shape":
            learned = frozenset().union(*(self._from.get(name, frozenset()) for name in node.input[:1]))
            self._from.update((name, learned) for name in node.output)
            return
        source = self._activations[reads[0]]
        if self._is_gate(node):
            self._gates.add(node.output[0])
            self._activations[node.output[0]] = source
            return
        if self._is_bias(node):
            self._add_bias(source, node)
            return
        if (
            self._selects(node)
            or node.op_type in _VIEWS
            or node.op_type == "DequantizeLinear"
            or self._fused_quantize(node)
        ):
            # A dequantised tensor is the quantised one: that is what is stored, and what fused operators read.
            transposed = node.op_type == "Transpose" and self._reorders(reads[0], attributes)
            for name in filter(None, node.output):
                self._activations[name] = source
                self._moves.view(reads[0], name, self._type(reads[0]), self._type(name), transposed)
                if node.op_type == "DequantizeLinear":
                    self._types[name] = Tensor(self._type(name).shape, self._type(node.input[0]).itemsize)
            return
        seen = [self._type(name) for name in reads]
        known = _Node(
            node.op_type, list(node.input), attributes, self._full_shape, self._activations, self._arrays
        )  # fmt: skip
        try:
            kind, fields = _READERS.get(node.op_type, _plain)(known)
        except KeyError as error:
            raise UserError(
                f"{self._where}: {node.op_type} {node.name!r} reads {error.args[0]!r}, which nothing writes"
            ) from error
        if any(name in self._gates for name in reads):
            kind, reads = "silu", [name for name in reads if name not in self._gates]
        output = self._type(node.output[0])
        written = self._builder.add(
            kind,
            [self._activations[name] for name in reads],
            output.shape,
            params=self._learned(node),
            inputs=seen[: len(reads)],
            itemsize=self._quantised_itemsize(node.output[0]) or output.itemsize,
            moved=self._moves.name(reads),
            **fields,
        )
        self._activations.update((name, written) for name in node.output if name)
        if kind == "linear":
            self._products.add(node.output[0])

    def _reorders(self, name: str, attributes: dict[str, Any]) -> bool:
        shape = self._full_shape[name]
        return reorders(shape, attributes.get("perm", range(len(shape))[::-1]))

    def _is_gate(self, node: onnx.NodeProto) -> bool:
        """Whether a sigmoid is only there to multiply its own input."""
        readers = self._readers.get(node.output[0], [])
        return (
            node.op_type == "Sigmoid"
            and [reader.op_type for reader in readers] == ["Mul"]
            and set(readers[0].input) == {node.input[0], node.output[0]}
            and node.output[0] not in self._results
        )

    def _is_bias(self, node: onnx.NodeProto) -> bool:
        """Whether an addition puts a learned vector on a product that nobody else reads."""
        product, bias = self._split(node)
        return (
            node.op_type == "Add"
            and product in self._products
            and len(self._readers[product]) == 1
            and product not in self._results
            and self._full_shape.get(bias) == self._full_shape[product][-1:]
        )

    def _split(self, node: onnx.NodeProto) -> tuple[str, str]:
        """An activation and a constant among the inputs; empty where there are not one of each."""
        activations = [name for name in node.input if name in self._activations]
        constants = [name for name in node.input if name in self._from]
        return (activations[0], constants[0]) if len(activations) == len(constants) == 1 else ("", "")

    def _add_bias(self, written: int, node: onnx.NodeProto) -> None:
        """Charge the operator that wrote a tensor with the learned values of an addition to it."""
        builder = self._builder
        index = builder.writes.index(written)
        operator, output = builder.operators[index], self._type(node.output[0])
        output = replace(output, itemsize=self._quantised_itemsize(node.output[0]) or output.itemsize)
        params = operator.params + self._learned(node)
        builder.operators[index] = replace(operator, params=params, output=output)
        builder.tensors[written] = output
        self._activations[node.output[0]] = written

    def _selects(self, node: onnx.NodeProto) -> bool:
        """Whether a Gather takes one slice of an activation, which is a view."""
        index = self._arrays.get(node.input[1]) if node.op_type == "Gather" else None
        return index is not None and index.ndim == 0 and node.input[0] in self._activations

    def _learned(self, node: onnx.NodeProto) -> int:
        positions = _LEARNED.get(node.op_type, range(len(node.input)))
        names = frozenset().union(
            *(self._from.get(node.input[p], frozenset()) for p in positions if p < len(node.input))
        )
        # A single number is a constant of the formula, such as the 6 of a clip.
        return sum(self._sizes.pop(name, 0) for name in names if self._sizes.get(name, 0) > 1)

    def _quantised_itemsize(self, name: str) -> int | None:
        """Bytes per element where a tensor is read through QuantizeLinear alone, views included; None otherwise."""
        sizes: set[int | None] = set()
        for node in self._readers.get(name, []):
            if node.op_type == "QuantizeLinear":
                sizes.add(self._type(node.output[0]).itemsize)
            elif node.op_type in _VIEWS:
                sizes.update(self._quantised_itemsize(output) for output in node.output)
            else:
                return None
        return sizes.pop() if len(sizes) == 1 else None

    def _fused_quantize(self, node: onnx.NodeProto) -> bool:
        """Whether a QuantizeLinear disappears into the operator that writes its input."""
        if node.op_type != "QuantizeLinear" or self._activations[node.input[0]] in self._builder.inputs:
            return False
        return self._quantised_itemsize(node.input[0]) is not None


_Read = tuple[str, dict[str, Any]]


def _plain(node: _Node) -> _Read:
    return _KINDS.get(node.op, node.op), {}


def _gather(node: _Node) -> _Read:
    return "gather" if node.inputs[0] in node.activations else "embedding", {}


def _convolution(node: _Node) -> _Read:
    weight = node.shapes[node.inputs[3 if node.op == "QLinearConv" else 1]]
    kernel, groups = weight[2:], int(node.attributes.get("group", 1))
    stride = tuple(node.attributes.get("strides", (1,) * len(kernel)))
    channels = node.shapes[node.inputs[0]][1]
    depthwise = groups > 1 and groups == channels
    kind = "conv_transpose2d" if node.op == "ConvTranspose" else "depthwise_conv2d" if depthwise else "conv2d"
    return kind, {"kernel": kernel, "stride": stride, "groups": groups}


def _product(node: _Node) -> _Read:
    second = node.inputs[3 if node.op == "QLinearMatMul" else 1]
    return "matmul" if second in node.activations else "linear", {}


def _pool(node: _Node) -> _Read:
    kernel = tuple(node.attributes["kernel_shape"])
    stride = tuple(node.attributes.get("strides", (1,) * len(kernel)))
    if node.op == "AveragePool" and kernel == node.shapes[node.inputs[0]][2:]:
        return "global_avg_pool", {}
    return {"MaxPool": "max_pool2d", "AveragePool": "avg_pool2d"}[node.op], {"kernel": kernel, "stride": stride}


def _mean(node: _Node) -> _Read:
    axes = node.attributes.get("axes")
    if axes is None and (given := node.array(1)) is not None:
        axes = given.tolist()
    rank = len(node.shapes[node.inputs[0]])
    dims = sorted(int(a) % rank for a in (range(rank) if axes is None else axes))
    return "global_avg_pool" if rank == 4 and dims == [2, 3] else "mean", {}


def _resize(node: _Node) -> _Read:
    edge = {b"nearest": 1, b"linear": 2, b"cubic": 4}[node.attributes.get("mode", b"nearest")]
    return "resize", {"kernel": (edge,) * (len(node.shapes[node.inputs[0]]) - 2)}


def _clip(node: _Node) -> _Read:
    low, high = node.array(1), node.array(2)
    return "relu6" if low is not None and high is not None and (low, high) == (0, 6) else "clip", {}


_READERS: dict[str, Callable[[_Node], _Read]] = {
    **dict.fromkeys(("Conv", "ConvTranspose", "QLinearConv"), _convolution),
    **dict.fromkeys(("Gemm", "MatMul", "QLinearMatMul"), _product),
    **dict.fromkeys(("MaxPool", "AveragePool"), _pool),
    "Gather": _gather,
    "ReduceMean": _mean,
    "Clip": _clip,
    **dict.fromkeys(("Resize", "Upsample"), _resize),
}
