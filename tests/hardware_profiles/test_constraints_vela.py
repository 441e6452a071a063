"""What the Ethos-U profile says of operators, held against the compiler itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hardware_profiles import check_workload, converter_for, load_target, meter_for
from search_spaces import trace

pytestmark = pytest.mark.extra("ethosu", "litert_torch")


class Chain(nn.Module):
    """A layer between two convolutions, so that it is neither first nor last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.gate = nn.Conv2d(8, 8, 1), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.squeeze(x.mean((2, 3), keepdim=True)))


class Attention(nn.Module):
    """Normalised dot-product attention over pixels, one head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.norm(x.flatten(2).transpose(1, 2))
        y = torch.softmax(self.q(y) @ self.k(y).transpose(1, 2), dim=-1) @ self.v(y)
        return y.transpose(1, 2).reshape(n, c, h, w)


class Branches(nn.Module):
    """Pooling, concatenation and enlargement."""

    def forward(self, x: Tensor) -> Tensor:
        small = nn.functional.max_pool2d(x, 2)
        large = nn.functional.interpolate(small, scale_factor=2, mode="nearest")
        return (x + large)[:, :8]


def placed() -> nn.Module:
    """All that the profile says the NPU takes, as far as networks of this project have it."""
    return nn.Sequential(
        Gate(), Branches(), Attention(), nn.AvgPool2d(3, 1), nn.MaxPool2d(3, 2),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.Hardswish(),
        nn.Conv2d(8, 8, 1), nn.SiLU(), nn.ConvTranspose2d(8, 8, 2, stride=2), nn.GELU(),
    )  # fmt: skip


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "placed": placed,
    "wide_stride": lambda: nn.Conv2d(8, 8, 5, stride=4, groups=8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_profile_and_the_compiler_agree_on_what_the_npu_takes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Chain(LAYERS[name]()).eval()
    target = load_target("ethos_u55")
    said = check_workload(trace(network, (3, 18, 18)), target)
    artifact = converter_for(target).convert(network, target, (3, 18, 18), tmp_path / "n.tflite")
    (measured,) = meter_for(target).measure([artifact], target)
    assert not measured.error
    assert bool(said) == ("runs on the CPU" in measured.note), (said, measured.note)
    assert bool(said) == (name != "placed")
