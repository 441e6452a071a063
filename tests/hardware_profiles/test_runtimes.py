"""What every converter and meter of this machine promises. A new runtime is one line of `POINTS`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hardware_profiles import Artifact, Meter, Profile, Target, converter_for, load_target, meter_for
from hardware_profiles.conversion import calibration_batches
from search_spaces import UserError, load_space

# Operating points of `host`, with the extra that brings their runtime.
POINTS = {
    "fp32": "",
    "int8": "",
    "litert-fp32": "litert",
    "litert-int8": "litert",
    "openvino-fp32": "openvino",
    "openvino-int8": "openvino",
    "executorch-fp32": "executorch",
    "executorch-int8": "executorch",
}
SILENT = ("litert",)  # runtimes that give no times of single operators
SHAPE = (3, 24, 24)

Files = Callable[[Target, Callable[[], nn.Module]], Artifact]


def points(precision: str = "") -> list[Any]:
    return [
        pytest.param(point, id=point, marks=[pytest.mark.extra(extra)] if extra else [])
        for point, extra in POINTS.items()
        if precision in point
    ]


@pytest.fixture(params=points())
def target(request: pytest.FixtureRequest) -> Target:
    return load_target(f"host:{request.param}")


only_fp32 = pytest.mark.parametrize("target", points("fp32"), indirect=True)
only_int8 = pytest.mark.parametrize("target", points("int8"), indirect=True)


def with_batch(target: Target, batch: int) -> Target:
    point = target.point.model_copy(update={"batch": batch})
    points = {**target.profile.operating_points, target.operating_point: point}
    return Target(target.profile.model_copy(update={"operating_points": points}), target.operating_point)


def plain_cnn(channels: int = 8) -> nn.Module:
    """Convolutions, a depthwise one, pooling and a linear layer: what every runtime takes in every precision."""
    torch.manual_seed(channels)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, stride=2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(channels, 5),
    )


def mobile_net() -> nn.Module:
    """Inverted residuals, squeeze-and-excitation, hard-swish; normalised, as training leaves it."""
    torch.manual_seed(0)
    space = load_space("quickstart", in_channels=3, num_classes=5)
    network = space.build(space.sample(1, np.random.default_rng(1))[0]).train()
    for _ in range(20):
        network(torch.randn(16, *SHAPE))
    return network


def decoder() -> nn.Module:
    """Transposed convolutions of every padding, which runtimes pad in ways of their own."""
    torch.manual_seed(0)
    sizes = [(2, 2, 0, 0, 1), (3, 2, 1, 1, 1), (4, 2, 1, 0, 8), (3, 2, 1, 0, 1), (3, 1, 1, 0, 1), (5, 3, 2, 1, 4)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 4), *(nn.ConvTranspose2d(8, 8, k, s, p, o, g) for k, s, p, o, g in sizes), nn.ReLU()
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Converts a network for a target, once."""
    folder = tmp_path_factory.mktemp("files")
    done: dict[tuple[str, str], Artifact] = {}

    def get(target: Target, make: Callable[[], nn.Module]) -> Artifact:
        key = target.operating_point, make.__name__
        if key not in done:
            converter, network = converter_for(target), make().train()
            path = folder / "-".join(key) / f"n.{converter.format}"
            artifact = done[key] = converter.convert(network, target, SHAPE, path)
            assert network.training
            assert (artifact.path, artifact.precision, artifact.input_shape) == (path, target.precision, SHAPE)
            assert {p.stem for p in path.parent.iterdir()} == {"n"}, "something was left behind"
        return done[key]

    return get


def outputs(artifact: Artifact, target: Target, x: np.ndarray) -> np.ndarray:
    session = meter_for(target).opened(artifact, target, x)
    first = session.run()[0].copy()
    np.testing.assert_array_equal(session.run()[0], first)
    session.feed(x[::-1].copy())
    session.run()
    session.feed(x)
    np.testing.assert_array_equal(session.run()[0], first)
    return first


def fast(target: Target) -> Meter:
    return type(meter_for(target))(passes=2, max_passes=2, pass_ms=0.5)


@pytest.mark.parametrize("make", [plain_cnn, mobile_net, decoder])
def test_the_file_computes_what_the_network_does(make: Callable[[], nn.Module], target: Target, files: Files) -> None:
    artifact = files(target, make)
    assert artifact.file_bytes >= artifact.path.stat().st_size > 0
    x = calibration_batches(None, 1, SHAPE)[1]
    with torch.no_grad():
        expected = make().eval()(torch.from_numpy(x)).numpy()
    found = outputs(artifact, target, x)
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (1e-4 if target.precision == "fp32" else 0.25)
    assert (error > 1e-4) == (target.precision == "int8"), "an int8 file that is exact was not quantised"


