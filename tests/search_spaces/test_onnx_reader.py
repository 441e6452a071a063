"""Workloads of ONNX models."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from search_spaces import MobileNetV3Space, UserError, read_onnx, trace


def model(
    nodes: list[onnx.NodeProto],
    shape: list[int | str],
    out: str = "y",
    **weights: np.ndarray[Any, Any],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


def cnn(batch: int | str = 1) -> onnx.ModelProto:
    """Convolution, depthwise convolution, relu6, pooling, fully connected layer."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Conv", ["a", "w2"], ["b"], group=4, kernel_shape=[3, 3]),
        helper.make_node("Clip", ["b", "zero", "six"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w3", "b3"], ["y"], transB=1),
    ]
    weights = {"w1": floats(4, 3, 3, 3), "b1": floats(4), "w2": floats(4, 1, 3, 3), "w3": floats(5, 4), "b3": floats(5)}
    limits = {"zero": np.float32(0), "six": np.float32(6)}
    return model(nodes, [batch, 3, 8, 8], **weights, **{k: np.array(v) for k, v in limits.items()})


def test_operators_of_a_convolutional_model() -> None:
    workload = read_onnx(cnn())
    assert [(op.kind, op.output.shape, op.params, op.macs) for op in workload.operators] == [
        ("conv2d", (4, 4, 4), 108 + 4, 4 * 16 * 27),
        ("depthwise_conv2d", (4, 2, 2), 36, 4 * 4 * 9),
        ("relu6", (4, 2, 2), 0, 0),
        ("global_avg_pool", (4, 1, 1), 0, 0),
        ("linear", (5,), 25, 20),
    ]
    assert workload.operators[0].stride == (2, 2)
    assert workload.operators[1].groups == 4
    assert workload.tensors[workload.inputs[0]].shape == (3, 8, 8)


def test_a_dynamic_batch_is_one() -> None:
    assert read_onnx(cnn("batch")) == read_onnx(cnn())


def test_the_given_model_stays_as_it_is() -> None:
    given = cnn("batch")
    before = given.SerializeToString()
    read_onnx(given)
    assert given.SerializeToString() == before


def test_products_with_and_without_weights() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["c", "d"], ["e"]),
        helper.make_node("Softmax", ["e"], ["y"]),
    ]
    workload = read_onnx(model(nodes, [1, 6, 8], w=floats(8, 4), b=floats(4)))
    assert [(op.kind, op.macs, op.params) for op in workload.operators] == [
        ("linear", 6 * 4 * 8, 32 + 4), ("matmul", 6 * 6 * 4, 0), ("softmax", 0, 0),
    ]  # fmt: skip
    # The bias belongs to the product, the transposition is a view: both factors are the first product.
    assert workload.reads[1] == (workload.writes[0], workload.writes[0])


def test_what_else_is_added_to_a_product_is_no_bias() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Add", ["c", "a"], ["d"]),
        helper.make_node("MatMul", ["d", "w2"], ["e"]),
        helper.make_node("Add", ["e", "p"], ["y"]),
    ]
    weights = {"w": floats(8, 4), "b": floats(4), "w2": floats(4, 4), "p": floats(6, 4)}
    workload = read_onnx(model(nodes, [1, 6, 8], **weights))
    # The first product is read again, and positions are no vector.
    assert [(op.kind, op.params) for op in workload.operators] == [
        ("linear", 32), ("add", 4), ("add", 0), ("linear", 16), ("add", 24),
    ]  # fmt: skip


def test_a_sigmoid_times_its_input_is_one_operator() -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["s"]),
        helper.make_node("Mul", ["x", "s"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["t"]),
        helper.make_node("Mul", ["x", "t"], ["y"]),
    ]
    workload = read_onnx(model(nodes, [1, 4, 4]))
    assert [op.kind for op in workload.operators] == ["silu", "sigmoid", "mul"]
    assert workload.reads == ((0,), (1,), (0, 2))


def test_one_slice_of_an_activation_is_a_view_and_a_table_of_weights_is_an_embedding() -> None:
    first = np.array(0)
    nodes = [
        helper.make_node("Gather", ["x", "first"], ["a"], axis=1),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    (op,) = read_onnx(model(nodes, [1, 6, 8], first=first)).operators
    assert (op.kind, op.inputs[0].shape) == ("relu", (8,))
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("Gather", ["t", "i"], ["y"]),
    ]
    (op,) = read_onnx(model(nodes, [1, 6], t=floats(50, 8))).operators
    assert (op.kind, op.params, op.output.shape) == ("embedding", 400, (6, 8))


