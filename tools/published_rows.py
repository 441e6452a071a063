"""Which published latency is a reference of which profile: every row of a table of published figures, judged.

    python -m tools.published_rows TABLE.csv [--rows]

A row is used where its device has a profile, its runtime and precision are an operating point's, its network is a
reference network, and its figure is the latency of one inference at batch 1. Every other row is left out for one stated
reason. `tools.update_profiles` writes the used rows into the profiles.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from search_spaces import UserError
from search_spaces.reference import reference_networks

COLUMNS = (
    "device", "runtime", "precision", "batch", "model", "input_size", "latency_ms", "throughput_fps", "energy_mj",
    "source", "notes",
)  # fmt: skip

# Names of models, as sources write them -> reference networks. Where one name means two designs, size or MACs decide.
NETWORKS = {
    "DeepLab V3": "deeplab_v3_mobilenet_v2",
    "DenseNet": "densenet121",
    "EfficientNet-EdgeTpu-L": "efficientnet_edgetpu_l",
    "EfficientNet-EdgeTpu-M": "efficientnet_edgetpu_m",
    "EfficientNet-EdgeTpu-S": "efficientnet_edgetpu_s",
    "EfficientNet_v1": "efficientnet_b4",  # by its 1.50 G MACs at 224
    "EfficientNet_v2": "efficientnet_v2_m",  # by its 5.36 G MACs at 224
    "GoogLeNetv1 width/pruning 100%": "googlenet",
    "Inception V2": "inception_v2",
    "Inception V3": "inception_v3",
    "Inception V3 (TF-slim)": "inception_v3",
    "Inception V4": "inception_v4",
    "Inception v4": "inception_v4",
    "Inception V1": "inception_v1",
    "Inception v1": "inception_v1",
    "Inception-ResNet V2": "inception_resnet_v2",
    "Inception-ResNet V2 (TF-slim)": "inception_resnet_v2",
    "MobileNet V1 1.0 (TF-slim)": "mobilenet_v1",
    "MobileNet v1": "mobilenet_v1",
    "MobileNet v1 1.0": "mobilenet_v1",
    "MobileNet v1 SSD": "ssd_mobilenet_v1",
    "MobileNet v2": "mobilenet_v2",
    "MobileNet v2 1.0": "mobilenet_v2",
    "MobileNet v2 SSD": "ssd_mobilenet_v2",
    "MobileNet v3 Large": "mobilenet_v3_large",
    "MobileNet v3 Small": "mobilenet_v3_small",
    "MobileNetV1 (w0.25, 128?)": "mobilenet_v1_0.25",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV2 1.0": "mobilenet_v2",
    "MobileNetV3 Large dm=0.75": "mobilenet_v3_large_0.75",
    "MobileNetV3 Large dm=1": "mobilenet_v3_large",
    "MobileNetV3 Large minimalistic": "mobilenet_v3_large_minimalistic",
    "MobileNetV3 Small dm=0.75": "mobilenet_v3_small_0.75",
    "MobileNetV3 Small dm=1": "mobilenet_v3_small",
    "MobileNetV3 Small minimalistic": "mobilenet_v3_small_minimalistic",
    "MobileOne S0": "mobileone_s0",
    "MobilenetEdgeTPU dm=0.75": "mobilenet_edgetpu_0.75",
    "MobilenetEdgeTPU dm=1": "mobilenet_edgetpu",
    "NASNet large": "nasnet_large",
    "NASNet mobile": "nasnet_mobile",
    "ResNet V2 101": "resnet101_v2",
    "ResNet-152 V2": "resnet152_v2",
    "ResNet-50": "resnet50",
    "ResNet-50 V1": "resnet50_v1",
    "ResNet-50 V2": "resnet50_v2",
    "ResNet-50 width/pruning 100%": "resnet50_v1",
    "ResNet18": "resnet18",
    "ResNet50": "resnet50",
    "SSD MobileNet v2": "ssd_mobilenet_v2",
    "Shufflenet_v2": "shufflenet_v2",  # by its 145 M MACs
    "SqueezeNet": "squeezenet1_0",  # by its latency beside MobileNetV1's; version 1.1 has 2.4 times fewer MACs
    "UNet": "unet",
    "Unet Mv2": "unet_mobilenet_v2",
    "VGG16": "vgg16",
    "VGG19": "vgg19",
    "Xception": "xception",
    "trt_pose densenet121_baseline_att_256x256_B": "pose_densenet121",
    "trt_pose resnet18_baseline_att_224x224_A": "pose_resnet18",
    "YOLOX-S-Leaky": "yolox_s_leaky",
    "YOLOv7t": "yolov7_tiny",
    "yolov6-nano": "yolov6n",
    # ncnn's benchmark, by its .param files
    "efficientnet_b0": "efficientnet_b0",
    "googlenet": "googlenet",
    "mnasnet": "mnasnet",
    "mobilenet": "mobilenet_v1",
    "mobilenet_int8": "mobilenet_v1",
    "mobilenet_v2": "mobilenet_v2_ncnn",
    "mobilenet_v3": "mobilenet_v3_large_ncnn",
    "proxylessnasnet": "proxylessnas_mobile_ncnn",
    "resnet18": "resnet18",
    "resnet18_int8": "resnet18",
    "resnet50": "resnet50_v1",  # Caffe's, with the stride on the 1x1 convolution
    "resnet50_int8": "resnet50_v1",
    "shufflenet_v2": "shufflenet_v2",
    "squeezenet": "squeezenet1_1",
    "squeezenet_int8": "squeezenet1_1",
    "vgg16": "vgg16",
}
# The same, by pattern; `{}` is the first group.
PATTERNS = {
    r"MobileNetV1 w([\d.]+)": "mobilenet_v1_{}",
    r"MobileNetV2 w([\d.]+)": "mobilenet_v2_{}",
    r"MnasNet ([\d.]+)": "mnasnet_{}",
    r"mnasnet1_3 \(torchvision\)": "mnasnet_1.3",
    r"mnasnet1_0 \(torchvision\)": "mnasnet",
    r"mnasnet0_75 \(torchvision\)": "mnasnet_0.75",
    r"mnasnet0_5 \(torchvision\)": "mnasnet_0.5",
    r"shufflenet_v2_x0_5 \(torchvision\)": "shufflenet_v2_0.5",
    r"shufflenet_v2_x1_0 \(torchvision\)": "shufflenet_v2",
    r"shufflenet_v2_x1_5 \(torchvision\)": "shufflenet_v2_1.5",
    r"shufflenet_v2_x2_0 \(torchvision\)": "shufflenet_v2_2.0",
    r"(vgg\d+)(?:_bn)? \(torchvision\)": "{}",  # normalisation is folded into the convolutions
    r"([a-z][a-z0-9_]*) \(torchvision\)": "{}",
    r"fcn-resnet18-.*": "fcn_resnet18",
    r"YOLO(v6[a-z]) R2": "yolo{}",
    r"YOLO(v?\d+[a-z])": "yolo{}",
}
# QuTiBench's percentages are widths: 50 % has a quarter of the operations.
SSD_SIZE = (300, 300)
SSD_NOTE = (
    "the page says 224, but Coral publishes these detectors for 300 pixels only, and its CPU times agree with that"
)
YOLOX_SIZE = (640, 640)
YOLOX_NOTE = "the size is that of the repository's programs (jetson/*.patch, aicast/edge/demo_aicast.py)"
QUTIBENCH_WIDTHS = {"100": "", "50": "_0.5", "25": "_0.25", "12.5": "_0.125"}


OTHER_DEVICE = "device without a profile"
OTHER_POINT = "no such operating point in the profile (another runtime or number of threads)"
BATCH = "not batch 1"
THROUGHPUT = "throughput only, and the latency of the same network is in another row"
ONE_STREAM = "1 / frames per second of one stream; no latency is stated"
END_TO_END = "end-to-end demo: camera or video included"
UNKNOWN_NETWORK = "no such reference network"
UNKNOWN_SIZE = "input size not stated"


@dataclass(frozen=True)
class Rule:
    """Where the figures of a device belong: patterns that match whole cells, and an operating point or a reason."""

    device: str
    runtime: str
    precision: str
    target: str  # `profile:point`, `{}` for the groups of the patterns in turn; or why the row is left out


# The first rule that matches a row counts. ncnn's default is fp16 storage, and fp16 arithmetic where the CPU has it.
RULES = tuple(
    Rule(*row)
    for row in (
        # Google
        ("Coral Edge TPU USB.*", ".*", "int8", "edge_tpu:int8"),
        ("Coral Dev Board", "TFLite\\+EdgeTPU", "int8", "edge_tpu_dev_board:int8"),
        ("Coral Dev Board.*", "TFLite", "int8", "edge_tpu_dev_board:int8-cpu"),
        ("Coral Dev Board.*", ".*", ".*", OTHER_POINT),
        # Intel
        ("Intel NCS2.*", "OpenVINO async demo", ".*", END_TO_END),
        ("Intel NCS2.*", ".*", "fp16", "ncs2:fp16"),
        ("Intel NCS1.*", ".*", "fp16", "ncs1:fp16"),
        ("Luxonis .*", ".*", "fp16", "oak_rvc2:fp16"),
        # NVIDIA
        (".*Jetson .*", "ncnn.*", ".*", OTHER_POINT),
        (".*Jetson .*", "PyTorch CUDA|TFLite|TensorFlow.*", ".*", OTHER_POINT),
        ("Jetson Nano", "(?:ONNX-|TF-)?TensorRT.*", "(fp16|fp32)", "jetson_nano:{}-maxn"),
        ("Jetson TX2 \\(MAX-N\\)", "TensorRT", "(fp16|fp32)", "jetson_tx2:{}-maxn"),
        ("Jetson TX2 \\(MAX-P\\)", "TensorRT", "(fp16|fp32)", "jetson_tx2:{}-maxp"),
        ("Jetson TX2 \\(MAX-Q\\)", "TensorRT", "(fp16|fp32)", "jetson_tx2:{}-maxq"),
        ("Jetson (?:AGX Xavier|Xavier \\(AGX\\))", "TensorRT.*", "fp16", "jetson_agx_xavier:fp16-maxn"),
        ("Jetson Xavier NX", "TensorRT.*", "int8", "jetson_xavier_nx:int8-15w"),
        ("Jetson Orin Nano 8GB", "TensorRT.*", "(fp16|fp32|int8)", "jetson_orin_nano:{}-15w"),
        # phones
        ("Pixel 1 big core", "TFLite", "(fp32|int8)", "pixel_1:{}-1thread"),
        ("Pixel 1 CPU \\(1 thread\\)", "XNNPACK", "fp32", "pixel_1:fp32-xnnpack-1thread"),
        ("Pixel 1 CPU \\(big cores threads\\)", "XNNPACK", "fp32", "pixel_1:fp32-xnnpack-2threads"),
        ("Pixel 3 CPU \\(4 threads\\)", "TFLite", "(fp32|int8)", "pixel_3:{}-4threads"),
        ("Pixel 3 big core", "TFLite", "(fp32|int8)", "pixel_3:{}-1thread"),
        ("Pixel 4 CPU", "TFLite", "int8", "pixel_4:int8-1thread"),
        ("Qualcomm SM8150-AC .*", "ncnn CPU threads=4.*", "ncnn default.*", "snapdragon_855:fp16-ncnn"),
        ("Qualcomm SM8150-AC .*", "ncnn CPU threads=4.*", "int8", "snapdragon_855:int8-ncnn"),
        ("Qualcomm SM8150-AC .*", "ncnn CPU threads=1.*", "ncnn default.*", "snapdragon_855:fp16-ncnn-1thread"),
        ("Qualcomm SM8150-AC .*", "ncnn CPU threads=1.*", "int8", "snapdragon_855:int8-ncnn-1thread"),
        # Raspberry Pi
        ("Raspberry Pi ([34]) Model B.*", "ncnn CPU threads=4.*", "ncnn default.*", "raspberry_pi_{}:fp32-ncnn"),
        ("Raspberry Pi ([34]) Model B.*", "ncnn CPU threads=4.*", "int8", "raspberry_pi_{}:int8-ncnn"),
        (
            "Raspberry Pi ([34]) Model B.*",
            "ncnn CPU threads=1.*",
            "ncnn default.*",
            "raspberry_pi_{}:fp32-ncnn-1thread",
        ),
        ("Raspberry Pi ([34]) Model B.*", "ncnn CPU threads=1.*", "int8", "raspberry_pi_{}:int8-ncnn-1thread"),
        ("Raspberry Pi (3)\\+ \\(multi-thread\\)", "XNNPACK", "(fp32|int8)", "raspberry_pi_{}:{}-xnnpack"),
        ("Raspberry Pi (4) \\(arm64\\) \\(multi-thread\\)", "XNNPACK", "(fp32|int8)", "raspberry_pi_{}:{}-xnnpack"),
        ("Raspberry Pi (4)", "TFLite", "(fp32|int8)", "raspberry_pi_{}:{}-tflite"),
        ("(?:Pixel [134] |Raspberry Pi [34]|Qualcomm SM8150-AC ).*", ".*", ".*", OTHER_POINT),
        (".*", ".*", ".*", OTHER_DEVICE),
    )
)


@dataclass(frozen=True)
class Row:
    """One published figure, with what becomes of it: a reference network at an operating point, or a reason."""

    line: int
    cells: dict[str, str]
    profile: str = ""
    point: str = ""
    network: str = ""
    resolution: tuple[int, int] = (0, 0)  # height, width
    reason: str = ""
    note: str = ""  # ours, on how the row was read

    @property
    def latency_ms(self) -> float:
        """As stated, else the inverse of the throughput."""
        return float(self.cells["latency_ms"] or 1e3 / float(self.cells["throughput_fps"]))

    @property
    def key(self) -> tuple[str, str, str, tuple[int, int]]:
        """What one number of a profile is of."""
        return self.profile, self.point, self.network, self.resolution

    @property
    def energy_mj(self) -> float | None:
        return float(self.cells["energy_mj"]) if self.cells["energy_mj"] else None


def network_of(model: str) -> str:
    """Our name of a source's model, whether or not it is a reference network; "" where it has none."""
    if model in NETWORKS:
        return NETWORKS[model]
    if match := re.fullmatch(r"(CNV|MLP) width/pruning ([\d.]+)%", model):
        return match[1].lower() + QUTIBENCH_WIDTHS[match[2]]
    for pattern, name in PATTERNS.items():
        if match := re.fullmatch(pattern, model):
            return name.format(*match.groups()).removesuffix("_1.0")
    return ""


