"""One contract for every ask/tell strategy: a new one joins by a line in STRATEGIES."""

from __future__ import annotations

import json

import numpy as np
import optuna
import pytest

from nasbench.evaluators.base import Status
from nasbench.objectives import make_objective
from nasbench.pareto import constrained_ranks, hypervolume
from nasbench.strategies import optuna_strategy
from nasbench.strategies.bayesian import BayesianOptimization
from nasbench.strategies.local_search import LocalSearch
from nasbench.strategies.nsga2 import NSGA2
from nasbench.strategies.nsga3 import NSGA3, normalised, reference_directions
from nasbench.strategies.optuna_strategy import OptunaStrategy
from nasbench.strategies.ppo import PPO
from nasbench.strategies.predictor_gradient import PredictorGradient
from nasbench.strategies.random_search import RandomSearch
from nasbench.strategies.regularized_evolution import RegularizedEvolution
from nasbench.strategies.reinforce import Reinforce
from nasbench.strategies.successive_halving import SuccessiveHalving
from nasbench.variation import neighbours, row_keys
from predictors.counts import Count
from search_spaces import UserError
from search_spaces.nasbench201 import NASBench201Space


def predictor_gradient(space, seed, initial):
    """With a predictor per objective, as a run has after its samples."""
    strategy = PredictorGradient(space, seed, initial, restarts=8, rounds=50, steps=5, repairs=2)
    objectives = [make_objective("macs"), make_objective("params", direction="maximise")]
    strategy.use_predictors({o.name: Count(o.name).bind(space) for o in objectives}, objectives)
    return strategy


STRATEGIES = {
    "predictor_gradient": predictor_gradient,
    "random": RandomSearch,
    "regularized_evolution": lambda *args: RegularizedEvolution(*args, population_size=20, sample_size=5),
    "nsga2": lambda *args: NSGA2(*args, population_size=20),
    "nsga3": lambda *args: NSGA3(*args, population_size=20),
    "local_search": lambda *args: LocalSearch(*args, starts=5),
    "reinforce": lambda *args: Reinforce(*args, reward="pareto"),
    "ppo": lambda *args: PPO(*args, reward="pareto"),
    "successive_halving": SuccessiveHalving,
    "bayesian": lambda *args: BayesianOptimization(*args, candidates=300, model_evaluations=80),  # bred from then on
    "optuna_tpe": lambda *args: OptunaStrategy(*args, sampler_options={"n_startup_trials": 25, "n_ei_candidates": 4}),
    "optuna_nsga3": lambda *args: OptunaStrategy(
        *args, sampler="NSGAIIISampler", sampler_options={"population_size": 10}
    ),
    "optuna_nsga2": lambda *args: OptunaStrategy(
        *args, sampler="NSGAIISampler", sampler_options={"population_size": 10}
    ),
}
LEARNING = ["bayesian", "regularized_evolution", "nsga2", "nsga3", "local_search", "reinforce", "ppo"]


@pytest.fixture(params=STRATEGIES)
def make(request):
    return STRATEGIES[request.param]


@pytest.fixture(params=[name for name in STRATEGIES if name != "predictor_gradient"])
def tireless(request):
    """Those that propose as often as asked, if need be again; the other ends with what its predictors recommend."""
    return STRATEGIES[request.param]


class Problem:
    """Synthetic objectives: a cost that adds up, an error that falls with it, and knobs that interact."""

    def __init__(self, space, objectives=2, limit=None, failing=0.0):
        self.space, self.limit, self.failing = space, limit, failing
        rng = np.random.default_rng(7)
        width = space.features(space.sample(1, rng)).shape[1]
        self.cost = rng.random((width, objectives))
        self.pair = rng.normal(size=(width, width)) * 0.2
        self.objectives = objectives

    def __call__(self, proposals):
        x = self.space.features(proposals.archs).astype(float)
        costs = x @ self.cost
        error = np.einsum("ni,ij,nj->n", x, self.pair, x) - 0.5 * costs.sum(axis=1)
        values = np.column_stack([error, costs])[:, : self.objectives]
        status = np.zeros(len(values), dtype=np.uint8)
        failed = (row_keys(proposals.archs) % np.uint64(100)) < 100 * self.failing
        status[failed], values[failed] = Status.FAILED, np.nan
        if self.limit is None:
            violations = np.zeros((len(values), 0))
        else:
            violations = np.maximum(values[:, -1:] - self.limit, 0.0)
            violations[failed] = np.inf
        return values, violations, status


