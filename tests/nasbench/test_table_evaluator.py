"""Tabular evaluation: files as people have them, with everything that is wrong in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from nasbench.archive import arch_row
from nasbench.evaluators.base import Proposals, Status
from nasbench.evaluators.table import ArchitectureTable, TableEvaluator
from nasbench.objectives import make_objective
from nasbench.search import search
from nasbench.strategies.nsga2 import NSGA2
from nasbench.strategies.regularized_evolution import RegularizedEvolution
from nasbench.variation import crossover, mutate, neighbours
from search_spaces import NASBench201Space, UserError, load_space


def write(path: Path, header: list[str], rows: list[list[object]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def ask(evaluator, archs):
    return evaluator.evaluate(Proposals(np.arange(len(archs)), archs))


@pytest.fixture
def everything(space):
    archs = space.everything()
    rng = np.random.default_rng(0)
    return archs, rng.uniform(0.1, 0.9, len(archs)), rng.uniform(1, 9, len(archs))


@pytest.fixture
def file(tmp_path, everything):
    archs, accuracy, latency = everything
    rows = [["_".join(map(str, a)), x, y] for a, x, y in zip(archs, accuracy, latency, strict=True)]
    return write(tmp_path / "all.csv", ["arch", "top1", "phone_ms"], rows)


@pytest.mark.parametrize("form", ["_", " ", "", ",", "json"])
def test_what_is_asked_is_what_the_file_says_in_any_notation(tmp_path, space, everything, form):
    archs, accuracy, _ = everything
    texts = [json.dumps(space.decode(a)) if form == "json" else form.join(map(str, a)) for a in archs]
    path = write(tmp_path / "t.csv", ["arch", "top1"], list(zip(texts, accuracy, strict=True)))
    evaluator = TableEvaluator(space, path=str(path), columns={"accuracy": "top1"})
    order = np.random.default_rng(1).permutation(len(archs))
    result = ask(evaluator, archs[order])
    assert evaluator.metrics == ("accuracy",)
    assert (result.status == Status.OK).all()
    np.testing.assert_array_equal(result.values[:, 0], accuracy[order])
    assert evaluator.table.complete


def test_every_column_of_numbers_is_a_metric_by_default(file, space):
    assert TableEvaluator(space, path=str(file)).metrics == ("top1", "phone_ms")
    priced = TableEvaluator(space, path=str(file), seconds="phone_ms")
    assert priced.metrics == ("top1",)
    archs = space.sample(5, np.random.default_rng(0))
    np.testing.assert_array_equal(ask(priced, archs).seconds, priced.table.values[priced.table.index.find(archs), 1])


def test_files_are_joined_by_architecture(tmp_path, space, everything):
    archs, accuracy, latency = everything
    texts = [" ".join(map(str, a)) for a in archs]
    shuffled = np.random.default_rng(2).permutation(len(archs))
    first = write(tmp_path / "a.csv", ["arch", "top1"], list(zip(texts, 100 * accuracy, strict=True)))
    second = write(tmp_path / "b.csv", ["arch", "us"], [[texts[i], latency[i] * 1000] for i in shuffled])
    evaluator = TableEvaluator(
        space,
        path=[str(first), str(second)],
        columns={"latency_ms@phone": "us", "accuracy": "top1"},
        scale={"accuracy": 0.01, "latency_ms@phone": 0.001},
    )
    np.testing.assert_allclose(ask(evaluator, archs).values, np.column_stack([latency, accuracy]))


def test_limits_on_either_side_that_no_row_keeps_are_named(file, space, everything):
    _, accuracy, latency = everything
    evaluator = TableEvaluator(space, path=str(file))
    both = make_objective("phone_ms", direction="minimise", at_least=float(latency.min()), at_most=float(latency.max()))
    least = make_objective("top1", direction="maximise", at_least=1.0)
    evaluator.check_limits([both])
    with pytest.raises(UserError, match=rf"objectives\.top1\.at_least = 1: .*the best has {accuracy.max():.4g}"):
        evaluator.check_limits([both, least])
    with pytest.raises(UserError, match=rf"phone_ms\.at_least = 99: .*the best has {latency.max():.4g}"):
        evaluator.check_limits([make_objective("phone_ms", direction="minimise", at_least=99.0)])
    most_accurate = make_objective("top1", direction="maximise", at_least=float(accuracy.max()))
    fastest = make_objective("phone_ms", direction="minimise", at_most=float(latency.min()))
    with pytest.raises(UserError, match=r"all limits at once.*\(at_least [\d.]+\), phone_ms [\d.]+ \(at_most"):
        evaluator.check_limits([most_accurate, fastest])


@pytest.mark.extra("pyarrow")
def test_parquet_is_read_as_csv_is(tmp_path, space, everything):
    import pyarrow as pa
    import pyarrow.parquet as pq

    archs, accuracy, _ = everything
    columns = {"arch": ["_".join(map(str, a)) for a in archs], "top1": accuracy}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = ArchitectureTable.read(tmp_path / "t.parquet", space)
    np.testing.assert_array_equal(table.column("top1")[table.index.find(archs)], accuracy)
    pq.write_table(pa.table({"arch": [1, 2], "top1": [0.1, None]}), tmp_path / "n.parquet")
    with pytest.raises(UserError, match=r"n\.parquet: row 0, column 'arch'.*leading zeros"):
        ArchitectureTable.read(tmp_path / "n.parquet", space)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(UserError, match=r"broken\.parquet: cannot be read as a Parquet file"):
        ArchitectureTable.read(tmp_path / "broken.parquet", space)


def test_what_the_table_does_not_have_is_unsupported_and_what_is_empty_has_failed(tmp_path, space, everything):
    archs, accuracy, _ = everything
    rows = [["_".join(map(str, a)), x] for a, x in zip(archs[:9], accuracy[:9], strict=True)]
    rows[4][1] = ""
    path = write(tmp_path / "t.csv", ["arch", "score"], rows)
    with pytest.raises(UserError, match=r"t\.csv: line 6, column 'score': expected a finite number, got nothing"):
        TableEvaluator(space, path=str(path))
    evaluator = TableEvaluator(space, path=str(path), missing="failed")
    result = ask(evaluator, archs[:12])
    np.testing.assert_array_equal(result.status, [0, 0, 0, 0, Status.FAILED, 0, 0, 0, 0] + 3 * [Status.UNSUPPORTED])
    assert result.messages[4] == f"{path} has no 'score' of it"
    assert result.messages[11] == f"not in {path}"
    np.testing.assert_array_equal(np.isnan(result.values[:, 0]), result.status != 0)
    assert not evaluator.table.complete


@pytest.mark.parametrize("strategy", [NSGA2, RegularizedEvolution])
def test_a_search_restricted_to_the_rows_of_a_sparse_table_asks_for_nothing_else(space, everything, strategy):
    archs, accuracy, latency = everything
    few = np.random.default_rng(3).choice(len(archs), 60, replace=False)
    table = ArchitectureTable(space, archs[few], ("accuracy", "cost"), np.column_stack([accuracy, latency])[few])
    evaluator = TableEvaluator.of(table, rows_only=True)
    objectives = (make_objective("accuracy"), make_objective("cost", direction="minimise"))
    asked = []
    search(
        strategy(evaluator.space, 0, population_size=10),
        evaluator,
        objectives,
        evaluations=300,
        batch=10,
        on_batch=lambda archive, proposals, evaluation: asked.append((proposals.archs, evaluation.status)),
    )
    every = np.concatenate([a for a, _ in asked])
    assert all((status == Status.OK).all() for _, status in asked)
    assert len(np.unique(every, axis=0)) > 30  # it moves on from what it began with


def test_a_list_of_architectures_restricts_all_variation(space, everything):
    rng = np.random.default_rng(4)
    listed = everything[0][rng.choice(len(everything[0]), 40, replace=False)]
    part = space.only(listed)
    known = {a.tobytes() for a in listed}
    rows = part.sample(1000, rng)
    made = [rows, mutate(part, rows, rng, 0.1), crossover(part, rows, rows[::-1], rng)]
    made += [neighbours(part, rows[i], rng) for i in range(5)]
    for archs in made:
        assert {a.tobytes() for a in archs} <= known
    assert {a.tobytes() for a in rows} == known
    assert (mutate(part, rows, rng, 0.0) != rows).any(axis=1).all()
    with pytest.raises(UserError, match="none of the 0"):
        space.only(listed[:0])


@pytest.mark.parametrize(
    ("header", "rows", "keys", "message"),
    [
        (["arch", "x"], [], {}, "has no rows"),
        (["network", "x"], [["0", "1"]], {}, "no column of architectures, one of arch, .*arch_column"),
        (["arch", "x"], [["000000", "1"]], {"arch_column": "arhc"}, "no column 'arhc'.*Did you mean 'arch'"),
        (["arch", "x"], [["000000", "1"]], {"columns": {"accuracy": "y"}}, "no column 'y'.*Known: arch, x"),
        (["arch", "x"], [["000000", "1"], ["00000", "1"]], {}, "line 3, column 'arch'.*6 choice indices, got '00000'"),
        (["arch", "x"], [["000005", "1"]], {}, "line 2, column 'arch': '2->3' has choices 0..4, got 5"),
        (["arch", "x"], [["|skip~0|", "1"]], {}, "line 2, column 'arch'.*unknown operation 'skip'"),
        (["arch", "x"], [['{"0->1": 1', "1"]], {}, "line 2, column 'arch': not valid JSON"),
        (["arch", "x"], [["000000", "1"], ["000001", "fast"]], {"columns": {"m": "x"}}, "line 3.*'x'.*got 'fast'"),
        (["arch", "x"], [["000000", "1"], ["000001", "nan"]], {}, "line 3.*finite number, got 'nan'"),
        (["arch", "x"], [["000000", "1"], ["000001", "inf"]], {"missing": "failed"}, "line 3.*finite number"),
        (["arch", "x"], [["000000", "1"], ["000000", "2"]], {}, "line 3, column 'x': 2 for.*has 1 in line 2"),
        (["arch", "x"], [["000000", "93.2"]], {"columns": {"accuracy": "x"}}, "accuracy.*got 93.2.*accuracy = 0.01"),
        (["arch", "x_us"], [["000000", "9"]], {"columns": {"latency_ms": "x_us"}}, "is in us.*latency_ms = 0.001"),
        (["arch", "x"], [["000000", "9"]], {"scale": {"y": 2}}, "evaluator.scale: no metric 'y'"),
        (["arch", "text"], [["000000", "a"]], {}, "no column of numbers"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, header, rows, keys, message):
    path = write(tmp_path / "t.csv", header, rows)
    with pytest.raises(UserError, match=message):
        TableEvaluator(NASBench201Space(), path=str(path), **keys)


def test_equal_repetitions_count_once_and_ambiguous_columns_are_refused(tmp_path):
    space = NASBench201Space()
    one = write(tmp_path / "one.csv", ["arch", "x"], [["000000", 1], ["000001", 2], ["000000", 1]])
    two = write(tmp_path / "two.csv", ["arch", "x"], [["000000", 1]])
    three = write(tmp_path / "three.csv", ["arch", "y"], [["000000", 1]])
    assert len(ArchitectureTable.read(one, space)) == 2
    with pytest.raises(UserError, match=r"'x' stands in .*one\.csv and in .*two\.csv"):
        ArchitectureTable.read([one, two], space)
    with pytest.raises(UserError, match=r"three\.csv: has no row for 1 architectures.*0 0 0 0 0 1"):
        ArchitectureTable.read([one, three], space)
    assert np.isnan(ArchitectureTable.read([one, three], space, missing="failed").values).sum() == 1
    with pytest.raises(UserError, match=r"gone\.csv"):
        ArchitectureTable.read(tmp_path / "gone.csv", space)


def test_a_published_benchmark_is_read_whole(data_dir):
    space = NASBench201Space()
    evaluator = TableEvaluator(
        space,
        path=[str(data_dir / "nb201_accuracy.csv.gz"), str(data_dir / "nb201_latency_help.csv.gz")],
        columns={"accuracy": "cifar100_test_acc", "latency_ms@raspi4": "raspi4", "macs": "macs_cifar10"},
        scale={"accuracy": 0.01},
    )
    assert evaluator.table.complete
    assert evaluator.table.column("accuracy").max() == pytest.approx(0.7351, abs=1e-4)
    arch = space.from_official_index([1462])
    assert ask(evaluator, arch).values[0, 2] == 220_119_680


@pytest.fixture
def experiment(tmp_path):
    """A whole NAS-Bench-201 with made-up values: more 3x3 convolutions are better and slower."""
    space = NASBench201Space()
    archs = np.stack(np.meshgrid(*6 * [np.arange(5)], indexing="ij"), axis=-1).reshape(-1, 6).astype(np.uint8)
    cost = (archs == 3) @ np.array([6, 5, 4, 3, 2, 1]) + (archs == 2).sum(1) + 1.0
    percent = 90 * (1 - np.exp(-cost / 9)) - 5 * (archs == 4).sum(1)
    rows = list(zip(["".join(map(str, a)) for a in archs], percent.clip(1), cost, percent - 50, strict=True))
    write(tmp_path / "table.csv", ["arch", "percent", "board", "gain"], rows)
    (tmp_path / "experiment.toml").write_text("""
        name = "tabular"
        [space]
        name = "nasbench201"
        [evaluator]
        name = "table"
        path = "$TABLE_FOLDER/table.csv"
        columns = { accuracy = "percent", "latency_ms@board" = "board" }
        scale = { accuracy = 0.01 }
        [objectives.accuracy]
        [objectives."latency_ms@board"]
        [strategy]
        evaluations = 300
        population_size = 20
    """)
    return tmp_path / "experiment.toml", space


def test_an_experiment_on_a_table_loads_no_data_and_trains_nothing(experiment, tmp_path, monkeypatch):
    from nasbench.config import load_config
    from nasbench.experiment import run_experiment
    from nasbench.tasks.array_task import ArrayTask

    monkeypatch.setenv("TABLE_FOLDER", str(tmp_path))
    monkeypatch.setattr(ArrayTask, "load", lambda self: pytest.fail("data were loaded"))
    file, _ = experiment
    view = run_experiment(load_config(file), tmp_path / "run", where=file.parent)
    front = view.front()
    assert view.config.task.name == "none"
    assert set(view.ledger()["phase"]) == {"search", "evaluate verify"}
    assert 0.9 < view.state["hypervolume"]["share"] <= 1
    assert "15,625 rows of table.csv" in (view.path / "report.html").read_text()
    assert (front["latency_ms@board"] == front["latency_ms@board_evaluated"]).all()
    best = view.evaluations().query("phase == 'search'")
    assert front["accuracy"].max() >= best["accuracy"].max() - 1e-12
    # Interrupted after some rows, the run ends with the same archive.
    import nasbench.evaluators.table as module

    calls = []
    evaluate = module.TableEvaluator.evaluate

    def broken(self, proposals):
        calls.append(len(proposals))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return evaluate(self, proposals)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.TableEvaluator, "evaluate", broken)
        run_experiment(load_config(file), tmp_path / "again", where=file.parent)
    from nasbench.run import load_run_config

    text = (tmp_path / "table.csv").read_bytes()
    (tmp_path / "table.csv").write_bytes(text + b"\n")  # what a row says may have changed as well
    state = (tmp_path / "again" / "run.json").read_text()
    with pytest.raises(UserError, match=r"table\.csv: has changed since .*again began.*put that back"):
        run_experiment(load_run_config(tmp_path / "again"), tmp_path / "again", resume=True)
    assert (tmp_path / "again" / "run.json").read_text() == state
    (tmp_path / "table.csv").write_bytes(text)
    again = run_experiment(load_run_config(tmp_path / "again"), tmp_path / "again", resume=True)
    columns = ["phase", "id", "arch", "accuracy", "latency_ms@board"]
    assert again.evaluations()[columns].equals(view.evaluations()[columns])


def test_what_an_experiment_on_a_table_cannot_do_is_told_before_it_starts(experiment, tmp_path, monkeypatch):
    from nasbench.config import load_config
    from nasbench.plan import make_plan

    file, _ = experiment
    with pytest.raises(UserError, match="environment variable TABLE_FOLDER is not set"):
        make_plan(load_config(file), file.parent)
    monkeypatch.setenv("TABLE_FOLDER", str(tmp_path))
    plan = make_plan(load_config(file), file.parent)
    assert [o.label for o in plan.objectives] == ["accuracy", "latency on board (ms)"]
    assert not plan.predicted
    limit = "objectives.latency_ms@board.limit"
    for overrides, message in (
        ([f"{limit}=0.5"], r"latency_ms@board.limit = 0.5: no architecture of .*table\.csv keeps it; the best has 1$"),
        ([f"{limit}=2", "objectives.accuracy.limit=0.8"], "keeps all limits at once; the nearest has accuracy"),
        (["objectives.energy.metric=energy"], "objectives.energy: unknown metric 'energy'"),
        (["objectives.energy.metric=energy", "objectives.energy.direction=minimise"], "nothing gives the metric"),
        (["task.name=none", 'stages=[{name="finetune"}]'], r"stages\[0\]: 'finetune' needs data"),
        (["task.name=none", "evaluator.name=supernet"], "unknown key 'path'|needs a task's data"),
        (
            [
                "strategy={name='reinforce'}",
                "evaluator.columns.gain=gain",
                "objectives.gain={metric='gain', direction='maximise'}",
            ],
            r"objectives\.gain goes from -\S+ to \d\S*, and strategy\.reward = 'mnasnet'.*choose reward = 'pareto'",
        ),
        (["strategy.name=darts"], "trains a supernet.*goes with .*nsga2, .*random"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(load_config(file, overrides), file.parent)


def test_the_table_that_ships_is_searched_by_its_name(tmp_path):
    from nasbench.config import parse_config
    from nasbench.experiment import run_experiment

    config = {
        "space": {"name": "tiny_images", "in_channels": 1, "num_classes": 10},
        "evaluator": {"name": "table", "path": "tiny_images"},
        "objectives": {"accuracy": {}, "macs": {}},
        "strategy": {"name": "random", "evaluations": 64},
    }
    view = run_experiment(parse_config(config), tmp_path / "run")
    assert view.config.evaluator.options["path"] == "tiny_images", "wherever the package lies"
    assert view.state["inputs"].keys() == {"tiny_images"}
    space = load_space("tiny_images", 1, 10)
    table = ArchitectureTable.read("tiny_images", space)
    rows = view.evaluations().query("phase == 'search'")
    found = table.column("accuracy")[table.index.find(np.stack([arch_row(a) for a in rows["arch"]]))]
    np.testing.assert_array_equal(rows["accuracy"], found)


def test_a_cache_forgets_what_a_table_said_before(experiment, tmp_path, monkeypatch):
    from nasbench.config import load_config
    from nasbench.execution.choice import _parts
    from nasbench.plan import make_plan

    file, _ = experiment
    monkeypatch.setenv("TABLE_FOLDER", str(tmp_path))
    plan = make_plan(load_config(file), file.parent)
    key = lambda: [settings() for settings, _ in _parts(plan, tmp_path)]  # noqa: E731
    before = key()
    assert key() == before
    with (tmp_path / "table.csv").open("a") as table:
        table.write("\n")
    assert key() != before
