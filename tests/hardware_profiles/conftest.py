from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hardware_profiles import Artifact, OnnxConverter, Target, load_target


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user data directory."""
    home = tmp_path / "home"
    monkeypatch.setenv("NASBENCH_HOME", str(home))
    return home


@pytest.fixture
def host() -> Target:
    return load_target("host")


def tiny_network(channels: int = 4) -> nn.Module:
    """A network with a batch normalisation that is not the identity."""
    torch.manual_seed(channels)
    network = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(channels, 2),
    )
    network[1].running_mean = torch.randn(channels)
    network[1].running_var = torch.rand(channels) + 0.5
    return network


@pytest.fixture
def make_network() -> Callable[[int], nn.Module]:
    """Makes a tiny network of the given width."""
    return tiny_network


@pytest.fixture
def artifacts(host: Target, tmp_path: Path) -> list[Artifact]:
    """Three ONNX files of networks of rising size."""
    return [OnnxConverter().convert(tiny_network(c), host, (3, 16, 16), tmp_path / f"{c}.onnx") for c in (4, 8, 16)]