def run(strategy, problem, batches, n=10):
    """All proposals' archs and values of `batches` rounds."""
    archs, values, violations = [], [], []
    for _ in range(batches):
        proposals = strategy.ask(n)
        told = problem(proposals)
        strategy.tell(proposals, *told)
        archs.append(proposals.archs)
        values.append(told[0])
        violations.append(told[1])
    return np.concatenate(archs), np.concatenate(values), np.concatenate(violations)


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_proposals_are_canonical_and_numbered_in_order(make, space, objectives):
    strategy, problem = make(space, 0, None), Problem(space, objectives)
    expected = 0
    for n in (7, 25, 1, 10):
        proposals = strategy.ask(n)
        assert len(proposals) == n
        np.testing.assert_array_equal(proposals.archs, space.canonical(space.check(proposals.archs)))
        assert proposals.archs.dtype == space.dtype
        np.testing.assert_array_equal(proposals.ids, np.arange(expected, expected + n))
        expected += n
        strategy.tell(proposals, *problem(proposals))


def test_the_seed_decides_everything(make, space):
    first, again, other = (run(make(space, seed, None), Problem(space), 5)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("objectives", [1, 2, 3])
@pytest.mark.parametrize("batches", [1, 4])
def test_restored_strategies_continue_identically(make, space, objectives, batches):
    problem = Problem(space, objectives, limit=2.0, failing=0.1)
    initial = space.sample(15, np.random.default_rng(5))
    strategy = make(space, 3, initial)
    run(strategy, problem, batches)
    state = json.loads(json.dumps(strategy.state_dict(), default=lambda array: array.tolist()))
    expected = run(strategy, problem, 4)
    restored = make(space, 3, initial)
    restored.load_state_dict(state)
    for a, b in zip(run(restored, problem, 4), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_is_a_snapshot(make, space):
    strategy, problem = make(space, 3, None), Problem(space)
    run(strategy, problem, 4)
    state = strategy.state_dict()
    before = json.dumps(state, default=lambda array: array.tolist())
    run(strategy, problem, 4)
    assert json.dumps(state, default=lambda array: array.tolist()) == before


def test_initial_architectures_come_first(make, space):
    initial = space.sample(12, np.random.default_rng(9))
    archs, _, _ = run(make(space, 0, initial), Problem(space), 3, n=5)
    np.testing.assert_array_equal(archs[:12], initial)
    with pytest.raises(UserError, match="knobs"):
        make(space, 0, initial[:, :-1])


def blocked_choice(space):
    """No 5x5 kernels: choices that are never possible."""
    return [any(op.kernel == (5, 5) for op in block.workload.operators) for block in space.catalog]


def blocked_pair(space):
    """No wide blocks on large maps: choices that are possible, but not together."""
    return [any(op.output.size > 5000 for op in block.workload.operators) for block in space.catalog]


@pytest.mark.parametrize("blocked", [blocked_choice, blocked_pair])
def test_what_a_space_does_not_permit_is_never_proposed(make, space, blocked):
    restricted = space.without_blocks(blocked(space))
    problem = Problem(space, limit=2.0, failing=0.1)
    strategy = make(restricted, 0, None)
    archs = np.concatenate([run(strategy, problem, 4)[0]])
    state = json.loads(json.dumps(strategy.state_dict(), default=lambda array: array.tolist()))
    expected = run(strategy, problem, 3)[0]
    restored = make(restricted, 0, None)
    restored.load_state_dict(state)
    np.testing.assert_array_equal(run(restored, problem, 3)[0], expected)
    for proposed in (archs, expected):
        assert restricted.permits(proposed).all()
        np.testing.assert_array_equal(proposed, space.canonical(space.check(proposed)))
    assert len(np.unique(archs, axis=0)) > 20


def test_a_start_from_what_is_not_permitted_is_refused(make, space):
    restricted = space.without_blocks(blocked_choice(space))
    allowed = restricted.permits(space.everything())
    initial = np.stack([space.everything()[allowed][0], space.everything()[~allowed][0]])
    with pytest.raises(UserError, match=r"starts from 1 architectures that not all targets run.*'kernel1.0': 5"):
        make(restricted, 0, initial)
    assert len(make(restricted, 0, initial[:1]).ask(2)) == 2


def test_a_strategy_of_the_users_own_cannot_propose_what_is_not_permitted(space):
    class Stubborn(RandomSearch):
        def ask(self, n):
            return self._proposals(np.repeat(space.references["largest"][None], n, axis=0))

    with pytest.raises(UserError, match="strategy Stubborn proposes 3 architectures that not all targets run"):
        Stubborn(space.without_blocks(blocked_choice(space))).ask(3)
    assert len(Stubborn(space).ask(3)) == 3


def test_failures_are_survived(make, space):
    strategy = make(space, 0, None)
    archs, values, _ = run(strategy, Problem(space, failing=0.5), 12)
    assert 0 < np.isnan(values).any(axis=1).mean() < 1
    assert len(archs) == 120
    hopeless = make(space, 0, None)
    archs, values, _ = run(hopeless, Problem(space, failing=1.0, limit=1.0), 6)
    assert np.isnan(values).all()
    assert len(np.unique(archs, axis=0)) > 50


@pytest.mark.parametrize("sizes", [{"max_depths": (1,), "kernels": (3,)}, {"max_depths": (1,), "resolutions": (8,)}])
def test_spaces_smaller_than_a_population_end(tireless, make_space, sizes):
    small = make_space(**sizes)
    archs, _, _ = run(tireless(small, 0, None), Problem(small), 10, n=15)
    assert len(archs) == 150
    assert len(np.unique(archs, axis=0)) == small.size == 4


def test_a_space_of_one_architecture(tireless, make_space):
    single = make_space(max_depths=(1,), resolutions=(8,), kernels=(3,), expansions=(2,))
    archs, _, _ = run(tireless(single, 0, None), Problem(single), 3)
    assert len(archs) == 30


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("limit", [None, 2.5])
def test_learning_beats_random(make_space, name, limit):
    wide = make_space(max_depths=(4, 4), kernels=(3, 5, 7), expansions=(2, 3, 4))
    problem = Problem(wide, limit=limit)
    reference = np.array([0.0, 12.0])
    batches = 8 if name == "bayesian" else 30  # each choice of a model costs some milliseconds
    won = 0
    for seed in range(5):
        volumes = []
        for make_one in (STRATEGIES[name], STRATEGIES["random"]):
            _, values, violations = run(make_one(wide, seed, None), problem, batches)
            feasible = (violations <= 0).all(axis=1)
            volumes.append(hypervolume(values[feasible], reference))
        won += volumes[0] > volumes[1]
    assert won >= 4


@pytest.mark.parametrize("name", LEARNING)
def test_learning_finds_a_single_objectives_minimum(space, name):
    problem = Problem(space, 1)
    least = problem(RandomSearch(space)._proposals(space.everything()))[0].min()
    _, values, _ = run(STRATEGIES[name](space, 0, None), problem, 15 if name == "bayesian" else 60)
    assert values.min() == pytest.approx(least, abs=0.05 * abs(least))


def test_nsga2_keeps_the_best_of_all_it_saw_without_repeats(space):
    strategy, problem = NSGA2(space, 0, None, population_size=20), Problem(space, limit=2.5)
    proposals = strategy.ask(60)
    strategy.tell(proposals, *problem(proposals))
    values, violations, _ = problem(proposals)
    ranks = constrained_ranks(values, violations)
    assert len(strategy.archs) == 20
    assert len(np.unique(strategy.archs, axis=0)) == 20
    worst = np.sort(ranks)[19]
    kept = {row.tobytes() for row in strategy.archs}
    assert (
        {row.tobytes() for row in proposals.archs[ranks < worst]}
        <= kept
        <= {row.tobytes() for row in proposals.archs[ranks <= worst]}
    )


def test_aging_forgets_the_oldest_even_if_best(space):
    strategy = RegularizedEvolution(space, 0, None, population_size=5, sample_size=2)
    problem = Problem(space, 1)
    proposals = strategy.ask(8)
    strategy.tell(proposals, *problem(proposals))
    np.testing.assert_array_equal(strategy.archs, proposals.archs[3:])


@pytest.mark.parametrize(
    ("strategy", "options", "key"),
    [
        (BayesianOptimization, {"design": 1}, "design"),
        (BayesianOptimization, {"candidates": 0}, "candidates"),
        (BayesianOptimization, {"model_evaluations": -1}, "model_evaluations"),
        (NSGA2, {"population_size": 1}, "population_size"),
        (NSGA2, {"crossover_rate": 1.5}, "crossover_rate"),
        (NSGA2, {"mutation_rate": -0.1}, "mutation_rate"),
        (RegularizedEvolution, {"sample_size": 0}, "sample_size"),
        (RegularizedEvolution, {"mutation_rate": 2.0}, "mutation_rate"),
    ],
)
def test_bad_settings_name_their_key(space, strategy, options, key):
    with pytest.raises(UserError, match=f"strategy.{key}"):
        strategy(space, 0, None, **options)


def test_optuna_learns(space):
    problem = Problem(space, 1)
    best = []
    for strategy in (OptunaStrategy(space, 0), RandomSearch(space, 0)):
        _, values, _ = run(strategy, problem, 6)
        best.append(np.sort(values[:, 0])[:10].mean())
    assert best[0] < best[1]


def test_optuna_writes_a_study_that_survives_an_interruption(space, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    problem = Problem(space, limit=2.0, failing=0.2)

    def start(seed=0):
        return OptunaStrategy(space, seed, sampler="RandomSampler", storage=url)

    strategy = start()
    run(strategy, problem, 1, n=5)
    state = strategy.state_dict()
    run(strategy, problem, 1, n=3)  # told, but killed before the state was saved
    again = start()
    again.load_state_dict(state)
    archs, values, _ = run(again, problem, 2, n=3)

    study = optuna.load_study(study_name="nasbench", storage=url)
    assert [t.number for t in study.trials] == list(range(11))
    for trial, arch, value in zip(study.trials[5:], archs, values, strict=True):
        np.testing.assert_array_equal(space.encode(trial.params), arch)
        assert (trial.values is None) == bool(np.isnan(value).any())
        if trial.values:
            np.testing.assert_array_equal(trial.values, value)
    with pytest.raises(UserError, match="another search; give another study_name"):
        run(start(seed=1), problem, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "TPESampler2"}, "Did you mean 'TPESampler'"),
        ({"sampler_options": {"candidates": 3}}, "sampler_options: TPESampler.*candidates"),
    ],
)
def test_optuna_settings_are_checked(space, options, message):
    with pytest.raises(UserError, match=message):
        OptunaStrategy(space, 0, **options)


