"""Shared pieces of the reference networks.

Padding: every odd kernel pads by half its size on each side ("same"), or not at all ("valid"). TensorFlow's SAME gives
the same output sizes, multiply-accumulates and parameters for every input size, but pads one pixel less at the top and
left where stride is 2 and the size is even, so that trained weights of a TensorFlow reference would have to be shifted
by a pixel; explicit one-sided padding would add an operator that the reference does not run.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from search_spaces.mobilenet_v3_network import RESIDUAL_SCALE, GlobalAvgPool

Padding = Literal["same", "valid"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU,
    "hard_sigmoid": nn.Hardsigmoid,
    "hard_swish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
}


def conv(
    cin: int,
    cout: int,
    kernel: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] = 1,
    *,
    groups: int = 1,
    padding: Padding = "same",
    dilation: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """A convolution padded by name: the output has `ceil(size / stride)` pixels with "same"."""
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    pad = (dilation * (kernel[0] - 1) // 2, dilation * (kernel[1] - 1) // 2) if padding == "same" else (0, 0)
    return nn.Conv2d(cin, cout, kernel, stride, pad, dilation, groups, bias)


class ConvBnAct(nn.Sequential):
    """Convolution, batch normalisation, and the activation that is named (none where empty).

    A bias before the normalisation changes nothing but the number of parameters: some references have it.
    """

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int | tuple[int, int] = 1,
        stride: int | tuple[int, int] = 1,
        *,
        groups: int = 1,
        padding: Padding = "same",
        dilation: int = 1,
        activation: str = "relu",
        bias: bool = False,
    ) -> None:
        layers: list[nn.Module] = [
            conv(cin, cout, kernel, stride, groups=groups, padding=padding, dilation=dilation, bias=bias),
            nn.BatchNorm2d(cout),
        ]
        super().__init__(*layers, *([ACTIVATIONS[activation]()] if activation else []))


class BnActConv(nn.Sequential):
    """Batch normalisation, ReLU, then a convolution without bias: the order of pre-activated networks."""

    def __init__(self, cin: int, cout: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(nn.BatchNorm2d(cin), nn.ReLU(), conv(cin, cout, kernel, stride, bias=False))


class SqueezeExcite(nn.Module):
    """Channel gates from globally pooled channels (Hu et al., CVPR 2018)."""

    def __init__(
        self, channels: int, squeeze: int, *, activation: str = "relu", gate: str = "hard_sigmoid", bias: bool = True
    ) -> None:
        super().__init__()
        self.gates = nn.Sequential(
            GlobalAvgPool(),
            conv(channels, squeeze, bias=bias),
            ACTIVATIONS[activation](),
            conv(squeeze, channels, bias=bias),
            ACTIVATIONS[gate](),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x)


class Residual(nn.Module):
    """`body(x) + shortcut(x)`, and an activation where one is named."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, activation: str = "") -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.activation = ACTIVATIONS[activation]() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class Branches(nn.Module):
    """All branches see the input; their outputs are concatenated along the channels, in order."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class InvertedResidual(nn.Module):
    """Widen to `hidden`, filter channel by channel, gate, project (Sandler et al., CVPR 2018).

    Without `expand` the first convolution is left out (`hidden == cin`); the input is added where shapes allow it. With
    `groups`, both 1x1 convolutions are grouped, and channels are shuffled after the first (FBNet; Wu et al., 2019).
    """

    def __init__(
        self,
        cin: int,
        hidden: int,
        cout: int,
        kernel: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        *,
        activation: str = "relu6",
        se: nn.Module | None = None,
        expand: bool | None = None,
        residual: bool | None = None,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        expand = hidden != cin if expand is None else expand
        body: list[nn.Module] = [ConvBnAct(cin, hidden, groups=groups, activation=activation)] if expand else []
        if expand and groups > 1:
            body.append(ChannelShuffle(groups))
        body.append(ConvBnAct(hidden, hidden, kernel, stride, groups=hidden, dilation=dilation, activation=activation))
        project = ConvBnAct(hidden, cout, groups=groups, activation="")
        self.body = nn.Sequential(*body, *([se] if se else []), project)
        self.residual = stride == 1 and cin == cout if residual is None else residual

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x if self.residual else self.body(x)


class ChannelShuffle(nn.Module):
    """Interleaves the channels of `groups` groups (Zhang et al., CVPR 2018)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


def max_pool(kernel: int, stride: int, padding: Padding = "same", ceil: bool = False) -> nn.MaxPool2d:
    """Max pooling, padded by name; `ceil` rounds the output's size up, as Caffe does."""
    return nn.MaxPool2d(kernel, stride, (kernel - 1) // 2 if padding == "same" else 0, ceil_mode=ceil)


def average_pool(kernel: int, stride: int = 1) -> nn.AvgPool2d:
    """Average pooling over "same" windows that leaves the padding out of the mean."""
    return nn.AvgPool2d(kernel, stride, (kernel - 1) // 2, count_include_pad=False)


def classifier(cin: int, classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Global pooling, dropout, one linear layer: logits `(batch, classes)`."""
    return nn.Sequential(GlobalAvgPool(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(cin, classes))


def initialise(network: nn.Module) -> nn.Module:
    """He initialisation, by fan-out for convolutions and fan-in for linear layers; returns the network.

    Residual branches begin small, by the scale of their last normalisation, as in the networks of the spaces: easier to
    train, and before any training, when normalisation does nothing yet, a deep network's outputs stay moderate. On the
    meta device there is nothing to initialise.
    """
    for module in network.modules():
        if any(p.is_meta for p in module.parameters(recurse=False)):
            continue
        if isinstance(module, Residual) or (isinstance(module, InvertedResidual) and module.residual):
            for norm in [m for m in module.body.modules() if isinstance(m, nn.BatchNorm2d)][-1:]:
                nn.init.constant_(norm.weight, RESIDUAL_SCALE)
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, math.sqrt(1.0 / module.in_features))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    return network
