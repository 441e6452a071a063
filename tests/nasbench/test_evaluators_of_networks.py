"""Evaluators that train and measure, composed, and kept in a cache."""

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nasbench.config import load_config
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.cached import Cache, CachedEvaluator
from nasbench.evaluators.composed import ComposedEvaluator
from nasbench.evaluators.trained import TrainEvaluator
from nasbench.plan import Plan, make_plan
from search_spaces import UserError

MEASURED = ['evaluator={name="train", epochs=1, samples=0, also=[{name="measure"}]}']


@pytest.fixture
def plan(tiny_experiment: Path) -> Plan:
    return make_plan(load_config(tiny_experiment), tiny_experiment.parent)


def asked(plan: Plan, n: int, epochs: float = np.nan) -> Proposals:
    archs = np.unique(plan.space.sample(50, np.random.default_rng(1)), axis=0)[:n]
    return Proposals(np.arange(n), archs, {} if np.isnan(epochs) else {"epochs": np.full(n, epochs)})


def test_training_goes_on_where_fewer_epochs_ended(plan: Plan, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"epochs": 3, "batch_size": 50, "lr": 0.1}
    stepwise = TrainEvaluator(plan.space, plan.task, tmp_path, **keys)
    first = stepwise.evaluate(asked(plan, 1, 1))
    folder = tmp_path / "trained"
    assert [f.name.endswith("-training.safetensors") for f in folder.iterdir()] == [True]
    last = stepwise.evaluate(asked(plan, 1))
    whole = TrainEvaluator(plan.space, plan.task, None, **keys).evaluate(asked(plan, 1))
    assert last.values == whole.values
    assert first.values != last.values
    (weights,) = folder.iterdir()  # what training needs to go on is gone
    network = stepwise.extract(asked(plan, 1).archs[0])
    other = TrainEvaluator(plan.space, plan.task, None, **keys).extract(asked(plan, 1).archs[0])
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert weights.name.count("-") == 0


def test_training_that_breaks_down_or_makes_no_sense_is_the_failure_of_its_row(plan: Plan) -> None:
    result = TrainEvaluator(plan.space, plan.task, None, epochs=1, lr=1e30, warmup=0.0).evaluate(asked(plan, 1))
    assert result.status.tolist() == [Status.FAILED]
    assert "training broke down" in result.messages[0]
    result = TrainEvaluator(plan.space, plan.task, None, epochs=2).evaluate(asked(plan, 1, 5))
    assert "epochs = 5: expected 1..2" in result.messages[0]
    with pytest.raises(UserError, match=r"evaluator\.lr = -1"):
        TrainEvaluator(plan.space, plan.task, None, lr=-1)


def test_accuracy_is_trained_and_latency_measured_in_one_experiment(tiny_experiment: Path, tmp_path: Path) -> None:
    plan = make_plan(load_config(tiny_experiment, MEASURED), tiny_experiment.parent)
    assert plan.evaluator_metrics == ("accuracy", "latency_ms@host:fp32")
    assert not plan.predicted
    result = plan.make_evaluator(None, tmp_path).evaluate(asked(plan, 2))
    assert (result.status == Status.OK).all()
    assert (result.values[:, 1] > 0).all()


@pytest.mark.parametrize(
    ("metric", "words"),
    [("latency", "nothing measures 'latency'"), ("latency_ms@jetson_nano", "not among targets.devices")],
)
def test_what_cannot_be_measured_is_refused(tiny_experiment: Path, metric: str, words: str) -> None:
    changes = ["evaluator.samples=0", f'evaluator.also=[{{name="measure", metrics=["{metric}"]}}]']
    with pytest.raises(UserError, match=words):
        make_plan(load_config(tiny_experiment, changes), tiny_experiment.parent)
    with pytest.raises(UserError, match="gives 'accuracy', which an evaluator before it gives already"):
        make_plan(load_config(tiny_experiment, ['evaluator.also=[{name="train"}]']), tiny_experiment.parent)


class Counting(Evaluator):
    """Sum of the row times a factor; counts what it is asked for, and fails where the first knob is 9."""

    preferred_batch = 2
    fidelities = ("epochs",)

    def __init__(self, metric: str, factor: float = 1.0) -> None:
        self.metrics = (metric,)
        self.factor = factor
        self.count = 0

    def evaluate(self, proposals: Proposals) -> Evaluation:
        self.count += len(proposals)
        bad = proposals.archs[:, 0] == 9
        values = np.where(bad, np.nan, self.factor * proposals.archs.sum(axis=1, dtype=float))[:, None]
        return Evaluation(values, bad.astype(np.uint8), messages={int(r): "nine" for r in np.flatnonzero(bad)})