def test_optuna_storage_that_cannot_be_used_is_named(space, monkeypatch):
    monkeypatch.setattr(optuna_strategy, "_WAITS", (0.0,))
    strategy = OptunaStrategy(space, 0, storage="sqlite:////no/such/directory/study.db")
    with pytest.raises(UserError, match=r"strategy\.storage"):
        run(strategy, Problem(space), 1)


def test_reference_directions_are_das_and_dennis(space):
    # Deb & Jain, table I: 12 divisions of 3 objectives are 91 directions, 6 of 5 are 210.
    for objectives, most, expected in ((3, 92, 91), (5, 212, 210), (2, 20, 20), (1, 9, 1)):
        directions = reference_directions(objectives, most)
        assert len(np.unique(directions, axis=0)) == len(directions) == expected
        np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1.0)
        assert (directions >= 0).all()


def test_normalisation_finds_the_intercepts_of_a_tilted_plane():
    rng = np.random.default_rng(0)
    shares = np.vstack([np.eye(3), rng.dirichlet(np.ones(3), 50)])
    values = shares * [2.0, 30.0, 400.0] + [5.0, -7.0, 100.0]
    np.testing.assert_allclose(normalised(values), shares, atol=1e-6)
    with_worst = normalised(np.vstack([values, [np.inf, 0.0, 200.0]]))
    assert np.isfinite(with_worst).all()


