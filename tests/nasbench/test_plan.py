"""What is told, or refused, before a run begins."""

import json
from pathlib import Path
from typing import Any

import pytest

from nasbench.config import find_experiment, load_config
from nasbench.experiment import run_experiment
from nasbench.plan import make_plan
from nasbench.progress import Reporter
from search_spaces import UserError

KEYS = """
verify = 1
[strategy]
name = "regularized_evolution"
evaluations = 8
population_size = 10
sample_size = 3
"""


class Lines(Reporter):
    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def experiment(scored: Any, tmp_path: Path) -> Path:
    path: Path = scored.lay_out(tmp_path, KEYS)
    return path


def test_a_run_tells_at_its_start_that_its_budget_leaves_evolution_nothing_to_do(experiment: Path) -> None:
    report = Lines()
    view = run_experiment(load_config(experiment), experiment.parent / "run", where=experiment.parent, report=report)
    (said,) = [line for line in report.lines if line.startswith("strategy: ")]
    assert "evaluations = 8 is not above population_size = 10" in said
    assert json.loads((view.path / "run.json").read_text())["notes"] == [said]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["strategy.evaluations=10"], "evaluations = 10 is not above population_size = 10"),
        (["strategy.evaluations=11"], ""),
        (["strategy={name='nsga2', evaluations=40}"], "evaluations = 40 is not above population_size = 100"),
        (["strategy={name='ppo', evaluations=20}"], "evaluations = 20 is not above batch_size = 20"),
        (["strategy={name='reinforce', evaluations=21}"], ""),
        (["strategy={name='random', evaluations=2}"], ""),
    ],
)
def test_only_budgets_that_are_too_small_are_told_of(experiment: Path, changes: list[str], words: str) -> None:
    notes = make_plan(load_config(experiment, changes), experiment.parent).notes
    assert [words in note for note in notes] == ([True] if words else [])


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("epochz", "unknown key 'epochz'. Did you mean 'epochs'?"),
        ("log_dir", "unknown key 'log_dir'. Known: "),
        ("seed", "unknown key 'seed'. The experiment's seed stands above all sections. "),
    ],
)
def test_keys_of_training_are_listed_as_an_experiment_takes_them(key: str, words: str) -> None:
    file = find_experiment("quickstart")
    with pytest.raises(UserError) as error:
        make_plan(load_config(file, [f"supernet.{key}=1"]))
    message = str(error.value)
    assert message.startswith(f"{file}: supernet: {words}")
    listed = message.partition("Known: ")[2].rstrip(".").split(", ")
    assert {"epochs", "lr", "checkpoint", "tensorboard"} <= set(listed)
    assert not {"seed", "log_dir", "progress"} & set(listed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('space.name="gone.toml"', "space.name: gone.toml: no such file or folder"),
        ('evaluator={name="table", path="gone.csv"}', "evaluator.path: gone.csv: no such file or folder"),
        ('evaluator.also=[{name="gone:Evaluator"}]', "evaluator.also[0]: evaluator: cannot import 'gone:Evaluator'"),
        ('targets.devices=["gone"]', "targets.devices: unknown device 'gone'"),
        ('targets.meters={host="gone.toml"}', "targets.meters: host:fp32: gone.toml: no such file or folder"),
        ('targets.meters={host="gone"}', "targets.meters: host:fp32: unknown meter 'gone'"),
        ('targets.predictors={host="gone:P"}', "targets.predictors: host:fp32: predictor: cannot import 'gone:P'"),
        ('targets.calibration={host="gone.json"}', "targets.calibration: host:fp32: gone.json: no such file"),
        ("objectives.latency_ms.target=gone", "objectives.latency_ms: unknown device 'gone'"),
        ('stages=[{name="finetune", epochs=-1}]', "stages[0]: epochs = -1: expected 0 or more"),
        ('stages=[{name="gone"}]', "stages[0]: stage: unknown name 'gone'"),
        ('networks.a.source="gone.onnx"', "networks.a.source: gone.onnx: no such file or folder"),
    ],
)
def test_errors_of_a_plan_name_file_and_key(experiment: Path, change: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(load_config(experiment, [change]), experiment.parent)
    assert str(error.value).startswith(f"{experiment}: {words}")


def test_several_workers_beside_measurements_here_are_refused_before_there_is_a_run(experiment: Path) -> None:
    changes = ['evaluator.also=[{name="measure"}]', "execution.backend=processes", "execution.workers=2"]
    path = experiment.parent / "run"
    with pytest.raises(UserError, match=r"execution.workers = 2: measurements on this machine would be disturbed"):
        run_experiment(load_config(experiment, changes), path, where=experiment.parent)
    assert not path.exists()
    assert make_plan(load_config(experiment, [*changes[:2], "execution.workers=1"]), experiment.parent)
