"""The Ethos-U compiler as a meter: its estimates are read, said to be estimates, and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hardware_profiles import Artifact, Target, converter_for, load_target, meter_for
from hardware_profiles.subprocesses import Finished, ToolError
from hardware_profiles.vela import VelaMeter
from search_spaces import UserError

pytestmark = pytest.mark.extra("ethos-u", "litert")

SUMMARY = "experiment,core_clock,inference_time,sram_memory_used\ndefault,500000000.0,0.002,76.5\n"
LAYERS = "Original Operator,NNG Operator,Target,Op Cycles,Name\nConv2D,Conv2D,NPU,1000,a;\nSplit,,CPU,0,b;\n"


@pytest.fixture(scope="module")
def target() -> Target:
    return load_target("ethos_u55:int8-128")


@pytest.fixture(scope="module")
def artifact(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return converter_for(target).convert(network, target, (3, 24, 24), tmp_path_factory.mktemp("vela") / "n.tflite")


def meter(summary: str = SUMMARY, layers: str = LAYERS, returncode: int = 0) -> VelaMeter:
    """One whose compiler writes these reports."""

    def runner(command: object, timeout_s: float) -> Finished:
        arguments = list(command)  # type: ignore[call-overload]
        folder = Path(arguments[arguments.index("--output-dir") + 1])
        (folder / "n_summary_x.csv").write_text(summary)
        (folder / "n_per-layer.csv").write_text(layers)
        return Finished(tuple(arguments), returncode, "", "Error: Invalid tflite file", 0.0)

    return VelaMeter(runner=runner)


def test_the_compiler_estimates_an_int8_network(target: Target, artifact: Artifact) -> None:
    meter = meter_for(target)
    slow, fast = target, load_target("ethos_u55:int8-256")
    (m,), (faster,) = meter.measure([artifact], slow), meter.measure([artifact], fast)
    assert (m.error, m.note) == ("", "")
    assert 0 < faster.latency_ms < m.latency_ms < 10
    assert m.peak_memory_bytes is not None
    assert 24 * 24 * 3 < m.peak_memory_bytes < 2**20
    assert m.protocol.statistic == "estimate of the compiler"
    assert "nothing was run" in m.protocol.notes
    assert "ethos-u55-128" in m.protocol.host
    assert "no device" in m.protocol.host
    assert m.protocol.runtime_version
    assert sum(o.kind == "Conv2D" for o in m.operators) >= 1
    assert sum(o.latency_ms for o in m.operators) == pytest.approx(m.latency_ms, rel=0.1)
    assert meter.per_operator(artifact, slow) == list(m.operators)


def test_files_that_it_cannot_take_get_an_error_and_the_others_their_numbers(
    target: Target, artifact: Artifact, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(artifact.path.read_bytes()[:100])
    host = load_target("host:litert-fp32")
    floats = converter_for(host).convert(nn.Conv2d(3, 4, 3), host, (3, 8, 8), tmp_path / "float.tflite")
    bad = [
        replace(artifact, path=broken),
        replace(artifact, path=tmp_path / "gone.tflite"),
        replace(artifact, format="onnx"),
        floats,
    ]
    measured = meter_for(target).measure([artifact, *bad, artifact], target)
    assert [bool(m.error) for m in measured] == [False, True, True, True, True, False]
    for m, word in zip(measured[1:5], ["cannot compile", "no such file", "'onnx'", "takes int8"], strict=True):
        assert word in m.error
        assert np.isnan(m.latency_ms)
    with pytest.raises(UserError, match="cannot compile"):
        meter_for(target).per_operator(bad[0], target)


def test_reports_are_read_with_their_units(target: Target, artifact: Artifact) -> None:
    (m,) = meter().measure([artifact], target)
    assert m.latency_ms == 2.0
    assert m.peak_memory_bytes == 76.5 * 1024
    assert [(o.name, o.kind, o.latency_ms) for o in m.operators] == [("a", "Conv2D", 0.002)]
    assert m.note == "runs on the CPU and is not in the figure: Split"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: meter(returncode=1), "cannot compile this file: Error: Invalid tflite file"),
        (lambda: meter(summary=""), "wrote no report"),
        (lambda: meter(summary=SUMMARY.replace("0.002", "soon")), "no number 'inference_time': 'soon'"),
        (lambda: meter(summary=SUMMARY.replace("0.002", "nan")), "inference_time = nan"),
        (lambda: meter(summary=SUMMARY.replace("sram_memory_used", "ram")), "no number 'sram_memory_used'"),
        (lambda: meter(layers=LAYERS.replace("NPU", "CPU")), "nothing of this network runs on the NPU"),
    ],
)
def test_nonsense_of_the_compiler_is_an_error(
    make: Callable[[], VelaMeter], message: str, target: Target, artifact: Artifact
) -> None:
    (m,) = make().measure([artifact], target)
    assert message in m.error
    assert np.isnan(m.latency_ms)


def test_a_compiler_that_hangs_is_an_error(target: Target, artifact: Artifact) -> None:
    def hangs(command: object, timeout_s: float) -> Finished:
        raise ToolError(f"not finished after {timeout_s:g} s", transient=True)

    (m,) = VelaMeter(runner=hangs, timeout_s=3).measure([artifact], target)
    assert "not finished after 3 s" in m.error


def test_other_targets_are_refused(artifact: Artifact) -> None:
    with pytest.raises(UserError, match="accelerator in their options"):
        meter().measure([artifact], load_target("host:int8"))