def test_nsga3_spreads_over_directions(space):
    """Of a front that is crowded in one corner, the survivors serve as many directions as there are."""
    rng = np.random.default_rng(1)
    strategy = NSGA3(space, 0, None, population_size=15)  # 4 divisions of 3 objectives: 15 directions
    proposals = strategy.ask(60)
    points = np.abs(rng.normal(size=(60, 3)) * [0.05, 0.05, 1.0])
    points[:14] = reference_directions(3, 15)[:14]
    values = points / np.linalg.norm(points, axis=1, keepdims=True)  # all on a sphere: none dominates another
    strategy.tell(proposals, values, np.zeros((60, 0)), np.zeros(60, dtype=np.uint8))
    nearest = (strategy.values @ reference_directions(3, 15).T).argmax(axis=1)
    assert len(strategy.archs) == 15
    assert len(set(nearest.tolist())) >= 14


def test_a_climb_ends_in_a_local_optimum_and_repeats_nothing(space):
    problem = Problem(space, 1)
    strategy = LocalSearch(space, 0, None, starts=1)
    archs, values, _ = run(strategy, problem, 30, n=10)
    assert len(np.unique(archs, axis=0)) == 300
    keys = dict(zip(row_keys(archs).tolist(), values[:, 0], strict=True))
    best = archs[values[:, 0].argmin()]
    around = neighbours(space, best, np.random.default_rng(0))
    seen = [keys.get(key) for key in row_keys(around).tolist()]
    assert None not in seen  # the best was explored whole
    assert min(seen) >= values.min()


