"""Gradient search on predictors, held against spaces whose whole front is known."""

from __future__ import annotations

import numpy as np
import pytest

from hardware_profiles import load_target
from nasbench.objectives import make_objective, minimised
from nasbench.pareto import hypervolume, non_dominated_mask
from nasbench.strategies.predictor_gradient import PredictorGradient
from predictors.accuracy import AccuracyPredictor
from predictors.base import BoundPredictor, Estimate
from predictors.counts import Count
from predictors.roofline import Roofline
from search_spaces import NASBench201Space, UserError

ACCURACY, MACS = make_objective("accuracy"), make_objective("macs")
QUICK = {"restarts": 16, "rounds": 2, "steps": 40}


def truth(space, archs):
    """An accuracy with interactions: larger is better, but two knobs' ends do not go together."""
    x = space.features(archs).astype(float)
    rng = np.random.default_rng(3)
    width = x.shape[1]
    pair = rng.normal(size=(width, width)) * 0.01
    return (
        0.5 + 0.03 * np.log(Count("macs").bind(space).predict(archs).mean / 1e6) + np.einsum("ni,ij,nj->n", x, pair, x)
    )


@pytest.fixture
def predictors(space):
    archs = np.unique(space.sample(150, np.random.default_rng(1)), axis=0)
    return {
        "accuracy": AccuracyPredictor(space).fit(archs, truth(space, archs)),
        "macs": Count("macs").bind(space),
        "latency_ms": Roofline(load_target("raspberry_pi_4")).bind(space),
    }


def found(space, predictors, objectives, seed=0, n=400, **options):
    strategy = PredictorGradient(space, seed, **(QUICK | options))
    strategy.use_predictors(predictors, objectives)
    return strategy.ask(n).archs


def values(predictors, objectives, archs):
    means = np.column_stack([predictors[o.name].predict(archs).mean for o in objectives])
    return minimised(means, tuple(objectives))


@pytest.mark.parametrize("count", [2, 3])
def test_the_front_of_the_predictions_is_swept(space, predictors, count):
    objectives = [ACCURACY, MACS, make_objective("latency_ms", target="raspberry_pi_4")][:count]
    everything = values(predictors, objectives, space.everything())
    reference = everything.max(axis=0)
    best = hypervolume(everything[non_dominated_mask(everything)], reference)
    ours = values(predictors, objectives, found(space, predictors, objectives))
    assert hypervolume(ours[non_dominated_mask(ours)], reference) > 0.98 * best


@pytest.mark.parametrize("quantile", [0.05, 0.5])
def test_limits_are_kept_and_used(space, predictors, quantile):
    every = values(predictors, [ACCURACY, MACS], space.everything())
    limit = float(np.quantile(every[:, 1], quantile))
    archs = found(space, predictors, [ACCURACY, make_objective("macs", limit=limit)], n=20)
    ours = values(predictors, [ACCURACY, MACS], archs)
    assert (ours[:, 1] <= limit).all()
    assert ours[:, 0].min() == pytest.approx(every[every[:, 1] <= limit, 0].min(), abs=0.005)


def test_one_objective_will_do(space, predictors):
    archs = found(space, predictors, [ACCURACY], n=1)
    best = predictors["accuracy"].predict(space.everything()).mean.max()
    assert predictors["accuracy"].predict(archs).mean[0] == pytest.approx(best, abs=0.003)


def test_what_is_not_permitted_is_never_proposed(space, predictors):
    large = [any(op.output.size > 5000 for op in block.workload.operators) for block in space.catalog]
    restricted = space.without_blocks(np.array(large))
    archs = found(restricted, predictors, [ACCURACY, MACS])
    assert len(archs) > 10
    assert restricted.permits(archs).all()


class Opaque(BoundPredictor):
    """A user's own predictor, which no gradient goes through."""

    def __init__(self, space):
        self.space = space

    def predict(self, archs):
        return Estimate(truth(self.space, archs), np.zeros(len(archs)))


def test_predictors_need_not_be_differentiable():
    space = NASBench201Space(1, 4, resolution=8, channels=4, cells=1)
    predictors = {"accuracy": Opaque(space), "macs": Count("macs").bind(space)}
    every = space.from_official_index(range(15625))
    limit = float(np.quantile(predictors["macs"].predict(every).mean, 0.5))
    archs = found(space, predictors, [ACCURACY, make_objective("macs", limit=limit)], n=20)
    kept = every[predictors["macs"].predict(every).mean <= limit]
    assert truth(space, archs).max() > np.quantile(truth(space, kept), 0.999)


def test_after_its_rounds_it_has_no_more(space, predictors):
    strategy = PredictorGradient(space, 0, restarts=4, rounds=1, steps=5)
    strategy.use_predictors(predictors, [MACS])
    assert 0 < len(strategy.ask(10_000)) < 10_000
    assert len(strategy.ask(1)) == 0


def test_it_says_what_it_needs(space, predictors):
    with pytest.raises(UserError, match=r"evaluator\.samples above 0.*nsga2"):
        PredictorGradient(space, 0).ask(1)
    with pytest.raises(UserError, match="no predictor for objectives.energy_mj"):
        PredictorGradient(space, 0).use_predictors(predictors, [make_objective("energy_mj", target="raspberry_pi_4")])
    for key, value in {"restarts": 0, "rounds": 0, "steps": 0, "repairs": -1, "lr": -1.0}.items():
        with pytest.raises(UserError, match=f"strategy.{key}"):
            PredictorGradient(space, 0, **{key: value})
