"""QuTiBench's own families (Blott et al., ACM JETC 2019): CNV on CIFAR-10 and an MLP on MNIST.

The topologies are BNN-PYNQ's CNV and LFC (Umuroglu et al., FPGA 2017), which QuTiBench calls 50 %: the operations it
states (0.47, 0.12, 0.03 and 0.01 GOP for CNV at 100, 50, 25 and 12.5 %; 0.02, 0.0058, 0.0019 and 0.0007 for the MLP)
are those of twice, once, half and a quarter of their widths.
"""

from __future__ import annotations

from math import prod

from torch import nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, initialise

CNV_STAGES = (128, 256, 512)
CNV_HIDDEN = 1024
MLP_HIDDEN = 2048


def _hidden(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(cin, cout, bias=False), nn.BatchNorm1d(cout), nn.ReLU())


def cnv(input_shape: InputShape, num_classes: int, *, width: float = 1.0) -> nn.Module:
    """Six 3x3 convolutions without padding, two max poolings, three linear layers."""
    channels, *size = input_shape
    layers: list[nn.Module] = []
    for i, stage in enumerate(CNV_STAGES):
        cout = round(stage * width)
        layers += [ConvBnAct(channels, cout, 3, padding="valid"), ConvBnAct(cout, cout, 3, padding="valid")]
        size = [s - 4 for s in size]
        if i < 2:
            layers.append(nn.MaxPool2d(2, 2))
            size = [s // 2 for s in size]
        channels = cout
    hidden = round(CNV_HIDDEN * width)
    head = (_hidden(channels * max(0, prod(size)), hidden), _hidden(hidden, hidden), nn.Linear(hidden, num_classes))
    return initialise(nn.Sequential(*layers, nn.Flatten(), *head))


def mlp(input_shape: InputShape, num_classes: int, *, width: float = 1.0) -> nn.Module:
    """Three hidden linear layers."""
    hidden = round(MLP_HIDDEN * width)
    layers = (_hidden(prod(input_shape), hidden), _hidden(hidden, hidden), _hidden(hidden, hidden))
    return initialise(nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden, num_classes)))
