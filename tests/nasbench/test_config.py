"""Experiment files: every wrong word gets the nearest right one."""

from pathlib import Path

import pytest

from nasbench.comparison.settings import dump_settings, load_settings
from nasbench.config import dump_config, find_experiment, load_config, parse_config
from nasbench.plan import make_plan
from search_spaces import UserError

FILES = sorted((Path(__file__).parents[2] / "experiments").glob("*.toml"))
COMPARISONS = [file for file in FILES if file.stem.startswith("compare_")]
EXPERIMENTS = [file for file in FILES if file not in COMPARISONS]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"taks": {}}, ["'taks'", "'task'"]),
        ({"objectives": {"latency_ms": {"limt": 3}}}, ["objectives.latency_ms.limt", "'limit'"]),
        ({"selection": {"rule": "kne"}}, ["selection.rule", "'knee'"]),
        ({"targets": {"device": ["host"]}}, ["targets.device", "'devices'"]),
        ({"strategy": {"evaluations": -1}}, ["strategy.evaluations = -1", "greater than or equal to 1"]),
        ({"stages": [{"epochs": 3}]}, ["stages.0.name", "missing"]),
        ({"objectives": {"latency_ms": {"limit": "fast"}}}, ["objectives.latency_ms.limit = 'fast'", "number"]),
        ({"objectives": {"latency_ms": {"limit": float("nan")}}}, ["objectives.latency_ms.limit", "finite"]),
        ({"objectives": {"latency_ms": {"limit": True}}}, ["objectives.latency_ms.limit = True: expected a number"]),
        ({"strategy": {"evaluations": True}}, ["strategy.evaluations = True: expected a number"]),
        ({"seed": False}, ["seed = False: expected a number"]),
        ({"strategy": 3}, ["strategy = 3", "section"]),
        ({"name": "a/b"}, ["name = 'a/b'", "letters (a to z, A to Z), digits"]),
        ({"name": "größe"}, ["name = 'größe'", "letters (a to z, A to Z), digits"]),
        (
            {"objectives": ["accuracy"]},
            ["objectives = ['accuracy']: expected a section for each, [objectives.accuracy]"],
        ),
        ({"objectives": 3}, ["objectives = 3: expected a section for each, [objectives.NAME]"]),
        ({"stages": {"name": "finetune"}}, ["expected a section for each, [[stages]]"]),
        ({"stages": ["finetune"]}, ["stages.0 = 'finetune': expected a section for each, [[stages]]"]),
        ({"targets": {"devices": "host"}}, ["targets.devices = 'host': expected a list, as ['host']"]),
    ],
)
def test_wrong_words_are_named_with_the_nearest_right_one(data: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_config(data, "my.toml")
    assert str(error.value).startswith("my.toml: ")
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("file", COMPARISONS, ids=lambda f: f.stem)
def test_shipped_comparisons_survive_being_written_out_and_are_told_from_experiments(file, tmp_path):
    settings = load_settings(file)
    again = tmp_path / "again.toml"
    again.write_text(dump_settings(settings))
    assert load_settings(again) == settings
    with pytest.raises(UserError, match=rf"{file.name}: .*nasbench compare"):
        load_config(file)


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda f: f.stem)
def test_shipped_experiments_survive_being_written_out(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    again = tmp_path / "again.toml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda p: p.stem)
def test_what_a_run_writes_out_plans_the_same_again(file: Path, tmp_path: Path) -> None:
    """A run is resumed from its resolved configuration, which has every default written out."""
    first = make_plan(load_config(file), file.parent)
    (tmp_path / "config.toml").write_text(dump_config(first.config))
    again = make_plan(load_config(tmp_path / "config.toml"), file.parent)
    assert dump_config(again.config) == dump_config(first.config)
    assert len(again.task.split("train")) == len(first.task.split("train"))


def test_overrides_reach_sections_lists_and_new_keys() -> None:
    file = find_experiment("quickstart")
    config = load_config(
        file,
        [
            "objectives.latency_ms.limit=2.5",
            "strategy.name=random",
            "stages.0.epochs=7",
            'targets.devices=["jetson_nano"]',
        ],
    )
    assert config.objectives["latency_ms"].limit == 2.5
    assert config.strategy.name == "random"
    assert config.stages[0].options["epochs"] == 7
    assert config.targets.devices == ["jetson_nano"]


def test_an_override_of_a_default_objective_keeps_the_other(tmp_path: Path) -> None:
    file = tmp_path / "short.toml"
    file.write_text('name = "short"\n')
    assert list(load_config(file, ["objectives.latency_ms.limit=2.5"]).objectives) == ["accuracy", "latency_ms"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("strategy.evaluations", "expected section.key=value"),
        ("stages.9.epochs=1", "not an index"),
        ("strategy.evaluations.more=1", "is a value"),
        ("strategy.evalutions=many", ""),
    ],
)
def test_wrong_overrides_are_refused(override: str, words: str) -> None:
    if words:
        with pytest.raises(UserError, match=words):
            load_config(find_experiment("quickstart"), [override])
    else:  # a component's own key is checked when the component is built
        assert load_config(find_experiment("quickstart"), [override]).strategy.options == {"evalutions": "many"}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(UserError, match=r"broken\.toml: not valid TOML"):
        load_config(broken)
    with pytest.raises(UserError, match="'quickstrat'.*quickstart"):
        find_experiment("quickstrat")
