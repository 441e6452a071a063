"""Predict, measure, correct: rounds end with measured networks within the limits, and are the same when resumed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nasbench.config import Config, parse_config
from nasbench.experiment import run_experiment
from predictors.corrected import CorrectedPredictor
from predictors.counts import Count
from search_spaces import UserError, load_space

PARTS = """
import numpy as np
from hardware_profiles import Measurement, Meter, Protocol
from predictors.base import AdditivePredictor, Estimate
from search_spaces import read_onnx

def accuracy(choices):
    return 1 - float(np.exp(-sum(v for v in choices.values() if isinstance(v, int | float)) / 20))

class Macs(AdditivePredictor):
    def __init__(self, target, metric): self.metric = metric
    def block_features(self, workload): return np.array([workload.macs], dtype=float)
    def head(self, totals): return totals[:, 0] / 1e6
    @property
    def coefficients(self): return np.array([1e-6]), 0.0

class Slower(Meter):
    '''A device on which everything takes a third longer than predicted, and small networks more.'''
    runtime = "mine"
    calls = 0
    def __init__(self, progress=None): pass
    def measure(self, artifacts, target):
        type(self).calls += 1
        protocol = Protocol("mine", "1", "fp32", 1, 1, 0, 1, 1, "value", "nowhere")
        ms = [1.3 * (read_onnx(a.path).macs / 1e6) ** 0.95 for a in artifacts]
        return [Measurement(a, t, np.array([t]), protocol) for a, t in zip(artifacts, ms)]
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_space: Path) -> Path:
    (tmp_path / "slower_parts.py").write_text(PARTS)
    monkeypatch.delitem(sys.modules, "slower_parts", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config(limit: float | None, **sections: object) -> Config:
    latency = {} if limit is None else {"limit": limit}
    base = {
        "task": {"name": "fashion_mnist"},
        "space": {"name": "space.toml"},
        "evaluator": {"name": "slower_parts:accuracy", "samples": 30, "verify": 4},
        "targets": {
            "devices": ["jetson_nano:fp32"],
            "predictors": {"jetson_nano:fp32": "slower_parts:Macs"},
            "meters": {"jetson_nano:fp32": "slower_parts:Slower"},
        },
        "objectives": {"accuracy": {}, "latency_ms": latency},
        "strategy": {"name": "nsga2", "evaluations": 600, "batch": 100, "population_size": 50},
        "verify": {"rounds": 3, "tolerance": 0.03},
        "selection": {"count": 1},
    }
    return parse_config(base | sections)


def middle_limit(parts: Path) -> float:
    """What half of the networks are predicted to keep."""
    space = load_space(str(parts / "space.toml"), 1, 10)
    return float(np.median(Count("macs").bind(space).predict(space.sample(1000, np.random.default_rng(0))).mean)) / 1e6


def test_a_broken_limit_is_corrected_and_the_same_when_resumed(parts: Path) -> None:
    limit, path = middle_limit(parts), parts / "run"
    view = run_experiment(config(limit), path, where=parts)
    front, rounds = view.front(), view.rounds()
    first, last = rounds.iloc[0], rounds.iloc[-1]
    assert first["broken"] > 0
    assert first["bias"] < -0.1
    assert last["broken"] == 0
    assert last["mean_error"] < 0.03
    assert 1 <= last["round"] <= 3
    # What broke the limit is there to be seen, and on no front.
    broken = front[front["latency_ms_measured"] > limit]
    assert len(broken)
    assert not broken["pareto"].any()
    assert (front.loc[front["pareto"], "latency_ms_measured"] <= limit).all()
    later = front[front["round"] > 0]
    np.testing.assert_allclose(later["latency_ms_predicted"], later["latency_ms_measured"], rtol=0.1)
    page = (path / "report.html").read_text()
    assert "Predict, measure, correct" in page
    calls = sys.modules["slower_parts"].Slower.calls
    (path / "front.csv").unlink()
    (path / "search-round1.npz").unlink()  # killed in the first round after the first measurements
    again = run_experiment(view.config, path, resume=True, where=parts)
    pd.testing.assert_frame_equal(again.front(), front)
    assert sys.modules["slower_parts"].Slower.calls == calls  # nothing was measured again


def test_without_rounds_and_with_predictions_that_hold_enough_is_measured_once(parts: Path) -> None:
    once = run_experiment(config(None, verify={"rounds": 0}), parts / "once", where=parts)
    loose = run_experiment(config(None, verify={"tolerance": 0.9}), parts / "loose", where=parts)
    for view in (once, loose):
        assert view.rounds()["round"].tolist() == [0]
        assert (view.front()["round"] == 0).all()


def test_where_every_proposal_is_evaluated_the_evaluated_ones_are_looked_at_again(parts: Path) -> None:
    limit = middle_limit(parts)
    view = run_experiment(
        config(
            limit,
            evaluator={"name": "slower_parts:accuracy", "samples": 0, "verify": 4},
            strategy={"name": "random", "evaluations": 150, "batch": 50},
        ),
        parts / "run",
        where=parts,
    )
    assert view.rounds().iloc[-1]["broken"] == 0
    front = view.front()
    assert (front.loc[front["pareto"], "latency_ms_measured"] <= limit).all()
    assert len(view.evaluations().query("phase == 'search'")) == 150


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_a_correction_learns_a_factor_and_says_how_sure_it_is(factor: float) -> None:
    space = load_space("quickstart")
    bound, rng = Count("macs").bind(space), np.random.default_rng(0)
    archs = space.sample(60, rng)
    true = factor * bound.predict(archs).mean * np.exp(0.03 * rng.normal(size=60))
    corrected = CorrectedPredictor(bound, space, archs[:30], true[:30])
    estimate = corrected.predict(archs[30:])
    np.testing.assert_allclose(estimate.mean, true[30:], rtol=0.12)
    inside = (estimate.quantile(0.05) <= true[30:]) & (true[30:] <= estimate.quantile(0.95))
    assert 0.75 <= inside.mean() <= 1.0
    few = CorrectedPredictor(bound, space, archs[:2], true[:2]).predict(archs[30:])
    assert (few.std / few.mean).mean() > (estimate.std / estimate.mean).mean()


def test_a_correction_needs_a_measurement() -> None:
    space = load_space("quickstart")
    archs = space.sample(3, np.random.default_rng(0))
    with pytest.raises(UserError, match="corrected by measurements"):
        CorrectedPredictor(Count("macs").bind(space), space, archs, np.full(3, np.nan))