def test_shapes_that_are_computed_are_followed() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["channels"]),
        helper.make_node("Div", ["channels", "two"], ["half"]),
        helper.make_node("Unsqueeze", ["half", "zero"], ["end"]),
        helper.make_node("Slice", ["x", "start", "end", "axis"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    numbers = {"one": np.array(1), "two": np.array(2), "zero": np.array([0]), "start": np.array([0])}
    workload = read_onnx(model(nodes, ["batch", 6, 4, 4], axis=np.array([1]), **numbers))
    assert [(op.kind, op.output.shape, op.params) for op in workload.operators] == [("relu", (3, 4, 4), 0)]


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.LeakyReLU(0.1), torch.nn.ELU(), torch.nn.Tanh(), torch.nn.ZeroPad2d(1), torch.nn.PixelShuffle(2),
        *(torch.nn.Upsample(scale_factor=2, mode=mode) for mode in ("nearest", "bilinear", "bicubic")),
        torch.nn.PReLU(4), torch.nn.Softmax(1),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_operators_are_called_as_torch_calls_them(layer: torch.nn.Module) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layer, (torch.randn(1, 4, 6, 6),), buffer, dynamo=False)
    read, traced = read_onnx(onnx.load_from_string(buffer.getvalue())), trace(layer, (4, 6, 6))
    assert [(op.kind, op.output, op.kernel, op.params) for op in read.operators] == [
        (op.kind, op.output, op.kernel, op.params) for op in traced.operators
    ]


def test_unknown_operators_keep_their_name() -> None:
    (op,) = read_onnx(model([helper.make_node("Sinh", ["x"], ["y"])], [1, 4])).operators
    assert (op.kind, op.macs) == ("Sinh", 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A network of a space as a workload and as torch exports it."""
    stages = [{"width": 16, "stride": 2, "depths": [2], "kernels": [5], "expansions": [3], "se": True}]
    space = MobileNetV3Space(3, 10, stages=stages, resolutions=[16], final_width=32, feature_width=24)
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    arch = space.references["largest"]
    network = space.build(arch).eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.dim() == 1:  # the exporter would keep equal biases once
                tensor.add_(torch.rand_like(tensor))
    torch.onnx.export(network, (torch.randn(1, 3, 16, 16),), path, dynamo=True, verbose=False)
    return space.workload(arch), path


def test_an_exported_network_has_the_operators_of_its_space(exported: tuple[Any, Path]) -> None:
    workload, path = exported
    read = read_onnx(path)
    # The exporter folds normalisation into convolutions, whose biases then are its shifts.
    folded = [op for op in workload.operators if op.kind != "batch_norm"]
    assert [(op.kind, op.macs, op.output, op.kernel, op.stride) for op in read.operators] == [
        (op.kind, op.macs, op.output, op.kernel, op.stride) for op in folded
    ]
    scales = sum(op.params // 2 for op in workload.operators if op.kind == "batch_norm")
    assert read.params == workload.params - scales
    assert read.peak_memory_bytes == workload.peak_memory_bytes


def test_a_quantised_network_moves_a_quarter_of_the_bytes(exported: tuple[Any, Path], tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)}]

        def get_next(self) -> dict[str, Any] | None:
            return self.left.pop() if self.left else None

    _, path = exported
    quantize_static(path, tmp_path / "int8.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
    fp32, int8 = read_onnx(path), read_onnx(tmp_path / "int8.onnx")
    assert int8.operators[0].kind == "quantize"
    assert (int8.macs, int8.params) == (fp32.macs, fp32.params)
    compute = [op for op in int8.operators if op.macs]
    assert {op.output.itemsize for op in compute} == {1}
    assert sum(op.bytes_moved for op in compute) * 4 == sum(op.bytes_moved for op in fp32.operators if op.macs)
    # ONNX Runtime leaves the last activation and the pooling after it in fp32.
    kept = [op.kind for op in int8.operators if op.output.itemsize == 4]
    assert set(kept) <= {"hard_swish", "global_avg_pool"}


@pytest.mark.parametrize("content", [b"", b"no model at all", cnn().SerializeToString()[:300]])
def test_corrupt_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match="broken.onnx"):
        read_onnx(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing.onnx: no such file"):
        read_onnx(tmp_path / "missing.onnx")


@pytest.mark.parametrize(
    ("shape", "message"),
    [([1, 3, "height", 8], "'x': dimension 2 is not fixed"), ([4, 3, 8, 8], "'x' has batch 4; export with batch 1")],
)
def test_sizes_must_be_fixed(shape: list[int | str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_onnx(model([helper.make_node("Relu", ["x"], ["y"])], shape))


def test_sizes_that_depend_on_data_are_refused() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["i"]), helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)]
    with pytest.raises(UserError, match="size of tensor 'i' is not fixed"):
        read_onnx(model(nodes, [1, 4]))


@pytest.mark.parametrize("batch", [1, "N"])
def test_operators_that_onnx_does_not_know_keep_their_name_where_the_file_tells_their_sizes(batch: int | str) -> None:
    nodes = [
        helper.make_node("Fold", ["x"], ["a"], name="first", domain="my.operators"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Score", ["b"], ["y"], domain="my.operators"),
    ]

    def sized(name: str, *shape: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape])

    def foreign(*known: onnx.ValueInfoProto) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "g", [sized("x", 8, 6)], [sized("y", 5)], value_info=known)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.operators", 1)]
        return helper.make_model(graph, opset_imports=opsets)

    told = sized("a", 8, 3)
    found = read_onnx(foreign(told)).operators
    assert [(op.kind, op.output.shape) for op in found] == [("Fold", (8, 3)), ("relu", (8, 3)), ("Score", (5,))]
    with pytest.raises(
        UserError, match=r"no operator 'Fold' of domain 'my.operators' \(node 'first'\).* 'a' .*value_info"
    ):
        read_onnx(foreign())


def test_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(UserError, match="Conv 'first' reads 'w', which nothing writes"):
        read_onnx(model([helper.make_node("Conv", ["x", "w"], ["y"], name="first")], [1, 3, 8, 8]))
