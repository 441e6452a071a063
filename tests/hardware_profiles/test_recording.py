import json
import sys
from pathlib import Path

import pytest

from hardware_profiles import Artifact, OnnxRuntimeMeter, RecordingMeter, ReplayMeter, Target, meter_for
from hardware_profiles.profile import parse_profile
from hardware_profiles.recording import Recording
from search_spaces import UserError

PRINT = "import json, sys; print(json.dumps({'latency_ms': [0.3, 0.2, 0.4], 'energy_mj': 0.5, 'runtime_version': '7'}))"


@pytest.fixture
def board() -> Target:
    point = {"precision": "fp32", "runtime": "odd", "peak_gmacs": 1, "bandwidth_gbs": 1, "source": "test"}
    table = {
        "name": "board",
        "title": "A board",
        "kind": "NPU",
        "default": "p",
        "meter": {"kind": "command", "command": [sys.executable, "-c", PRINT, "{artifact}"]},
        "operating_points": {"p": point, "q": point},
        "roofline": {"efficiency": {"other": 0.5}, "launch_us": 1, "source": "test"},
    }
    return parse_profile(table, "test").target()


def test_a_device_that_is_gone_gives_its_measurements_back(
    artifacts: list[Artifact], board: Target, tmp_path: Path
) -> None:
    path = tmp_path / "recording.json"
    missing = Artifact(tmp_path / "gone.onnx", "onnx", "fp32", (3, 16, 16))
    first = RecordingMeter(meter_for(board), path).measure([artifacts[0], missing], board)
    second = RecordingMeter(meter_for(board), path).measure(artifacts[1:2], board)
    assert first[1].error

    kept = Recording.load(path)
    assert len(kept.measurements) == 2
    assert kept.commands[0][0].command[0] == sys.executable
    assert '"latency_ms"' in kept.commands[0][0].stdout

    elsewhere = tmp_path / "moved.onnx"
    elsewhere.write_bytes(artifacts[0].path.read_bytes())
    moved = Artifact(elsewhere, "onnx", "fp32", (3, 16, 16))
    replayed = ReplayMeter(path).measure([moved, artifacts[1], artifacts[2]], board)
    for measured, again in zip([first[0], second[0]], replayed[:2], strict=True):
        assert again.latency_ms == measured.latency_ms
        assert again.samples_ms.tolist() == measured.samples_ms.tolist()
        assert again.energy_mj == measured.energy_mj == 0.5
        assert again.protocol == measured.protocol
        assert "recorded 20" in again.note
    assert "was never measured on board:p" in replayed[2].error
    assert "no such file" in ReplayMeter(path).measure([missing], board)[0].error
    with pytest.raises(UserError, match=r"nothing recorded of 'board:q'.*Did you mean 'board:p'"):
        ReplayMeter(path).measure(artifacts, Target(board.profile, "q"))


def test_two_meters_record_into_one_file(artifacts: list[Artifact], board: Target, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    one, other = RecordingMeter(meter_for(board), path), RecordingMeter(meter_for(board), path)
    one.measure(artifacts[:1], board)
    other.measure(artifacts[1:2], board)
    one.measure(artifacts[2:3], board)
    assert [m.artifact for m in Recording.load(path).measurements] == [a.path.name for a in artifacts[:3]]


def test_a_runtime_in_this_process_is_recorded_too(artifacts: list[Artifact], host: Target, tmp_path: Path) -> None:
    path = tmp_path / "recording.json"
    (measured,) = RecordingMeter(OnnxRuntimeMeter(passes=2, max_passes=2, pass_ms=1.0), path).measure(
        artifacts[:1], host
    )
    (again,) = ReplayMeter(path).measure(artifacts[:1], host)
    assert again.latency_ms == measured.latency_ms
    assert again.protocol == measured.protocol


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[: len(t) // 2], "damaged"),
        (lambda t: t.replace('"latency_ms":', '"latency_m":'), "unknown key|missing"),
        (lambda t: t.replace('"warmup":', '"warm_up":'), "protocol.warmup' is missing"),
        (lambda t: json.dumps({**json.loads(t), "format": 99}), "recording format 99"),
        (lambda t: t.replace('"energy_mj": 0.5', '"energy_mj": -0.5'), "greater than 0"),
    ],
)
def test_damaged_recordings_are_refused(
    change, message: str, artifacts: list[Artifact], board: Target, tmp_path: Path
) -> None:
    path = tmp_path / "recording.json"
    RecordingMeter(meter_for(board), path).measure(artifacts[:1], board)
    path.write_text(change(path.read_text()))
    before = path.read_text()
    for meter in (ReplayMeter, lambda p: RecordingMeter(meter_for(board), p)):
        with pytest.raises(UserError, match=message):
            meter(path)
    assert path.read_text() == before
    with pytest.raises(UserError, match="cannot read this recording"):
        ReplayMeter(tmp_path / "none.json")
