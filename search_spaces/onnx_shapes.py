"""Shapes of all tensors of an ONNX model whose inputs have fixed sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

# Constants up to this many values may be shapes, indices or bounds; larger ones are weights, whose values tell nothing.
_SMALL = 64

Values = dict[str, np.ndarray[Any, Any]]


def infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shapes that follow from its inputs, as far as they do.

    Exporters compute shapes by operators where they could have written numbers, and ONNX's own inference does not
    follow them all. Where it stops, this goes on node by node: what depends on shapes alone becomes a constant.

    Raises:
        onnx.shape_inference.InferenceError, RuntimeError: a node contradicts the shapes of its inputs.
    """
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output) if _fixed(value.type)}
    made = {name for node in inferred.graph.node for name in node.output if name}
    if made <= known:
        return inferred
    _Folder(inferred).fold()
    return inferred


def _fixed(kind: onnx.TypeProto) -> bool:
    tensor = kind.tensor_type
    return tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)


class _Folder:
    """One pass over the nodes of a model, in execution order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        graph = model.graph
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}
        self._types = {value.name: value.type for value in graph.input}
        self._values: Values = {}
        for tensor in graph.initializer:
            self._types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
            if prod(tensor.dims) <= _SMALL:
                self._values[tensor.name] = numpy_helper.to_array(tensor)

    def fold(self) -> None:
        """Writes the shapes into the model, and replaces nodes whose result is known by constants."""
        graph = self._model.graph
        nodes = [self._step(node) for node in graph.node]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
        results = {value.name: value for value in graph.output}
        for name in (name for node in nodes for name in node.output if name in self._types):
            value = results.get(name) or graph.value_info.add(name=name)
            value.type.CopyFrom(self._types[name])

    def _step(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """The node, or the constant that it computes; learns the types of its outputs."""
        given = [name for name in node.input if name]
        if node.op_type == "Shape" and (kind := self._types.get(node.input[0])) is not None and _fixed(kind):
            sizes = np.array([dim.dim_value for dim in kind.tensor_type.shape.dim], dtype=np.int64)
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return self._constant(node, sizes[attributes.get("start", 0) : attributes.get("end")])
        if all(name in self._values for name in given) and self._deterministic(node):
            try:
                (result, *others) = ReferenceEvaluator(self._alone(node)).run(None, {n: self._values[n] for n in given})
            except Exception:  # an operator that the evaluator does not know; its shape may still be inferred
                result, others = None, []
            if not others and isinstance(result, np.ndarray | np.generic) and np.size(result) <= _SMALL:
                return self._constant(node, np.asarray(result))
        self._infer(node, given)
        return node

    def _deterministic(self, node: onnx.NodeProto) -> bool:
        return not node.op_type.startswith("Random") and not any(a.HasField("g") for a in node.attribute)

    def _constant(self, node: onnx.NodeProto, value: np.ndarray[Any, Any]) -> onnx.NodeProto:
        name = node.output[0]
        tensor = numpy_helper.from_array(np.ascontiguousarray(value).reshape(np.shape(value)), name)
        self._values[name] = value
        self._types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        return helper.make_node("Constant", [], [name], value=tensor)

    def _alone(self, node: onnx.NodeProto) -> onnx.ModelProto:
        """A model of this node only."""
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(self._values[n].dtype), None)
            for n in dict.fromkeys(node.input)
            if n
        ]
        outputs = [helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name]
        graph = helper.make_graph([node], "node", inputs, outputs)
        return helper.make_model(graph, opset_imports=list(self._model.opset_import), ir_version=self._model.ir_version)

    def _infer(self, node: onnx.NodeProto, given: list[str]) -> None:
        """Types of the outputs, where those of the inputs tell them."""
        domain = node.domain or ""
        version = self._opsets.get(domain, 1)
        if any(name not in self._types for name in given) or not onnx.defs.has(node.op_type, version, domain):
            return
        self._types.update(
            shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, version, domain),
                node,
                {name: self._types[name] for name in given},
                {
                    name: numpy_helper.from_array(np.asarray(self._values[name]), name)
                    for name in given
                    if name in self._values
                },
                opset_imports=list(self._model.opset_import),
                ir_version=self._model.ir_version,
            )
        )
