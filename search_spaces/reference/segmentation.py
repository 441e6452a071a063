"""Segmenters on MobileNetV2: DeepLabV3 and the U-Net of TensorFlow's tutorial. They give logits per pixel."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.mobilenet_v3_network import GlobalAvgPool
from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, InvertedResidual, conv, initialise
from search_spaces.reference.mobile import backbone, block, output_channels, split_widening
from search_spaces.reference.mobile_tables import MOBILENET_V2

ATROUS_FROM = 16  # a map never gets coarser than a sixteenth of the image; kernels are dilated instead
PYRAMID = 256


class DeepLab(nn.Module):
    """Backbone, a pooled and a 1x1 branch, logits, and bilinear resizing to the input's size.

    Without atrous branches and decoder, as in the MobileNetV2 models of Sandler et al. (CVPR 2018, section 6.3) and of
    DeepLab's model zoo.
    """

    def __init__(self, features: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.pooled = nn.Sequential(GlobalAvgPool(), ConvBnAct(channels, PYRAMID))
        self.local = ConvBnAct(channels, PYRAMID)
        self.head = nn.Sequential(ConvBnAct(2 * PYRAMID, PYRAMID), nn.Dropout(0.1), conv(PYRAMID, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        x = self.features(x)
        pooled = F.interpolate(self.pooled(x), x.shape[-2:], mode="bilinear", align_corners=False)
        logits = self.head(torch.cat([pooled, self.local(x)], 1))
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def deeplab_v3_mobilenet_v2(input_shape: InputShape, num_classes: int, *, width: float = 1.0) -> nn.Module:
    """DeepLabV3 at output stride 16; its widths, unlike MobileNetV2's, are not rounded to multiples of 8."""
    channels = round(MOBILENET_V2.stem * width)
    layers: list[nn.Module] = [ConvBnAct(input_shape[0], channels, 3, 2, activation=MOBILENET_V2.activation)]
    reached, dilation = 2, 1
    for row in MOBILENET_V2.rows:
        cout = round(row.width * width)
        for i in range(row.repeats):
            stride = row.stride if i == 0 else 1
            atrous = stride > 1 and reached == ATROUS_FROM
            layers.append(block(MOBILENET_V2, row, channels, cout, 1 if atrous else stride, width, dilation))
            reached, dilation = (reached, dilation * stride) if atrous else (reached * stride, dilation)
            channels = cout
    return initialise(DeepLab(nn.Sequential(*layers), channels, num_classes))


class UNet(nn.Module):
    """Maps of a backbone, from coarse to fine: upsampled by transposed convolutions and joined with the next finer."""

    def __init__(self, parts: list[nn.Module], channels: list[int], widths: list[int], num_classes: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        coarse, *skips = reversed(channels)
        self.up = nn.ModuleList()
        for width, skip in zip(widths, skips, strict=True):
            layers = [_double(coarse, width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            self.up.append(nn.Sequential(*layers))
            coarse = width + skip
        self.head = _double(coarse, num_classes, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        for up, skip in zip(self.up, reversed(maps[:-1]), strict=True):
            x = torch.cat([up(x), skip], 1)
        return self.head(x)


def _double(cin: int, cout: int, bias: bool) -> nn.ConvTranspose2d:
    """A 3x3 transposed convolution to twice the size."""
    layer = nn.ConvTranspose2d(cin, cout, 3, 2, 1, 1, bias=bias)
    nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / (cin * 9 / 4)))
    return layer


# Blocks of MobileNetV2 (from one) whose widened input is joined; the last block, whose projection is upsampled without
# normalisation; channels of the decoder from coarse to fine.
UNET_TAPS, UNET_LAST, UNET_WIDTHS = (2, 4, 7, 14), 17, (512, 256, 128, 64)


def unet_mobilenet_v2(input_shape: InputShape, num_classes: int) -> nn.Module:
    """The network of https://www.tensorflow.org/tutorials/images/segmentation."""
    layers, _ = backbone(input_shape[0], MOBILENET_V2)
    last = layers[UNET_LAST]
    assert isinstance(last, InvertedResidual)
    last.body[-1] = next(last.body[-1].children())
    parts: list[nn.Module] = []
    channels: list[int] = []
    pending: list[nn.Module] = []
    for index, layer in enumerate(layers[: UNET_LAST + 1]):
        if index in UNET_TAPS:
            assert isinstance(layer, InvertedResidual)
            widen, rest = split_widening(layer)
            parts.append(nn.Sequential(*pending, widen))
            channels.append(output_channels(widen))
            pending = rest
        else:
            pending.append(layer)
    parts.append(nn.Sequential(*pending))
    channels.append(MOBILENET_V2.rows[-1].width)
    return initialise(UNet(parts, channels, list(UNET_WIDTHS), num_classes))
