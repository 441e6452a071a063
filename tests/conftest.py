"""Fixtures and rules for all tests."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hardware_profiles.extras import EXTRAS

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `extra(name)`, an extra or a module, are skipped without it, or fail with NASBENCH_ALL_EXTRAS=1."""
    for marker in item.iter_markers("extra"):
        for module in [m for name in marker.args for m in EXTRAS.get(name, (name,))]:
            if importlib.util.find_spec(module) is None:
                if os.environ.get("NASBENCH_ALL_EXTRAS") == "1":
                    pytest.fail(f"{module} is not installed, but every extra must be here")
                pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Torch uses one thread: tests must give the same result on any machine, and not fight over cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C means what it means at a terminal, also where a shell runs the tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


TINY_SPACE = """
family = "mobilenet_v3"
description = "for tests: two stages of tiny blocks"
resolutions = [12, 16]
widths = [1.0]
stem_width = 8
stem_stride = 2
final_width = 32
feature_width = 32

[[stages]]
width = 8
stride = 1
depths = [1]
kernels = [3]
expansions = [1]
se = false
activation = "relu"

[[stages]]
width = 16
stride = 2
depths = [1, 2, 3]
kernels = [3, 5]
expansions = [2, 4]
se = true
activation = "hard_swish"
"""


@pytest.fixture
def tiny_space(tmp_path: Path) -> Path:
    """The file of a space of tiny networks."""
    path = tmp_path / "space.toml"
    path.write_text(TINY_SPACE)
    return path


TINY_EXPERIMENT = """
name = "tiny"
seed = 3
threads = 1

[task]
name = "npz"
path = "images.npz"

[space]
name = "space.toml"

[supernet]
epochs = 2
batch_size = 32
random_subnets = 1
validation_images = 100

[evaluator]
samples = 24
verify = 6
calibration_images = 100

[targets]
calibration_networks = 10

[verify]
rounds = 0

[strategy]
evaluations = 3000
batch = 500
population_size = 100

[selection]
count = 2

[[stages]]
name = "finetune"
epochs = 1

[[stages]]
name = "export"

[[stages]]
name = "quantize"
images = 64
"""


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment file of half a minute: 16x16 images in four classes that a tiny network can tell apart."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    rows, columns = np.mgrid[0:16, 0:16]
    waves = np.stack(
        [np.sin(rows / 2), np.sin(columns / 2), np.sin((rows + columns) / 2), np.sin((rows - columns) / 2)]
    )
    images = 128 + 50 * waves[labels] + rng.normal(0, 90, (1000, 16, 16))
    np.savez(folder / "images.npz", images=images.clip(0, 255).astype(np.uint8), labels=labels)
    (folder / "space.toml").write_text(TINY_SPACE)
    (folder / "tiny.toml").write_text(TINY_EXPERIMENT)
    return folder / "tiny.toml"


@pytest.fixture(scope="session")
def finished_run(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of the tiny experiment."""
    from nasbench.config import load_config
    from nasbench.experiment import run_experiment

    path = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NASBENCH_HOME", str(tmp_path_factory.mktemp("home")))
        run_experiment(load_config(tiny_experiment), path, where=tiny_experiment.parent)
    return path
