"""The classic designs: AlexNet, VGG, ResNet and their time, one row each."""

from __future__ import annotations

from search_spaces.reference.base import Design

_HERE = "search_spaces.reference"


def _torchvision(name: str, file: str) -> str:
    return f"torchvision.models.{file}.{name}"


# Multiply-accumulates are those that torchvision states with its weights (`_ops`).
_MACS = "{}G multiply-accumulates"


_ALEXNET = Design(
    "alexnet", "alexnet", f"{_HERE}.vgg:alexnet", _torchvision("alexnet", "alexnet"),
    params=61_100_840, operations=_MACS.format("0.71"),
)  # fmt: skip

_VGG = tuple(
    Design(
        f"vgg{layers}{'_bn' if norm else ''}",
        "vgg",
        f"{_HERE}.vgg:vgg",
        _torchvision(f"vgg{layers}{'_bn' if norm else ''}", "vgg"),
        {"depths": depths, "norm": norm},
        params[norm],
        operations=_MACS.format(macs),
    )
    for layers, depths, params, macs in (
        (11, (1, 1, 2, 2, 2), (132_863_336, 132_868_840), "7.61"),
        (13, (2, 2, 2, 2, 2), (133_047_848, 133_053_736), "11.31"),
        (16, (2, 2, 3, 3, 3), (138_357_544, 138_365_992), "15.47"),
        (19, (2, 2, 4, 4, 4), (143_667_240, 143_678_248), "19.63"),
    )
    for norm in (False, True)
)

_RESNET = tuple(
    Design(
        f"resnet{layers}",
        "resnet",
        f"{_HERE}.resnet:resnet",
        _torchvision(f"resnet{layers}", "resnet"),
        {"block": block, "depths": depths},
        params,
        operations=_MACS.format(macs),
        deviations="stride on the 3x3 convolution of a bottleneck (v1.5), as in torchvision" if layers >= 50 else "",
    )
    for layers, block, depths, params, macs in (
        (18, "basic", (2, 2, 2, 2), 11_689_512, "1.81"),
        (34, "basic", (3, 4, 6, 3), 21_797_672, "3.66"),
        (50, "bottleneck", (3, 4, 6, 3), 25_557_032, "4.09"),
        (101, "bottleneck", (3, 4, 23, 3), 44_549_160, "7.80"),
        (152, "bottleneck", (3, 8, 36, 3), 60_192_808, "11.51"),
    )
)

_RESNET_V1 = (
    Design(
        "resnet50_v1",
        "resnet",
        f"{_HERE}.resnet:resnet",
        "keras.applications.ResNet50, trainable",
        {"block": "bottleneck_v1", "depths": (3, 4, 6, 3)},
        25_583_592,
        operations="7.7G",
        deviations="Caffe's original has no biases before its normalisations; operations are QuTiBench's",
    ),
)

_RESNET_V2 = tuple(
    Design(
        f"resnet{layers}_v2",
        "resnet_v2",
        f"{_HERE}.resnet:resnet_v2",
        f"keras.applications.ResNet{layers}V2, trainable",
        {"depths": depths},
        params,
    )
    for layers, depths, params in (
        (50, (3, 4, 6, 3), 25_568_360),
        (101, (3, 4, 23, 3), 44_577_896),
        (152, (3, 8, 36, 3), 60_236_904),
    )
)

_SQUEEZENET = (
    Design(
        "squeezenet1_0",
        "squeezenet",
        f"{_HERE}.squeezenet:squeezenet",
        _torchvision("squeezenet1_0", "squeezenet"),
        {"stem": 96, "stem_kernel": 7, "pools": (0, 3, 7)},
        1_248_424,
        operations=_MACS.format("0.82"),
    ),
    Design(
        "squeezenet1_1",
        "squeezenet",
        f"{_HERE}.squeezenet:squeezenet",
        _torchvision("squeezenet1_1", "squeezenet"),
        {"stem": 64, "stem_kernel": 3, "pools": (0, 2, 4)},
        1_235_496,
        operations=_MACS.format("0.35"),
    ),
)

_INCEPTION = (
    Design(
        "inception_v1",
        "inception_v1",
        f"{_HERE}.inception:inception",
        _torchvision("googlenet", "googlenet"),
        {"table": "v1", "dropout": 0.2},
        6_624_904,
        operations=_MACS.format("1.50"),
        deviations="3x3 in place of the paper's 5x5 convolutions, and normalised, as in torchvision and TF-slim; "
        "no auxiliary classifiers",
    ),
    Design(
        "googlenet",
        "inception_v1",
        f"{_HERE}.inception:inception",
        "BVLC Caffe bvlc_googlenet",
        {"table": "v1_caffe", "dropout": 0.4, "norm": False},
        6_998_552,
        deviations="no local response normalisation (two layers without parameters); no auxiliary classifiers",
    ),
    Design(
        "inception_v2",
        "inception_v2",
        f"{_HERE}.inception:inception_v2",
        "TF-slim inception_v2",
        {"dropout": 0.2},
        "11.2M",
        deviations="normalisations have a scale, which TF-slim leaves out",
    ),
    Design(
        "inception_v3",
        "inception_v3",
        f"{_HERE}.inception:inception",
        "torchvision.models.inception.inception_v3, aux_logits=False",
        {"table": "v3", "dropout": 0.5},
        23_834_568,
        operations=_MACS.format("5.71"),
        resolution=299,
        deviations="no auxiliary classifier",
    ),
    Design(
        "inception_v4",
        "inception_v4",
        f"{_HERE}.inception:inception",
        "timm inception_v4",
        {"table": "v4", "dropout": 0.2},
        42_679_816,
        resolution=299,
    ),
    Design(
        "inception_resnet_v2",
        "inception_resnet_v2",
        f"{_HERE}.inception:inception",
        "timm inception_resnet_v2",
        {"table": "resnet_v2", "dropout": 0.2},
        55_843_464,
        resolution=299,
    ),
)

