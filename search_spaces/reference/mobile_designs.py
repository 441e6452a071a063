"""The mobile classifiers as rows: MobileNet, MnasNet, EfficientNet, ShuffleNetV2, GhostNet, small transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from search_spaces.reference import mobile_tables as tables
from search_spaces.reference.base import Design
from search_spaces.reference.mobile_tables import Table

_HERE = "search_spaces.reference"
_SLIM = "tensorflow/models research/slim/nets"
_IMGCLSMOB = "osmr/imgclsmob tensorflow2/README.md"


def _design(name: str, family: str, table: Table, source: str, *, depth: float = 1.0, **fields: Any) -> Design:
    """A row of this page; a depth or width multiplier of one is left out of the options."""
    options = {"table": table, **({"depth": depth} if depth != 1 else {}), **fields.pop("options", {})}
    return Design(name, family, f"{_HERE}.mobile:mobile", source, options, **fields)


_MOBILENET_V1 = _design(
    "mobilenet_v1",
    "mobilenet_v1",
    tables.MOBILENET_V1,
    f"{_IMGCLSMOB}; keras.applications.MobileNet (trainable)",
    widths=(0.25, 0.5, 0.75),
    params={1: 4_231_976, 0.75: 2_585_560, 0.5: 1_331_592, 0.25: 470_072},
)

_MOBILENET_V2 = _design(
    "mobilenet_v2",
    "mobilenet_v2",
    tables.MOBILENET_V2,
    f"torchvision.models.mobilenet_v2; widths: {_SLIM}/mobilenet/README.md",
    widths=(0.35, 0.5, 0.75, 1.3, 1.4),
    params={
        1: 3_504_872,
        0.35: "1.66M without normalisation",
        0.5: "1.95M without normalisation",
        0.75: "2.61M without normalisation",
        1.3: "5.34M without normalisation",
        1.4: "6.06M without normalisation",
    },
)

_MOBILENET_V2_NCNN = _design(
    "mobilenet_v2_ncnn",
    "mobilenet_v2",
    tables.MOBILENET_V2_NCNN,
    f"Tencent/ncnn benchmark/mobilenet_v2.param; count: {_IMGCLSMOB}, MobileNetV2 x1.0, with the classifier's biases",
    params=3_504_960 + 1000,
    deviations="ncnn runs the normalisations as operators of their own there",
)

_V3_NARROW = "timm tf_mobilenetv3_{}_075"
_MOBILENET_V3 = (
    _design(
        "mobilenet_v3_small",
        "mobilenet_v3",
        tables.MOBILENET_V3_SMALL,
        f"torchvision.models.mobilenet_v3_small; 0.75: {_V3_NARROW.format('small')}",
        widths=(0.75,),
        params={1: 2_542_856, 0.75: "2.04M"},
    ),
    _design(
        "mobilenet_v3_small_minimalistic",
        "mobilenet_v3",
        tables.MOBILENET_V3_SMALL_MINIMALISTIC,
        "timm tf_mobilenetv3_small_minimal_100",
        params="2.04M",
    ),
    _design(
        "mobilenet_v3_large",
        "mobilenet_v3",
        tables.MOBILENET_V3_LARGE,
        f"torchvision.models.mobilenet_v3_large; 0.75: {_V3_NARROW.format('large')}",
        widths=(0.75,),
        params={1: 5_483_032, 0.75: "3.99M"},
    ),
    _design(
        "mobilenet_v3_large_minimalistic",
        "mobilenet_v3",
        tables.MOBILENET_V3_LARGE_MINIMALISTIC,
        "timm tf_mobilenetv3_large_minimal_100",
        params="3.92M",
    ),
    _design(
        "mobilenet_v3_large_ncnn",
        "mobilenet_v3",
        tables.MOBILENET_V3_LARGE_NCNN,
        "Tencent/ncnn benchmark/mobilenet_v3.param",
        params="5.133694M with folded normalisation",
        deviations="gates come before the activation there; the work is the same",
    ),
)

_MOBILENET_EDGETPU = _design(
    "mobilenet_edgetpu",
    "mobilenet_edgetpu",
    tables.MOBILENET_EDGETPU,
    f"{_SLIM}/mobilenet/README.md",
    widths=(0.75,),
    params={1: "4.0M without normalisation, truncated", 0.75: "2.9M without normalisation, truncated"},
)

_MNASNET = (
    _design(
        "mnasnet",
        "mnasnet",
        tables.MNASNET,
        "torchvision.models.mnasnet1_0, mnasnet0_5, mnasnet0_75, mnasnet1_3",
        widths=(0.5, 0.75, 1.3),
        params={1: 4_383_312, 0.5: 2_218_512, 0.75: 3_170_208, 1.3: 6_282_256},
    ),
    _design(
        "mnasnet_a1",
        "mnasnet",
        tables.MNASNET_A1,
        f"{_IMGCLSMOB}; 0.75: timm semnasnet_075",
        widths=(0.75,),
        params={1: 3_887_038, 0.75: "2.91M"},
    ),
)

# Width, depth, resolution, dropout of EfficientNet-B0 to B7 (tensorflow/tpu, efficientnet_builder.py).
_COMPOUND = (
    (1.0, 1.0, 224, 0.2), (1.0, 1.1, 240, 0.2), (1.1, 1.2, 260, 0.3), (1.2, 1.4, 300, 0.3), (1.4, 1.8, 380, 0.4),
    (1.6, 2.2, 456, 0.4), (1.8, 2.6, 528, 0.5), (2.0, 3.1, 600, 0.5),
)  # fmt: skip


def _scaled(
    prefix: str,
    family: str,
    table: Table,
    source: str,
    rows: Mapping[str, tuple[float, float, int, float, int]],
) -> tuple[Design, ...]:
    """Rows of (width, depth, resolution, dropout, parameters), by the suffix of the name."""
    return tuple(
        _design(
            f"{prefix}{suffix}",
            family,
            replace(table, dropout=dropout),
            source.format(suffix),
            depth=depth,
            resolution=resolution,
            params=params,
            options={"width": width} if width != 1 else {},
        )
        for suffix, (width, depth, resolution, dropout, params) in rows.items()
    )


_EFFICIENTNET = _scaled(
    "efficientnet_b",
    "efficientnet",
    tables.EFFICIENTNET,
    "torchvision.models.efficientnet_b{}",
    {
        str(i): (*scale, params)
        for i, (scale, params) in enumerate(
            zip(
                _COMPOUND,
                (5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960),
                strict=True,
            )
        )
    },
)

_EFFICIENTNET_LITE = _scaled(
    "efficientnet_lite",
    "efficientnet_lite",
    tables.EFFICIENTNET_LITE,
    "tensorflow/tpu models/official/efficientnet/lite/efficientnet_lite_builder_test.py, efficientnet-lite{}",
    {
        "0": (1.0, 1.0, 224, 0.2, 4_652_008),
        "1": (1.0, 1.1, 240, 0.2, 5_416_680),
        "2": (1.1, 1.2, 260, 0.3, 6_092_072),
        "3": (1.2, 1.4, 280, 0.3, 8_197_096),
        "4": (1.4, 1.8, 300, 0.3, 13_006_568),
    },
)

_EFFICIENTNET_EDGETPU = _scaled(
    "efficientnet_edgetpu_",
    "efficientnet_edgetpu",
    tables.EFFICIENTNET_EDGETPU,
    f"{_IMGCLSMOB}, EfficientNet-Edge, size {{}}",
    {
        "s": (1.0, 1.0, 224, 0.2, 5_438_392),
        "m": (1.0, 1.1, 240, 0.2, 6_899_496),
        "l": (1.2, 1.4, 300, 0.3, 10_589_712),
    },
)

_EFFICIENTNET_V2 = tuple(
    _design(
        f"efficientnet_v2_{size}",
        "efficientnet_v2",
        table,
        f"torchvision.models.efficientnet_v2_{size}",
        params=params,
        resolution=resolution,
    )
    for size, table, params, resolution in (
        ("s", tables.EFFICIENTNET_V2_S, 21_458_488, 384),
        ("m", tables.EFFICIENTNET_V2_M, 54_139_356, 480),
    )
)

_PROXYLESSNAS = (
    _design("proxylessnas_mobile", "proxylessnas", tables.PROXYLESSNAS_MOBILE, _IMGCLSMOB, params=4_080_512),
    _design(
        "proxylessnas_mobile_ncnn",
        "proxylessnas",
        tables.PROXYLESSNAS_MOBILE_NCNN,
        "Tencent/ncnn benchmark/proxylessnasnet.param",
        params="4.064560M with folded normalisation",
    ),
)

_SHUFFLENET_V2 = Design(
    "shufflenet_v2",
    "shufflenet_v2",
    f"{_HERE}.shufflenet_v2:shufflenet_v2",
    "torchvision.models.shufflenet_v2_x1_0, x0_5, x1_5, x2_0",
    widths=(0.5, 1.5, 2.0),
    params={1: 2_278_604, 0.5: 1_366_792, 1.5: 3_503_624, 2.0: 7_393_996},
)

_GHOSTNET = (
    Design(
        "ghostnet_v1",
        "ghostnet",
        f"{_HERE}.ghostnet:ghostnet",
        "timm ghostnet_100; widths: Han et al., CVPR 2020, table 7",
        widths=(0.5, 1.3),
        params={1: "5.18M", 0.5: "2.6M", 1.3: "7.3M truncated"},
    ),
    Design(
        "ghostnet_v2",
        "ghostnet",
        f"{_HERE}.ghostnet:ghostnet",
        "timm ghostnetv2_100, ghostnetv2_130, ghostnetv2_160",
        {"attention": True},
        widths=(1.3, 1.6),
        params={1: "6.16M", 1.3: "8.96M", 1.6: "12.39M"},
    ),
)

_MOBILEONE = Design(
    "mobileone_s0",
    "mobileone",
    f"{_HERE}.mobileone:mobileone",
    "Vasu et al., CVPR 2023, table 1 (re-parameterised)",
    {"widths": (0.75, 1.0, 1.0, 2.0)},
    "2.1M",
    deviations="as deployed: branches and normalisation that only training has are folded into convolutions with bias",
)

_DEIT = tuple(
    Design(
        f"deit_{size}",
        "deit",
        f"{_HERE}.transformers:deit",
        f"timm deit_{size}_patch16_224",
        {"width": width, "heads": heads},
        params,
    )
    for size, width, heads, params in (("tiny", 192, 3, 5_717_416), ("small", 384, 6, 22_050_664))
)

_MOBILEVIT = Design(
    "mobilevit_s",
    "mobilevit",
    f"{_HERE}.transformers:mobilevit",
    "timm mobilevit_s",
    {"channels": (16, 32, 64, 96, 128, 160), "widths": (144, 192, 240), "final": 640},
    5_578_632,
    resolution=256,
)

DESIGNS = (
    _MOBILENET_V1,
    _MOBILENET_V2,
    _MOBILENET_V2_NCNN,
    *_MOBILENET_V3,
    _MOBILENET_EDGETPU,
    *_MNASNET,
    *_EFFICIENTNET,
    *_EFFICIENTNET_LITE,
    *_EFFICIENTNET_EDGETPU,
    *_EFFICIENTNET_V2,
    *_PROXYLESSNAS,
    _SHUFFLENET_V2,
    *_GHOSTNET,
    _MOBILEONE,
    *_DEIT,
    _MOBILEVIT,
)
