"""Whole experiments: the artefacts of a run, resumption after kills, and answers to bad input."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tomli_w

from hardware_profiles import load_profile, load_target
from nasbench.archive import Archive, arch_row
from nasbench.config import load_config
from nasbench.experiment import run_experiment
from nasbench.objectives import minimised
from nasbench.pareto import non_dominated_mask
from nasbench.progress import Phase
from nasbench.run import load_run, load_run_config, load_state
from nasbench.training import Update
from search_spaces import UserError, load_space

NASBENCH = [sys.executable, "-m", "nasbench"]
ROOT = Path(__file__).parents[2]


def nasbench(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NASBENCH, *map(str, arguments)], capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_run_leaves_everything_a_person_wants_to_see(finished_run: Path) -> None:
    view = load_run(finished_run)
    assert view.state["status"] == "finished"
    assert " · finished · " in (finished_run / "report.html").read_text()
    front = view.front()
    assert {"accuracy_predicted", "accuracy_evaluated", "latency_ms_predicted", "latency_ms_measured"} <= set(front)
    values = minimised(front.loc[front["kind"] == "front", ["accuracy", "latency_ms"]].to_numpy(), view.objectives)
    assert np.array_equal(front.loc[front["kind"] == "front", "pareto"], non_dominated_mask(values))
    assert front["latency_ms"].equals(front["latency_ms_measured"])
    for name in ("pareto", "predicted_vs_measured", "training", "stages"):
        assert (finished_run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (finished_run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http://" not in page
    assert "https://" not in page  # opens offline
    ledger = view.ledger().set_index("phase")
    assert ledger.loc["evaluate sample", "work"] == 24
    assert ledger.loc["search", "work"] == 3000


def test_stages_are_measured_as_files_and_tested_once(finished_run: Path) -> None:
    rows = load_run(finished_run).stages()
    assert len(rows) == 2 * 4
    assert rows["stage"].tolist()[:4] == ["search", "finetune", "export", "quantize"]
    figures = ["accuracy", "test_accuracy", "latency_ms@host:fp32", "file_bytes", "peak_memory_bytes"]
    assert rows[figures].notna().all().all()
    assert (rows["latency_ms@host:fp32"] > 0).all()
    by_stage = rows.groupby("stage")[["file_bytes", "peak_memory_bytes"]].mean()
    assert by_stage.loc["quantize", "peak_memory_bytes"] < 0.5 * by_stage.loc["export", "peak_memory_bytes"]
    for file in rows["file"]:
        assert (finished_run / file).is_file()
    ledger = load_run(finished_run).ledger().set_index("phase")
    assert ledger.loc["test", "work"] == len(rows)


def test_a_finished_run_resumes_to_itself(finished_run: Path) -> None:
    before = load_run(finished_run)
    front, ledger = before.front(), before.ledger().set_index("phase")["work"]
    view = run_experiment(before.config, finished_run, resume=True, where=Path(before.state["where"]))
    pd.testing.assert_frame_equal(view.front(), front)
    assert view.ledger().set_index("phase")["work"].equals(ledger)


def frozen(tiny_experiment: Path, finished_run: Path) -> list[str]:
    """Arguments of a run of the tiny experiment that uses the calibration of the finished one."""
    calibration = finished_run / "calibration" / "host-fp32.json"
    return [str(tiny_experiment), "--set", f'targets.calibration={{"host:fp32"="{calibration}"}}', "--quiet"]


def archived(path: Path, phases: tuple[str, ...] = ("sample", "verify")) -> pd.DataFrame:
    """Evaluations that must be equal between runs."""
    rows = Archive(path / "archive.sqlite", readonly=True).evaluations()
    return rows[rows["phase"].isin(phases)].drop(columns="seconds").reset_index(drop=True)


def count(path: Path, table: str) -> int:
    """Rows of a table of a run under way; 0 while it is not there yet."""
    try:
        database = sqlite3.connect(f"file:{path / 'archive.sqlite'}?mode=ro", uri=True)
        return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def killed_when(arguments: list[str], ready: object, how: int = signal.SIGKILL) -> subprocess.Popen[str]:
    """Start a run and end it with a signal as soon as `ready()` is true."""
    process = subprocess.Popen([*NASBENCH, "run", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while process.poll() is None and not ready() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.005)
    assert process.poll() is None, (
        f"the run ended before it could be killed: {process.stderr and process.stderr.read()}"
    )
    process.send_signal(how)
    return process


def test_a_killed_run_ends_as_an_uninterrupted_one(tiny_experiment: Path, finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "killed"
    start = [*frozen(tiny_experiment, finished_run), "--output", str(path)]
    resume = ["--resume", str(path), "--quiet"]
    moments = [
        (start, lambda: (path / "supernet.safetensors").exists()),
        (resume, lambda: count(path, "evaluations") >= 5),
        (resume, lambda: (path / "search.npz").exists()),
        (resume, lambda: count(path, "stages") >= 1),
        (resume, lambda: count(path, "stages") >= 8),  # all done, the last of them not yet measured
    ]
    earlier: dict[tuple[str, int], float] = {}
    for arguments, ready in moments:
        killed_when(arguments, ready).wait()
        rows = Archive(path / "archive.sqlite").evaluations()
        now = dict(zip(zip(rows["phase"], rows["id"], strict=True), rows["seconds"], strict=True))
        assert earlier.items() <= now.items(), "a finished evaluation was lost or repeated"
        earlier = now
    assert len(earlier) >= 5
    finished = nasbench("run", *resume)
    assert finished.returncode == 0, finished.stderr
    pd.testing.assert_frame_equal(archived(path, ("sample",)), archived(finished_run, ("sample",)))
    ours, theirs = (load_state(p / "search.npz")["archive"] for p in (path, finished_run))
    assert ours["evaluated"] == theirs["evaluated"]
    assert np.array_equal(ours["archs"], theirs["archs"])
    assert np.array_equal(ours["values"], theirs["values"])
    pd.testing.assert_frame_equal(archived(path), archived(finished_run))
    assert load_run(path).stages()["latency_ms@host:fp32"].notna().all()


def test_interrupting_says_how_to_go_on(tiny_experiment: Path, finished_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped"
    arguments = [*frozen(tiny_experiment, finished_run), "--output", str(path)]
    process = killed_when(arguments, lambda: count(path, "evaluations") >= 2, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].endswith(f"nasbench run --resume {path}")
    assert "Traceback" not in error
    assert json.loads((path / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["strategy.population=10"], ["strategy: unknown key 'population'", "'population_size'"]),
        (["space.name=quickstrat"], ["'quickstrat'", "quickstart"]),
        (["task.path=nowhere.npz"], ["nowhere.npz"]),
        (["stages.0.epoch=3"], ["stages[0]: unknown key 'epoch'", "'epochs'"]),
        (["supernet.epoch=3"], ["supernet: unknown key 'epoch'", "'epochs'"]),
        (["supernet.seed=3"], ["supernet: unknown key 'seed'"]),
        (["evaluator.name=supernte"], ["'supernte'", "'supernet'"]),
        (["targets.devices=['hots']"], ["'hots'", "'host'"]),
        (["objectives.latency_ms.target=jetson_nano"], ["jetson_nano", "targets.devices"]),
        (["objectives.latencyms.limit=3"], ["'latencyms'", "'latency_ms'"]),
        (["objectives.speed.direction=maximise"], ["nothing gives the metric 'speed'"]),
        (["objectives.latency_ms.limit=-1"], ["objectives.latency_ms.limit = -1"]),
        (["targets.calibration={host = 'none.json'}"], ["none.json"]),
        (["targets.calibration={jetson_nano = 'tiny.toml'}"], ["targets.calibration", "jetson_nano"]),
        (["selection={rule = 'named', networks = ['larget']}"], ["'larget'", "'largest'"]),
        (["selection={rule = 'best', objective = 'latency'}"], ["'latency'", "'latency_ms'"]),
        (["evaluator.samples=5"], ["evaluator.samples = 5"]),
        (["space.name=mobilenet_v3_small"], ["evaluator.samples", "the space has 1 architectures", "0 evaluates"]),
        (["space.name=sensor_1d"], ["'sensor_1d' takes inputs of shape (1, 1, 128)", "images one for images"]),
        (
            ["strategy={name = 'successive_halving'}"],
            ["'successive_halving' asks for evaluations at reduced 'epochs'", "evaluator.samples = 0", "nsga2"],
        ),
        (
            ["strategy={name = 'successive_halving'}", "evaluator.samples=0"],
            ["'supernet' knows 'images' alone: set strategy.fidelity", "'train'", "nsga2"],
        ),
        (
            ["strategy={name = 'successive_halving', rungs = 4}", "evaluator={name = 'train', samples = 0}"],
            ["1, 3, 9 epochs", "evaluator.epochs = 8", "from 1 to 7, not 9"],
        ),
        (
            ["strategy={name = 'successive_halving'}", "objectives={params = {}, macs = {}}"],
            ["all objectives are predicted", "nsga2"],
        ),
        pytest.param(
            ["strategy={name = 'optuna', sampler = 'CmaEsSampler'}"],
            ["multi-objective", "TPESampler"],
            marks=pytest.mark.extra("cmaes"),
        ),
        (["strategy={name = 'optuna', storage = 'nosql://x'}"], ["strategy.storage = 'nosql://x'", "sqlite:///"]),
        (["strategy={name = 'ppo', targets = [1.0, 2.0]}"], ["strategy.targets: 2 given, but 1 objectives"]),
        (["objectives.'accuracy'.at_least=0.9", "objectives.accuracy.at_most=0.8"], ["accuracy.at_least = 0.9"]),
        (["supernet.validation_images=-1"], ["supernet.validation_images = -1"]),
        (["supernet.save_every_s=-1"], ["supernet.save_every_s = -1"]),
        (["supernet.accumulate=3"], ["supernet.accumulate = 3", "batch_size = 32"]),
        (["supernet.checkpoint=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["supernet.weights=nowhere.safetensors"], ["nowhere.safetensors"]),
        (["supernet.weights=space.toml"], ["space.toml: cannot read it as safetensors"]),
        (["supernet.weights=space.toml", "supernet.checkpoint=space.toml"], ["either checkpoint or weights"]),
        (["supernet.keep=['head']"], ["keep goes with weights"]),
    ],
)
def test_wrong_words_stop_before_anything_is_done(
    tiny_experiment: Path, tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        run_experiment(load_config(tiny_experiment, changes), tmp_path / "run", where=tiny_experiment.parent)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "run" / "supernet.safetensors").exists()


def test_an_impossible_limit_is_answered_with_the_tightest(
    tiny_experiment: Path, finished_run: Path, tmp_path: Path
) -> None:
    arguments = [*frozen(tiny_experiment, finished_run), "--output", str(tmp_path / "run")]
    result = nasbench("run", *arguments, "--set", "objectives.latency_ms.limit=0.000001")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "latency_ms" in result.stderr
    assert not (tmp_path / "run" / "supernet.safetensors").exists()  # said before any training
    # The value that it names can be had.
    import re

    from predictors import Calibration

    space = load_space(str(tiny_experiment.parent / "space.toml"), 1, 4)
    calibration = Calibration.load(finished_run / "calibration" / "host-fp32.json")
    predictor = calibration.predictor(load_target("host")).bind(space)
    archs = space.canonical(np.array(list(np.ndindex(*space.cardinalities)), dtype=space.dtype))
    tightest = predictor.predict(np.unique(archs, axis=0)).mean.min()
    numbers = [float(n) for n in re.findall(r"\d+\.?\d*(?:e-?\d+)?", result.stderr)]
    assert any(abs(n - tightest) < 0.01 * tightest for n in numbers), result.stderr


def test_a_limit_on_accuracy_that_nothing_reaches_is_answered_with_the_nearest(
    tiny_experiment: Path, finished_run: Path, tmp_path: Path
) -> None:
    changes = [
        "objectives.accuracy.limit=0.9999",
        f'targets.calibration={{"host:fp32"="{finished_run / "calibration" / "host-fp32.json"}"}}',
        f'supernet.checkpoint="{finished_run / "supernet.safetensors"}"',
        "supernet.epochs=0",
    ]
    with pytest.raises(UserError, match=r"the nearest has accuracy 0\.\d+ \(limit 0\.9999\)"):
        run_experiment(load_config(tiny_experiment, changes), tmp_path / "run", where=tiny_experiment.parent)


def test_a_supernet_starts_from_published_weights(tiny_experiment: Path, finished_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    kept = load_file(finished_run / "supernet.safetensors").items()
    trained = {key: value for key, value in kept if key.startswith("model/")}
    published = {key.removeprefix("model/largest."): v for key, v in trained.items() if "classifier" not in key}
    save_file(published, tmp_path / "published.safetensors")
    changes = [
        f'targets.calibration={{"host:fp32"="{finished_run / "calibration" / "host-fp32.json"}"}}',
        f'supernet.weights="{tmp_path / "published.safetensors"}"',
        "supernet.keep=['head.classifier']",
        "supernet.epochs=0",
        "stages=[]",
    ]
    view = run_experiment(load_config(tiny_experiment, changes), tmp_path / "run", where=tiny_experiment.parent)
    used = load_file(view.path / "supernet.safetensors")
    assert all((used[key] == value).all() == ("classifier" not in key) for key, value in trained.items())


def test_limits_are_kept_by_the_search(tiny_experiment: Path, finished_run: Path, tmp_path: Path) -> None:
    predicted = load_run(finished_run).front()["latency_ms_predicted"]
    limit = 0.8 * float(predicted.max())  # cuts off the slowest; the fastest keep it on a busy machine too
    changes = [
        f"objectives.latency_ms.limit={limit}",
        f'targets.calibration={{"host:fp32"="{finished_run / "calibration" / "host-fp32.json"}"}}',
        "stages=[]",
    ]
    view = run_experiment(load_config(tiny_experiment, changes), tmp_path / "run", where=tiny_experiment.parent)
    front = view.front()
    assert (front.loc[front["kind"] == "front", "latency_ms_predicted"] <= limit).all()
    assert (front.loc[front["pareto"], "latency_ms_measured"] <= limit).all()


def test_damaged_files_of_a_run_are_named(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "damaged"
    shutil.copytree(finished_run, path)
    file = path / "supernet.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    result = nasbench("run", "--resume", path)
    assert result.returncode == 2
    assert "supernet.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_experiment_takes_classes_of_the_users_own(tmp_path: Path) -> None:
    result = nasbench(
        "run", ROOT / "experiments" / "own_parts.toml", "--output", tmp_path / "own", "--set", "strategy.evaluations=60"
    )
    assert result.returncode == 0, result.stderr
    view = load_run(tmp_path / "own")
    assert (view.evaluations()["phase"] == "search").sum() == 60
    assert view.config.strategy.options["rate"] == 0.2
    assert "latency_ms_measured" not in view.front()  # the device is not here


@pytest.mark.parametrize("strategy", ["own_parts:HillClimb", "nsga2"])
def test_what_a_device_does_not_run_is_never_proposed(strategy: str, tmp_path: Path) -> None:
    """A device of the user's own that takes no kernel above 3x3, and a front without one."""
    (tmp_path / "devices").mkdir()
    profile = load_profile("raspberry_pi_4").model_dump(exclude_none=True) | {"name": "small_kernels"}
    limits = {"depthwise_conv2d": {"max_kernel": 3, "source": "its handbook"}}
    profile["constraints"] = {"otherwise": "host_cpu", "limits": limits}
    (tmp_path / "devices" / "small_kernels.toml").write_text(tomli_w.dumps(profile))
    result = nasbench(
        "run", ROOT / "experiments" / "own_parts.toml", "--output", tmp_path / "run",
        "--set", 'targets.devices=["small_kernels"]',
        "--set", f'strategy={{name="{strategy}", evaluations=100}}',
        env=os.environ | {"NASBENCH_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "kernel 5 is above 3" in result.stderr
    view = load_run(tmp_path / "run")
    space = load_space("quickstart", 1, 10)
    kernels = [i for i, knob in enumerate(space.knobs) if knob.name.endswith("kernel")]
    archs = np.stack([arch_row(text) for text in [*view.evaluations()["arch"], *view.front()["arch"]]])
    assert len(archs) > 100
    assert not archs[:, kernels].any()
    assert archs.any()
    assert "kernel 5 is above 3" in " ".join(view.state["notes"])


def test_a_gradient_strategy_runs_in_the_same_procedure_and_is_resumed(
    tiny_experiment: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = finished_run / "calibration" / "host-fp32.json"
    config = load_config(
        tiny_experiment,
        [
            "strategy={name='gumbel', epochs=2, warmup_epochs=1}",
            "stages=[]",
            "evaluator.samples=0",
            "supernet.epochs=1",
        ],
    )
    config.targets.calibration = {"host:fp32": str(calibration)}
    steps: list[int] = []

    def stopped(update: Update) -> None:
        steps.append(update.step)
        if (path / "mixture.safetensors").exists():  # the first epoch is over
            steps.clear()
            raise KeyboardInterrupt

    path = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Phase, "training", lambda self: stopped)
        run_experiment(config, path, where=tiny_experiment.parent)
    assert load_run(path).state["status"] == "interrupted"
    assert not (path / "search.npz").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Phase, "training", lambda self: lambda update: steps.append(update.step))
        view = run_experiment(load_run_config(path), path, resume=True, where=tiny_experiment.parent)
    assert view.front()["pareto"].any()
    assert steps
    assert steps[0] > 1


def test_help_is_answered_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['nasbench', '--help']; import nasbench.cli as c\n"
    code += "try: c.main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"}
    )
    assert result.returncode == 0, result.stderr
    assert "run" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["spaces"], ["quickstart", "mobile96"]),
        (["spaces", "show", "ofa_mobilenet_v3"], ["21,758,655,492,572,485,851"]),
        (
            ["spaces", "show", "fbnet"],
            ["984,770,902,183,611,232,881", "fbnet_a, with final_width = 1504: 249M"],
        ),
        (["strategies"], ["nsga2", "population_size"]),
        (["evaluators"], ["supernet", "calibration_images"]),
        (["tasks"], ["npz", "class_names"]),
        (["stages"], ["quantize"]),
        (["devices", "list"], ["host", "raspberry_pi_4", "edge_tpu", "jetson_nano"]),
        (["devices", "show", "jetson_nano"], ["source"]),
        (
            ["predict", "--target", "raspberry_pi_4", "--space", "mobilenet_v3_large", "--arch", "largest"],
            ["latency", " ms "],
        ),
    ],
)
def test_commands_answer(arguments: list[str], words: list[str]) -> None:
    result = nasbench(*arguments, env=os.environ | {"COLUMNS": "200"})
    assert result.returncode == 0, result.stderr
    for word in words:
        assert word in result.stdout


def test_commands_name_what_is_wrong(tmp_path: Path, finished_run: Path) -> None:
    for arguments, word in [
        (["run"], "name an experiment"),
        (["run", "quickstrat"], "quickstart"),
        (["runs", tmp_path], "no run there"),
        (["report", tmp_path], "no run there"),
        (["spaces", "show", "mobile69"], "mobile96"),
        (["devices", "show", "jetson_nan"], "jetson_nano"),
        (["predict", "--target", "host"], "--space"),
        (["run", "quickstart", "--output", finished_run], "--resume"),
    ]:
        result = nasbench(*arguments)
        assert result.returncode == 2, (arguments, result.stdout, result.stderr)
        assert word in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr
