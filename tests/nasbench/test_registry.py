"""Components by name, and signatures as schemas."""

from dataclasses import fields
from pathlib import Path

import pytest

from nasbench.registry import REGISTRY, defaults, options, resolve
from nasbench.strategies.darts import DARTS
from nasbench.training.recipe import Recipe
from search_spaces import UserError


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in REGISTRY.items() for n in names])
def test_every_registered_component_is_there_and_documented(family: str, name: str) -> None:
    component = resolve(family, name)
    assert component.__doc__


def test_the_page_of_strategies_has_a_row_for_each() -> None:
    page = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    table = page.partition("\n## ")[0]
    rows = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(REGISTRY["strategy"])


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'optuna'"):
        resolve("strategy", "optun")


def test_own_modules_are_found_beside_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("class Mine:\n    pass\n")
    assert resolve("strategy", "beside_it:Mine", tmp_path).__name__ == "Mine"
    with pytest.raises(UserError, match="no_such_module_here"):
        resolve("strategy", "no_such_module_here:Mine", tmp_path)
    with pytest.raises(UserError, match="Other"):
        resolve("strategy", "beside_it:Other", tmp_path)


def test_two_experiments_may_have_modules_of_one_name(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same_name.py").write_text(f"class Mine:\n    home = {folder!r}\n")
    for folder in ("first", "second", "first"):
        assert resolve("strategy", "same_name:Mine", tmp_path / folder).home == folder


def test_modules_that_fail_are_named(tmp_path: Path) -> None:
    (tmp_path / "half_written.py").write_text("class Mine(:\n")
    with pytest.raises(UserError, match="half_written.*SyntaxError"):
        resolve("strategy", "half_written:Mine", tmp_path)


def test_types_that_are_not_keys_need_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "typed_only.py").write_text(
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from somewhere import Space\nclass Mine:\n    def __init__(self, space: Space, *, rate: float = 1): ...\n"
    )
    mine = resolve("strategy", "typed_only:Mine", tmp_path)
    assert options(mine, {"rate": 2}, "strategy") == {"rate": 2.0}


class Part:
    def __init__(self, space: object, *, size: int = 3, rate: float) -> None: ...


def test_keys_that_are_listed_are_keys_that_are_taken() -> None:
    assert defaults(Part) == {"size": 3, "rate": ...}
    listed = defaults(DARTS)
    assert {"drop_path", "epochs", "limit_weight"} <= listed.keys(), "its own, and those of all gradient searches"
    assert options(DARTS, {}, "strategy") == listed


@pytest.mark.parametrize(
    ("name", "epochs", "lr"),
    [
        ("finetune", 3, 0.1),
        ("distill", 5, 0.05),
        ("quantization_aware", 2, 0.01),
        ("prune", 1, 0.02),
        ("prune_blocks", 1, 0.02),
        ("prune_weights", 1, 0.02),
    ],
)
def test_stages_that_train_have_its_keys_beside_their_own(name: str, epochs: int, lr: float) -> None:
    stage = resolve("stage", name)
    keys = {"epochs", "lr", "batch_size", "optimizer", "weight_decay", "label_smoothing"}
    listed = defaults(stage)
    assert keys <= listed.keys()
    assert (listed["epochs"], listed["lr"]) == (epochs, lr)
    with pytest.raises(UserError, match=r"stages\[0\]: unknown key 'wieght_decay'. Did you mean 'weight_decay'"):
        options(stage, {"wieght_decay": 0.1}, "stages[0]")
    with pytest.raises(UserError, match=r"stages\[0\]: optimizer: .*'sgd' or 'adamw', got 'adam'"):
        options(stage, {"optimizer": "adam"}, "stages[0]")


def test_an_evaluator_that_trains_has_the_keys_of_a_recipe() -> None:
    listed = defaults(resolve("evaluator", "train"))
    assert list(listed)[:2] == ["device", "seed"], "its own first"
    assert {field.name: field.default for field in fields(Recipe)} == {k: listed[k] for k in list(listed)[2:]}
    with pytest.raises(UserError, match="evaluator: unknown key 'schedul'. Did you mean 'schedule'"):
        options(resolve("evaluator", "train"), {"schedul": "step"}, "evaluator")


def test_options_come_from_keyword_only_parameters() -> None:
    assert options(Part, {"rate": 1}, "strategy") == {"size": 3, "rate": 1.0}
    with pytest.raises(UserError, match="strategy: unknown key 'siez'. Did you mean 'size'"):
        options(Part, {"siez": 1, "rate": 1.0}, "strategy")
    with pytest.raises(UserError, match="'rate' is missing"):
        options(Part, {}, "strategy")
    with pytest.raises(UserError, match=r"strategy: size: expected a number, not true or false, got True"):
        options(Part, {"size": True, "rate": 1.0}, "strategy")
    with pytest.raises(UserError, match=r"strategy: size: .*got 'big'"):
        options(Part, {"size": "big", "rate": 1.0}, "strategy")
    with pytest.raises(UserError, match="unknown key 'space'"):
        options(Part, {"space": 1, "rate": 1.0}, "strategy")
