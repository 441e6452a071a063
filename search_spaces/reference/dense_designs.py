"""Detectors and segmenters as rows. Their networks give raw maps: no decoding, no suppression, no arg max."""

from __future__ import annotations

from typing import Any

from search_spaces.reference import mobile_tables as tables
from search_spaces.reference.base import Design

_HERE = "search_spaces.reference"
_CONFIGS = "tensorflow/models research/object_detection/samples/configs"
_ZOO = "openvinotoolkit/open_model_zoo models/public"


def _ssd(name: str, family: str, source: str, options: dict[str, Any], **fields: Any) -> Design:
    """A detector of 90 COCO categories and background, at 300x300 pixels."""
    return Design(
        name,
        family,
        f"{_HERE}.ssd:ssd_mobilenet",
        source,
        options,
        resolution=300,
        num_classes=91,
        task="detection",
        **fields,
    )


_V1 = {"table": tables.MOBILENET_V1, "tap": 11}
_V2 = {"table": tables.MOBILENET_V2, "tap": 14}
_SSD = (
    _ssd(
        "ssd_mobilenet_v1",
        "ssd_mobilenet_v1",
        f"{_CONFIGS}/ssd_mobilenet_v1_coco.config; count: {_ZOO}/ssd_mobilenet_v1_coco",
        _V1,
        params="6.807M with folded normalisation",
    ),
    _ssd(
        "ssd_mobilenet_v2",
        "ssd_mobilenet_v2",
        f"{_CONFIGS}/ssd_mobilenet_v2_quantized_300x300_coco.config",
        _V2,
        deviations="no published count; that of ssd_mobilenet_v2_coco, of which it has another head, is met",
    ),
    _ssd(
        "ssd_mobilenet_v2_coco",
        "ssd_mobilenet_v2",
        f"{_CONFIGS}/ssd_mobilenet_v2_coco.config; count: {_ZOO}/ssd_mobilenet_v2_coco",
        {**_V2, "kernel": 3, "separable_extras": True},
        params="16.818M with folded normalisation",
    ),
    _ssd(
        "ssdlite_mobilenet_v2",
        "ssd_mobilenet_v2",
        f"{_CONFIGS}/ssdlite_mobilenet_v2_coco.config; count: {_ZOO}/ssdlite_mobilenet_v2",
        {**_V2, "kernel": 3, "separable_extras": True, "separable_predictors": True},
        params="4.475M with folded normalisation",
    ),
)

_DEEPLAB = Design(
    "deeplab_v3_mobilenet_v2",
    "deeplab_v3_mobilenet_v2",
    f"{_HERE}.segmentation:deeplab_v3_mobilenet_v2",
    "Sandler et al., CVPR 2018, table 7; tensorflow/models research/deeplab, mobilenetv2_coco_voc_trainaug",
    params={1: "2.11M"},
    widths=(0.5,),
    resolution=513,
    num_classes=21,
    task="segmentation",
    deviations="no published count at width 0.5, but its 0.88 G multiply-accumulates are met within 2 %",
)

_UNET = Design(
    "unet_mobilenet_v2",
    "unet_mobilenet_v2",
    f"{_HERE}.segmentation:unet_mobilenet_v2",
    "https://www.tensorflow.org/tutorials/images/segmentation: 6,504,227, less 32,832 running statistics",
    params=6_471_395,
    resolution=128,
    num_classes=3,
    task="segmentation",
)

DESIGNS = (*_SSD, _DEEPLAB, _UNET)
