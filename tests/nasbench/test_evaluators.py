"""Predicted populations, and the user's own functions and commands, misbehaving ones included."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import psutil
import pytest

from nasbench.evaluators.base import Proposals, Status
from nasbench.evaluators.command import CommandEvaluator
from nasbench.evaluators.function import FunctionEvaluator
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.objectives import make_objective
from predictors.base import BoundPredictor, Estimate
from search_spaces import UserError


@pytest.fixture
def proposals(space):
    archs = space.sample(4, np.random.default_rng(0))
    return Proposals(np.arange(10, 14), archs, {"epochs": np.array([1, 2, 3, 4])})


class Sum(BoundPredictor):
    """The sum of the choices, with a standard deviation of one; not a number for resolution 1."""

    def predict(self, archs):
        mean = archs.astype(float).sum(axis=1)
        mean[archs[:, 0] == 1] = np.nan
        return Estimate(mean, np.ones(len(mean)))

    def expected(self, probabilities):
        raise NotImplementedError


def test_predictions_with_quantiles_for_limits(space):
    objectives = (
        make_objective("accuracy", limit=3.0),
        make_objective("latency_ms@somewhere", limit=5.0, quantile=0.975),
        make_objective("params"),
    )
    evaluator = PredictedEvaluator(objectives, {o.name: Sum() for o in objectives})
    archs = space.sample(50, np.random.default_rng(0))
    result = evaluator.evaluate(Proposals(np.arange(50), archs))
    ok = archs[:, 0] == 0
    total = archs.astype(float).sum(axis=1)
    assert evaluator.metrics == ("accuracy", "latency_ms@somewhere", "params")
    np.testing.assert_array_equal(result.status, np.where(ok, Status.OK, Status.UNSUPPORTED))
    assert np.isnan(result.values[~ok]).all()
    np.testing.assert_array_equal(result.values[ok], np.repeat(total[ok, None], 3, axis=1))
    np.testing.assert_array_equal(result.limit_values[ok][:, [0, 2]], result.values[ok][:, [0, 2]])
    np.testing.assert_allclose(result.limit_values[ok, 1], total[ok] + 1.96, atol=1e-3)
    with pytest.raises(UserError, match=r"objectives\.params.*no predictor"):
        PredictedEvaluator(objectives, {"accuracy": Sum(), "latency_ms@somewhere": Sum()})


def test_a_function_sees_choices_and_fidelity(space, proposals):
    def function(choices, epochs):
        return {"accuracy": choices["resolution"] / 100, "size": epochs}

    result = FunctionEvaluator(space, function, metrics=("size", "accuracy")).evaluate(proposals)
    np.testing.assert_array_equal(result.values[:, 0], [1, 2, 3, 4])
    np.testing.assert_allclose(result.values[:, 1], [space.decode(a)["resolution"] / 100 for a in proposals.archs])
    assert (result.status == Status.OK).all()
    assert result.messages == {}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("good", "finite number, got str 'good'"),
        (None, "got NoneType None"),
        (float("nan"), "got float nan"),
        (True, "got bool True"),
        ([0.5], "got list"),
        ({"acuracy": 0.5}, "no 'accuracy' in the result"),
        (np.float32(0.5), None),
        (np.int64(1), None),
        (1, None),
    ],
)
def test_what_a_function_returns_is_checked(space, proposals, returned, message):
    result = FunctionEvaluator(space, lambda choices, epochs: returned).evaluate(proposals)
    if message is None:
        np.testing.assert_array_equal(result.values, np.full((4, 1), float(returned)))
        return
    assert (result.status == Status.FAILED).all()
    assert np.isnan(result.values).all()
    assert message in result.messages[0]


def test_one_bad_call_fails_one_row(space, proposals):
    def function(choices, epochs):
        if epochs == 3:
            raise RuntimeError("out of luck")
        return 0.5

    result = FunctionEvaluator(space, function).evaluate(proposals)
    assert result.status.tolist() == [Status.OK, Status.OK, Status.FAILED, Status.OK]
    assert result.messages == {2: "RuntimeError: out of luck"}
    assert np.isnan(result.values[2, 0])


# A command that does what its argument says; `arch` is the request.
FAKE = """
import json, os, pathlib, subprocess, sys, time
request = json.load(sys.stdin)
what, notes = sys.argv[1], pathlib.Path(sys.argv[2])
notes.open("a").write(json.dumps(request) + "\\n")
tries = len(notes.read_text().splitlines())
if what == "good":
    print("epoch 1 of 1"); print(json.dumps({"accuracy": request["id"] / 100, "size": request["fidelity"]["epochs"]}))
