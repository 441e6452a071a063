import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from hardware_profiles import Artifact, OnnxConverter, OnnxRuntimeMeter, Target, converter_for, load_target, meter_for
from hardware_profiles import passes as module
from hardware_profiles.paths import atomic
from search_spaces import UserError

FAST = {"passes": 3, "max_passes": 3, "pass_ms": 1.0}


def test_the_onnx_file_computes_what_the_network_does(
    make_network: Callable[[int], nn.Module], host: Target, tmp_path: Path
) -> None:
    network = make_network(8).train()
    network[0].eval()
    artifact = OnnxConverter().convert(network, host, (3, 16, 16), tmp_path / "n.onnx")
    assert [m.training for m in (network, network[0], network[1])] == [True, False, True]
    assert artifact.file_bytes > 0
    assert artifact.input_shape == (3, 16, 16)

    graph = onnx.load(artifact.path).graph
    assert "BatchNormalization" not in {n.op_type for n in graph.node}
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 16]
    x = torch.randn(1, 3, 16, 16)
    expected = network.eval()(x).detach().numpy()
    got = ort.InferenceSession(str(artifact.path)).run(None, {graph.input[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_conversion_that_fails_leaves_nothing_behind_and_prints_nothing(
    host: Target, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x)

    network = Odd().train()
    with pytest.raises(UserError, match="Odd: cannot be written as ONNX"):
        OnnxConverter().convert(network, host, (3, 4, 4), tmp_path / "n.onnx")
    assert network.training
    assert list(tmp_path.glob("*.onnx")) == list(tmp_path.glob(".*")) == []
    ctypes.CDLL(None).fflush(None)  # torch prints the whole graph from C++
    assert capfd.readouterr() == ("", "")


def test_targets_that_cannot_be_measured_here_say_how_to(host: Target) -> None:
    assert isinstance(meter_for(host), OnnxRuntimeMeter)
    assert isinstance(converter_for(host), OnnxConverter)
    with pytest.raises(UserError, match=r"jetson_nano:fp16-maxn: .*not the machine.*trtexec"):
        meter_for(load_target("jetson_nano"))
    assert isinstance(converter_for(load_target("jetson_nano")), OnnxConverter)
    with pytest.raises(UserError, match="on this machine only"):
        OnnxRuntimeMeter().measure([], load_target("raspberry_pi_4"))


def test_a_measurement_keeps_all_samples_and_the_whole_protocol(artifacts: list[Artifact], host: Target) -> None:
    measured = OnnxRuntimeMeter(**FAST).measure(artifacts, host)
    for artifact, m in zip(artifacts, measured, strict=True):
        assert m.artifact is artifact
        assert not m.error
        assert m.protocol.passes == 3
        assert len(m.samples_ms) >= 3 * 3
        assert m.latency_ms == m.samples_ms.min() <= m.median_ms <= m.percentile_ms(90)
        assert m.protocol.runtime_version == ort.__version__
        assert (m.protocol.threads, m.protocol.batch, m.protocol.precision) == (1, 1, "fp32")
        assert m.protocol.host
    assert OnnxRuntimeMeter().measure([], host) == []


def test_passes_go_round_all_artifacts_in_changing_order(
    artifacts: list[Artifact], host: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    take = OnnxRuntimeMeter._take

    def spy(self: OnnxRuntimeMeter, running: Any) -> None:
        turns.append(running.artifact.path.stem)
        take(self, running)

    monkeypatch.setattr(OnnxRuntimeMeter, "_take", spy)
    OnnxRuntimeMeter(passes=8, max_passes=8, pass_ms=0.1, isolated=False).measure(artifacts, host)
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 8
    assert all(sorted(r) == ["16", "4", "8"] for r in rounds)
    assert len(set(rounds)) > 1


def test_a_best_time_that_is_not_repeated_costs_further_passes_and_is_flagged(
    artifacts: list[Artifact], host: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([1.0] + [2.0 + i for i in range(10_000)])  # one fast run, then slower and slower
    monkeypatch.setattr(module, "_timed_ms", lambda run: next(clock))
    meter = OnnxRuntimeMeter(passes=2, max_passes=5, pass_ms=1.0, isolated=False)
    (m,) = meter.measure(artifacts[:1], host)
    assert m.protocol.passes == 5
    assert m.throttled
    assert "not repeated" in m.note

    monkeypatch.setattr(module, "_timed_ms", lambda run: 2.0)
    (m,) = meter.measure(artifacts[:1], host)
    assert m.protocol.passes == 2
    assert not m.throttled


def test_one_bad_file_gets_an_error_and_the_others_their_numbers(
    artifacts: list[Artifact], host: Target, tmp_path: Path
) -> None:
    corrupt = tmp_path / "corrupt.onnx"
    corrupt.write_bytes(artifacts[0].path.read_bytes()[:100])
    shape = artifacts[0].input_shape
    bad = [
        Artifact(corrupt, "onnx", "fp32", shape),
        Artifact(tmp_path / "gone.onnx", "onnx", "fp32", shape),
        Artifact(artifacts[0].path, "tflite", "fp32", shape),
        Artifact(artifacts[0].path, "onnx", "fp32", (3, 9, 9)),
    ]
    measured = OnnxRuntimeMeter(**FAST).measure([artifacts[0], *bad, artifacts[1]], host)
    assert [bool(m.error) for m in measured] == [False, True, True, True, True, False]
    assert all(np.isnan(m.latency_ms) and len(m.samples_ms) == 0 for m in measured[1:5])
    for m, word in zip(measured[1:5], ["corrupt.onnx", "no such file", "'tflite'", "cannot run"], strict=True):
        assert word in m.error


def test_large_sets_are_opened_in_groups(artifacts: list[Artifact], host: Target) -> None:
    meter = OnnxRuntimeMeter(**FAST, open_mb=artifacts[0].file_bytes * 1.5 / 1e6)
    measured = meter.measure(artifacts, host)
    assert [m.artifact for m in measured] == artifacts
    assert not any(m.error for m in measured)


def test_meters_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2 passes"):
        OnnxRuntimeMeter(passes=1)


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write"), atomic(path / "below" / "x"):
        pass
