"""The loop for cheap evaluators: budget, limits, resume."""

import numpy as np
import pytest

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.function import FunctionEvaluator
from nasbench.objectives import make_objective
from nasbench.pareto import ParetoArchive, non_dominated_mask
from nasbench.search import search
from nasbench.strategies.base import Strategy
from nasbench.strategies.nsga2 import NSGA2
from nasbench.strategies.random_search import RandomSearch
from search_spaces import UserError


class Toy(Evaluator):
    """Accuracy grows with the sum of the choices, and so does the parameter count; columns swapped on purpose."""

    metrics = ("params", "accuracy")

    def __init__(self, margin=0.0):
        self.margin = margin

    def evaluate(self, proposals):
        total = proposals.archs.astype(float).sum(axis=1)
        values = np.column_stack([total**2, total])
        return Evaluation(values, np.full(len(values), Status.OK, dtype=np.uint8), values + self.margin)


OBJECTIVES = (make_objective("accuracy"), make_objective("size", metric="params", limit=36.0))


def test_front_is_feasible_and_minimised(space):
    archive = search(RandomSearch(space, 0), Toy(), OBJECTIVES, evaluations=1050, batch=100)
    assert archive.evaluated == 1050
    assert 0 < archive.feasible < 1050
    assert (archive.values[:, 0] <= 0).all()
    assert archive.values[:, 1].max() == 36.0
    assert non_dominated_mask(archive.values).all()
    np.testing.assert_array_equal(archive.values[:, 1], archive.values[:, 0] ** 2)


def test_limits_apply_to_the_limit_values(space):
    archive = search(RandomSearch(space, 0), Toy(margin=12.0), OBJECTIVES, evaluations=1000, batch=100)
    assert archive.values[:, 1].max() <= 24.0


def test_a_saved_search_continues_as_if_never_stopped(space):
    def start():
        return NSGA2(space, 1, None, population_size=20)

    whole = search(start(), Toy(), OBJECTIVES, evaluations=300, batch=20)
    strategy = start()
    half = search(strategy, Toy(), OBJECTIVES, evaluations=140, batch=20)
    restored, archive = start(), ParetoArchive(space, 2)
    restored.load_state_dict(strategy.state_dict())
    archive.load_state_dict(half.state_dict())
    search(restored, Toy(), OBJECTIVES, evaluations=300, batch=20, archive=archive)
    np.testing.assert_array_equal(archive.archs, whole.archs)
    np.testing.assert_array_equal(archive.values, whole.values)
    assert (archive.evaluated, archive.feasible) == (whole.evaluated, whole.feasible)


def test_every_batch_is_reported(space):
    seen = []
    search(
        RandomSearch(space, 0), Toy(), OBJECTIVES, evaluations=25, batch=10,
        on_batch=lambda archive, proposals, evaluation: seen.append(
            (archive.evaluated, len(proposals), len(evaluation.values))
        ),
    )  # fmt: skip
    assert seen == [(10, 10, 10), (20, 10, 10), (25, 5, 5)]


def test_a_strategy_with_nothing_to_propose_ends_the_search(space):
    class Exhausted(RandomSearch):
        def ask(self, n):
            return super().ask(min(n, max(0, 30 - self.next_id)))

    strategy: Strategy = Exhausted(space, 0)
    assert search(strategy, Toy(), OBJECTIVES, evaluations=1000, batch=20).evaluated == 30


def test_an_objective_nobody_gives_is_named(space):
    with pytest.raises(UserError, match=r"objectives\.latency_ms.*params, accuracy"):
        search(RandomSearch(space), Toy(), [make_objective("latency_ms")], evaluations=1, batch=1)


def test_reduced_fidelity_reaches_the_evaluator_and_never_the_front(space):
    class Halves(RandomSearch):
        def ask(self, n):
            proposals = super().ask(n)
            return Proposals(proposals.ids, proposals.archs, {"epochs": np.where(np.arange(n) % 2, np.nan, 3.0)})

    seen = []

    def judge(arch, epochs=None):
        seen.append(epochs)
        return 0.99 if epochs else 0.5

    evaluator = FunctionEvaluator(space, judge)
    objectives = (make_objective("accuracy"),)
    archive = search(Halves(space, 0), evaluator, objectives, evaluations=8, batch=4)
    assert seen == [3, None] * 4
    assert archive.evaluated == 8
    np.testing.assert_array_equal(archive.values, [[-0.5]] * len(archive.values))

    evaluator.fidelities = ("images",)
    with pytest.raises(UserError, match=r"strategy.fidelity = 'epochs': the evaluator knows only images"):
        search(Halves(space, 0), evaluator, objectives, evaluations=8, batch=4)
