"""`nasbench export` and what is behind it: checked files with manifests, and refusals that name operator and layer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hardware_profiles import load_target
from nasbench.cli import app
from nasbench.exporting import (
    SUFFIX,
    calibration_images,
    check_operators,
    export_network,
    export_target,
    host_target,
)
from nasbench.stages.artifacts import evaluate_artifact
from nasbench.stages.export import Export
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training import evaluate_network, save_weights
from search_spaces import UserError, reference_network, trace, trace_layers

SHAPE = (1, 28, 28)


class Small(nn.Module):
    """With an activation that the Edge TPU leaves to its host."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), activation())
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


@pytest.fixture(scope="module")
def task() -> FashionMNIST:
    return FashionMNIST()


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def nasbench(*words: object) -> str:
    """Runs the command in this process; its error where it ends in one."""
    result = CliRunner().invoke(app, [str(w) for w in words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_layers_are_those_that_ran_the_operators() -> None:
    network = Small(nn.Hardswish)
    workload, layers = trace_layers(network, SHAPE)
    assert workload == trace(network, SHAPE)
    assert [(op.kind, layer) for op, layer in zip(workload.operators, layers, strict=True)] == [
        ("conv2d", "stem.0"), ("batch_norm", "stem.1"), ("hard_swish", "stem.2"), ("global_avg_pool", ""),
        ("linear", "head"),
    ]  # fmt: skip
    assert not network.head._forward_hooks


def test_an_exported_file_comes_with_all_that_its_user_needs(network, task, tmp_path) -> None:
    done = export_network(network, SHAPE, tmp_path / "n.onnx", host_target("onnx", "fp32"), task=task, images=100)
    manifest = json.loads(done.manifest_path.read_text())
    assert manifest == done.manifest
    assert manifest["sha256"] == hashlib.sha256((tmp_path / "n.onnx").read_bytes()).hexdigest()
    assert manifest["classes"] == list(task.class_names)
    assert manifest["check"]["images"] == 100
    assert manifest["check"]["same_top1"] == 1
    assert manifest["check"]["accuracy"] == manifest["check"]["accuracy_network"]
    (measured,) = manifest["measurements"]
    assert measured["latency_ms"] > 0
    assert measured["load_and_first_run_ms"] > 0
    assert {"runtime_version", "threads", "host"} <= measured["protocol"].keys()
    assert {"torch", "onnxruntime", "nasbench-hw"} <= manifest["versions"].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n.json", "n.onnx"]


def test_ranges_come_from_training_images(network, task, tmp_path) -> None:
    target = host_target("onnx", "int8")
    done = export_network(network, SHAPE, tmp_path / "n.onnx", target, task=task, calibration=32, measure=False)
    assert done.manifest["calibration"]["note"] == "int8 ranges calibrated on 32 images"
    accuracy = evaluate_network(network, task, "val", SHAPE)
    assert evaluate_artifact(done.artifact, task, "val") == pytest.approx(accuracy, abs=0.03)
    noise = export_network(network, SHAPE, tmp_path / "m.onnx", target, measure=False)
    assert "seeded noise" in noise.manifest["calibration"]["note"]
    assert noise.manifest["calibration"]["images"] == 0
    assert "task" not in noise.manifest


def test_a_refused_export_leaves_nothing(network, task, tmp_path) -> None:
    for options in ({"tolerance": 1e-12, "images": 20}, {"calibration": 8}, {"calibration": 10**6}):
        precision = "fp32" if "tolerance" in options else "int8"
        with pytest.raises(UserError, match="tolerance|expected 16 or more|training split of fashion_mnist has"):
            export_network(network, SHAPE, tmp_path / "n.onnx", host_target("onnx", precision), task=task, **options)
    with pytest.raises(UserError, match=r"\(3, 28, 28\) cannot take images of \(1, 28, 28\)"):
        calibration_images(task, (3, 28, 28), 32, 0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/n.onnx: cannot be written"):
        export_network(network, SHAPE, tmp_path / "file" / "n.onnx", host_target("onnx", "fp32"), measure=False)


def test_modes_of_single_layers_stay_as_they_were(network, tmp_path) -> None:
    network.train()
    network.stem[1].eval()
    export_network(network, SHAPE, tmp_path / "n.onnx", host_target("onnx", "fp32"), measure=False)
    assert network.training
    assert network.head.training
    assert not network.stem[1].training


def test_what_a_device_does_not_run_is_named_with_its_layer() -> None:
    edge_tpu = load_target("edge_tpu")
    assert check_operators(Small(), SHAPE, edge_tpu, "refuse") == []
    with pytest.raises(UserError, match=r"Small cannot be exported for edge_tpu:int8: layer 'stem.2', .*hard_swish"):
        check_operators(Small(nn.Hardswish), SHAPE, edge_tpu, "refuse")
    (left,) = check_operators(Small(nn.Hardswish), SHAPE, edge_tpu, "allow")
    assert "stem.2" in left


@pytest.mark.parametrize(
    ("format", "target", "precision", "match"),
    [
        ("tflite", "", "", "Format|format = 'tflite'"),
        ("onnx", "", "int4", "precision = 'int4': expected fp32, fp16 or int8"),
        (None, "edge_tpu", "fp32", "edge_tpu computes in int8 only"),
        (None, "edge_tpu_dev", "", "unknown device"),
        (None, "host:fp32", "int8", "host:fp32 computes in fp32"),
        ("onnx", "host:fp32", "int8", "host:fp32 computes in fp32"),
    ],
)
def test_formats_and_precisions_that_a_target_does_not_take(format, target, precision, match) -> None:
    with pytest.raises(UserError, match=match):
        export_target(format, target, precision)


def test_the_precision_is_the_devices_where_none_is_named() -> None:
    assert export_target(None, "", "").name == "host:fp32"
    assert export_target(None, "host", "int8").name == "host:int8"
    assert export_target("onnx", "jetson_nano").precision in ("fp16", "fp32")


@pytest.mark.extra("openvino")
def test_a_stick_of_the_myriad_kind_gets_fp16(network, task, tmp_path) -> None:
    with pytest.raises(UserError, match="ncs2 computes in fp16 only"):
        export_target("openvino", "ncs2", "int8")
    with pytest.raises(UserError, match="runs openvino files"):
        export_target("onnx", "ncs2")
    done = export_network(network, SHAPE, tmp_path / "n.xml", export_target(None, "ncs2"), task=task)
    assert done.artifact.precision == "fp16"
    assert set(done.manifest["files"]) == {"n.xml", "n.bin"}
    assert done.manifest["check"]["same_top1"] > 0.97
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".json", ".xml"]


@pytest.mark.extra("litert", "ethos-u")
def test_the_npus_compiler_says_cycles_and_sram(network, task, tmp_path) -> None:
    done = export_network(network, SHAPE, tmp_path / "n.tflite", export_target(None, "ethos_u55"), task=task)
    here, npu = done.manifest["measurements"]
    assert here["target"] == "host:litert-int8"
    assert npu["cycles"] > 1000
    assert npu["peak_memory_bytes"] > 28 * 28
    assert npu["protocol"]["statistic"] == "estimate of the compiler"


@pytest.mark.extra("executorch")
def test_a_program_for_executorch_runs_on_real_images(network, task, tmp_path) -> None:
    target = export_target("executorch")
    done = export_network(network, SHAPE, tmp_path / "n.pte", target, task=task, images=50)
    assert done.manifest["check"]["same_top1"] == 1
    assert done.manifest["measurements"][0]["target"] == "host:executorch-fp32"


def test_the_command_exports_a_network_with_its_weights(task, tmp_path) -> None:
    torch.manual_seed(1)
    module = reference_network("mobilenet_v2_0.35", resolution=32, in_channels=1, num_classes=10).build()
    save_weights(tmp_path / "w.safetensors", module)
    words = ["export", "mobilenet_v2_0.35@32", "--task", "fashion_mnist", "--images", 20, "--no-measure"]
    output = nasbench(*words, "--weights", tmp_path / "w.safetensors", "--output", tmp_path / "out")
    assert "mobilenet_v2_0_35-32-onnxruntime-fp32.onnx" in output
    (manifest,) = (tmp_path / "out").glob("*.json")
    said = json.loads(manifest.read_text())
    assert said["weights"].endswith("w.safetensors")
    assert said["input_shape"] == [1, 32, 32]
    with pytest.raises(UserError, match="of another network"):
        nasbench("export", "resnet18@32", "--task", "fashion_mnist", "--weights", tmp_path / "w.safetensors")


def test_the_command_exports_the_networks_of_a_run(finished_run: Path, tmp_path) -> None:
    from nasbench.run import load_run

    stages = load_run(finished_run).stages()
    nasbench("export", finished_run, "--output", tmp_path, "--images", 0, "--no-measure")
    manifests = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))]
    assert {m["network"] for m in manifests} == set(stages["network"])
    for manifest in manifests:
        rows = stages[(stages["network"] == manifest["network"]) & (stages["stage"] == "finetune")]
        assert manifest["after_stage"] == "finetune"
        assert np.isclose(manifest["check"]["accuracy"], rows["accuracy"].iloc[0], atol=0.011)
    with pytest.raises(UserError, match="--name nobody: no such network"):
        nasbench("export", finished_run, "--name", "nobody")
    with pytest.raises(UserError, match="a run knows its own"):
        nasbench("export", finished_run, "--task", "fashion_mnist")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["nothing_like_it"], "no network 'nothing_like_it'"),
        (["resnet18", "--name", "knee"], "names networks of a run"),
        (["a.onnx"], "is a file of a runtime already"),
        (["."], "no run there"),
        (["resnet18", "--format", "tflite"], "format"),
        (["resnet18", "--images", "-1"], "--images -1"),
        (["resnet18", "--fallback", "perhaps"], "fallback"),
    ],
)
def test_wrong_words_are_named(words, match) -> None:
    with pytest.raises(UserError, match=match):
        nasbench("export", *words)


def test_a_stage_is_refused_before_it_runs_where_its_target_cannot() -> None:
    for options, match in (
        ({"precision": "int2"}, "precision = 'int2'"),
        ({"target": "edge_tpu", "precision": "fp16"}, "edge_tpu computes in int8 only"),
        ({"calibration_images": 3}, "calibration_images = 3: expected 16"),
    ):
        with pytest.raises(UserError, match=match):
            Export(**options)
    assert Export(target="host:int8").target.precision == "int8"
    assert SUFFIX["litert"] == "tflite"
