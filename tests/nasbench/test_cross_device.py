"""Several devices in one run: fronts per device, networks for all of them, and what specialising costs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from nasbench.cli import app
from nasbench.config import parse_config
from nasbench.cross_device import cross_device, front_of, of_target, searches
from nasbench.evaluators.base import Proposals
from nasbench.experiment import run_experiment
from nasbench.objectives import make_objective
from nasbench.plan import make_plan
from predictors.counts import Count
from predictors.derived import FunctionCost, Throughput
from search_spaces import UserError, load_space

PARTS = """
import numpy as np

def accuracy(choices):
    return 1 - float(np.exp(-sum(v for v in choices.values() if isinstance(v, int | float)) / 20))

def changes(archs, space):
    return (archs > 0).sum(1)

def wrong(archs, space):
    return archs
"""
DEVICES = ("raspberry_pi_4", "jetson_nano", "pixel_3")


def table() -> pd.DataFrame:
    """Two networks for A, two for B, and one between, all of made-up figures."""
    rows = [(0.9, 10.0, 40.0), (0.8, 5.0, 20.0), (0.9, 30.0, 12.0), (0.8, 15.0, 6.0), (0.85, 12.0, 14.0)]
    frame = pd.DataFrame(rows, columns=["accuracy", "latency_ms@a", "latency_ms@b"])
    return frame.assign(kind="front", name=[f"n{i}" for i in range(len(rows))])


def objectives(**limits: float) -> list:
    return [make_objective("accuracy"), *(make_objective(f"latency_ms@{d}", limit=limits.get(d)) for d in "ab")]


def test_the_matrix_by_hand() -> None:
    ratio = cross_device(table(), objectives())
    assert ratio.index.tolist() == ratio.columns.tolist() == ["a", "b"]
    np.testing.assert_allclose(np.diag(ratio), 1.0)
    # A's front on B: 40 and 20 ms where B's own networks of that accuracy take 12 and 6.
    assert ratio.loc["a", "b"] == pytest.approx(np.sqrt(40 / 12 * 20 / 6))
    assert ratio.loc["b", "a"] == pytest.approx(np.sqrt(30 / 10 * 15 / 5))
    loss = cross_device(table(), objectives(), "loss")
    np.testing.assert_allclose(np.diag(loss), 0.0)
    # A's networks keep none of B's costs of 6, 12 and 14 ms.
    assert np.isnan(loss.loc["a", "b"])
    nearer = table()
    nearer.loc[3, "latency_ms@a"] = 8.0  # B's small network, in 8 ms on A: 0.8 where A's own give 0.9 in 10 ms
    assert cross_device(nearer, objectives(), "loss").loc["b", "a"] == pytest.approx(0.1)
    with pytest.raises(UserError, match="two devices or more"):
        cross_device(table(), objectives()[:2])
    with pytest.raises(UserError, match="measure = 'ratio'"):
        cross_device(table(), objectives(), "ratio")


def test_fronts_per_device_keep_that_devices_limits_alone() -> None:
    some = objectives(a=11.0)
    assert front_of(table(), of_target(some, "a"))["name"].tolist() == ["n0", "n1"]
    assert front_of(table(), of_target(some, "b"))["name"].tolist() == ["n2", "n3"]
    with pytest.raises(UserError, match="no objective is of target 'c'"):
        of_target(some, "c")


def test_the_joint_search_sees_the_worst_device_and_all_limits() -> None:
    space = load_space("quickstart")
    bound = {"accuracy": Count("params").bind(space)}
    bound |= {f"latency_ms@{d}": Count(m).bind(space) for d, m in (("a", "macs"), ("b", "params"))}
    archs = space.sample(200, np.random.default_rng(0))
    macs, params = (bound[f"latency_ms@{d}"].predict(archs).mean for d in "ab")
    limits = {"a": float(np.median(macs)), "b": float(np.median(params))}
    given = tuple(objectives(**limits))
    names = [s.name for s in searches(space, given, bound, 0)]
    assert names == ["a", "b", "all"]
    joint = searches(space, given, bound, 0)[-1].evaluator
    found = joint.evaluate(Proposals(np.arange(200), archs))
    np.testing.assert_allclose(found.values[:, 1], np.maximum(macs / limits["a"], params / limits["b"]))
    kept = found.limit_values[:, 1] <= joint.objectives[-1].limit
    np.testing.assert_array_equal(kept, (macs <= limits["a"]) & (params <= limits["b"]))
    assert [s.name for s in searches(space, given[:2], bound, 0)] == [""]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_space: Path) -> Path:
    (tmp_path / "device_parts.py").write_text(PARTS)
    monkeypatch.delitem(sys.modules, "device_parts", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config(objectives: dict, **sections: object):
    base = {
        "task": {"name": "fashion_mnist"},
        "space": {"name": "space.toml"},
        "evaluator": {"name": "device_parts:accuracy", "samples": 30, "verify": 16},
        "targets": {"devices": list(DEVICES)},
        "objectives": objectives,
        "strategy": {"name": "nsga2", "evaluations": 400, "batch": 100, "population_size": 50},
        "selection": {"count": 1},
    }
    return parse_config(base | sections)


def test_a_run_with_several_devices(parts: Path) -> None:
    view = run_experiment(config({"accuracy": {}, "latency_ms": {"target": "each"}}), parts / "run", where=parts)
    names = [f"latency_ms@{d}" for d in DEVICES]
    assert list(view.config.objectives) == ["accuracy", *names]
    front = view.front()
    assert {f"{n}_predicted" for n in names} <= set(front)
    for device in DEVICES:
        own = view.front(device)
        assert len(own) >= 2
        assert own.sort_values(f"latency_ms@{device}")["accuracy"].is_monotonic_increasing
    assert len(view.front("all")) == (front["kind"] == "front").sum()
    matrix = view.cross_device()
    assert (matrix.to_numpy() >= 1 - 1e-12).all()
    np.testing.assert_allclose(np.diag(matrix), 1.0)
    shown = CliRunner().invoke(app, ["runs", str(parts / "run")]).stdout  # none of these devices is here
    given = [f"accuracy_{kind}" for kind in ("predicted", "evaluated")]
    assert shown.split("\n")[0].split() == ["name", *given, *(f"{n}_predicted" for n in names)]
    page = (parts / "run" / "report.html").read_text()
    assert "What specialising for a device costs" in page
    assert (parts / "run" / "figures" / "cross_device.png").is_file()
    # What is resumed is the same.
    again = run_experiment(view.config, parts / "run", resume=True, where=parts)
    pd.testing.assert_frame_equal(again.front(), front)


def test_ones_own_function_and_analytic_objectives(parts: Path) -> None:
    given = {
        "accuracy": {},
        "changed": {"metric": "device_parts:changes", "direction": "minimise", "limit": 4},
        "training_memory_bytes": {"batch": 8},
        "file_bytes": {},
        "throughput_ips": {"target": "jetson_nano", "at_least": 10.0},
    }
    one = {"targets": {"devices": ["jetson_nano"]}, "evaluator": {"name": "device_parts:accuracy", "samples": 30}}
    front = run_experiment(config(given, **one), parts / "run", where=parts).front()
    best = front[front["pareto"]]
    assert len(best)
    assert (best["changed"] <= 4).all()
    assert (best["training_memory_bytes"] > 2 * best["file_bytes"]).all()
    assert (best["throughput_ips"] >= 10).all()
    with pytest.raises(UserError, match="needs direction"):
        make_plan(config({"accuracy": {}, "changed": {"metric": "device_parts:changes"}}), parts)
    with pytest.raises(UserError, match="cannot import 'device_parts:gone'"):
        make_plan(config({"accuracy": {}, "x": {"metric": "device_parts:gone", "direction": "minimise"}}), parts)
    with pytest.raises(UserError, match="batch is a key of training_memory_bytes"):
        make_plan(config({"accuracy": {}, "macs": {"batch": 2}}), parts)
    with pytest.raises(UserError, match="method is a key of training_memory_bytes"):
        make_plan(config({"accuracy": {}, "macs": {"method": "bias"}}), parts)


def test_costs_made_of_others() -> None:
    space = load_space("quickstart")
    archs = space.sample(5, np.random.default_rng(0))
    params = Count("params").bind(space)
    rate = Throughput(params, 4).predict(archs)
    np.testing.assert_allclose(rate.mean, 4000 / params.predict(archs).mean)
    with pytest.raises(UserError, match=r"gave shape \(5, \d+\) for 5"):
        FunctionCost(space, lambda a, s: a, "mine").predict(archs)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        FunctionCost(space, lambda a, s: 1 / 0, "mine").predict(archs)
    assert replace(make_objective("macs", limit=1), opposite=2).limited
