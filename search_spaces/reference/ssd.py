"""Single-shot detectors (Liu et al., ECCV 2016) on MobileNets, as the TensorFlow object detection API has them.

What the network itself computes: box encodings and class logits of all anchors. Decoding and suppression are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, InvertedResidual, conv, initialise
from search_spaces.reference.mobile import backbone, output_channels, split_widening
from search_spaces.reference.mobile_tables import Table

# Channels of the maps after the backbone's two, each half as large; before each, a 1x1 convolution to half of them.
EXTRAS = (512, 256, 256, 128)
# Anchors per pixel of the six maps: the finest has three.
ANCHORS = (3, 6, 6, 6, 6, 6)
BOX = 4


def _separable(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        ConvBnAct(cin, cin, 3, stride, groups=cin, activation="relu6"), ConvBnAct(cin, cout, activation="relu6")
    )


def _extra(cin: int, cout: int, separable: bool) -> nn.Module:
    squeeze = ConvBnAct(cin, cout // 2, activation="relu6")
    if separable:
        return nn.Sequential(squeeze, _separable(cout // 2, cout, 2))
    return nn.Sequential(squeeze, ConvBnAct(cout // 2, cout, 3, 2, activation="relu6"))


def _predictor(cin: int, cout: int, kernel: int, separable: bool) -> nn.Module:
    if separable:
        return nn.Sequential(ConvBnAct(cin, cin, kernel, groups=cin, activation="relu6"), conv(cin, cout))
    return conv(cin, cout, kernel)


class Ssd(nn.Module):
    """Detector on the maps that `parts` give one after the other.

    Args:
        parts: modules, each of which sees the output of the one before; every output is predicted on.
        channels: of these outputs.
        num_classes: background included.
        kernel: of the predictors.
        separable: whether the predictors are depthwise separable (SSDLite).
    """

    def __init__(
        self, parts: Sequence[nn.Module], channels: Sequence[int], num_classes: int, kernel: int, separable: bool
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.parts = nn.ModuleList(parts)
        pairs = list(zip(channels, ANCHORS, strict=True))
        self.boxes = nn.ModuleList(_predictor(c, a * BOX, kernel, separable) for c, a in pairs)
        self.classes = nn.ModuleList(_predictor(c, a * num_classes, kernel, separable) for c, a in pairs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Box encodings `(batch, anchors, 4)` and class logits `(batch, anchors, classes)`."""
        boxes, classes = [], []
        for part, box, score in zip(self.parts, self.boxes, self.classes, strict=True):
            x = part(x)
            boxes.append(box(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, BOX)))
            classes.append(score(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.num_classes)))
        return torch.cat(boxes, 1), torch.cat(classes, 1)


def ssd_mobilenet(
    input_shape: InputShape,
    num_classes: int,
    *,
    table: Table,
    tap: int,
    kernel: int = 1,
    separable_extras: bool = False,
    separable_predictors: bool = False,
) -> nn.Module:
    """SSD on a table of `search_spaces.reference.mobile_tables`.

    Args:
        tap: the first map is the output of this layer of the backbone (zero is the stem); of an inverted residual, its
            widened input. The second is the backbone's last.
    """
    layers, channels = backbone(input_shape[0], table)
    tapped = layers[tap]
    fine, rest = split_widening(tapped) if isinstance(tapped, InvertedResidual) else (tapped, [])
    parts: list[nn.Module] = [nn.Sequential(*layers[:tap], fine), nn.Sequential(*rest, *layers[tap + 1 :])]
    widths = [output_channels(fine), channels]
    for extra in EXTRAS:
        parts.append(_extra(widths[-1], extra, separable_extras))
        widths.append(extra)
    return initialise(Ssd(parts, widths, num_classes, kernel, separable_predictors))