@pytest.mark.parametrize("kind", [Reinforce, PPO])
def test_mnasnets_reward_decides_where_a_policy_goes(space, kind):
    """Accuracy that grows and a cost that grows with it: beyond its target a steep exponent turns the policy back."""

    def told(proposals):
        size = space.features(proposals.archs) @ np.arange(1.0, space.features(proposals.archs).shape[1] + 1)
        size = size / 60.0
        values = np.column_stack([-(0.5 + 0.1 * size), size])
        return values, np.zeros((len(values), 0)), np.zeros(len(values), dtype=np.uint8)

    ends = {}
    for name, options in {
        "free": {"exponents": (0.0, 0.0)},
        "tight": {"targets": [1.0], "exponents": (0.0, -3.0)},
    }.items():
        strategy = kind(space, 0, None, **options)
        _, values, _ = run(strategy, told, 40, n=20)
        ends[name] = np.median(values[-200:, 1])
    everything = told(RandomSearch(space)._proposals(space.everything()))[0][:, 1]
    assert ends["free"] >= np.quantile(everything, 0.9)
    assert abs(ends["tight"] - 1.0) < abs(ends["free"] - 1.0) / 3


def test_rewards_say_what_they_cannot_do(space):
    with pytest.raises(UserError, match=r"takes both signs.*mnasnet.*: choose reward = 'pareto'"):
        strategy = Reinforce(space, 0)
        values = np.column_stack([np.linspace(-1, 1, 20), np.ones(20)])
        strategy.tell(strategy.ask(20), values, np.zeros((20, 0)), np.zeros(20, dtype=np.uint8))
    with pytest.raises(UserError, match=r"strategy.targets: 2 given, but 1 objectives are minimised"):
        strategy = Reinforce(space, 0, targets=[1.0, 2.0])
        proposals = strategy.ask(20)
        strategy.tell(proposals, np.tile([-0.5, 2.0], (20, 1)), np.zeros((20, 0)), np.zeros(20, dtype=np.uint8))


