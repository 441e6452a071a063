"""Components by name, and signatures as schemas."""

from pathlib import Path

import pytest

from nasbench.registry import REGISTRY, options, resolve
from search_spaces import UserError


@pytest.mark.parametrize(("family", "name"), [(f, n) for f, names in REGISTRY.items() for n in names])
def test_every_registered_component_is_there_and_documented(family: str, name: str) -> None:
    component = resolve(family, name)
    assert component.__doc__


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'nsga2'"):
        resolve("strategy", "nsga")


def test_own_modules_are_found_beside_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("class Mine:\n    pass\n")
    assert resolve("strategy", "beside_it:Mine", tmp_path).__name__ == "Mine"
    with pytest.raises(UserError, match="no_such_module_here"):
        resolve("strategy", "no_such_module_here:Mine", tmp_path)
    with pytest.raises(UserError, match="Other"):
        resolve("strategy", "beside_it:Other", tmp_path)


class Part:
    def __init__(self, space: object, *, size: int = 3, rate: float) -> None: ...


def test_options_come_from_keyword_only_parameters() -> None:
    assert options(Part, {"rate": 1}, "strategy") == {"size": 3, "rate": 1.0}
    with pytest.raises(UserError, match="strategy: unknown key 'siez'. Did you mean 'size'"):
        options(Part, {"siez": 1, "rate": 1.0}, "strategy")
    with pytest.raises(UserError, match="'rate' is missing"):
        options(Part, {}, "strategy")
    with pytest.raises(UserError, match=r"strategy: size: .*got 'big'"):
        options(Part, {"size": "big", "rate": 1.0}, "strategy")
    with pytest.raises(UserError, match="unknown key 'space'"):
        options(Part, {"space": 1, "rate": 1.0}, "strategy")
