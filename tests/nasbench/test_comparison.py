"""Comparison of strategies: its statistics against brute force, its counting, and what survives a kill."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import nasbench as nb
from hardware_profiles.paths import finished
from nasbench.comparison.problems import make_problem
from nasbench.comparison.result import Comparison, Yardstick
from nasbench.comparison.settings import load_settings
from nasbench.comparison.statistics import (
    at_times,
    band,
    evaluations_to,
    front_of,
    holm,
    hypervolume_curve,
    rank_test,
    regret_curve,
)
from nasbench.comparison.study import make_study
from nasbench.comparison.trial import PATIENCE, run_trial
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals
from nasbench.evaluators.table import SHIPPED
from nasbench.objectives import make_objective
from nasbench.pareto import hypervolume
from nasbench.strategies.random_search import RandomSearch
from nasbench.strategies.successive_halving import SuccessiveHalving
from predictors import predictor_for
from search_spaces import UserError, load_space


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("levels", [4, 1000])  # few: many ties
def test_curves_are_what_is_found_so_far_gives_each_time(objectives, levels):
    rng = np.random.default_rng(objectives)
    values = rng.integers(0, levels, (60, objectives)) / levels
    values[rng.random(60) < 0.1] = np.nan
    reference = np.full(objectives, 0.9)
    curve = hypervolume_curve(values, reference)
    np.testing.assert_allclose(curve, [hypervolume(values[: n + 1], reference) for n in range(60)], atol=1e-12)
    front = front_of(values[~np.isnan(values).any(axis=1)])
    regret = regret_curve(values, front, np.zeros(objectives), np.ones(objectives))
    for n in (0, 7, 59):
        good = values[: n + 1][~np.isnan(values[: n + 1]).any(axis=1)]
        shift = max((good - row).max(axis=1).min() for row in front) if len(good) else 1.0
        assert regret[n] == pytest.approx(min(shift, 1.0))
    assert regret[-1] == 0
    assert (np.diff(regret) <= 0).all()


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="reference"):
        hypervolume_curve(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(ValueError, match="two methods"):
        rank_test({"one": np.zeros(3)})
    with pytest.raises(ValueError, match="every block"):
        rank_test({"one": np.zeros(3), "two": np.zeros(4)})


def test_the_whole_front_is_measured_once_for_all_searches(tmp_path):
    points = np.random.default_rng(0).random((300, 3))
    front = 1 - points / np.linalg.norm(points, axis=1, keepdims=True)
    stick = Yardstick(front.min(axis=0), np.full(3, 1.5), front, "made up")
    trials = {("p", "s", seed): SimpleNamespace(found=front[seed : seed + 3]) for seed in range(20)}
    comparison = Comparison(tmp_path, SimpleNamespace(strategies=("s",)), {}, trials)
    comparison.yardsticks = {"p": stick}
    start = time.perf_counter()
    curves = [comparison.hypervolume("p", "s", seed) for seed in range(20)]
    assert time.perf_counter() - start < 5
    for seed, curve in enumerate(curves):
        volume, whole = (hypervolume(rows, stick.worst) for rows in (front[seed : seed + 3], front))
        assert curve[-1] == pytest.approx(volume / whole)


def test_bands_times_and_thresholds():
    low, middle, high = band([np.array([0.1, 0.3]), np.array([0.2]), np.array([0.3, 0.5])])
    np.testing.assert_allclose(middle, [0.2, 0.3])  # the one that ended keeps its 0.2
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert evaluations_to(np.array([0.2, 0.99, 1.0]), 0.99) == 2
    assert evaluations_to(np.array([0.2]), 0.99) == np.inf
    curve = at_times(np.array([0.5, 0.7]), np.array([1.0, 3.0]), np.array([0.5, 1.0, 2.9, 9.0]))
    np.testing.assert_array_equal(curve, [np.nan, 0.5, 0.5, 0.7])


def test_rank_tests_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, (3, 24))
    test = rank_test({"worse": noise[0], "better": noise[1] + 0.3, "worse too": noise[2]})
    assert min(test.ranks, key=test.ranks.get) == "better"
    assert sum(test.ranks.values()) == pytest.approx(6)
    assert test.friedman_p == pytest.approx(stats.friedmanchisquare(noise[0], noise[1] + 0.3, noise[2]).pvalue)
    pairs = test.pairs.set_index(["first", "second"])
    assert pairs.loc[("worse", "better"), "p_holm"] < 0.001
    assert pairs.loc[("worse", "worse too"), "p_holm"] > 0.05
    assert (pairs["p_holm"] >= pairs["p"]).all()
    same = rank_test({"a": np.ones(5), "b": np.ones(5), "c": np.ones(5)})
    assert set(same.ranks.values()) == {2.0}
    assert same.friedman_p == 1
    assert (same.pairs["p_holm"] == 1).all()
    # Holm's own procedure, by hand: 3 * 0.01, 2 * 0.03, then never less than before.
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.03])), [0.06, 0.03, 0.06])


class Counting(Evaluator):
    """The sum of the choices, and how often each architecture was asked for."""

    metrics = ("cost",)

    def __init__(self):
        self.asked = []

    def evaluate(self, proposals):
        self.asked += [a.tobytes() for a in proposals.archs]
        values = proposals.archs.astype(float).sum(axis=1)[:, None]
        return Evaluation(values, np.zeros(len(values), dtype=np.uint8), seconds=np.ones(len(values)))


class Stubborn(RandomSearch):
    """Proposes the same three over and over, twice in each batch, and checks what it is told."""

    def ask(self, n):
        if not hasattr(self, "few"):
            self.few = self.space.sample(3, self.rng)
        return self._proposals(np.concatenate([self.few, self.few]))

    def tell(self, proposals, values, violations, status):
        np.testing.assert_array_equal(values[:, 0], proposals.archs.astype(float).sum(axis=1))


def test_only_distinct_architectures_are_evaluated_and_counted(space):
    objectives = [make_objective("cost", direction="minimise")]
    evaluator = Counting()
    trial = run_trial(RandomSearch(space, 0), evaluator, objectives, evaluations=50, batch=7)
    assert len(trial.values) == len(set(evaluator.asked)) == len(evaluator.asked) == 50
    assert (np.diff(trial.seconds) > 0).all()
    assert trial.seconds[-1] >= 50
    evaluator = Counting()
    trial = run_trial(Stubborn(space, 0), evaluator, objectives, evaluations=50)
    assert len(trial.values) == len(evaluator.asked) == 3
    assert trial.asked == 6 * (1 + PATIENCE)


def test_costs_of_every_kind_are_predicted_as_in_an_experiment():
    sections = {
        "space": {"name": "tiny_images"},
        "evaluator": {"name": "table", "path": "tiny_images", "columns": {"accuracy": "accuracy"}},
        "targets": {"devices": ["raspberry_pi_4"]},
        "objectives": ["accuracy", "latency_ms", "throughput_ips", "training_memory_bytes"],
    }
    problem = make_problem("derived", sections)
    archs = problem.space.sample(3, np.random.default_rng(0))
    values = problem.evaluator.evaluate(Proposals(np.arange(3), archs)).values
    assert (values > 0).all()
    np.testing.assert_allclose(values[:, 1] * values[:, 2], 1000)


def test_results_are_of_the_code_of_a_users_function(tmp_path):
    code = tmp_path / "mine_compared.py"
    code.write_text("def f(choices): return 0.25\n")
    sections = {
        "space": {"name": "nasbench201"},
        "evaluator": {"name": "mine_compared:f", "metrics": ["accuracy"]},
        "objectives": ["accuracy", "params"],
    }
    before = make_problem("p", sections, tmp_path).fingerprint
    assert make_problem("p", sections, tmp_path).fingerprint == before
    code.write_text("def f(choices): return 0.75\n")
    assert make_problem("p", sections, tmp_path).fingerprint != before


def test_limits_on_both_sides_count(space):
    objectives = [make_objective("cost", direction="minimise", at_least=3, at_most=5)]
    trial = run_trial(RandomSearch(space, 0), Counting(), objectives, evaluations=50, batch=7)
    np.testing.assert_array_equal(trial.feasible, (trial.values[:, 0] >= 3) & (trial.values[:, 0] <= 5))
    assert trial.feasible.any()
    assert not trial.feasible.all()


def test_an_evaluation_of_reduced_fidelity_is_never_taken_for_a_whole_one(space):
    with pytest.raises(UserError, match="fidelity"):
        run_trial(
            SuccessiveHalving(space, 0), Counting(), [make_objective("cost", direction="minimise")], evaluations=9
        )


OWN = """
from nasbench.strategies.random_search import RandomSearch

