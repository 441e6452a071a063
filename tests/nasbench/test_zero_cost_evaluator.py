"""Zero-cost proxies as objectives of a search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nasbench.config import parse_config
from nasbench.evaluators.base import Proposals, Status
from nasbench.evaluators.zero_cost import ZeroCostEvaluator
from nasbench.experiment import run_experiment
from nasbench.plan import make_plan
from nasbench.run import RunView
from nasbench.tasks.fashion_mnist import FashionMNIST
from predictors import score_architecture
from search_spaces import UserError, load_space


@pytest.fixture(scope="module")
def task() -> FashionMNIST:
    return FashionMNIST()


@pytest.fixture(scope="module")
def quickstart():
    return load_space("quickstart", 1, 10)


def proposals(archs):
    return Proposals(np.arange(len(archs)), archs)


def test_values_do_not_depend_on_order_or_company(task, quickstart):
    evaluator = ZeroCostEvaluator(quickstart, task, metrics=("snip", "naswot"), images=8, seed=3)
    archs = quickstart.sample(3, np.random.default_rng(0))
    together = evaluator.evaluate(proposals(archs))
    assert evaluator.metrics == ("snip", "naswot")
    assert (together.status == Status.OK).all()
    assert together.values.shape == (3, 2)
    np.testing.assert_array_equal(evaluator.evaluate(proposals(archs[::-1])).values[::-1], together.values)
    by_hand = score_architecture(quickstart, archs[1], evaluator.images, evaluator.labels, ["snip", "naswot"], seed=3)
    np.testing.assert_array_equal(together.values[1], by_hand)


def test_a_row_that_fails_says_why_and_the_others_have_values(task, quickstart, monkeypatch):
    archs = quickstart.sample(3, np.random.default_rng(0))
    evaluator = ZeroCostEvaluator(quickstart, task, images=8)
    build = type(quickstart).build

    def moody(space, arch):
        if (arch == archs[1]).all():
            raise RuntimeError("not this one")
        return build(space, arch)

    monkeypatch.setattr(type(quickstart), "build", moody)
    result = evaluator.evaluate(proposals(archs))
    assert result.status.tolist() == [Status.OK, Status.FAILED, Status.OK]
    assert result.messages == {1: "RuntimeError: not this one"}
    assert np.isnan(result.values[1]).all()
    assert np.isfinite(result.values[[0, 2]]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["naswto"]}, "Did you mean 'naswot'"),
        ({"metrics": []}, "at least one"),
        ({"metrics": ["zen", "zen"]}, "distinct"),
        ({"images": 1}, "images = 1"),
        ({"initialisations": 0}, "initialisations = 0"),
    ],
)
def test_bad_settings_are_named(task, quickstart, options, message):
    with pytest.raises(UserError, match=message):
        ZeroCostEvaluator(quickstart, task, **options)


EXPERIMENT = {
    "name": "proxies",
    "threads": 1,
    "task": {"name": "fashion_mnist"},
    "space": {"name": "quickstart"},
    "evaluator": {"name": "zero_cost", "metrics": ["synflow"], "images": 4, "samples": 0, "verify": 4},
    "objectives": {"synflow": {"direction": "maximise"}, "params": {}},
    "strategy": {"name": "nsga2", "evaluations": 24, "batch": 8, "population_size": 8},
}


def test_a_search_by_a_proxy_finds_a_front(tmp_path: Path) -> None:
    view = run_experiment(parse_config(EXPERIMENT), tmp_path / "run")
    front = view.front()
    assert front["pareto"].any()
    assert np.isfinite(front.filter(like="synflow").to_numpy(dtype=float)).all()


def test_an_objective_that_the_evaluator_does_not_give_is_refused() -> None:
    config = parse_config(EXPERIMENT | {"objectives": {"zen": {"direction": "maximise"}}})
    with pytest.raises(UserError, match=r"objectives\.zen.*synflow"):
        make_plan(config)


def test_values_of_other_data_are_neither_resumed_nor_taken_from_the_cache(tmp_path: Path):
    config = parse_config({
        "task": {"name": "npz", "path": str(tmp_path / "d.npz"), "layout": "nchw"},
        "space": {"name": "nasbench201"},
        "evaluator": {
            "name": "zero_cost", "metrics": ["grad_norm"], "images": 8, "samples": 0, "verify": 1,
            "cache": str(tmp_path / "cache.sqlite"),
        },
        "objectives": {"grad_norm": {"direction": "maximise"}, "macs": {}},
        "strategy": {"name": "random", "evaluations": 2},
    })  # fmt: skip

    def write(seed: int) -> None:
        images = np.random.default_rng(seed).integers(0, 255, (60, 3, 32, 32), dtype=np.uint8)
        np.savez(tmp_path / "d.npz", images=images, labels=np.arange(60) % 3)

    def searched(run: RunView) -> list[float]:
        rows = run.evaluations()
        return rows[rows.phase == "search"].grad_norm.tolist()

    write(0)
    first = run_experiment(config, tmp_path / "a")
    same = run_experiment(config, tmp_path / "b")
    assert searched(same) == searched(first)
    write(1)
    other = run_experiment(config, tmp_path / "c")
    assert not set(searched(other)) & set(searched(first))
    with pytest.raises(UserError, match="task: has changed since .*begin a new run"):
        run_experiment(config, tmp_path / "a", resume=True)
    write(0)
    assert searched(run_experiment(config, tmp_path / "a", resume=True)) == searched(first)
