"""The four packages depend on each other in one direction only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "search_spaces": set(),
    "hardware_profiles": {"search_spaces"},
    "predictors": {"search_spaces", "hardware_profiles"},
    "nasbench": {"search_spaces", "hardware_profiles", "predictors"},
}


# Files that may read pickles.
PICKLES = {
    "nasbench/importers/nats_bench.py",  # a third party's, by an unpickler that refuses all but plain values
    "hardware_profiles/isolation.py",  # those of its own child, as multiprocessing does, in a folder of this user alone
}


def imported(file: Path) -> set[str]:
    """Top-level names of all imports in a file, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_upwards_only(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        wrong = (imported(file) & ALLOWED.keys()) - ALLOWED[package] - {package}
        assert not wrong, f"{file} imports {wrong}"


@pytest.mark.parametrize("package", ALLOWED)
def test_nothing_untrusted_is_loaded(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        unsafe = {"pickle", "dill", "joblib", "shelve", "marshal"}
        allowed = {"pickle"} if file.relative_to(ROOT).as_posix() in PICKLES else set()
        assert not imported(file) & unsafe - allowed, file
        calls = [node.func for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert "torch.load" not in [ast.unparse(function) for function in calls], file