class Ascending(RandomSearch):
    '''Random, with a key of its own.'''

    def __init__(self, space, seed=0, initial=None, *, breaks_at: int = 0):
        super().__init__(space, seed, initial)
        self.breaks_at = breaks_at

    def ask(self, n):
        if self.breaks_at and self.next_id >= self.breaks_at:
            raise ZeroDivisionError("so it is")
        return super().ask(n)

def both(choices):
    return {"accuracy": 0.9 - 0.1 * (choices["0->1"] == "none"), "cost": 1.0 + 3 * (choices["2->3"] == "nor_conv_3x3")}
"""

COMPARISON = """
name = "small"
evaluations = 24
seeds = 3
batch = 4

[problem]
space = "nasbench201"
evaluator = { name = "table", path = "t.csv", rows_only = true, columns = { accuracy = "a", cost = "c", size = "s" } }

[problem.objectives.accuracy]

[problems.cost.objectives.cost]
direction = "minimise"

[problems.limited.objectives.size]
direction = "minimise"
limit = 30

[strategies.random]

[strategies.evolution]
name = "regularized_evolution"
population_size = 8
sample_size = 3

[strategies.mine]
name = "own_compare:Ascending"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    archs = np.unique(rng.integers(0, 5, (400, 6)), axis=0)
    convs = (archs == 3).sum(axis=1)
    frame = pd.DataFrame(
        {
            "arch": ["".join(map(str, a)) for a in archs],
            "a": (0.5 + 0.06 * convs + rng.uniform(0, 0.1, len(archs))).round(4),
            "c": (1 + convs + rng.uniform(0, 2, len(archs))).round(3),
            "s": 10 + 9 * convs,
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "own_compare.py").write_text(OWN)
    (tmp_path / "compare.toml").write_text(COMPARISON)
    return tmp_path / "compare.toml"


def found(path: Path) -> dict[str, tuple[int, float]]:
    """When each result was written, and what it holds."""
    return {p.name: (p.stat().st_mtime_ns, float(np.nansum(np.load(p)["a1"]))) for p in finished(path, "**/*.npz")}


def same(first: nb.Comparison, second: nb.Comparison) -> bool:
    columns = ["problem", "strategy", "seed", "evaluations", "proposals", "infeasible", "hypervolume", "regret"]
    return first.runs[columns].equals(second.runs[columns]) and first.curves.equals(second.curves)


def test_a_comparison_ends_in_frames_figures_and_a_report(file, tmp_path):
    result = nb.compare(file, output=tmp_path / "out")
    assert len(result.runs) == 2 * 3 * 3
    assert (result.runs["evaluations"] == 24).all()
    assert set(result.summary["evaluations"]) == {6, 12, 24}
    assert result.summary["hypervolume"].between(0, 1).all()
    curves = result.curves.groupby(["problem", "strategy"])["hypervolume"]
    assert curves.apply(lambda c: c.is_monotonic_increasing).all()
    assert list(result.ranks.columns) == [6, 12, 24]
    assert (result.ranks[24].sum()) == pytest.approx(6)
    assert "true front, known from all" in result.yardsticks["cost"].basis
    assert (result.runs.query("problem == 'limited'")["infeasible"] > 0).any()
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("evolution", "Holm", "cost", "size (limit 30)", "true front"):
        assert text in page
    assert "| evolution |" in (tmp_path / "out" / "summary.md").read_text()
    for name in ("hypervolume", "hypervolume_time", "regret", "regret_time", "ranks"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 10_000
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "summary.csv"), result.summary)
    with pytest.raises(UserError, match="no figure of 'hypervolume' against 'speed'"):
        result.plot_hypervolume("speed")


