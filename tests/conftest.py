"""Fixtures and rules for all tests."""

import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `extra(module)` are skipped without that module; with NASBENCH_ALL_EXTRAS=1 they fail instead."""
    for marker in item.iter_markers("extra"):
        for module in marker.args:
            if importlib.util.find_spec(module) is None:
                if os.environ.get("NASBENCH_ALL_EXTRAS") == "1":
                    pytest.fail(f"{module} is not installed, but every extra must be here")
                pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Torch uses one thread: tests must give the same result on any machine, and not fight over cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches and user profiles of a test lie in a directory of its own."""
    monkeypatch.setenv("NASBENCH_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real measurements named by NASBENCH_DATA; tests that need it are skipped where it is unset."""
    if not os.environ.get("NASBENCH_DATA"):
        pytest.skip("NASBENCH_DATA is not set")
    path = Path(os.environ["NASBENCH_DATA"])
    assert path.is_dir(), f"NASBENCH_DATA={path} is no directory"
    return path
