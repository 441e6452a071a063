"""Builds the tables of inverted residuals: MobileNet, MnasNet, EfficientNet and their kin."""

from __future__ import annotations

import math

from torch import nn

from search_spaces.mobilenet_v3_network import GlobalAvgPool
from search_spaces.mobilenet_v3_spec import make_divisible
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import (
    ACTIVATIONS,
    ConvBnAct,
    InvertedResidual,
    Residual,
    SqueezeExcite,
    classifier,
    initialise,
)
from search_spaces.reference.mobile_tables import Row, Table


def mobile(
    input_shape: InputShape, num_classes: int, *, table: Table, width: float = 1.0, depth: float = 1.0
) -> nn.Module:
    """The classifier that a table describes, at a width and a depth multiplier."""
    features, channels = backbone(input_shape[0], table, width, depth)
    if not table.features:
        return initialise(nn.Sequential(*features, classifier(channels, num_classes, table.dropout)))
    hidden = make_divisible(table.features * max(width, 1.0))
    head = nn.Sequential(
        GlobalAvgPool(),
        nn.Flatten(),
        nn.Linear(channels, hidden),
        ACTIVATIONS[table.activation](),
        nn.Dropout(table.dropout),
        nn.Linear(hidden, num_classes),
    )
    return initialise(nn.Sequential(*features, head))


def backbone(in_channels: int, table: Table, width: float = 1.0, depth: float = 1.0) -> tuple[list[nn.Module], int]:
    """Stem, blocks and final convolution one by one, and the channels of the last.

    Where a table has no final convolution, nothing stands in its place.
    """
    channels = make_divisible(table.stem * (width if table.scaled_stem else 1.0))
    layers: list[nn.Module] = [ConvBnAct(in_channels, channels, 3, 2, activation=table.activation)]
    for row in table.rows:
        cout = make_divisible(row.width * width)
        for i in range(math.ceil(row.repeats * (depth if row.scaled_depth else 1.0))):
            layers.append(block(table, row, channels, cout, row.stride if i == 0 else 1, width))
            channels = cout
    if table.final:
        scale = {"always": width, "wider": max(width, 1.0), "never": 1.0}[table.scaled_final]
        cout = make_divisible(table.final * scale)
        layers.append(ConvBnAct(channels, cout, activation=table.activation))
        channels = cout
    return layers, channels


def block(table: Table, row: Row, cin: int, cout: int, stride: int, width: float = 1.0, dilation: int = 1) -> nn.Module:
    """One block of a row."""
    activation = row.activation or table.activation
    counted = make_divisible(row.expand_from * width) if row.expand_from else cin
    hidden = make_divisible(counted * row.expansion)
    residual = row.residual and stride == 1 and cin == cout
    if row.block == "separable":
        depthwise = ConvBnAct(cin, cin, row.kernel, stride, groups=cin, dilation=dilation, activation=activation)
        return nn.Sequential(depthwise, ConvBnAct(cin, cout, activation=activation))
    if row.block == "project":
        return ConvBnAct(cin, cout, 1, stride, activation="")
    if row.block == "fused":
        if row.expansion == 1:
            body: nn.Module = ConvBnAct(cin, cout, row.kernel, stride, activation=activation)
        else:
            widen = ConvBnAct(cin, hidden, row.kernel, stride, activation=activation)
            body = nn.Sequential(widen, ConvBnAct(hidden, cout, activation=""))
        return Residual(body) if residual else body
    return InvertedResidual(
        cin,
        hidden,
        cout,
        row.kernel,
        stride,
        activation=activation,
        se=_squeeze_excite(table, row, cin, hidden) if row.squeeze else None,
        expand=row.expansion != 1 or row.widened,
        residual=residual,
        dilation=dilation,
    )


def split_widening(layer: InvertedResidual) -> tuple[nn.Module, list[nn.Module]]:
    """The convolution that widens the input of a block without shortcut, and what follows it: where detectors tap."""
    assert not layer.residual
    widen, *rest = layer.body
    return widen, rest


def output_channels(layer: nn.Module) -> int:
    """Channels of the last convolution in a layer."""
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)][-1].out_channels


def _squeeze_excite(table: Table, row: Row, cin: int, hidden: int) -> SqueezeExcite:
    share = row.squeeze * (cin if table.squeeze_of == "input" else hidden)
    squeeze = make_divisible(share, table.squeeze_divisor) if table.squeeze_divisor > 1 else max(1, int(share))
    return SqueezeExcite(hidden, squeeze, activation=table.squeeze_activation, gate=table.gate)
