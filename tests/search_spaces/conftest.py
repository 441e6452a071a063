"""Example spaces, small and with everything: for the contract tests of spaces and of supernets."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from search_spaces import ChainSpace, ElasticSpace, Knob, Layer, LayeredSpace, SearchSpace
from search_spaces.base import Choice
from search_spaces.reference.blocks import ConvBnAct, classifier


def every_block() -> ChainSpace:
    """A chain with every type of block, a layer without a choice, and both kinds of skip."""
    blocks = {
        "mbconv": {
            "type": "inverted_residual",
            "kernel": 5,
            "expansion": 3,
            "squeeze": 0.25,
            "activation": "hard_swish",
        },
        "grouped": {"type": "inverted_residual", "expansion": 1, "widen": True, "groups": 2},
        "plain": {"type": "inverted_residual", "expansion": 1},
        "separable": {"type": "separable"},
        "conv": {"type": "conv", "groups": 2},
        "bottleneck": {"type": "bottleneck"},
        "fire": {"type": "fire"},
        "ghost": {"type": "ghost", "squeeze": 0.25},
        "shuffle": {"type": "shuffle", "kernel": 5},
        "attention": {"type": "attention", "head_width": 8},
        "gates": {"type": "squeeze_excite"},
        "skip": {"type": "skip"},
        "project": {"type": "skip", "project": True},
    }
    stages = [{"width": 16, "choices": ["conv"]}, {"width": 24, "layers": 2, "stride": 2}, {"width": 32, "layers": 2}]
    return ChainSpace(
        1, 4, blocks=blocks, stages=stages, resolution=16, stem_stride=1, final_width=0, name="every_block"
    )


def elastic_chain() -> ChainSpace:
    """A chain in which everything is a knob: resolution, strides, widths, depths, blocks."""
    blocks = {"mb": {"type": "inverted_residual", "kernel": [3, 5], "expansion": 2}, "skip": {"type": "skip"}}
    stages = [
        {"width": [8, 12], "stride": [1, 2], "layers": [1, 2]},
        {"width": [16, 24], "stride": 2, "layers": [2, 4], "choices": ["mb_kernel3", "mb_kernel5"]},
    ]
    return ChainSpace(2, 5, blocks=blocks, stages=stages, resolution=[12, 16], final_width=32, name="elastic_chain")


def signals() -> ChainSpace:
    """Windows of a signal: every type of block along one dimension, and elastic lengths."""
    blocks = {
        "mb": {"type": "inverted_residual", "kernel": 5, "expansion": 2, "squeeze": 0.25},
        "separable": {"type": "separable", "kernel": 7, "squeeze": 0.25},
        "conv": {"type": "conv"},
        "bottleneck": {"type": "bottleneck", "squeeze": 0.25},
        "fire": {"type": "fire"},
        "ghost": {"type": "ghost"},
        "shuffle": {"type": "shuffle"},
        "attention": {"type": "attention"},
        "skip": {"type": "skip", "project": True},
    }
    stages = [{"width": 16, "stride": 2}, {"width": [16, 24], "layers": [1, 2]}]
    return ChainSpace(
        3, 4, blocks=blocks, stages=stages, dimensions=1, resolution=[24, 33], stem_kernel=5, final_width=0,
        name="signals",
    )  # fmt: skip


class Words(LayeredSpace):
    """A space of one's own: kernels and widths share weights, activations are paths, the last layer may be absent."""

    name = "words"
    knobs = (
        Knob("resolution", (8, 11)),
        Knob("width", (4, 8)),
        Knob("kernel", (1, 3)),
        Knob("activation", ("relu", "silu")),
        Knob("depth", (1, 2, 3)),
        Knob("late", (1, 5)),
    )
    layers = (
        Layer("stem", ("resolution", "width")),
        Layer("first", ("resolution", "width", "kernel", "activation"), paths=("activation",)),
        Layer("second", ("resolution", "width"), depth="depth", place=1),
        Layer("third", ("resolution", "width", "late"), depth="depth", place=2),
        Layer("head", ("resolution", "width")),
    )
    input_shape = (1, 11, 11)
    num_classes = 5

    def module(self, layer: Layer, choices: Mapping[str, Choice]) -> nn.Module:
        width = int(choices["width"])
        match layer.name:
            case "stem":
                return ConvBnAct(1, width, 3, 2)
            case "first":
                return ConvBnAct(width, width, int(choices["kernel"]), activation=str(choices["activation"]))
            case "second":
                return nn.GroupNorm(1, width)
            case "third":
                return ConvBnAct(width, width, int(choices["late"]), groups=width)
        return classifier(width, self.num_classes)


class Block(nn.Module):
    """An inverted residual with squeeze-and-excitation, as users write them."""

    def __init__(self, cin: int, hidden: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = cin == cout and stride == 1
        self.expand = nn.Sequential(nn.Conv2d(cin, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.PReLU(hidden))
        self.depthwise = nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.squeeze, self.excite = nn.Conv2d(hidden, 6, 1), nn.Conv2d(6, hidden, 1)
        self.project = nn.Sequential(nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.depthwise(self.expand(x))))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.project(y)
        return x + y if self.residual else y


class ElasticNetwork(nn.Module):
    """Residual blocks, one after an activation; a concatenation; a shuffle; a branch on sizes; a flattened map."""

    def __init__(self, in_channels: int = 2, num_classes: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 10, 3, 2, 1, bias=False), nn.BatchNorm2d(10), nn.ReLU())
        self.blocks = nn.ModuleList([Block(10, 16, 10), Block(10, 12, 12, 2), Block(12, 16, 12)])
        self.wide, self.up = nn.Conv2d(12, 10, 3, padding=1), nn.ConvTranspose2d(10, 8, 2, 2)
        self.narrow = nn.Conv2d(12, 4, 1)
        self.mix = nn.Conv2d(22, 12, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(22)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.drop = nn.Dropout(dropout)
        self.hidden, self.norm1d, self.head = nn.Linear(12 * 9, 14), nn.BatchNorm1d(14), nn.Linear(14, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        wide = torch.relu(self.wide(x))
        up = torch.nn.functional.avg_pool2d(self.up(wide), 2)
        x = torch.cat([wide, up, self.narrow(x)], 1)
        if x.shape[-1] > 8:  # known, although the number of channels is not
            raise ValueError("too large")
        x = torch.relu(self.mix(self.norm(x)))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        x = self.drop(self.hidden(self.grouped(x).flatten(1)))
        return self.head(torch.relu(self.norm1d(x)))


def elastic_network() -> SearchSpace:
    torch.manual_seed(0)
    return ElasticSpace(ElasticNetwork(), (2, 12, 12), ratios=(0.3, 0.5, 1.0), multiple=2)


@pytest.fixture(scope="session")
def examples() -> dict[str, Callable[[], SearchSpace]]:
    """By name."""
    return {
        "every_block": every_block,
        "elastic_chain": elastic_chain,
        "signals": signals,
        "words": Words,
        "elastic_network": elastic_network,
    }
