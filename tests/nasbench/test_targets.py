"""An experiment says per target what predicts it and what measures it; the user's own included."""

import sys
from pathlib import Path

import pytest

from hardware_profiles import OnnxRuntimeMeter, load_target, user_data_dir
from nasbench.config import Config, parse_config
from nasbench.devices import NewDevice, new_profile
from nasbench.experiment import run_experiment
from nasbench.plan import make_plan
from nasbench.run import load_run
from predictors.calibration import Calibration, MeasuredRow, fit_target
from search_spaces import UserError
from search_spaces.reference import reference_network

PARTS = """
import numpy as np
from hardware_profiles import Measurement, Meter, Protocol
from predictors.base import AdditivePredictor

def accuracy(choices):
    return 1 - float(np.exp(-sum(v for v in choices.values() if isinstance(v, int | float)) / 500))

class Mine(AdditivePredictor):
    def __init__(self, target, metric): self.metric = metric
    def block_features(self, workload): return np.array([workload.macs], dtype=float)
    def head(self, totals): return totals[:, 0] / 1e6

class Stopwatch(Meter):
    runtime = "mine"
    def __init__(self, progress=None): pass
    def measure(self, artifacts, target):
        protocol = Protocol("mine", "1", "fp32", 1, 1, 0, 1, 1, "value", "nowhere")
        return [Measurement(a, a.file_bytes / 1e6, np.array([a.file_bytes / 1e6]), protocol) for a in artifacts]
"""
COMMAND = "import json, os, sys; print(json.dumps({'latency_ms': 1e-4 + os.path.getsize(sys.argv[1]) / 1e9}))"


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    name = "my_target_parts"
    (tmp_path / f"{name}.py").write_text(PARTS)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config(**targets: object) -> Config:
    return parse_config(
        {
            "evaluator": {"name": "my_target_parts:accuracy", "samples": 0, "verify": 3},
            "targets": targets,
            "objectives": {"accuracy": {}, "latency_ms": {}},
            "strategy": {"name": "random", "evaluations": 12, "batch": 6},
        }
    )


def test_a_search_on_a_device_of_ones_own_calibrates_and_verifies_there(parts: Path) -> None:
    script = parts / "board.py"
    script.write_text(COMMAND)
    new_profile(NewDevice(name="board", runtime="boardlib", command=f"{sys.executable} {script} {{artifact}}"))
    path = parts / "run"
    run_experiment(config(devices=["board"], calibration_networks=8), path, where=parts)
    front = load_run(path).front()
    assert front["latency_ms_measured"].notna().all()
    assert front["latency_ms"].equals(front["latency_ms_measured"])
    assert (path / "calibration" / "board-fp32.json").is_file()
    assert "Latency model of <b>board:fp32</b>" in (path / "report.html").read_text()


def test_ones_own_predictor_and_meter(parts: Path) -> None:
    path = parts / "run"
    own = config(
        devices=["jetson_nano:fp32"],
        predictors={"jetson_nano:fp32": "my_target_parts:Mine"},
        meters={"jetson_nano:fp32": "my_target_parts:Stopwatch"},
    )
    run_experiment(own, path, where=parts)
    front = load_run(path).front()
    assert (front["latency_ms_predicted"] > 0).all()
    assert (front["latency_ms_measured"] > 0).all()
    assert not (path / "calibration").exists() or not list((path / "calibration").glob("*"))


@pytest.mark.parametrize("predictor", ["auto", "roofline"])
@pytest.mark.parametrize("given", [False, True])
def test_the_users_calibration_is_frozen_in_the_run(predictor: str, given: bool, parts: Path) -> None:
    target = load_target("jetson_nano")
    names = ("resnet18", "mobilenet_v2", "squeezenet1_1", "alexnet")
    rows = [MeasuredRow(network=n, latency_ms=ms) for n, ms in zip(names, (10.0, 6.0, 5.0, 18.0), strict=True)]
    calibration = fit_target(target, rows, [reference_network(n).workload() for n in names], method="roofline")
    kept = user_data_dir() / "calibrations" / "jetson_nano-fp16-maxn.json"
    calibration.save(parts / "given.json" if given else kept)
    named = {"calibration": {"jetson_nano": "given.json"}} if given else {}
    path = parts / "run"
    run_experiment(config(devices=["jetson_nano"], predictors={"jetson_nano": predictor}, **named), path, where=parts)
    assert Calibration.load(path / "calibration" / "jetson_nano-fp16-maxn.json") == calibration
    assert load_run(path).front()["latency_ms"].notna().all()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"predictors": {"pixel_3": "roofline"}}, r"targets.predictors: 'pixel_3:.*' is not among"),
        ({"predictors": {"jetson_nano": "rofline"}}, "unknown predictor 'rofline'. Did you mean 'roofline'"),
        ({"predictors": {"jetson_nano": "my_target_parts:Missing"}}, "cannot import 'my_target_parts:Missing'"),
        ({"predictors": {"jetson_nano": "few_shot:gone.npz"}}, "gone.npz: no such file"),
        ({"meters": {"jetson_nano": "telnet"}}, "unknown meter 'telnet'"),
        ({"meters": {"jetson_nano": "replay:gone.json"}}, "gone.json: no such file"),
        ({"meters": {"jetson_nano": "gone.toml"}}, "gone.toml: no such file"),
        ({"meters": {"jetson_nano": "ssh:-x"}}, "host: .*pattern"),
        ({"meters": {"jetson_nano": "my_target_parts:accuracy"}}, "cannot be made"),
        ({"meter": {"jetson_nano": "adb"}}, r"unknown key 'targets.meter'. Did you mean 'meters'"),
    ],
)
def test_what_is_no_predictor_or_meter_is_refused_before_the_search(
    targets: dict[str, object], message: str, parts: Path
) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(config(devices=["jetson_nano"], **targets), parts)


@pytest.mark.parametrize("again", ["jetson_nano", "jetson_nano:fp16-maxn"])
def test_a_device_named_twice_is_refused(again: str, parts: Path) -> None:
    with pytest.raises(UserError, match=r"targets.devices = .*: jetson_nano:fp16-maxn is named twice"):
        make_plan(config(devices=["jetson_nano", again]), parts)


def test_a_meter_named_in_the_experiment_decides_the_file_format(parts: Path) -> None:
    (parts / "meter.toml").write_text('kind = "command"\ncommand = "run {artifact}"\n')
    plan = make_plan(config(devices=["pixel_4"], meters={"pixel_4": "meter.toml"}), parts)
    (target,) = plan.targets.values()
    assert plan.measurable(target)
    assert target.profile.meter is not None
    assert type(plan.meter_for(target)).__name__ == "CommandMeter"
    shipped = make_plan(config(devices=["pixel_4"]), parts)  # its profile knows adb, but nobody said a phone is there
    assert not shipped.measurable(shipped.targets[target.name])
    host = make_plan(config(devices=["host"]), parts)
    assert isinstance(host.meter_for(host.targets["host:fp32"]), OnnxRuntimeMeter)
