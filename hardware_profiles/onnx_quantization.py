"""int8 and int4 quantisation of ONNX files by ONNX Runtime's tools, in the form with quantise and dequantise nodes."""

from __future__ import annotations

import fnmatch
import inspect
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np

from hardware_profiles.extras import quiet, reason
from search_spaces.errors import UserError, nearest

CalibrationMethod = Literal["minmax", "entropy", "percentile"]
Bits = Literal[4, 8, 32]
# Operators with weights; the first three have a form with 4-bit weights.
_WEIGHTED = ("Conv", "Gemm", "MatMul", "ConvTranspose", "LSTM", "GRU", "RNN", "Einsum")
# The first opset with 4-bit tensors.
_NIBBLES = 21


@dataclass(frozen=True)
class WeightLayer:
    """A node with learned weights.

    Args:
        name: of the node; torch's exporter makes it of the submodule's, such as `/layer1/layer1.0/conv1/Conv`.
        kind: the ONNX operator.
        weight: name of its weight tensor.
        parameters: how many values that has.
        channels: of the output, which scales are kept for.
        axis: theirs, of the weight.
    """

    name: str
    kind: str
    weight: str
    parameters: int
    channels: int
    axis: int = 0

    @property
    def choices(self) -> tuple[int, ...]:
        """Bits that its weights can be kept in."""
        return (4, 8, 32) if self.kind in _WEIGHTED[:3] else (32,) if self.kind in _WEIGHTED[4:] else (8, 32)

    def bytes_at(self, bits: int) -> float:
        """Of the weights in so many bits, their scales (fp32, one per output channel) included."""
        return self.parameters * bits / 8 + (4 * self.channels if bits < 32 else 0)


