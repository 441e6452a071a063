"""Quantisation: what each way promises is kept by the file, and what is impossible is told by name."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from onnx import load as load_onnx
from onnxruntime import InferenceSession
from torch import nn

from hardware_profiles.host import has_int8_dot_product
from hardware_profiles.onnx_quantization import OnnxQuantizer, quantize_weights, weight_layers
from hardware_profiles.onnx_runtime import write_onnx
from nasbench.stages.artifacts import evaluate_artifact
from nasbench.stages.base import Candidate, Form
from nasbench.stages.mixed_precision import LayerBits, MixedPrecision
from nasbench.stages.quantization_aware import QuantizationAware
from nasbench.stages.quantize import Quantize
from nasbench.stages.weight_only import WeightOnly
from nasbench.training.fake_quantisation import FakeQuantised
from search_spaces import UserError, load_space, read_onnx


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.product, self.head = nn.Conv2d(1, 32, 8, 8), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.product(x).relu()).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory, self.head = nn.GRU(32, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.memory(x[:, 0])[0][:, -1])


def manifest(result):
    return json.loads(result.artifact.path.with_suffix(".json").read_text())


def test_the_best_calibration_on_validation_images_is_kept(candidate, context, task):
    result = Quantize(images=32, calibration="auto").run(candidate, context)
    said = manifest(result)["quantisation"]
    tried = said["accuracy_by_calibration"]
    assert set(tried) == {"minmax", "entropy", "percentile"}
    assert tried[said["calibration"]] == max(tried.values())
    assert evaluate_artifact(result.artifact, task, "val") == pytest.approx(tried[said["calibration"]])
    assert sorted(p.suffix for p in context.directory.iterdir()) == [".json", ".onnx"]


def test_excluded_layers_stay_float(candidate, context):
    result = Quantize(images=16, exclude=["*head*"]).run(candidate, context)
    assert manifest(result)["quantisation"]["float_layers"] == ["/head/Gemm"]
    with pytest.raises(UserError, match=r"exclude: no node matches '\*tail\*'"):
        Quantize(images=16, exclude=["*tail*"]).run(candidate, context)


def test_a_layer_without_an_int8_form_is_skipped_or_refused_by_name(context):
    torch.manual_seed(0)
    candidate = Candidate("memory", None, Form.FLOAT, network=Recurrent().eval())
    result = Quantize(images=16).run(candidate, context)
    assert manifest(result)["quantisation"]["float_layers"] == ["/memory/GRU"]
    result.artifact.path.unlink()
    with pytest.raises(UserError, match=r"layer '/memory/GRU' \(GRU\) has no int8 form"):
        Quantize(images=16, unquantizable="refuse").run(candidate, context)
    assert not result.artifact.path.exists()


def test_four_bits_take_half_the_space_and_training_for_them_helps(candidate, context, task, tmp_path):
    eight = Quantize(images=32).run(candidate, context)
    layers = weight_layers_of(candidate, tmp_path)
    four = Quantize(images=32, weight_bits=4).run(replace_name(candidate, "four"), context)
    assert all(x.bytes_at(4) < x.bytes_at(8) < x.bytes_at(32) for x in layers if x.parameters > 16 * x.channels)
    assert four.artifact.file_bytes < eight.artifact.file_bytes + 4000  # networks this small are mostly graph
    learned = QuantizationAware(weight_bits=4, epochs=4, lr=0.02, batch_size=40).run(candidate, context)
    assert learned.form is Form.FLOAT
    assert list(learned.network.state_dict()) == list(candidate.network.state_dict())
    trained_four = Quantize(images=32, weight_bits=4).run(replace_name(learned, "learned"), context)
    before, after = (evaluate_artifact(r.artifact, task, "train") for r in (four, trained_four))
    assert after > before


def weight_layers_of(candidate, folder):
    write_onnx(candidate.network.eval(), np.zeros((1, 1, 32, 32), np.float32), folder / "n.onnx")
    layers = weight_layers(folder / "n.onnx")
    (folder / "n.onnx").unlink()
    return layers


def replace_name(candidate, name):
    from dataclasses import replace

    return replace(candidate, name=name)


def test_rounding_in_training_is_the_quantisers(candidate):
    network = copy.deepcopy(candidate.network)
    x = torch.randn(8, 1, 32, 32)
    rounding = FakeQuantised(network, 8, 8, x).eval()
    rounding.freeze()
    with torch.no_grad():
        fine = rounding(x)
        weight = network.head.weight
        scale = network.head.parametrizations.weight.original.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(weight / scale, (weight / scale).round(), atol=1e-3, rtol=0)
        exact = candidate.network.eval()(x)
    assert 0 < float((fine - exact).abs().max()) < 0.2 * float(exact.abs().max())
    released = rounding.release()
    with torch.no_grad():
        torch.testing.assert_close(released(x), exact)


def test_layers_get_bits_within_the_budget(candidate, context, task):
    stage = MixedPrecision(budget=0.3, evaluations=12, images=100, calibration_images=16)
    result = stage.run(candidate, context)
    said = manifest(result)["mixed_precision"]
    assert said["share_of_fp32_bytes"] <= 0.3
    assert set(said["bits"].values()) <= {4, 8, 32}
    within = [u["accuracy"] for u in said["uniform"].values() if u["share_of_fp32_bytes"] <= 0.3]
    assert said["accuracy"] >= max(within)
    again = stage.run(candidate, context)
    assert manifest(again)["mixed_precision"]["bits"] == said["bits"]
    floats = {x.name for x in weight_layers(result.artifact.path)}
    assert floats == {name for name, bits in said["bits"].items() if bits == 32}
    assert read_onnx(result.artifact.path).params > 0
    with pytest.raises(UserError, match=r"budget = 0.01: with 4 bits .* that is the least"):
        MixedPrecision(budget=0.01, evaluations=4).run(candidate, context)


def test_bytes_of_bits_add_up(candidate, tmp_path):
    layers = weight_layers_of(candidate, tmp_path)
    space = LayerBits(layers, (4, 8, 32))
    archs = space.sample(20, np.random.default_rng(0))
    expected = [sum(x.bytes_at(space.bits(a)[x.name]) for x in layers) for a in archs]
    np.testing.assert_allclose(space.bytes(archs), expected)
    assert set(space.bits(space.uniform(8)).values()) == {8}
    most = 1.5 * space.bytes(space.uniform(4)[None])[0]
    filled = space.filled(most, 20, np.random.default_rng(0))
    assert (space.bytes(filled) <= most).all()
    assert len(np.unique(filled, axis=0)) > 5
    np.testing.assert_array_equal(space.canonical(filled), filled)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_tokens_keep_weights_in_few_bits(context, task, bits):
    torch.manual_seed(0)
    candidate = Candidate("tokens", None, Form.FLOAT, network=Tokens().eval())
    result = WeightOnly(bits=bits, block=16).run(candidate, context)
    assert result.artifact.path.name == f"tokens-w{bits}.onnx"
    said = manifest(result)
    assert said["weight_only"]["layers"] == ["/product/MatMul"]
    assert said["check"]["agreement_with_fp32"] > 0.8
    kinds = [n.op_type for n in load_onnx(str(result.artifact.path)).graph.node]
    assert "MatMulNBits" in kinds
    plain = Quantize(images=16, exclude=["*"]).run(replace_name(candidate, "plain"), context)
    assert read_onnx(result.artifact.path).macs == read_onnx(plain.artifact.path).macs


def test_weights_alone_are_refused_where_there_are_no_products(candidate, context):
    with pytest.raises(UserError, match="has no matrix products with weights"):
        WeightOnly().run(candidate, context)
    assert not list(context.directory.glob("*.onnx"))


def test_too_few_images_and_other_networks_are_told(candidate, context, tmp_path):
    with pytest.raises(UserError, match="images = 9999: the training split of .* has 640"):
        Quantize(images=9999).run(candidate, context)
    write_onnx(candidate.network.eval(), np.zeros((1, 1, 32, 32), np.float32), tmp_path / "n.onnx")
    with pytest.raises(UserError, match="not even one batch"):
        OnnxQuantizer(tmp_path / "n.onnx", [])
    with (
        OnnxQuantizer(tmp_path / "n.onnx", [np.zeros((1, 1, 16, 16), np.float32)]) as quantizer,
        pytest.raises(UserError, match="cannot be quantised"),
    ):
        quantizer.write(tmp_path / "q.onnx")
    with pytest.raises(UserError, match="bits = 3: expected 4 or 8"):
        quantize_weights(tmp_path / "n.onnx", tmp_path / "q.onnx", bits=3)
    done = Quantize(images=16).run(candidate, context)
    for stage in (MixedPrecision(), WeightOnly()):
        with pytest.raises(UserError, match="takes an fp32 ONNX file, this is int8 onnx"):
            stage.run(done, context)
    with pytest.raises(UserError, match="no convolution or linear layer"):
        QuantizationAware().run(Candidate("x", None, Form.FLOAT, network=nn.Flatten()), context)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Quantize(images=8), "images = 8: expected 16"),
        (lambda: Quantize(weight_bits=5), "weight_bits = 5: expected 4 or 8"),
        (lambda: Quantize(calibration="guess"), "calibration = 'guess'"),
        (lambda: Quantize(unquantizable="ignore"), "unquantizable = 'ignore'"),
        (lambda: QuantizationAware(weight_bits=1), "weight_bits = 1: expected 2 to 8"),
        (lambda: QuantizationAware(activation_bits=16), "activation_bits = 16"),
        (lambda: WeightOnly(bits=2), "bits = 2"),
        (lambda: WeightOnly(block=24), "block = 24"),
        (lambda: MixedPrecision(budget=0.0), "budget = 0.0"),
        (lambda: MixedPrecision(choices=(8, 16)), r"choices = \[8, 16\]"),
        (lambda: MixedPrecision(evaluations=0), "evaluations = 0"),
        (lambda: MixedPrecision(strategy="darts"), "strategy = 'darts'"),
    ],
)
def test_impossible_options_are_named(make, match):
    with pytest.raises(UserError, match=match):
        make()


def test_equal_constants_leave_no_layer_of_an_untrained_network_float(tmp_path):
    layers = [nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()) for _ in range(3)]
    for layer in layers:
        nn.init.zeros_(layer[0].bias)  # torch's exporter keeps equal biases once
    x = np.random.default_rng(0).normal(size=(1, 8, 12, 12)).astype(np.float32)
    write_onnx(nn.Sequential(*layers).eval(), x, tmp_path / "n.onnx")
    with OnnxQuantizer(tmp_path / "n.onnx", [x]) as quantizer:
        quantizer.write(tmp_path / "int8.onnx")
    graph = load_onnx(tmp_path / "int8.onnx").graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 3
    assert all(made_by[name] == "DequantizeLinear" for node in convolutions for name in node.input)


def test_averages_over_the_edge_are_what_they_were(tmp_path):
    torch.manual_seed(0)
    pool = nn.AvgPool2d(2, 2, ceil_mode=True)
    network = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), pool, nn.Conv2d(8, 8, 1), nn.ReLU()).eval()
    x = np.random.default_rng(0).normal(size=(1, 8, 7, 7)).astype(np.float32)
    write_onnx(network, x, tmp_path / "n.onnx")
    with OnnxQuantizer(tmp_path / "n.onnx", [x]) as quantizer:
        quantizer.write(tmp_path / "int8.onnx", reduce_range=not has_int8_dot_product())
    session = InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    expected = network(torch.from_numpy(x)).detach().numpy()
    found = session.run(None, {"input": x})[0]
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_transformers_round_no_constants_and_run_in_openvino(tmp_path):
    torch.manual_seed(0)
    space = load_space("vit28", 1, 10)
    x = np.random.default_rng(0).normal(size=(1, 1, 28, 28)).astype(np.float32)
    network = space.build(space.references["smallest"]).eval()
    write_onnx(network, x, tmp_path / "n.onnx")
    with OnnxQuantizer(tmp_path / "n.onnx", [x]) as quantizer:
        quantizer.write(tmp_path / "int8.onnx")
    graph = load_onnx(tmp_path / "int8.onnx").graph
    made_by = {name: node for node in graph.node for name in node.output}
    constants = {node.output[0] for node in graph.node if node.op_type == "Constant"}

    def rounded_constant(name):
        pair = made_by.get(name)
        rounding = made_by.get(pair.input[0]) if pair is not None and pair.op_type == "DequantizeLinear" else None
        return rounding is not None and rounding.input[0] in constants

    readers = {node.op_type for node in graph.node if any(rounded_constant(name) for name in node.input)}
    assert readers == {"MatMul"}  # and not the factors of logits and of GELU
    openvino = pytest.importorskip("openvino")
    found = openvino.Core().compile_model(tmp_path / "int8.onnx", "CPU")(x)[0]
    expected = network(torch.from_numpy(x)).detach().numpy()
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
