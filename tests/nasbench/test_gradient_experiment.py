"""Differentiable strategies in an experiment: run from a file, refused where they cannot work."""

from __future__ import annotations

import numpy as np
import pytest

from nasbench.config import load_config
from nasbench.experiment import run_experiment
from nasbench.plan import make_plan
from predictors import predictor_for
from search_spaces import UserError

EXPERIMENT = """
name = "differentiable"
seed = 1
threads = 1

[task]
name = "npz"
path = "images.npz"

[space]
name = "{space}"

[supernet]
epochs = 1
validation_images = 0

[evaluator]
samples = {samples}
verify = 4
calibration_images = 50
validation_images = 50

[targets]
devices = ["raspberry_pi_4"]

[objectives.accuracy]

[objectives.latency_ms]
{limit}

[strategy]
name = "{strategy}"
{keys}

[selection]
count = 1
"""
LIGHTNAS = "epochs = 3\nwarmup_epochs = 1\nproposals = 6"


@pytest.fixture
def experiment(tiny_experiment, tmp_path):
    for name in ("images.npz", "space.toml"):
        (tmp_path / name).write_bytes((tiny_experiment.parent / name).read_bytes())
    (tmp_path / "without_mixture.py").write_text(
        "from search_spaces import NASBench201Space, SearchSpace\n"
        "class WithoutMixture(NASBench201Space):\n"
        "    mixture_supernet = SearchSpace.mixture_supernet\n"
    )

    def make(strategy, keys="", space="space.toml", samples=12, limit=""):
        file = tmp_path / "experiment.toml"
        file.write_text(EXPERIMENT.format(strategy=strategy, keys=keys, space=space, samples=samples, limit=limit))
        return load_config(file)

    return make


@pytest.mark.parametrize(
    ("strategy", "keys"),
    [("lightnas", LIGHTNAS), ("predictor_gradient", "evaluations = 100\nrestarts = 8\nrounds = 2\nsteps = 20")],
)
def test_a_run_keeps_its_limit(experiment, tmp_path, strategy, keys):
    space = make_plan(experiment("random"), tmp_path).space
    latency = predictor_for("raspberry_pi_4", "latency_ms").bind(space)
    limit = float(np.median(latency.predict(space.sample(200, np.random.default_rng(0))).mean))
    config = experiment(strategy, keys, limit=f"limit = {limit}")
    view = run_experiment(config, tmp_path / "run", where=tmp_path)
    front = view.front().query("kind == 'front'")
    assert len(front)
    assert (front["latency_ms"] <= limit).all()
    assert front["latency_ms"].max() > 0.5 * limit


def test_costs_alone_need_no_samples(experiment, tmp_path):
    config = experiment("predictor_gradient", "evaluations = 20\nrestarts = 4\nrounds = 1\nsteps = 5", samples=0)
    config.objectives = {k: v for k, v in config.objectives.items() if k != "accuracy"}
    front = run_experiment(config, tmp_path / "run", where=tmp_path).front()
    assert front.query("kind == 'front'")["latency_ms"].min() == front["latency_ms"].min()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"strategy": "predictor_gradient", "samples": 0},
            r"samples = 0 nothing predicts accuracy.*or choose one of .*nsga2",
        ),
        (
            {"strategy": "darts", "space": "without_mixture:WithoutMixture", "keys": "epochs = 3"},
            r"'darts' trains a mixture supernet, and space .* has none.*one of .*regularized_evolution",
        ),
        ({"strategy": "lightnas", "keys": LIGHTNAS}, r"objectives\.NAME\.limit or strategy\.target.*latency_ms"),
        ({"strategy": "darts", "keys": "drop_path = 1.5"}, r"strategy\.drop_path"),
        ({"strategy": "fbnet", "keys": "exponent = 1.5"}, r"unknown key 'exponent'"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_trained(experiment, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make_plan(experiment(**settings), tmp_path)
