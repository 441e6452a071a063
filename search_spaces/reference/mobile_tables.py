"""Networks of inverted residuals as tables: MobileNet, MnasNet, EfficientNet and their kin. Without torch.

A table is what the papers print: a stem, rows of equal blocks, a head; `search_spaces.reference.mobile` builds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Block = Literal["separable", "inverted", "fused", "project"]


@dataclass(frozen=True, slots=True)
class Row:
    """`repeats` blocks of one width, of which the first may stride.

    Args:
        block: `separable`: depthwise, then pointwise convolution, both activated (MobileNetV1). `inverted`: widen,
            filter channel by channel, project. `fused`: widening and filtering are one full convolution; without
            widening it is the whole block (EfficientNetV2). `project`: a 1x1 convolution without activation.
        width: output channels at width multiplier 1.
        expansion: hidden channels over input channels.
        squeeze: inner channels of squeeze-and-excitation over those that the table names; 0 for none.
        activation: instead of the table's.
        expand_from: input channels that the expansion counts from, instead of the block's own (EfficientNet-EdgeTPU).
        residual: false where the input is not added although shapes allow it.
        widened: whether an inverted residual begins with a 1x1 convolution even if that widens nothing.
        scaled_depth: whether a depth multiplier applies.
    """

    block: Block
    width: int
    repeats: int = 1
    stride: int = 1
    kernel: int = 3
    expansion: float = 1
    squeeze: float = 0
    activation: str = ""
    expand_from: int = 0
    residual: bool = True
    widened: bool = False
    scaled_depth: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """One network.

    Args:
        stem: channels of the first 3x3 convolution, stride 2.
        final: channels of the 1x1 convolution before global pooling; 0 for none.
        features: width of a linear layer between pooling and classifier, with bias (MobileNetV3); 0 for none.
        activation: wherever a row names no other.
        squeeze_of: whether `Row.squeeze` is a share of the block's input channels or of its hidden channels.
        squeeze_divisor: inner channels of squeeze-and-excitation are rounded to multiples of it, or down to whole ones.
        squeeze_activation, gate: inside squeeze-and-excitation.
        scaled_stem: whether the width multiplier applies to the stem.
        scaled_final: to the final convolution: always, only if it widens, or never.
        dropout: before the classifier.
    """

    stem: int
    rows: tuple[Row, ...]
    final: int = 0
    features: int = 0
    activation: str = "relu6"
    squeeze_of: Literal["input", "hidden"] = "input"
    squeeze_divisor: int = 1
    squeeze_activation: str = "relu"
    gate: str = "sigmoid"
    scaled_stem: bool = True
    scaled_final: Literal["always", "wider", "never"] = "always"
    dropout: float = 0.2


def _inverted(*rows: tuple[float, int, int, int, int], squeeze: float = 0) -> tuple[Row, ...]:
    """Rows of (expansion, width, repeats, stride, kernel), as the papers of MobileNetV2 and EfficientNet print them."""
    return tuple(Row("inverted", w, n, s, k, e, squeeze) for e, w, n, s, k in rows)


# Howard et al., 2017, table 1.
MOBILENET_V1 = Table(
    32,
    (
        Row("separable", 64),
        Row("separable", 128, 2, 2),
        Row("separable", 256, 2, 2),
        Row("separable", 512, 6, 2),
        Row("separable", 1024, 2, 2),
    ),
    dropout=0.001,
)

# Sandler et al., CVPR 2018, table 2.
MOBILENET_V2 = Table(
    32,
    _inverted(
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3), (6, 96, 3, 1, 3), (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    ),
    final=1280,
    scaled_final="wider",
)  # fmt: skip

# What ncnn measures as mobilenet_v2 (Tencent/ncnn benchmark/mobilenet_v2.param), from Caffe.
MOBILENET_V2_NCNN = replace(
    MOBILENET_V2, rows=(replace(MOBILENET_V2.rows[0], widened=True), *MOBILENET_V2.rows[1:]), activation="relu"
)


def _mobilenet_v3(
    rows: tuple[tuple[float, int, int, int, float, str], ...], final: int, features: int, minimalistic: bool
) -> Table:
    """Rows of (expansion, width, stride, kernel, squeeze, activation), one block each.

    The minimalistic ones are without squeeze-and-excitation, hard-swish and 5x5 convolutions.
    """
    return Table(
        16,
        tuple(
            Row("inverted", w, 1, s, 3, e, activation="relu")
            if minimalistic
            else Row("inverted", w, 1, s, k, e, se, act)
            for e, w, s, k, se, act in rows
        ),
        final,
        features,
        activation="relu" if minimalistic else "hard_swish",
        squeeze_of="hidden",
        squeeze_divisor=8,
        gate="hard_sigmoid",
    )


# Howard et al., ICCV 2019, tables 1 and 2. Expansions are those of the widths that are printed.
_V3_LARGE = (
    (1, 16, 1, 3, 0, "relu"),
    (4, 24, 2, 3, 0, "relu"),
    (3, 24, 1, 3, 0, "relu"),
    (3, 40, 2, 5, 0.25, "relu"),
    (3, 40, 1, 5, 0.25, "relu"),
    (3, 40, 1, 5, 0.25, "relu"),
    (6, 80, 2, 3, 0, "hard_swish"),
    (2.5, 80, 1, 3, 0, "hard_swish"),
    (184 / 80, 80, 1, 3, 0, "hard_swish"),
    (184 / 80, 80, 1, 3, 0, "hard_swish"),
    (6, 112, 1, 3, 0.25, "hard_swish"),
    (6, 112, 1, 3, 0.25, "hard_swish"),
    (6, 160, 2, 5, 0.25, "hard_swish"),
    (6, 160, 1, 5, 0.25, "hard_swish"),
    (6, 160, 1, 5, 0.25, "hard_swish"),
)
_V3_SMALL = (
    (1, 16, 2, 3, 0.25, "relu"),
    (72 / 16, 24, 2, 3, 0, "relu"),
    (88 / 24, 24, 1, 3, 0, "relu"),
    (4, 40, 2, 5, 0.25, "hard_swish"),
    (6, 40, 1, 5, 0.25, "hard_swish"),
    (6, 40, 1, 5, 0.25, "hard_swish"),
    (3, 48, 1, 5, 0.25, "hard_swish"),
    (3, 48, 1, 5, 0.25, "hard_swish"),
    (6, 96, 2, 5, 0.25, "hard_swish"),
    (6, 96, 1, 5, 0.25, "hard_swish"),
    (6, 96, 1, 5, 0.25, "hard_swish"),
)
MOBILENET_V3_LARGE = _mobilenet_v3(_V3_LARGE, 960, 1280, minimalistic=False)
MOBILENET_V3_SMALL = _mobilenet_v3(_V3_SMALL, 576, 1024, minimalistic=False)
MOBILENET_V3_LARGE_MINIMALISTIC = _mobilenet_v3(_V3_LARGE, 960, 1280, minimalistic=True)
MOBILENET_V3_SMALL_MINIMALISTIC = _mobilenet_v3(_V3_SMALL, 576, 1024, minimalistic=True)

# What ncnn measures as mobilenet_v3 (Tencent/ncnn benchmark/mobilenet_v3.param): the stride of the last stage comes one
# block later, and inner channels of squeeze-and-excitation are not rounded.
MOBILENET_V3_LARGE_NCNN = replace(
    _mobilenet_v3(
        (*_V3_LARGE[:12], (6, 160, 1, 5, 0.25, "hard_swish"), (4.2, 160, 2, 5, 0.25, "hard_swish"), _V3_LARGE[14]),
        960,
        1280,
        minimalistic=False,
    ),
    squeeze_divisor=1,
)

# tensorflow/models, research/slim/nets/mobilenet/mobilenet_v3.py, V3_EDGETPU. Its first "fused" block widens nothing,
# and so is a projection.
MOBILENET_EDGETPU = Table(
    32,
    (
        Row("project", 16),
        Row("fused", 32, 1, 2, 3, 8),
        Row("fused", 32, 3, 1, 3, 4),
        Row("fused", 48, 1, 2, 3, 8),
        Row("fused", 48, 3, 1, 3, 4),
        Row("inverted", 96, 1, 2, 3, 8),
        Row("inverted", 96, 3, 1, 3, 4),
        Row("inverted", 96, 1, 1, 3, 8, residual=False),
        Row("inverted", 96, 3, 1, 3, 4),
        Row("inverted", 160, 1, 2, 5, 8),
        Row("inverted", 160, 3, 1, 5, 4),
        Row("inverted", 192, 1, 1, 3, 8),
    ),
    final=1280,
    activation="relu",
    scaled_final="never",
)

# Tan et al., CVPR 2019: B1 (figure 7 (b)), the network of the hosted TFLite models; A1 (figure 7 (a)) has gates.
MNASNET = Table(
    32,
    _inverted(
        (1, 16, 1, 1, 3), (3, 24, 3, 2, 3), (3, 40, 3, 2, 5), (6, 80, 3, 2, 5), (6, 96, 2, 1, 3), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ),
    final=1280,
    activation="relu",
    scaled_final="never",
)  # fmt: skip
MNASNET_A1 = Table(
    32,
    (
        Row("inverted", 16),
        Row("inverted", 24, 2, 2, 3, 6),
        Row("inverted", 40, 3, 2, 5, 3, 0.25),
        Row("inverted", 80, 4, 2, 3, 6),
        Row("inverted", 112, 2, 1, 3, 6, 0.25),
        Row("inverted", 160, 3, 2, 5, 6, 0.25),
        Row("inverted", 320, 1, 1, 3, 6),
    ),
    final=1280,
    activation="relu",
    scaled_stem=False,
    scaled_final="never",
)

# Tan and Le, ICML 2019, table 1. B1 to B7 scale its width and depth.
_EFFICIENTNET = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
EFFICIENTNET = Table(
    32, _inverted(*_EFFICIENTNET, squeeze=0.25), final=1280, activation="silu", squeeze_activation="silu"
)


def _efficientnet_lite() -> Table:
    """B0 without gates, with ReLU6; stem, head and the depth of the two outer rows are not scaled."""
    rows = _inverted(*_EFFICIENTNET)
    first, last = (replace(row, scaled_depth=False) for row in (rows[0], rows[-1]))
    return Table(32, (first, *rows[1:-1], last), final=1280, scaled_stem=False, scaled_final="never")


EFFICIENTNET_LITE = _efficientnet_lite()

# tensorflow/tpu, models/official/efficientnet/edgetpu/efficientnet_edgetpu_builder.py.
EFFICIENTNET_EDGETPU = Table(
    32,
    (
        Row("fused", 24, 1, 1, 3, 4, expand_from=24, residual=False),
        Row("fused", 32, 2, 2, 3, 8),
        Row("fused", 48, 4, 2, 3, 8),
        Row("inverted", 96, 5, 2, 5, 8),
        Row("inverted", 144, 4, 1, 5, 8),
        Row("inverted", 192, 2, 2, 5, 8),
    ),
    final=1280,
    activation="relu",
)


def _efficientnet_v2(stem: int, *rows: tuple[Block, float, int, int, int, float], dropout: float) -> Table:
    """Rows of (block, expansion, width, repeats, stride, squeeze)."""
    return Table(
        stem,
        tuple(Row(block, w, n, s, 3, e, se) for block, e, w, n, s, se in rows),
        final=1280,
        activation="silu",
        squeeze_activation="silu",
        dropout=dropout,
    )


# Tan and Le, ICML 2021, table 4, and the reference implementation for M.
EFFICIENTNET_V2_S = _efficientnet_v2(
    24,
    ("fused", 1, 24, 2, 1, 0),
    ("fused", 4, 48, 4, 2, 0),
    ("fused", 4, 64, 4, 2, 0),
    ("inverted", 4, 128, 6, 2, 0.25),
    ("inverted", 6, 160, 9, 1, 0.25),
    ("inverted", 6, 256, 15, 2, 0.25),
    dropout=0.2,
)
EFFICIENTNET_V2_M = _efficientnet_v2(
    24,
    ("fused", 1, 24, 3, 1, 0),
    ("fused", 4, 48, 5, 2, 0),
    ("fused", 4, 80, 5, 2, 0),
    ("inverted", 4, 160, 7, 2, 0.25),
    ("inverted", 6, 176, 14, 1, 0.25),
    ("inverted", 6, 304, 18, 2, 0.25),
    ("inverted", 6, 512, 5, 1, 0.25),
    dropout=0.3,
)


def _proxyless(first: int, *stages: tuple[int, int, tuple[tuple[int, float], ...]]) -> Table:
    """Stages of (width, stride, (kernel, expansion) of each block) after an unwidened block of `first` channels."""
    rows = tuple(
        Row("inverted", width, 1, stride if i == 0 else 1, k, e)
        for width, stride, blocks in stages
        for i, (k, e) in enumerate(blocks)
    )
    return Table(32, (Row("inverted", first), *rows), final=1280, scaled_final="wider", dropout=0.0)


# Cai et al., ICLR 2019, figure 4 (c): Proxyless (Mobile).
_PROXYLESS_MOBILE = (
    (32, 2, ((5, 3), (3, 3))),
    (40, 2, ((7, 3), (3, 3), (5, 3), (5, 3))),
    (80, 2, ((7, 6), (5, 3), (5, 3), (5, 3))),
    (96, 1, ((5, 6), (5, 3), (5, 3), (5, 3))),
    (192, 2, ((7, 6), (7, 6), (7, 3), (7, 3))),
    (320, 1, ((7, 6),)),
)
PROXYLESSNAS_MOBILE = _proxyless(16, *_PROXYLESS_MOBILE)
# What ncnn measures as proxylessnasnet (Tencent/ncnn benchmark/proxylessnasnet.param): its first block is wider.
PROXYLESSNAS_MOBILE_NCNN = _proxyless(32, (32, 2, ((5, 1.5), (3, 3))), *_PROXYLESS_MOBILE[1:])
