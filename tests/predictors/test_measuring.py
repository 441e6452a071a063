import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from hardware_profiles import Artifact, Converter, Measurement, Meter, Protocol, Target, load_target, measuring
from hardware_profiles.meter_section import AdbSection
from predictors import Calibration, calibrate, fit_target, predictor_for
from predictors import measuring as module
from search_spaces import MobileNetV3Space, UserError, load_space


class FakeConverter(Converter):
    """Writes the number of parameters instead of the network."""

    format = "onnx"

    def convert(self, network: Any, target: Target, input_shape: tuple[int, ...], path: Path) -> Artifact:
        path.write_text(str(sum(p.numel() for p in network.parameters())))
        return Artifact(path, "onnx", "fp32", input_shape)


class FakeMeter(Meter):
    """Latency by parameters and resolution; counts its calls, and fails as often as told."""

    runtime = "onnxruntime"
    calls = 0
    failures = 0
    version = "0"

    def runtime_version(self) -> str:
        return self.version

    def __init__(self, progress: Callable[[int, int], None] | None) -> None:
        self.progress = progress or (lambda done, total: None)

    def measure(self, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
        FakeMeter.calls += 1
        self.progress(2, 2)
        protocol = Protocol("onnxruntime", "0", "fp32", 1, 1, 1, 2, 1, "minimum", "nowhere")
        out = []
        for i, a in enumerate(artifacts):
            ms = int(a.path.read_text()) * 1e-6 + a.input_shape[1] ** 2 * 1e-5
            if i < FakeMeter.failures:
                out.append(Measurement(a, float("nan"), np.empty(0), protocol, error="broken"))
            else:
                out.append(Measurement(a, ms, np.array([ms, 1.1 * ms]), protocol))
        return out


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeMeter]:
    """Measuring without a runtime."""
    monkeypatch.setattr(module, "meter_for", lambda target, progress=None: FakeMeter(progress))
    monkeypatch.setattr(module, "converter_for", lambda target: FakeConverter())
    FakeMeter.calls = FakeMeter.failures = 0
    return FakeMeter


@pytest.fixture
def host() -> Target:
    return load_target("host")


def test_a_calibration_is_reused_until_something_changes(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate(host, small_space, 12, cache=tmp_path)
    assert calibrate(host, small_space, 12, cache=tmp_path) == first
    assert fake.calls == 1
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]

    calibrate(host, small_space, 13, cache=tmp_path)
    calibrate(host, small_space, 12, seed=1, cache=tmp_path)
    calibrate(host, load_space("mobilenet_v3_small", resolutions=[*range(16, 80, 4)]), 12, cache=tmp_path)
    calibrate(load_target("host:int8"), small_space, 12, cache=tmp_path)
    assert fake.calls == 5
    monkeypatch.setattr(FakeMeter, "version", "999")
    calibrate(host, small_space, 12, cache=tmp_path)
    assert fake.calls == 6
    elsewhere = [host.profile.model_copy(update={"meter": AdbSection(kind="adb", serial=s)}) for s in ("one", "two")]
    for profile in elsewhere * 2:
        calibrate(profile.target("fp32"), small_space, 12, cache=tmp_path)
    assert fake.calls == 8
    monkeypatch.setattr(measuring, "host_fingerprint", lambda: "another machine")
    calibrate(host, small_space, 12, cache=tmp_path)
    assert fake.calls == 9


