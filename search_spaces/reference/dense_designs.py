"""Detectors and segmenters as rows. Their networks give raw maps: no decoding, no suppression, no arg max."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from search_spaces.reference import mobile_tables as tables
from search_spaces.reference import yolo_tables as yolo
from search_spaces.reference.base import Design
from search_spaces.reference.yolo_tables import Table

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


_DEPLOYED = "re-parameterised as deployed; raw heads, without decoding of boxes"


def _yolo(
    name: str,
    family: str,
    table: Table,
    scale: tuple[float, float],
    params: int | str | None,
    source: str,
    **options: Any,
) -> Design:
    """A detector of 80 COCO categories at 640x640 pixels; `scale` is depth and width."""
    multipliers = {key: value for key, value in zip(("depth", "width"), scale, strict=True) if value != 1}
    return Design(
        name,
        family,
        f"{_HERE}.yolo:yolo",
        source,
        {"table": table, **multipliers, **options},
        params,
        resolution=640,
        num_classes=80,
        task="detection",
        deviations=_DEPLOYED,
    )


_ULTRALYTICS = "ultralytics/ultralytics cfg/models/{}"
# Published counts hold 16 constants of the decoding of boxes, which is not in here.
_YOLO = (
    *(
        _yolo(f"yolov6{s}", "yolov6", table, scale, params, "meituan/YOLOv6 0.2.0 README.md")
        for s, table, scale, params in (
            ("n", yolo.YOLOV6, (0.33, 0.25), "4.3M"),
            ("s", yolo.YOLOV6, (0.33, 0.5), "17.2M"),
            ("m", yolo.YOLOV6_CSP, (0.6, 0.75), "34.3M"),
        )
    ),
    replace(
        _yolo("yolov6t", "yolov6", yolo.YOLOV6, (0.33, 0.375), None, "meituan/YOLOv6 configs/yolov6t.py"),
        deviations=f"{_DEPLOYED}; no published count: the README's 15.0M are of a model of other multipliers",
    ),
    _yolo(
        "yolov7_tiny",
        "yolov7",
        yolo.YOLOV7_TINY,
        (1, 1),
        "6.2M",
        "WongKinYiu/yolov7 cfg/deploy/yolov7-tiny.yaml, README.md",
    ),
    *(
        _yolo(f"yolov8{s}", "yolov8", yolo.YOLOV8, scale, params, _ULTRALYTICS.format("v8/yolov8.yaml"), **options)
        for s, scale, params, options in (
            ("n", (0.33, 0.25), 3_157_184, {}),
            ("s", (0.33, 0.5), 11_166_544, {}),
            ("m", (0.67, 0.75), 25_902_624, {"max_channels": 768}),
            ("l", (1, 1), 43_691_504, {"max_channels": 512}),
            ("x", (1, 1.25), 68_229_632, {"max_channels": 512}),
        )
    ),
    *(
        _yolo(f"yolov9{s}", "yolov9", table, (1, 1), params, _ULTRALYTICS.format(f"v9/yolov9{s}.yaml") + count)
        for s, table, params, count in (
            ("t", yolo.YOLOV9T, "2.094M with folded normalisation", "; count: WongKinYiu/yolov9 summary (fused)"),
            ("s", yolo.YOLOV9S, "7.2M", "; count: documentation"),
            ("m", yolo.YOLOV9M, "20.1M", "; count: documentation"),
        )
    ),
    *(
        _yolo(f"yolov10{s}", "yolov10", table, scale, params, _ULTRALYTICS.format(f"v10/yolov10{s}.yaml"), **options)
        for s, table, scale, params, options in (
            ("n", yolo.YOLOV10N, (0.33, 0.25), "2.3M", {}),
            ("s", yolo.YOLOV10S, (0.33, 0.5), "7.2M with folded normalisation", {}),
            ("m", yolo.YOLOV10M, (0.67, 0.75), "15.4M", {"max_channels": 768}),
        )
    ),
    *(
        _yolo(f"yolo11{s}", "yolo11", table, scale, params, _ULTRALYTICS.format("11/yolo11.yaml"), **options)
        for s, table, scale, params, options in (
            ("n", yolo.YOLO11, (0.5, 0.25), 2_624_064, {}),
            ("s", yolo.YOLO11, (0.5, 0.5), 9_458_736, {}),
            ("m", yolo.YOLO11_DEEP, (0.5, 1.0), 20_114_672, {"max_channels": 512}),
        )
    ),
    _yolo(
        "yolox_s_leaky",
        "yolox",
        replace(yolo.YOLOX, activation="leaky_relu", head_activation="leaky_relu"),
        (0.33, 0.5),
        "9.0M",
        "Megvii-BaseDetection/YOLOX README.md (YOLOX-s, with leaky ReLU)",
    ),
)

_RESNET18 = {"block": "basic", "depths": (2, 2, 2, 2)}
_FCN = Design(
    "fcn_resnet18",
    "fcn_resnet",
    f"{_HERE}.heads:fcn_resnet",
    "dusty-nv/pytorch-segmentation; torchvision.models.segmentation.fcn.FCNHead",
    _RESNET18,
    resolution=(320, 512),
    num_classes=21,
    task="segmentation",
    deviations="no published count of parameters; logits at a 32nd of the resolution, as jetson-inference deploys it",
)

_POSE = (
    Design(
        "pose_resnet18",
        "pose_resnet",
        f"{_HERE}.heads:pose_resnet",
        "NVIDIA-AI-IOT/trt_pose resnet18_baseline_att",
        _RESNET18,
        num_classes=18,
        task="pose",
        deviations="no published count of parameters; maps only, without the search for persons",
    ),
    Design(
        "pose_densenet121",
        "pose_densenet",
        f"{_HERE}.heads:pose_densenet",
        "NVIDIA-AI-IOT/trt_pose densenet121_baseline_att",
        {"growth": 32, "stem": 64, "depths": (6, 12, 24, 16)},
        resolution=256,
        num_classes=18,
        task="pose",
        deviations="no published count of parameters; maps only, without the search for persons",
    ),
)

_PLAIN_UNET = Design(
    "unet",
    "unet",
    f"{_HERE}.heads:unet",
    "milesial/Pytorch-UNet UNet(3, 2), transposed convolutions",
    {"widths": (64, 128, 256, 512, 1024)},
    31_037_698,
    num_classes=2,
    task="segmentation",
    deviations="sides must be multiples of 16",
)

DESIGNS = (*_SSD, _DEEPLAB, _UNET, *_YOLO, _FCN, *_POSE, _PLAIN_UNET)