if what == "number":
    print(0.25)
if what == "third" and tries % 3 == 0:
    print(0.5)
if what == "garbage":
    print("accuracy: good")
if what == "unterminated":
    print('{"accuracy": 0.5}', end="")
if what == "crash":
    print(0.9); print("disk on fire", file=sys.stderr); sys.exit(7)
if what == "shell":
    print("$(echo 1)")
if what == "chatter":
    for _ in range(20000): print("x" * 100)
    print(0.75)
if what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    notes.with_suffix(".child").write_text(str(child.pid))
    time.sleep(60)
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return lambda what: [sys.executable, str(script), what, str(tmp_path / "notes")]


def test_a_command_reads_and_prints_json(space, proposals, fake, tmp_path):
    evaluator = CommandEvaluator(space, command=fake("good"), metrics=["accuracy", "size"])
    result = evaluator.evaluate(proposals)
    np.testing.assert_allclose(result.values, [[0.10, 1], [0.11, 2], [0.12, 3], [0.13, 4]])
    assert (result.status == Status.OK).all()
    assert (result.seconds > 0).all()
    requests = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    for request, arch in zip(requests, proposals.archs, strict=True):
        np.testing.assert_array_equal(space.encode(request["architecture"]), arch)


@pytest.mark.parametrize(("what", "value"), [("number", 0.25), ("unterminated", 0.5), ("chatter", 0.75)])
def test_output_that_is_good_enough(space, proposals, fake, what, value):
    result = CommandEvaluator(space, command=fake(what)).evaluate(proposals[:1])
    assert result.messages == {}
    assert result.values.tolist() == [[value]]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("garbage", "not JSON: 'accuracy: good'"),
        ("crash", "exited with code 7: disk on fire"),
        ("silent", "printed nothing"),
        ("shell", "not JSON"),
    ],
)
def test_output_that_is_not(space, proposals, fake, what, message):
    result = CommandEvaluator(space, command=fake(what)).evaluate(proposals[:2])
    assert (result.status == Status.FAILED).all()
    assert np.isnan(result.values).all()
    assert message in result.messages[0]


def test_failed_runs_are_repeated(space, proposals, fake):
    result = CommandEvaluator(space, command=fake("third"), retries=2).evaluate(proposals[:2])
    assert result.values.tolist() == [[0.5], [0.5]]
    assert result.messages == {}
    assert (result.status == Status.OK).all()
    result = CommandEvaluator(space, command=fake("third"), retries=1).evaluate(proposals[:1])
    assert result.status.tolist() == [Status.FAILED]


def test_a_command_that_prints_without_end_is_stopped(space, proposals):
    result = CommandEvaluator(space, command="yes", timeout_s=60.0).evaluate(proposals[:1])
    assert result.status.tolist() == [Status.FAILED]
    assert result.messages[0] == "yes: killed after printing more than 16 MB"
    assert result.seconds[0] < 30


def test_a_hanging_command_is_killed_with_its_children(space, proposals, fake, tmp_path):
    start = time.perf_counter()
    result = CommandEvaluator(space, command=fake("hang"), timeout_s=1.5).evaluate(proposals[:1])
    assert time.perf_counter() - start < 10
    assert result.status.tolist() == [Status.TIMEOUT]
    assert "not finished after 1.5 s" in result.messages[0]
    child = int((tmp_path / "notes.child").read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.02)
    else:
        pytest.fail("the command's child is still running")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": ""}, "command: is empty"),
        ({"command": "no-such-program --fast"}, "no program 'no-such-program'"),
        ({"command": "true", "timeout_s": 0.0}, "timeout_s"),
        ({"command": "true", "retries": -1}, "retries"),
    ],
)
def test_bad_settings_are_named(space, options, message):
    with pytest.raises(UserError, match=message):
        CommandEvaluator(space, **options)