def test_an_old_calibration_is_made_again(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    old = calibrate(host, small_space, 12, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    old.model_copy(update={"created": datetime.now(UTC) - timedelta(days=40)}).save(path)
    new = calibrate(host, small_space, 12, cache=tmp_path)
    assert fake.calls == 2
    assert new.created > old.created


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1}', "[1, 2]", "\x00\x01"])
def test_a_damaged_cache_file_is_named_and_measured_anew(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path, damage: str
) -> None:
    first = calibrate(host, small_space, 12, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    with pytest.raises(UserError, match=path.name):
        Calibration.load(path)
    with pytest.warns(UserWarning, match=f"{path.name}.*Measuring again"):
        again = calibrate(host, small_space, 12, cache=tmp_path)
    assert again.models == first.models
    assert Calibration.load(path) == again


def test_a_frozen_calibration_predicts_to_the_same_bits(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    calibration = calibrate(host, small_space, 12, cache=tmp_path / "cache")
    calibration.save(tmp_path / "frozen.json")
    loaded = Calibration.load(tmp_path / "frozen.json")
    assert loaded == calibration
    archs = small_space.sample(40, np.random.default_rng(0))
    a, b = (c.predictor(host).bind(small_space).predict(archs) for c in (calibration, loaded))
    assert (a.mean == b.mean).all()
    assert (a.std == b.std).all()
    assert (predictor_for("host", "latency_ms", loaded).bind(small_space).predict(archs).mean == a.mean).all()
    with pytest.raises(UserError, match=r"of host:fp32, not of host:int8"):
        predictor_for("host:int8", "latency_ms", loaded)


def test_files_that_are_no_calibrations_are_refused(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    path = tmp_path / "c.json"
    with pytest.raises(UserError, match=r"c.json: cannot read"):
        Calibration.load(path)
    good = json.loads(calibrate(host, small_space, 12, cache=tmp_path / "cache").model_dump_json())
    model = good["models"]["latency_ms"]
    for change, message in [
        ({"format": 99}, "format 99, this version reads 3"),
        ({"models": {"latency_ms": {**model, "numbers": {**model["numbers"], "groups": ["a"]}}}}, "another version"),
        ({"models": {"latency_ms": {**model, "method": "scale"}}}, "numbers of 'scale' are damaged: 'factor'"),
        ({"models": {"latency_ms": {**model, "method": "roofline"}}}, "numbers of 'roofline' are damaged"),
        ({"models": {"latency": model}}, "unknown metric 'latency'"),
        ({"seconds": {"measure": "long"}}, r"seconds.measure: .*got 'long'"),
        ({"targt": "x"}, r"unknown key 'targt'.*'target'"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=message) as error:
            Calibration.load(path)
        assert str(error.value).startswith(str(path))


def test_networks_cover_the_space_and_are_the_same_for_the_same_seed(host: Target) -> None:
    space = load_space("mobile96")
    archs = module.choose(space, 24, host, np.random.default_rng(0))
    assert (archs == module.choose(space, 24, host, np.random.default_rng(0))).all()
    assert (archs == space.canonical(archs)).all()
    assert len(np.unique(archs, axis=0)) == len(archs) == 24
    macs = predictor_for("", "macs").bind(space)
    chosen, random = macs.predict(archs).mean, macs.predict(space.sample(3000, np.random.default_rng(1))).mean
    assert chosen.min() <= random.min()
    assert chosen.max() >= random.max()
    assert np.median(chosen) == pytest.approx(np.median(random), rel=0.3)


def test_a_space_smaller_than_the_wish_gives_all_it_has(host: Target, small_space: MobileNetV3Space) -> None:
    archs = module.choose(small_space, 5000, host, np.random.default_rng(0))
    assert 0.95 * small_space.size < len(archs) <= small_space.size


def test_several_spaces_are_fitted_together(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    other = load_space("mobilenet_v3_small", resolutions=[*range(16, 80, 4)])
    progress: list[tuple[str, int, int]] = []
    calibration = calibrate(host, [small_space, other], 17, cache=tmp_path, progress=lambda *a: progress.append(a))
    assert [r.family for r in calibration.rows] == ["small"] * 9 + [other.name] * 8
    assert progress[0] == ("convert", 1, 17)
    assert progress[-2:] == [("convert", 17, 17), ("measure", 2, 2)]
    indices = [[int(i) for i in r.network.rpartition(":")[2].split(".")] for r in calibration.rows[:3]]
    assert (small_space.check(np.array(indices)) == indices).all()


def test_networks_that_fail_are_left_out_and_told(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    fake.failures = 3
    calibration = calibrate(host, small_space, 12, cache=tmp_path)
    assert len(calibration.rows) == calibration.models["latency_ms"].quality["networks"] == 9
    assert list(calibration.failures.values()) == ["broken"] * 3
    assert not calibration.failures.keys() & {r.network for r in calibration.rows}
    fake.failures = 6
    with pytest.raises(UserError, match=r"host:fp32: 6 of 13 networks could not be measured: broken"):
        calibrate(host, small_space, 13, cache=tmp_path)


def test_disturbed_measurements_are_told_with_every_prediction(
    fake: type[FakeMeter], host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    calibration = calibrate(host, small_space, 12, cache=tmp_path)
    assert calibration.warning == ""
    rows = [r.model_copy(update={"throttled": i < 4}) for i, r in enumerate(calibration.rows)]
    workloads = [small_space.workload(_arch(small_space, r.network)) for r in rows]
    for method in ("scale", "operator_model"):
        disturbed = fit_target(host, rows, workloads, method=method)  # type: ignore[arg-type]
        assert "4 of 12 calibration measurements were disturbed" in disturbed.warning
    assert "4 of 12" in disturbed.predictor(host).predict(workloads[:1]).warning


def _arch(space: MobileNetV3Space, name: str) -> Any:
    return np.array([int(i) for i in name.rpartition(":")[2].split(".")], dtype=space.dtype)


def test_calibrating_what_cannot_be_measured_or_fitted_is_refused(
    host: Target, small_space: MobileNetV3Space, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="not the machine we run on"):
        calibrate(load_target("jetson_nano"), small_space, cache=tmp_path)
    with pytest.raises(UserError, match="two networks are called 'small:"):
        calibrate(host, [small_space, small_space], 16, cache=tmp_path)
    with pytest.raises(UserError, match=r"calibration.networks: 4 .*at least 8"):
        calibrate(host, small_space, 4, cache=tmp_path)


def test_a_real_calibration_on_this_machine(host: Target, small_space: MobileNetV3Space, tmp_path: Path) -> None:
    calibration = calibrate(host, small_space, 8, cache=tmp_path)
    assert not calibration.failures
    assert calibration.protocol is not None
    assert calibration.protocol.runtime_version == onnxruntime.__version__
    assert all(r.median_ms is not None and r.latency_ms <= r.median_ms for r in calibration.rows)
    assert calibration.seconds.keys() == {"convert", "measure"}
    estimate = calibration.predictor(host).bind(small_space).predict(small_space.sample(20, np.random.default_rng(0)))
    assert (estimate.mean > 0).all()
    assert (estimate.std > 0).all()