class AnySpace:
    @staticmethod
    def canonical(archs: np.ndarray) -> np.ndarray:
        return archs


ARCHS = np.array([[1, 2], [3, 4], [9, 0], [5, 6], [7, 8]], dtype=np.uint8)


def test_parts_are_asked_in_turn_and_not_for_what_failed_or_is_known() -> None:
    a, b = Counting("a"), Counting("b", 10)
    composed = ComposedEvaluator([a, b])
    known = {"a": np.array([30.0, np.nan, np.nan, np.nan, np.nan])}
    result = composed.evaluate(Proposals(np.arange(5), ARCHS, known=known))
    assert (a.count, b.count) == (4, 4)
    assert result.values[0].tolist() == [30.0, 30.0]
    assert result.values[1].tolist() == [7.0, 70.0]
    assert np.isnan(result.values[2]).all()
    assert result.status.tolist() == [0, 0, Status.FAILED, 0, 0]
    assert result.messages == {2: "nine"}


def test_a_cache_serves_other_evaluators_with_equal_settings_and_parts(tmp_path: Path) -> None:
    def cached(*parts: tuple[str, Counting]) -> CachedEvaluator:
        settings = [((lambda s=s: s), e.metrics) for s, e in parts]
        whole = ComposedEvaluator([e for _, e in parts])
        return CachedEvaluator(AnySpace(), whole, Cache(tmp_path / "kept" / "cache.sqlite"), settings)  # type: ignore[arg-type]

    proposals = Proposals(np.arange(5), ARCHS)
    a, b, c = Counting("a"), Counting("b", 10), Counting("c", 100)
    first = cached(("A", a), ("B", b)).evaluate(proposals)
    again = cached(("A", a), ("B", b)).evaluate(proposals)
    assert np.array_equal(first.values, again.values, equal_nan=True)
    assert (a.count, b.count) == (5 + 1, 4)  # what failed is tried again
    third = cached(("A", a), ("C", c)).evaluate(proposals)
    assert (a.count, c.count) == (5 + 1 + 1, 4)  # the one part is known, the other is not
    assert np.array_equal(third.values[:, 0], first.values[:, 0], equal_nan=True)
    reduced = Proposals(np.arange(5), ARCHS, {"epochs": np.array([1.0, np.nan, np.nan, np.nan, np.nan])})
    cached(("A", a)).evaluate(reduced)
    assert a.count == 7 + 2  # another fidelity is another value
    cached(("A2", a)).evaluate(proposals)
    assert a.count == 9 + 5


def fill(path: Path, start: int) -> None:
    cache = Cache(path)
    for i in range(300):
        cache.put("s", str((start + i) % 350), "{}", {"a": float((start + i) % 350)})


def test_processes_may_fill_one_cache_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    processes = [multiprocessing.get_context("fork").Process(target=fill, args=(path, s)) for s in (0, 50, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    cache = Cache(path)
    assert [cache.get("s", str(i), "{}") for i in range(350)] == [{"a": float(i)} for i in range(350)]


def test_a_cache_that_cannot_be_written_loses_no_evaluation(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache.sqlite")
    cache._db.execute("PRAGMA max_page_count = 1")  # SQLite takes the pages there are, and gives no more
    counting = Counting("a")
    evaluator = CachedEvaluator(AnySpace(), counting, cache, [(lambda: "x" * 100_000, ("a",))])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"cache\.sqlite.*disk is full.*may not be kept") as caught:
        result = evaluator.evaluate(Proposals(np.arange(3), np.array([[1], [2], [3]])))
    assert result.values[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert len(caught) == 1


def test_a_cache_that_cannot_be_read_is_done_without(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache.sqlite")
    cache._db.execute("DROP TABLE evaluations")
    evaluator = CachedEvaluator(AnySpace(), Counting("a"), cache, [(lambda: "A", ("a",))])  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"cache\.sqlite.*no such table"):
        result = evaluator.evaluate(Proposals(np.arange(1), np.array([[4]])))
    assert result.values.tolist() == [[4.0]]


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(UserError, match=r"evaluator\.cache = .*notes\.txt"):
        Cache(tmp_path / "notes.txt")