@pytest.fixture
def unwritten(monkeypatch):
    """Figures and pages take longer than these searches."""
    monkeypatch.setattr(nb.Comparison, "write", lambda self: None)


def test_a_changed_comparison_runs_only_what_is_missing(file, tmp_path, unwritten):
    first = nb.compare(file, output=tmp_path / "out")
    before = found(tmp_path / "out")
    again = nb.compare(file, output=tmp_path / "out", overrides=["seeds=4", "strategies.evolution.sample_size=4"])
    after = found(tmp_path / "out")
    kept = [name for name in before if "evolution" not in name]
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2 * (2 + 4)  # one more seed of two strategies, four of the changed one
    assert len(kept) == 12
    assert len(again.runs) == 24
    # Another value in the table, and nothing of it holds any more.
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text.replace("0.5", "0.4", 1))
    nb.compare(file, output=tmp_path / "out")
    assert len(found(tmp_path / "out")) == len(after) + 18
    # The user's own code counts too.
    (tmp_path / "own_compare.py").write_text(OWN + "\n# changed\n")
    study = make_study(load_settings(file), tmp_path)
    assert sum(not c.file.is_file() for c in study.cells(tmp_path / "out")) == 6
    assert len(first.runs) == 18


def test_worker_processes_and_a_kill_change_nothing(file, tmp_path, unwritten):
    alone = nb.compare(file, output=tmp_path / "alone")
    command = [sys.executable, "-m", "nasbench", "compare", str(file), "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(finished(tmp_path / "killed", "**/*.npz")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = found(tmp_path / "killed")
    resumed = nb.compare(file, output=tmp_path / "killed", jobs=2)
    assert {name: found(tmp_path / "killed")[name] for name in left} == left
    assert same(alone, resumed)


def test_without_a_complete_table_all_runs_together_are_the_yardstick(file, tmp_path):
    settings = tmp_path / "own.toml"
    settings.write_text("""
        evaluations = 8
        seeds = 2
        [problems.own]
        space = "nasbench201"
        evaluator = { name = "own_compare:both", metrics = ["accuracy", "cost"] }
        objectives = { accuracy = {}, cost = { direction = "minimise" }, macs = {} }
        [strategies.random]
    """)
    result = nb.compare(settings, output=tmp_path / "own")
    assert "best of all runs" in result.yardsticks["own"].basis
    assert result.runs["hypervolume"].between(0, 1).all()
    assert not len(result.ranks.columns)
    assert "nothing to compare it with" in (tmp_path / "own" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluatons=3"], "unknown key 'evaluatons'. Did you mean 'evaluations'"),
        (["seeds=0"], "seeds.*1 or more"),
        (["seeds=[1, 1]"], "distinct seeds"),
        (["budgets=[10, 999]"], r"budgets = \[10, 999\]: must be within 1..evaluations \(24\)"),
        (["strategies.bayes={}"], "strategy: unknown name 'bayes'. Did you mean 'bayesian'"),
        (["strategies.darts={}"], "strategies.darts: 'darts' does not propose.*these can: .*nsga2, .*random"),
        (["strategies.successive_halving={}"], "'successive_halving' does not propose.*in full"),
        (["strategies.random.rate=1"], "strategies.random: unknown key 'rate'"),
        (["strategies.nsga2.population_size=1"], "strategies.nsga2 on problem 'cost'.*at least 2"),
        (["problems.bad.stages=[]"], "problems.bad: unknown section 'stages'"),
        (["problems.bad.objectives=['energy']"], "problems.bad: objectives.energy: unknown metric"),
        (["problems.bad.evaluator.path='gone.csv'"], "problems.bad: evaluator.path: gone.csv: no such file"),
        (
            [
                "problem.evaluator={name='supernet'}",
                "problem.space='quickstart'",
                "problems={a={objectives=['accuracy']}}",
            ],
            "problems.a: evaluator 'supernet' needs a trained supernet",
        ),
        (["strategies.mine.breaks_at=8"], "'mine' on problem 'cost' from seed 0: ZeroDivisionError: so it is"),
        (['strategies."a/b"={name="random"}'], "strategies.*a/b"),
    ],
)
def test_what_is_wrong_is_named(file, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        nb.compare(file, output=tmp_path / "out", overrides=overrides)


def test_directories_and_results_of_others_are_left_alone(file, tmp_path, unwritten):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="mine: is there and is no comparison"):
        nb.compare(file, output=tmp_path / "mine")
    with pytest.raises(UserError, match="jobs = 0"):
        nb.compare(file, output=tmp_path / "out", jobs=0)
    overrides = ["seeds=1", 'problems={cost={objectives=["accuracy"]}}', "strategies={random={}}"]
    nb.compare(file, output=tmp_path / "out", overrides=overrides)
    (result,) = (tmp_path / "out").rglob("*.npz")
    result.write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        nb.compare(file, output=tmp_path / "out", overrides=overrides)


def test_the_default_comparison_needs_nothing(tmp_path, unwritten):
    result = nb.compare(output=tmp_path / "default", overrides=["evaluations=12", "seeds=2", "strategies={random={}}"])
    assert set(result.problems) == {"raspberry_pi_4", "edge_tpu", "macs"}
    assert result.priced
    assert all("true front" in y.basis for y in result.yardsticks.values())


def test_the_published_comparison_is_complete_and_says_where_its_data_are(data_dir, monkeypatch):
    file = Path(__file__).parents[2] / "experiments" / "compare_nasbench201.toml"
    study = make_study(load_settings(file), file.parent)
    assert len(study.problems) == 4
    for problem in study.problems.values():
        assert len(problem.known) == 15_625
        assert problem.objectives[0].unit == ""
        assert problem.objectives[1].unit == "ms"
    assert "test images" in study.settings.note
    monkeypatch.delenv("NASBENCH_DATA")
    with pytest.raises(UserError, match=r"problems\..*NASBENCH_DATA/nb201_accuracy.* NASBENCH_DATA is not set"):
        make_study(load_settings(file), file.parent)


def test_the_table_that_ships_is_what_its_record_and_its_space_say():
    space = load_space("tiny_images", 1, 10)
    table = nb.ArchitectureTable.read("tiny_images", space)
    assert table.complete
    for count in ("macs", "params"):
        exact = predictor_for("", count).bind(space).predict(table.archs).mean
        np.testing.assert_array_equal(table.column(count), exact)
    assert np.ptp(table.column("accuracy")) > 0.1
    record = json.loads(SHIPPED["tiny_images"].with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(SHIPPED["tiny_images"].read_bytes()).hexdigest()
    assert "predicted" in record["columns"]["edge_tpu_predicted_ms"]