def size_of(text: str) -> tuple[int, int]:
    """Height and width from `224`, `224x224` (width first) or `CIFAR-10 32x32`; zeros where nothing is stated."""
    match = re.search(r"(\d+)(?:x(\d+))?$", text)
    return (int(match[2] or match[1]), int(match[1])) if match else (0, 0)


def judge(line: int, cells: dict[str, str], known: frozenset[str]) -> Row:
    """What becomes of one row of the table; `known` are the networks that can be built."""
    row = Row(line, cells)
    target = ""
    for rule in RULES:
        found = [re.fullmatch(getattr(rule, c), cells[c]) for c in ("device", "runtime", "precision")]
        if all(found):
            target = rule.target.format(*(group for match in found if match for group in match.groups()))
            break
    if target in (OTHER_DEVICE, OTHER_POINT, END_TO_END):
        return replace(row, reason=target)
    profile, _, point = target.partition(":")
    row = replace(
        row, profile=profile, point=point, network=network_of(cells["model"]), resolution=size_of(cells["input_size"])
    )
    if cells["model"] in ("MobileNet v1 SSD", "MobileNet v2 SSD"):
        row = replace(row, resolution=SSD_SIZE, note=SSD_NOTE)
    if cells["model"] == "YOLOX-S-Leaky":
        row = replace(row, resolution=YOLOX_SIZE, note=YOLOX_NOTE)
    if cells["batch"] != "1":
        return replace(row, reason=BATCH)
    if "end-to-end" in cells["notes"] or cells["runtime"].endswith("demo"):
        return replace(row, reason=END_TO_END)
    if row.network not in known:
        return replace(row, reason=UNKNOWN_NETWORK)
    if not all(row.resolution):
        return replace(row, reason=UNKNOWN_SIZE)
    return row if cells["latency_ms"] else replace(row, note=ONE_STREAM)