_DENSENET = tuple(
    Design(
        f"densenet{layers}",
        "densenet",
        f"{_HERE}.densenet:densenet",
        _torchvision(f"densenet{layers}", "densenet"),
        {"growth": growth, "stem": 2 * growth, "depths": depths},
        params,
        operations=_MACS.format(macs),
        deviations="each layer appends to one growing tensor; torchvision concatenates a list anew for each layer",
    )
    for layers, growth, depths, params, macs in (
        (121, 32, (6, 12, 24, 16), 7_978_856, "2.83"),
        (161, 48, (6, 12, 36, 24), 28_681_000, "7.73"),
        (169, 32, (6, 12, 32, 32), 14_149_480, "3.36"),
        (201, 32, (6, 12, 48, 32), 20_013_928, "4.29"),
    )
)

_XCEPTION = Design(
    "xception", "xception", f"{_HERE}.xception:xception", "keras.applications.Xception, trainable",
    params=22_855_952, resolution=299,
)  # fmt: skip

_NASNET = tuple(
    Design(
        f"nasnet_{size}",
        "nasnet",
        f"{_HERE}.nasnet:nasnet",
        f"keras.applications.NASNet{size.capitalize()}, trainable",
        options,
        params,
        resolution=resolution,
        deviations="no auxiliary classifier",
    )
    for size, options, params, resolution in (
        ("mobile", {"stem": 32, "channels": 44, "repeats": 4, "skip": False, "dropout": 0.5}, 5_289_978, 224),
        ("large", {"stem": 96, "channels": 168, "repeats": 6, "skip": True, "dropout": 0.5}, 88_753_150, 331),
    )
)

_SHUFFLENET_V1 = tuple(
    Design(
        "shufflenet_v1" if groups == 3 else f"shufflenet_v1_g{groups}",
        "shufflenet_v1",
        f"{_HERE}.shufflenet_v1:shufflenet_v1",
        "github.com/megvii-model/ShuffleNet-Series ShuffleNetV1" if params else "Zhang et al., CVPR 2018, table 1",
        {"groups": groups},
        params,
        widths=(0.5, 1.5, 2.0),
        deviations="no bias in the classifier, as in the reference"
        if params
        else f"no published count of parameters; the paper states {macs} MMAC and counts within 1 % of here",
    )
    for groups, params, macs in (
        (1, None, 143),
        (2, None, 140),
        (3, {0.5: "0.7M", 1.0: "1.9M", 1.5: "3.4M", 2.0: "5.4M"}, 137),
        (4, None, 133),
        (8, {0.5: "1.0M", 1.0: "2.4M", 1.5: "4.3M", 2.0: "6.5M"}, 137),
    )
)

_QUTIBENCH = (
    Design(
        "cnv",
        "cnv",
        f"{_HERE}.qutibench:cnv",
        "github.com/Xilinx/BNN-PYNQ cnv.py; operations: QuTiBench",
        operations={1.0: "0.47G", 0.5: "0.12G", 0.25: "0.03G", 0.125: "0.01G"},
        widths=(0.5, 0.25, 0.125),
        resolution=32,
        num_classes=10,
        deviations="the suffix is QuTiBench's pruning factor, BNN-PYNQ's own widths are cnv_0.5; ReLU for the "
        "quantised activations, normalisation before pooling; no published count of parameters",
    ),
    Design(
        "mlp",
        "mlp",
        f"{_HERE}.qutibench:mlp",
        "github.com/Xilinx/BNN-PYNQ lfc.py; operations: QuTiBench",
        operations={1.0: "0.02G", 0.5: "0.00582G", 0.25: "0.0019G", 0.125: "0.0007G"},
        widths=(0.5, 0.25, 0.125),
        resolution=28,
        in_channels=1,
        num_classes=10,
        deviations="the suffix is QuTiBench's pruning factor, BNN-PYNQ's own widths (LFC) are mlp_0.5; ReLU for the "
        "quantised activations; no published count of parameters",
    ),
)

DESIGNS = (
    _ALEXNET,
    *_VGG,
    *_RESNET,
    *_RESNET_V1,
    *_RESNET_V2,
    *_SQUEEZENET,
    *_INCEPTION,
    *_DENSENET,
    _XCEPTION,
    *_NASNET,
    *_SHUFFLENET_V1,
    *_QUTIBENCH,
)
