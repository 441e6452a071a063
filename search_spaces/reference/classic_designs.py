"""The classic designs: AlexNet, VGG, ResNet and their time, one row each."""

from __future__ import annotations

from search_spaces.reference.base import Design

_HERE = "search_spaces.reference"


def _torchvision(name: str, file: str) -> str:
    return f"torchvision.models.{file}.{name}"


_ALEXNET = Design(
    "alexnet", "alexnet", f"{_HERE}.vgg:alexnet", _torchvision("alexnet", "alexnet"), params=61_100_840
)  # fmt: skip

_VGG = tuple(
    Design(
        f"vgg{layers}{'_bn' if norm else ''}",
        "vgg",
        f"{_HERE}.vgg:vgg",
        _torchvision(f"vgg{layers}{'_bn' if norm else ''}", "vgg"),
        {"depths": depths, "norm": norm},
        params[norm],
    )
    for layers, depths, params in (
        (11, (1, 1, 2, 2, 2), (132_863_336, 132_868_840)),
        (13, (2, 2, 2, 2, 2), (133_047_848, 133_053_736)),
        (16, (2, 2, 3, 3, 3), (138_357_544, 138_365_992)),
        (19, (2, 2, 4, 4, 4), (143_667_240, 143_678_248)),
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
        deviations="stride on the 3x3 convolution of a bottleneck (v1.5), as in torchvision" if layers >= 50 else "",
    )
    for layers, block, depths, params in (
        (18, "basic", (2, 2, 2, 2), 11_689_512),
        (34, "basic", (3, 4, 6, 3), 21_797_672),
        (50, "bottleneck", (3, 4, 6, 3), 25_557_032),
        (101, "bottleneck", (3, 4, 23, 3), 44_549_160),
        (152, "bottleneck", (3, 8, 36, 3), 60_192_808),
    )
)

DESIGNS = (_ALEXNET, *_VGG, *_RESNET)