def read(path: Path) -> list[Row]:
    """All rows of the table, judged.

    Raises:
        UserError: no such file, or another table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)}")
            known = frozenset(reference_networks())
            rows = [judge(line, cells, known) for line, cells in enumerate(reader, start=2)]
    except OSError as error:
        raise UserError(f"{path}: cannot read this table: {error.strerror}") from error
    stated = {row.key for row in rows if not row.reason and row.note != ONE_STREAM}
    return [replace(row, reason=THROUGHPUT) if row.note == ONE_STREAM and row.key in stated else row for row in rows]


def report(rows: Sequence[Row], each: bool = False) -> str:
    """How many rows are left out for which reason; with `each`, the rows too."""
    left = [row for row in rows if row.reason]
    counts = Counter(row.reason for row in left)
    lines = [f"{len(rows)} published figures, {len(rows) - len(left)} used, {len(left)} left out:"]
    for reason, count in counts.most_common():
        lines.append(f"  {count:5d}  {reason}")
        rest = [row for row in left if row.reason == reason]
        if reason == UNKNOWN_NETWORK:
            names = Counter(row.cells["model"] for row in rest)
            lines.append("         " + ", ".join(f"{name} ({n})" for name, n in sorted(names.items())))
        if each:
            lines += [
                f"         line {row.line}: {', '.join(row.cells[c] for c in COLUMNS[:6])}: {row.cells['source'][:60]}"
                for row in rest
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of each published figure.")
    parser.add_argument("table", type=Path)
    parser.add_argument("--rows", action="store_true", help="list every row that is left out")
    args = parser.parse_args()
    rows = read(args.table)
    used = Counter(f"{row.profile}:{row.point}" for row in rows if not row.reason)
    for target, count in sorted(used.items()):
        networks = len({(r.network, r.resolution) for r in rows if not r.reason and f"{r.profile}:{r.point}" == target})
        print(f"{target:32}{count:4d} figures of {networks:3d} networks")
    print(report(rows, args.rows))


if __name__ == "__main__":
    main()