def test_pareto_policies_divide_the_front(space):
    strategy = Reinforce(space, 0, None, reward="pareto", policies=3)
    _, values, _ = run(strategy, Problem(space, 2), 40, n=15)
    late = np.stack([values[-150:][p::3].mean(axis=0) for p in range(3)])
    # The heavier the weight of the first objective, the smaller it is, and the larger the other.
    assert late[0, 0] > late[2, 0]
    assert late[0, 1] < late[2, 1]


def test_halving_promotes_the_best_of_each_rung(space):
    strategy = SuccessiveHalving(space, 0, None, minimum=2, factor=3, rungs=3)
    problem = Problem(space, 1)
    told = []
    for _ in range(30):
        proposals = strategy.ask(9)
        values, violations, status = problem(proposals)
        strategy.tell(proposals, values, violations, status)
        told += zip(
            row_keys(proposals.archs).tolist(), proposals.fidelity["epochs"].tolist(), values[:, 0], strict=True
        )
    rungs = [[(k, v) for k, level, v in told if level == wanted or (wanted is None and np.isnan(level))]
             for wanted in (2, 6, None)]  # fmt: skip
    first, second, full = (dict(rung) for rung in rungs)
    assert [len(r) for r in rungs] == [len(first), len(second), len(full)]  # none twice on a rung
    assert set(full) <= set(second) <= set(first)
    assert len(second) == pytest.approx(len(first) / 3, abs=9)
    assert len(full) == pytest.approx(len(second) / 3, abs=4)
    assert np.median(list(full.values())) < np.median(list(second.values())) < np.median(list(first.values()))


@pytest.mark.parametrize(
    ("strategy", "options", "key"),
    [
        (LocalSearch, {"starts": 0}, "starts"),
        (Reinforce, {"reward": "pareto", "policies": 0}, "policies"),
        (Reinforce, {"exponents": (0.0, -1.0)}, "targets"),
        (Reinforce, {"exponents": (0.5, -1.0)}, "exponents = .*a higher cost would be a higher reward"),
        (PPO, {"exponents": (0.07, 0.07)}, "exponents"),
        (PPO, {"exponents": (float("nan"), float("nan"))}, "exponents"),
        (Reinforce, {"reward": "best"}, "reward"),
        (PPO, {"clip": 1.5}, "clip"),
        (PPO, {"lr": 0.0}, "lr"),
        (SuccessiveHalving, {"factor": 1}, "factor"),
        (SuccessiveHalving, {"minimum": 0}, "minimum"),
    ],
)
def test_bad_settings_of_more_strategies_name_their_key(space, strategy, options, key):
    with pytest.raises(UserError, match=rf"strategy\.{key}"):
        strategy(space, 0, None, **options)


@pytest.mark.parametrize(
    ("sampler", "options", "objectives"),
    [
        ("GPSampler", {"n_startup_trials": 6}, 1),
        ("GPSampler", {"n_startup_trials": 6}, 2),
        pytest.param("CmaEsSampler", {}, 1, marks=pytest.mark.extra("cmaes")),
    ],
)
def test_optuna_samplers_that_know_no_trees_are_asked_for_every_knob(space, sampler, options, objectives):
    problem = Problem(space, objectives, failing=0.1)
    initial = space.sample(3, np.random.default_rng(5))

    def start():
        return OptunaStrategy(space, 0, initial, sampler=sampler, sampler_options=options)

    strategy = start()
    archs, _, _ = run(strategy, problem, 2, n=4)
    np.testing.assert_array_equal(archs[:3], initial)
    np.testing.assert_array_equal(archs, space.canonical(space.check(archs)))
    assert all(len(trial.params) == len(space.knobs) for trial in strategy._study.trials)
    state = json.loads(json.dumps(strategy.state_dict(), default=lambda array: array.tolist()))
    expected = run(strategy, problem, 1, n=2)[0]
    restored = start()
    restored.load_state_dict(state)
    np.testing.assert_array_equal(run(restored, problem, 1, n=2)[0], expected)


