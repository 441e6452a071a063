"""Stand-alone networks of the MobileNetV3 family, as plain static modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.mobilenet_v3_spec import BlockSpec, HeadSpec, NetworkSpec

RESIDUAL_SCALE = 0.2

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "hard_swish": nn.Hardswish}


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch normalisation, and an activation where one is named."""

    def __init__(
        self, cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: str = ""
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout)
        if activation:
            self.activation = ACTIVATIONS[activation]()


class GlobalAvgPool(nn.Module):
    """Mean over the map, `(batch, channels, 1, 1)`.

    As average pooling with the map's size: in channels_last on CPUs its gradient takes a third of the time of
    `AdaptiveAvgPool2d`'s, and it exports to one AveragePool node, which runtimes keep in their blocked layouts.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, x.shape[-2:])


class SqueezeExcite(nn.Module):
    """Channel gates from globally pooled channels (Hu et al., CVPR 2018), with a hard sigmoid as in MobileNetV3.

    Args:
        channels, squeeze: gated, and in between.
        gate: instead of the hard sigmoid.
    """

    def __init__(self, channels: int, squeeze: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.pool = GlobalAvgPool()
        self.reduce = nn.Conv2d(channels, squeeze, 1)
        self.activation = nn.ReLU()
        self.expand = nn.Conv2d(squeeze, channels, 1)
        self.gate = nn.Hardsigmoid() if gate is None else gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    """Widen, filter channel by channel, gate, project; the input is added where shapes allow."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.residual = spec.residual
        self.expand = ConvNorm(spec.cin, spec.hidden, activation=spec.activation) if spec.expand else None
        self.depthwise = ConvNorm(
            spec.hidden, spec.hidden, spec.kernel, spec.stride, groups=spec.hidden, activation=spec.activation
        )
        self.se = SqueezeExcite(spec.hidden, spec.squeeze) if spec.squeeze else None
        self.project = ConvNorm(spec.hidden, spec.cout)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        if self.se is not None:
            y = self.se(y)
        y = self.project(y)
        return y + x if self.residual else y


class Head(nn.Module):
    """Final convolution, global pooling, feature layer, classifier."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.final = ConvNorm(spec.cin, spec.final, activation="hard_swish")
        self.pool = GlobalAvgPool()
        self.features = nn.Linear(spec.final, spec.features, bias=spec.feature_bias)
        self.activation = nn.Hardswish()
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.features, spec.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.final(x)).flatten(1)
        return self.classifier(self.dropout(self.activation(self.features(x))))


class MobileNetV3(nn.Module):
    """One network of the family: `stem`, `stages[i][j]`, `head`.

    Takes images `(batch, channels, resolution, resolution)` of its own `input_shape`, gives logits `(batch, classes)`.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.input_shape = spec.input_shape
        self.stem = ConvNorm(spec.in_channels, spec.stem, 3, spec.stem_stride, activation="hard_swish")
        self.stages = nn.Sequential(*(nn.Sequential(*map(InvertedResidual, blocks)) for blocks in spec.stages))
        self.head = Head(spec.head)
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))


def initialise(network: nn.Module) -> None:
    """He initialisation: by fan-out for convolutions as in MobileNetV3's references, by fan-in for linear layers.

    The references' N(0, 0.01) for linear layers lets nearly no gradient through the two of a narrow head: a network of
    32 features stays at chance for its first hundreds of steps. Residual branches begin small, by the scale of their
    last normalisation, so that depth is no burden at the start (zero in Goyal et al. 2017 and, for supernets, BigNAS,
    Yu et al., ECCV 2020; above zero here, so that a gradient reaches every layer from the first step).
    """
    for module in network.modules():
        if isinstance(module, InvertedResidual) and module.residual:
            nn.init.constant_(module.project.norm.weight, RESIDUAL_SCALE)
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, math.sqrt(1.0 / module.in_features))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