@only_fp32
def test_several_outputs_come_in_the_order_of_the_network(target: Target, tmp_path: Path) -> None:
    class Three(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            pooled = torch.nn.functional.avg_pool2d(x, 4)
            return pooled.flatten(1) + 2, pooled, torch.relu(x)

    converter = converter_for(target)
    artifact = converter.convert(Three(), target, (3, 8, 8), tmp_path / f"n.{converter.format}")
    x = calibration_batches(None, 1, (3, 8, 8))[0]
    found = meter_for(target).opened(artifact, target, x).run()
    for f, e in zip(found, Three()(torch.from_numpy(x)), strict=True):
        np.testing.assert_allclose(f, e.numpy(), atol=1e-5)


def test_larger_batches_give_the_same_as_single_images(target: Target, tmp_path: Path) -> None:
    network, converter = plain_cnn(), converter_for(target)
    batched = with_batch(target, 3)
    artifact = converter.convert(network, batched, SHAPE, tmp_path / f"3.{converter.format}")
    x = calibration_batches(None, 3, SHAPE)[0]
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(x)).numpy()
    tolerance = (1e-4 if target.precision == "fp32" else 0.25) * abs(expected).max()
    np.testing.assert_allclose(outputs(artifact, batched, x), expected, atol=tolerance)
    (m,) = fast(target).measure([artifact], batched)
    assert (m.error, m.protocol.batch) == ("", 3)
    (m,) = fast(target).measure([artifact], target)
    assert "cannot run" in m.error


def test_many_are_measured_at_once_and_bad_files_get_an_error(target: Target, files: Files, tmp_path: Path) -> None:
    good = [files(target, make) for make in (plain_cnn, mobile_net)]
    broken = tmp_path / f"broken{good[0].path.suffix}"
    broken.write_bytes(good[0].path.read_bytes()[:50])
    bad = [
        replace(good[0], path=broken),
        replace(good[0], path=broken.with_stem("gone")),
        replace(good[0], format="weights"),
        replace(good[0], input_shape=(3, 9, 9)),
    ]
    measured = fast(target).measure([good[0], *bad, good[1]], target)
    assert [bool(m.error) for m in measured] == [False, True, True, True, True, False]
    for m, word in zip(measured[1:5], ["broken", "no such file", "'weights'", "cannot run"], strict=True):
        assert word in m.error
        assert "\n" not in m.error
        assert np.isnan(m.latency_ms)
    for m in (measured[0], measured[-1]):
        assert 0 < m.latency_ms == m.samples_ms.min()
        p = m.protocol
        assert (p.runtime, p.precision, p.threads, p.batch) == (target.runtime, target.precision, 1, 1)
        assert p.runtime_version == meter_for(target).runtime_version() != ""
        assert p.host
        assert p.notes
        assert ("seeded noise" in p.notes) == (target.precision == "int8")


def test_operators_have_names_kinds_and_times(target: Target, files: Files) -> None:
    artifact = files(target, plain_cnn)
    if target.runtime in SILENT:
        with pytest.raises(UserError, match="no times of single operators"):
            meter_for(target).per_operator(artifact, target)
        return
    times = meter_for(target).per_operator(artifact, target)
    kinds = [t.kind.lower() for t in times]
    assert sum("conv" in kind and "convert" not in kind for kind in kinds) == 2, kinds
    assert all(t.name and t.latency_ms >= 0 for t in times)
    assert len({t.name for t in times}) == len(times)
    assert 0 < sum(t.latency_ms for t in times) < 100


@only_fp32
def test_an_operator_that_the_runtime_does_not_take_is_named(target: Target, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x.flatten(2))

    network, converter = Odd().train(), converter_for(target)
    with pytest.raises(UserError, match=r"Odd: cannot be written as .*svd"):
        converter.convert(network, target, (3, 4, 4), tmp_path / f"n.{converter.format}")
    assert network.training
    assert list(tmp_path.iterdir()) == []