@pytest.mark.extra("cmaes")
def test_cma_es_learns_ordered_knobs(space):
    problem = Problem(space, 1)
    strategy = OptunaStrategy(space, 0, sampler="CmaEsSampler")
    _, values, _ = run(strategy, problem, 15)
    assert values[-50:].mean() < values[:50].mean()
    assert any(key.startswith("cma:") for trial in strategy._study.trials for key in trial.system_attrs)


def test_cma_es_refuses_a_space_of_categories():
    with pytest.raises(UserError, match="ascending numbers, and space 'nasbench201' has none"):
        OptunaStrategy(NASBench201Space(), 0, sampler="CmaEsSampler")


def test_optuna_storage_holds_finished_trials_only_whatever_order_they_finish_in(space, tmp_path):
    url, problem = f"sqlite:///{tmp_path}/study.db", Problem(space)
    restricted = space.without_blocks(blocked_pair(space))

    def trials():
        return optuna.load_study(study_name="nasbench", storage=url).trials

    def tell(strategy, proposals):
        strategy.tell(proposals, *problem(proposals))

    strategy = OptunaStrategy(restricted, 0, sampler="RandomSampler", storage=url)
    asked = [strategy.ask(1) for _ in range(12)]
    assert len(strategy._study.trials) > 12, "the sampler suggested nothing that is not permitted"
    tell(strategy, asked[1])
    tell(strategy, asked[0])
    for i in range(3, 12):
        tell(strategy, asked[i])
    assert [t.state.name for t in trials()] == ["COMPLETE"] * 2

    # The third was still under way when the run was killed: resumed, the others are proposed first.
    initial = np.concatenate([a.archs for i, a in enumerate(asked) if i != 2])
    resumed = OptunaStrategy(restricted, 0, initial, sampler="RandomSampler", storage=url)
    tell(resumed, resumed.ask(11))
    later = [resumed.ask(1), resumed.ask(1)]
    tell(resumed, later[1])
    tell(resumed, later[0])
    assert [t.state.name for t in trials()] == ["COMPLETE"] * 13
    archs = np.stack([space.encode(t.params) for t in trials()])
    np.testing.assert_array_equal(archs, np.concatenate([initial, later[0].archs, later[1].archs]))


def test_optuna_storage_that_comes_back_is_written_as_if_nothing_was(space, tmp_path, monkeypatch):
    url, problem = f"sqlite:///{tmp_path}/study.db", Problem(space)
    monkeypatch.setattr(optuna_strategy, "_WAITS", (0.0, 0.0))
    create, failures = optuna.create_study, [OSError("gone"), OSError("still gone")]

    def unreliable(*args, storage=None, **options):
        if storage == url and failures:
            raise failures.pop()
        return create(*args, storage=storage, **options)

    monkeypatch.setattr(optuna, "create_study", unreliable)
    strategy = OptunaStrategy(space, 0, sampler="RandomSampler", storage=url)
    run(strategy, problem, 2, n=3)
    assert len(optuna.load_study(study_name="nasbench", storage=url).trials) == 6

    failures += [OSError("gone")] * 3
    state = strategy.state_dict()
    strategy._mirror = None
    with pytest.raises(UserError, match=r"cannot be written: gone. Nothing is lost"):
        run(strategy, problem, 1, n=3)
    failures.clear()
    resumed = OptunaStrategy(space, 0, sampler="RandomSampler", storage=url)
    resumed.load_state_dict(state)
    run(resumed, problem, 1, n=3)
    assert len(optuna.load_study(study_name="nasbench", storage=url).trials) == 9