def weight_layers(model: Any) -> list[WeightLayer]:
    """The nodes of an ONNX model (or its file) that read a float weight of two or more dimensions, in order."""
    import onnx

    if isinstance(model, Path):
        model = onnx.load(str(model), load_external_data=False)
    weights = {t.name: tuple(t.dims) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    layers = []
    for node in model.graph.node:
        read = [name for name in node.input if len(weights.get(name, ())) > 1]
        if read and node.op_type in _WEIGHTED:
            shape = weights[read[0]]
            across = {a.name: a.i for a in node.attribute}.get("transB", 0)
            axis = len(shape) - 1 if node.op_type == "MatMul" or (node.op_type == "Gemm" and not across) else 0
            layers.append(WeightLayer(node.name, node.op_type, read[0], prod(shape), shape[axis], axis))
    return layers


def _own_constants(graph: Any) -> bool:
    """Give every layer constants of its own, in place; whether any were shared.

    torch's exporter keeps equal ones once and hands them on by `Identity`, such as the zero biases of a network that
    was never trained. Behind an `Identity` a bias stays fp32, and its convolution too: three times slower than int8.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    copies = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in constants]
    outputs = {output.name for output in graph.output}
    copies = [node for node in copies if node.output[0] not in outputs]
    for node in copies:
        tensor = graph.initializer.add()
        tensor.CopyFrom(constants[node.input[0]])
        tensor.name = node.output[0]
        graph.node.remove(node)
    return bool(copies)


def _around_pools_beyond_the_edge(graph: Any) -> list[str]:
    """Nodes that average windows which reach over the edge, and those that read them: they stay fp32.

    ONNX Runtime's int8 kernel averages such windows wrongly, and is chosen wherever both sides are int8. Of ResNet-D's
    pooled shortcut on a map of odd size that cost 2 to 7 points of accuracy.
    """
    pools = [
        node for node in graph.node
        if node.op_type == "AveragePool" and any(a.name == "ceil_mode" and a.i for a in node.attribute)
    ]  # fmt: skip
    written = {name for node in pools for name in node.output}
    return [node.name for node in [*pools, *(n for n in graph.node if written & set(n.input))]]


def _beside_products(graph: Any) -> list[str]:
    """Of a network with attention, all nodes but products and convolutions: they stay fp32.

    Softmax, GELU and the scaling of logits are made of many small operators, between which rounding costs more time
    than int8 saves (a fifth of `vit28`'s largest network in ONNX Runtime), and OpenVINO's transformations fail on some.
    """
    weighted = {name for node in graph.node if node.op_type == "Softmax" for name in node.output}
    if not any(node.op_type == "MatMul" and weighted & set(node.input) for node in graph.node):
        return []
    return [node.name for node in graph.node if node.op_type not in ("Conv", "Gemm", "MatMul")]


def _transposed_in_groups(graph: Any) -> list[str]:
    """Transposed convolutions in groups: the quantiser takes their weight's channels for those of one group."""
    return [
        node.name for node in graph.node
        if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
    ]  # fmt: skip


class OnnxQuantizer:
    """An fp32 ONNX file with the ranges of its activations, which can be quantised in many ways. A context manager.

    Args:
        source: the file; one input.
        batches: arrays `(batch, channels, height, width)` float32 in the file's batch size, to take the ranges from.
        calibration: how the range of an activation follows from its values; `entropy` and `percentile` keep all
            activations of all batches in memory.

    Raises:
        UserError: a file that cannot be read, no batches, or batches that it does not take.
    """

    def __init__(
        self, source: Path, batches: Iterable[np.ndarray[Any, Any]], calibration: CalibrationMethod = "minmax"
    ) -> None:
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        if calibration not in get_args(CalibrationMethod):
            raise UserError(f"calibration = {calibration!r}: expected {', '.join(get_args(CalibrationMethod))}")
        self.source, self.calibration = source, calibration
        self.batches = list(batches)
        if not self.batches:
            raise UserError(f"{source}: no calibration images, not even one batch")
        self._folder = tempfile.TemporaryDirectory(prefix="nasbench-quantise-")
        self.prepared = Path(self._folder.name) / "prepared.onnx"
        try:
            with quiet():
                # Shapes only: the converter has folded normalisation, and the runtime's own optimisation would split
                # hard-swish in two, each half then quantised (5 % slower). Shapes are static: no symbolic pass.
                quant_pre_process(str(source), str(self.prepared), skip_optimization=True, skip_symbolic_shape=True)
            model = onnx.load(str(self.prepared), load_external_data=False)
            if _own_constants(model.graph):
                onnx.save(model, str(self.prepared))
        except Exception as error:  # the tools raise whatever onnx, numpy and the runtime raise
            self.close()
            raise UserError(f"{source}: cannot be quantised: {reason(error)}") from error
        self.input = model.graph.input[0].name
        self.layers = weight_layers(model)
        self._left = [
            name
            for unfit in (_around_pools_beyond_the_edge, _beside_products, _transposed_in_groups)
            for name in unfit(model.graph)
        ]
        self.nodes = {node.name: node.op_type for node in model.graph.node if node.op_type not in ("Constant",)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove what was kept for further files."""
        self._folder.cleanup()

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names of the nodes that patterns such as `*/head/*` match.

        Raises:
            UserError: one that matches none.
        """
        found: dict[str, None] = {}
        for pattern in patterns:
            hits = fnmatch.filter(self.nodes, pattern)
            if not hits:
                raise UserError(f"exclude: no node matches {pattern!r}. {nearest(pattern, self.nodes)[:300]}")
            found.update(dict.fromkeys(hits))
        return list(found)

    def write(
        self,
        path: Path,
        *,
        per_channel: bool = True,
        reduce_range: bool = False,
        exclude: Sequence[str] = (),
        bits: Mapping[str, int] | None = None,
    ) -> None:
        """Write the quantised file: unsigned activations, signed weights.

        Args:
            path: written in place, so the caller makes it atomic.
            per_channel: one scale per output channel of a weight, instead of one per weight.
            reduce_range: 7 bits for weights. x86 processors without VNNI add pairs of 8-bit products in 16 bits, which
                overflow: there, 8 bits cost the logits of MobileNetV3-like networks 5 dB of signal-to-noise ratio (28
                to 22 dB) and gained no speed.
            exclude: names of nodes that stay fp32.
            bits: of single layers' weights by node: 8 (as all others), 4 (activations stay 8 bits; the runtime
                computes in fp32 from weights unpacked once, so that this saves memory and not time), or 32 (fp32).

        Raises:
            UserError: a file that cannot be quantised.
        """
        from onnxruntime import quantization as ortq

        methods, given = ortq.CalibrationMethod, dict(bits or {})
        layers = {layer.name: layer for layer in self.layers}
        for name, wanted in given.items():
            if name not in layers or wanted not in layers[name].choices:
                known = layers[name].choices if name in layers else "no layer with weights of that name"
                raise UserError(f"{self.source}: {name} in {wanted} bits: expected {known}")
        floats = [*exclude, *self._left, *(name for name, b in given.items() if b == 32)]
        nibbles = {}
        for name, b in given.items():
            if b == 4:
                axis = {"axis": layers[name].axis} if per_channel else {}
                nibbles[layers[name].weight] = [
                    {"quant_type": ortq.QuantType.QInt4, "symmetric": True, "reduce_range": False, **axis}
                ]
        more: dict[str, Any] = {}
        if "calibration_cache_path" in inspect.signature(ortq.quantize_static).parameters:
            more["calibration_cache_path"] = str(Path(self._folder.name) / f"{self.calibration}.json")
        try:
            with quiet():
                ortq.quantize_static(
                    str(self._with_nibbles() if nibbles else self.prepared),
                    str(path),
                    _reader(self.input, self.batches),
                    quant_format=ortq.QuantFormat.QDQ,
                    activation_type=ortq.QuantType.QUInt8,
                    weight_type=ortq.QuantType.QInt8,
                    per_channel=per_channel,
                    reduce_range=reduce_range,
                    nodes_to_exclude=floats,
                    calibrate_method={
                        "minmax": methods.MinMax,
                        "entropy": methods.Entropy,
                        "percentile": methods.Percentile,
                    }[self.calibration],
                    extra_options={"TensorQuantOverrides": nibbles} if nibbles else None,
                    **more,
                )
        except Exception as error:  # the tools raise whatever onnx, numpy and the runtime raise
            raise UserError(f"{self.source}: cannot be quantised: {reason(error)}") from error

    def _with_nibbles(self) -> Path:
        """The file in an opset that has 4-bit tensors."""
        import onnx

        path = self.prepared.with_name("nibbles.onnx")
        if not path.exists():
            onnx.save(onnx.version_converter.convert_version(onnx.load(str(self.prepared)), _NIBBLES), str(path))
        return path


def quantize_onnx(
    source: Path,
    path: Path,
    batches: Iterable[np.ndarray[Any, Any]],
    *,
    calibration: CalibrationMethod = "minmax",
    per_channel: bool = True,
    reduce_range: bool = False,
) -> None:
    """Quantise an fp32 ONNX file to int8; see `OnnxQuantizer`.

    Raises:
        UserError: a file that cannot be quantised.
    """
    with OnnxQuantizer(source, batches, calibration) as quantizer:
        quantizer.write(path, per_channel=per_channel, reduce_range=reduce_range)


def quantize_weights(source: Path, path: Path, *, bits: int = 4, block: int = 32) -> list[str]:
    """Keep the weights of matrix products in 4 or 8 bits, in blocks with a scale each; activations stay fp32.

    ONNX Runtime computes such a product with its `MatMulNBits` kernel. Convolutions, and products that torch writes as
    Gemm (of a linear layer on plain vectors), have no such form and stay fp32.

    Args:
        path: written in place, so the caller makes it atomic.
        block: weights with one scale, a power of two of 16 or more.

    Returns:
        Names of the nodes that were quantised.

    Raises:
        UserError: impossible bits or block, or a network without such products.
    """
    if bits not in (4, 8):
        raise UserError(f"bits = {bits}: expected 4 or 8")
    if block < 16 or block & (block - 1):
        raise UserError(f"block = {block}: expected a power of two, 16 or more")
    products = [layer for layer in weight_layers(source) if layer.kind == "MatMul"]
    if not products:
        kinds = ", ".join(sorted({layer.kind for layer in weight_layers(source)})) or "no layers"
        raise UserError(f"{source}: has no matrix products with weights (it has {kinds}); take the stage quantize")
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    try:
        with quiet():
            config = DefaultWeightOnlyQuantConfig(block_size=block, is_symmetric=True, bits=bits)
            quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=config)
            quantizer.process()
            onnx.save(quantizer.model.model, str(path))
    except Exception as error:  # the tools raise whatever onnx, numpy and the runtime raise
        raise UserError(f"{source}: its weights cannot be quantised: {reason(error)}") from error
    return [layer.name for layer in products]


def _reader(name: str, batches: Iterable[np.ndarray[Any, Any]]) -> Any:
    from onnxruntime import quantization as ortq

    class Reader(ortq.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[np.ndarray[Any, Any]] = iter(batches)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            x = next(self.feeds, None)
            return None if x is None else {name: x}

    return Reader()
