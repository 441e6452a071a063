"""Post-search stages: what they produce runs, is checked, and comes in a possible order."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from onnx import load as load_onnx
from onnx import numpy_helper
from onnx import save as save_onnx
from torch import nn

from hardware_profiles import OnnxConverter, Target, load_target
from hardware_profiles.meter import Artifact
from nasbench.stages.artifacts import evaluate_artifact, run_artifact
from nasbench.stages.base import Candidate, Form, StageContext, check_order
from nasbench.stages.export import Export
from nasbench.stages.finetune import FineTune
from nasbench.stages.quantize import Quantize
from nasbench.training import evaluate_network, predict_logits
from search_spaces import UserError


def test_finetuning_improves_a_copy(candidate, context, task):
    before = {n: t.clone() for n, t in candidate.network.state_dict().items()}
    accuracy = evaluate_network(candidate.network, task, "train", context.input_shape)
    result = FineTune(epochs=3, lr=0.05, batch_size=40).run(candidate, context)
    assert result.form is Form.FLOAT
    assert evaluate_network(result.network, task, "train", context.input_shape) > accuracy
    assert all(torch.equal(before[n], t) for n, t in candidate.network.state_dict().items())
    assert [row["epoch"] for row in json.loads((context.directory / "knee-finetune.json").read_text())] == [1, 2, 3]
    assert not list(context.directory.glob("*.safetensors"))


def test_finetuning_needs_no_supernet(candidate, context, task):
    alone = StageContext(context.task, context.space, context.directory, 0, None, context.input_shape)
    with_teacher = FineTune(epochs=1).run(candidate, context)
    without = FineTune(epochs=1).run(candidate, alone)
    assert not torch.equal(with_teacher.network.head.weight, without.network.head.weight)


def test_export_writes_an_equal_network_with_its_manifest(candidate, context, task):
    result = Export().run(candidate, context)
    assert (result.form, result.artifact.format, result.artifact.precision) == (Form.ARTIFACT, "onnx", "fp32")
    images = task.split("val").images[:7]
    expected = predict_logits(candidate.network, task, images, context.input_shape).numpy()
    np.testing.assert_allclose(run_artifact(result.artifact, task, images), expected, atol=1e-3)
    assert evaluate_artifact(result.artifact, task, "val") == pytest.approx(
        evaluate_network(candidate.network, task, "val", context.input_shape), abs=0.005
    )
    manifest = json.loads(result.artifact.path.with_suffix(".json").read_text())
    assert manifest["sha256"] == hashlib.sha256(result.artifact.path.read_bytes()).hexdigest()
    assert manifest["classes"] == list(task.class_names)
    assert manifest["input_shape"] == [1, 32, 32]
    assert manifest["preprocessing"]["mean"] == pytest.approx(task.normalisation[0].tolist())
    assert manifest["check"]["largest_relative_difference"] < 1e-3


def test_a_tampered_export_is_refused_and_not_kept(candidate, context, monkeypatch):
    import nasbench.exporting as module

    class Tampering(OnnxConverter):
        def convert(self, network, target, input_shape, path, images=None):
            artifact = super().convert(network, target, input_shape, path, images)
            model = load_onnx(str(path))
            weight = next(w for w in model.graph.initializer if len(w.dims) == 2)
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
            save_onnx(model, str(path))
            return artifact

    monkeypatch.setattr(module, "converter_for", lambda target: Tampering())
    with pytest.raises(UserError, match=r"differs from the network by 0\.0.*tolerance = 0\.001.*not written"):
        Export().run(candidate, context)
    assert list(context.directory.iterdir()) == []
    assert Export(tolerance=0.1).run(candidate, context).artifact.path.exists()


def test_a_network_without_finite_output_is_not_exported(candidate, context):
    with torch.no_grad():
        candidate.network.head.bias[0] = float("nan")
    with pytest.raises(UserError, match="differs from the network by nan"):
        Export().run(candidate, context)


@pytest.mark.parametrize("calibration", ["minmax", "percentile"])
def test_int8_runs_and_stays_near_float(candidate, context, task, calibration):
    result = Quantize(images=64, calibration=calibration).run(candidate, context)
    assert (result.form, result.artifact.precision) == (Form.ARTIFACT, "int8")
    kinds = {node.op_type for node in load_onnx(str(result.artifact.path)).graph.node}
    assert "QuantizeLinear" in kinds
    float_accuracy = evaluate_network(candidate.network, task, "val", context.input_shape)
    assert evaluate_artifact(result.artifact, task, "val") > float_accuracy - 0.05
    manifest = json.loads(result.artifact.path.with_suffix(".json").read_text())
    assert manifest["check"]["agreement_with_fp32"] > 0.85
    assert manifest["quantisation"]["calibration"] == calibration
    assert sorted(p.suffix for p in context.directory.iterdir()) == [".json", ".onnx"]


def test_an_exported_network_can_be_quantised_but_not_a_quantised_one(candidate, context):
    exported = Export().run(candidate, context)
    quantised = Quantize(images=32).run(exported, context)
    assert quantised.artifact.precision == "int8"
    with pytest.raises(UserError, match="takes an fp32 ONNX file, this is int8 onnx"):
        Quantize().run(quantised, context)


def test_impossible_orders_are_refused_before_anything_runs():
    tune, export, quantize = ("finetune", FineTune()), ("export", Export()), ("quantize", Quantize())
    for good in ([tune, tune, export, quantize], [quantize], [export], [tune, quantize], []):
        check_order(good)
    with pytest.raises(UserError, match=r"stages\[1\] \('export'\) takes a float module.*gives a runtime artifact"):
        check_order([quantize, export])
    with pytest.raises(UserError, match=r"stages\[1\] \('finetune'\) takes a float module"):
        check_order([export, tune])
    with pytest.raises(UserError, match=r"stages\[1\] \('quantize'\) stands there a second time"):
        check_order([quantize, quantize])


def test_networks_of_a_fixed_batch_size_run_on_any_number_of_images(candidate, task, tmp_path):
    class InFours(Target):
        batch = 4

    host = load_target("host:fp32")
    target = InFours(host.profile, host.operating_point)
    artifact = OnnxConverter().convert(candidate.network, target, (1, 32, 32), tmp_path / "four.onnx")
    images = task.split("val").images[:6]
    expected = predict_logits(candidate.network, task, images, (1, 32, 32)).numpy()
    np.testing.assert_allclose(run_artifact(artifact, task, images), expected, atol=1e-3)


def test_files_that_cannot_be_run_are_named(task, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"bad\.onnx: ONNX Runtime cannot run it"):
        evaluate_artifact(Artifact(path, "onnx", "fp32", (1, 32, 32)), task, "val")
    with pytest.raises(UserError, match="format 'bin', expected onnx, tflite, pte, xml"):
        evaluate_artifact(Artifact(path, "bin", "fp32", (1, 32, 32)), task, "val")


def test_a_network_that_has_no_onnx_form_is_named(context):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x.flatten(2))[:, 0]

    with pytest.raises(UserError, match="Odd"):
        Export().run(Candidate("odd", None, Form.FLOAT, network=Odd()), context)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: FineTune(epochs=-1), "epochs"),
        (lambda: FineTune(lr=-1.0), "lr"),
        (lambda: FineTune(distillation_weight=2.0), "distillation_weight"),
        (lambda: FineTune(temperature=0.0), "temperature"),
        (lambda: Export(tolerance=0.0), "tolerance"),
        (lambda: Export(images=0), "images"),
        (lambda: Quantize(images=0), "images"),
    ],
)
def test_values_out_of_range_are_named(make, key):
    with pytest.raises(UserError, match=f"{key} = .*expected"):
        make()
