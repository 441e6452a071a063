"""An experiment on a network of the user's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nasbench.config import load_config
from nasbench.experiment import run_experiment
from nasbench.plan import make_plan
from search_spaces import UserError

MODULE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
    def forward(self, x):
        return (x + self.body(x)).relu()

def make(in_channels, num_classes):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), Block(), Block(),
        nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    )
"""
EXPERIMENT = """
name = "hers"
threads = 1
[task]
name = "npz"
path = "images.npz"
[space]
name = "elastic"
network = "network_of_hers:make"
resolution = 16
ratios = [0.5, 1.0]
[supernet]
epochs = 2
batch_size = 50
random_subnets = 1
validation_images = 0
[evaluator]
samples = 0
verify = 4
calibration_images = 50
[objectives.accuracy]
[objectives.macs]
[strategy]
name = "random"
evaluations = 6
[selection]
count = 1
[[stages]]
name = "export"
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    (tmp_path / "network_of_hers.py").write_text(MODULE)
    (tmp_path / "hers.toml").write_text(EXPERIMENT)
    labels = np.arange(200) % 4
    noise = np.random.default_rng(0).normal(0, 20, (200, 16, 16))
    bright = 60 * (labels[:, None, None] + 1) - 30
    np.savez(tmp_path / "images.npz", images=(bright + noise).clip(0, 255).astype(np.uint8), labels=labels)
    return tmp_path / "hers.toml"


def test_a_users_network_is_trained_searched_and_exported(experiment: Path, tmp_path: Path) -> None:
    view = run_experiment(load_config(experiment), tmp_path / "run", where=experiment.parent)
    front = view.front()
    assert front["pareto"].any()
    assert list((tmp_path / "run").rglob("*.onnx"))
    assert view.config.space.options["network"] == "network_of_hers:make"


def test_wrong_networks_and_keys_are_named(experiment: Path) -> None:
    for override, message in [
        ("space.network='network_of_hers:nothing'", "cannot import 'network_of_hers:nothing'"),
        ("space.netwrok='x:y'", "Did you mean 'network'"),
        ("space.weights='none.safetensors'", r"none\.safetensors: no such file"),
    ]:
        with pytest.raises(UserError, match=message):
            make_plan(load_config(experiment, [override]), experiment.parent)