@only_fp32
def test_a_file_that_differs_from_the_network_is_not_written(target: Target, tmp_path: Path) -> None:
    converter = converter_for(target)
    write = converter._write
    converter._write = lambda network, *rest: write(plain_cnn(9).eval(), *rest)
    with pytest.raises(UserError, match=rf"the {target.precision} .* differs from the network by .*not written"):
        converter.convert(plain_cnn(8), target, SHAPE, tmp_path / f"n.{converter.format}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.extra("litert")
def test_a_file_that_crashes_the_runtime_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = "import os, sys; print('corrupted', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr("hardware_profiles.litert._PROBE", crash)
    target = load_target("host:litert-fp32")
    with pytest.raises(UserError, match=r"LiteRT crashes on this file: .* ended by SIGABRT \(Aborted\): corrupted"):
        converter_for(target).convert(plain_cnn(), target, SHAPE, tmp_path / "n.tflite")
    assert not list(tmp_path.iterdir())


@only_int8
def test_calibration_images_must_fit(target: Target, tmp_path: Path) -> None:
    converter = converter_for(target)
    for images, message in [
        (np.zeros((4, 3, 9, 9), np.float32), r"shape \(4, 3, 9, 9\), expected \(n, 3, 24, 24\)"),
        (np.zeros((0, *SHAPE), np.float32), r"shape \(0, 3, 24, 24\)"),
        (np.full((2, *SHAPE), np.nan, np.float32), "not all values are finite"),
    ]:
        with pytest.raises(UserError, match=message):
            converter.convert(plain_cnn(), target, SHAPE, tmp_path / "n", images=images)


@only_int8
def test_int8_ranges_come_from_the_images_that_are_given(target: Target, files: Files, tmp_path: Path) -> None:
    converter, x = converter_for(target), 50 * calibration_batches(None, 1, SHAPE)[0]
    images = np.concatenate([x, -x])
    wide = converter.convert(plain_cnn(), target, SHAPE, tmp_path / f"n.{converter.format}", images=images)
    assert "calibrated on 2 images" in wide.note
    assert "noise" not in wide.note
    narrow = files(target, plain_cnn)
    assert abs(outputs(wide, target, x)).max() > 5 * abs(outputs(narrow, target, x)).max()


def test_a_target_without_its_runtime_installed_says_what_to_install(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if target.runtime == "onnxruntime":
        meter_for(target)
        return
    for make in (meter_for, converter_for):
        with pytest.raises(UserError, match=rf"host:.*pip install nasbench-hw\[{target.runtime}\]"):
            make(target)


def own_target(runtime: str) -> Target:
    host = load_target("host")
    point = host.point.model_copy(update={"runtime": runtime})
    return Target(
        Profile.model_validate(
            {
                **host.profile.model_dump(),
                "operating_points": {"fp32": point.model_dump()},
            }
        ),
        "fp32",
    )


def test_a_runtime_may_be_the_users_own_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_meter.py").write_text(
        "from hardware_profiles import Meter, OnnxConverter\n"
        "class Mine(Meter):\n"
        "    converter = OnnxConverter\n"
        "    def __init__(self, progress=None): pass\n"
        "    def measure(self, artifacts, target): return []\n"
        "class Bare(Mine):\n"
        "    converter = None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    target = own_target("my_meter:Mine")
    assert type(meter_for(target)).__name__ == "Mine"
    assert converter_for(target).format == "onnx"
    with pytest.raises(UserError, match="Bare has no attribute 'converter'"):
        converter_for(own_target("my_meter:Bare"))
    with pytest.raises(UserError, match="'os:path' is no Meter, a class that extends"):
        meter_for(own_target("os:path"))
    with pytest.raises(UserError, match="cannot import 'my_meter:Absent'"):
        meter_for(own_target("my_meter:Absent"))
    with pytest.raises(UserError, match="unknown runtime 'onnxruntim'. Did you mean 'onnxruntime'"):
        converter_for(own_target("onnxruntim"))


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
import torch
from hardware_profiles import converter_for, load_target, meter_for

target = load_target("host:openvino-fp32")
network = torch.nn.Conv2d(3, 4, 3).eval()
artifact = converter_for(target).convert(network, target, (3, 8, 8), Path(sys.argv[1]) / "a.xml")
sessions = [meter_for(target).open(artifact, target) for _ in range(2)]
del sessions[0]
sessions.clear()
signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.extra("openvino")
def test_ctrl_c_after_networks_ran_in_openvino_is_no_segmentation_fault(tmp_path: Path) -> None:
    """Its plug-in changes where signals are handled; sessions that go in the order they came must not leave that."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr[-500:]
