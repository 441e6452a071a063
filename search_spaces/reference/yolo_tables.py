"""One-stage YOLO detectors as lists of layers, in the notation of their own configuration files. Without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: what it is, output channels and repeats at scale 1, the layers it reads (-1: the one before).

    Kinds and their options are the functions of `search_spaces.reference.yolo`.
    """

    kind: str
    channels: int = 0
    repeats: int = 1
    sources: tuple[int, ...] = (-1,)
    options: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """One detector.

    Args:
        layers: backbone and neck.
        outputs: layers that the head predicts on, from fine to coarse.
        head: `decoupled` (YOLOv8), `light` (depthwise separable class branch, YOLOv10 and 11), `plain` (YOLOv6),
            `anchors` (YOLOv7), `objectness` (YOLOX).
        activation: of layers; head_activation: of the head's.
        bins: values per box side; above one, the side is their expectation (distribution focal loss).
    """

    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    head: Literal["decoupled", "light", "plain", "anchors", "objectness"]
    activation: str = "silu"
    head_activation: str = "silu"
    bins: int = 16


def _conv(channels: int, kernel: int = 3, stride: int = 2, source: int = -1) -> Layer:
    return Layer("conv", channels, sources=(source,), options=(kernel, stride))


def _concat(*sources: int) -> Layer:
    return Layer("concat", sources=sources)


_UP = Layer("upsample")


def _pan(
    block: str, skips: tuple[int, int, int], options: tuple[tuple[Any, ...], ...], down: str = "conv"
) -> tuple[Layer, ...]:
    """Top-down and bottom-up path of YOLOv8 and its successors.

    Args:
        skips: layers of the backbone to join: stride 16, stride 8, and the last.
        options: of the four blocks.
        down: kind of the last downsampling.
    """
    middle, fine, last = skips
    first = last + 1
    return (
        _UP,
        _concat(-1, middle),
        Layer(block, 512, 3, options=options[0]),
        _UP,
        _concat(-1, fine),
        Layer(block, 256, 3, options=options[1]),
        _conv(256),
        _concat(-1, first + 2),
        Layer(block, 512, 3, options=options[2]),
        Layer(down, 512, options=(3, 2)),
        _concat(-1, last),
        Layer(block, 1024, 3, options=options[3]),
    )


# ultralytics/cfg/models/v8/yolov8.yaml
YOLOV8 = Table(
    (
        _conv(64),
        _conv(128),
        Layer("c2f", 128, 3, options=(True,)),
        _conv(256),
        Layer("c2f", 256, 6, options=(True,)),
        _conv(512),
        Layer("c2f", 512, 6, options=(True,)),
        _conv(1024),
        Layer("c2f", 1024, 3, options=(True,)),
        Layer("sppf", 1024),
        *_pan("c2f", (6, 4, 9), ((False,),) * 4),
    ),
    (15, 18, 21),
    "decoupled",
)


def _yolo11(deep: bool) -> Table:
    """ultralytics/cfg/models/11/yolo11.yaml; `deep`: sizes from m on nest deeper blocks everywhere."""

    def block(channels: int, nested: bool, share: float = 0.5) -> Layer:
        return Layer("c3k2", channels, 2, options=(nested or deep, share))

    neck = _pan("c3k2", (6, 4, 10), tuple((nested or deep, 0.5) for nested in (False, False, False, True)))
    return Table(
        (
            _conv(64),
            _conv(128),
            block(256, False, 0.25),
            _conv(256),
            block(512, False, 0.25),
            _conv(512),
            block(512, True),
            _conv(1024),
            block(1024, True),
            Layer("sppf", 1024),
            Layer("c2psa", 1024, 2),
            *(replace(layer, repeats=2) if layer.repeats > 1 else layer for layer in neck),
        ),
        (16, 19, 22),
        "light",
    )


YOLO11 = _yolo11(deep=False)
YOLO11_DEEP = _yolo11(deep=True)


def _yolov10(last: Layer, neck: dict[int, Layer]) -> Table:
    """ultralytics/cfg/models/v10: `last` is the last block of the backbone, `neck` replaces layers by their index."""
    layers = [
        _conv(64),
        _conv(128),
        Layer("c2f", 128, 3, options=(True,)),
        _conv(256),
        Layer("c2f", 256, 6, options=(True,)),
        Layer("scdown", 512, options=(3, 2)),
        Layer("c2f", 512, 6, options=(True,)),
        Layer("scdown", 1024, options=(3, 2)),
        last,
        Layer("sppf", 1024),
        Layer("psa", 1024),
        *_pan("c2f", (6, 4, 10), ((False,),) * 4, "scdown"),
    ]
    for index, layer in neck.items():
        layers[index] = layer
    return Table(tuple(layers), (16, 19, 22), "light")


def _inverted(channels: int, large: bool) -> Layer:
    """Compact inverted blocks, with a 7x7 kernel where `large`."""
    return Layer("c2fcib", channels, 3, options=(large,))


YOLOV10N = _yolov10(Layer("c2f", 1024, 3, options=(True,)), {22: _inverted(1024, True)})
YOLOV10S = _yolov10(_inverted(1024, True), {22: _inverted(1024, True)})
YOLOV10M = _yolov10(_inverted(1024, False), {19: _inverted(512, False), 22: _inverted(1024, False)})


def _yolov9(
    stem: tuple[int, int], first: Layer, widths: tuple[int, int, int, int], down: tuple[int, int], n: int
) -> Table:
    """ultralytics/cfg/models/v9, sizes t, s and m.

    Args:
        stem: channels of the first two convolutions.
        first: the first block.
        widths: channels of the maps from stride 4 on.
        down: channels of the two downsamplings of the bottom-up path.
        n: convolutions nested in a block.
    """

    def elan(channels: int) -> Layer:
        return Layer("elan", channels, options=(channels, channels // 2, n))

    _, fine, middle, coarse = widths
    return Table(
        (
            _conv(stem[0]),
            _conv(stem[1]),
            first,
            Layer("aconv", fine),
            elan(fine),
            Layer("aconv", middle),
            elan(middle),
            Layer("aconv", coarse),
            elan(coarse),
            Layer("sppelan", coarse),
            _UP,
            _concat(-1, 6),
            elan(middle),
            _UP,
            _concat(-1, 4),
            elan(fine),
            Layer("aconv", down[0]),
            _concat(-1, 12),
            elan(middle),
            Layer("aconv", down[1]),
            _concat(-1, 9),
            elan(coarse),
        ),
        (15, 18, 21),
        "decoupled",
    )


YOLOV9T = _yolov9((16, 32), Layer("elan", 32, options=(32, 16, 0)), (32, 64, 96, 128), (48, 64), 3)
YOLOV9S = _yolov9((32, 64), Layer("elan", 64, options=(64, 32, 0)), (64, 128, 192, 256), (96, 128), 3)
YOLOV9M = _yolov9((32, 64), Layer("elan", 128, options=(128, 64, 1)), (128, 240, 360, 480), (184, 240), 1)


def _tiny_elan(channels: int) -> tuple[Layer, ...]:
    """Four convolutions, all joined, to twice the channels (WongKinYiu/yolov7, cfg/deploy/yolov7-tiny.yaml)."""
    return (
        _conv(channels, 1, 1),
        _conv(channels, 1, 1, -2),
        _conv(channels, 3, 1),
        _conv(channels, 3, 1),
        _concat(-1, -2, -3, -4),
        _conv(2 * channels, 1, 1),
    )


def _pool(kernel: int, stride: int, source: int = -1) -> Layer:
    return Layer("max_pool", sources=(source,), options=(kernel, stride))


YOLOV7_TINY = Table(
    (
        _conv(32),
        _conv(64),
        *_tiny_elan(32),
        _pool(2, 2),
        *_tiny_elan(64),
        _pool(2, 2),
        *_tiny_elan(128),
        _pool(2, 2),
        *_tiny_elan(256),
        _conv(256, 1, 1),
        _conv(256, 1, 1, -2),
        _pool(5, 1),
        _pool(9, 1, -2),
        _pool(13, 1, -3),
        _concat(-1, -2, -3, -4),
        _conv(256, 1, 1),
        _concat(-1, -7),
        _conv(256, 1, 1),  # 37
        _conv(128, 1, 1),
        _UP,
        _conv(128, 1, 1, 21),
        _concat(-1, -2),
        *_tiny_elan(64),  # 47
        _conv(64, 1, 1),
        _UP,
        _conv(64, 1, 1, 14),
        _concat(-1, -2),
        *_tiny_elan(32),  # 57
        _conv(128, 3, 2),
        _concat(-1, 47),
        *_tiny_elan(64),  # 65
        _conv(256, 3, 2),
        _concat(-1, 37),
        *_tiny_elan(128),  # 73
        _conv(128, 3, 1, 57),
        _conv(256, 3, 1, 65),
        _conv(512, 3, 1, 73),
    ),
    (74, 75, 76),
    "anchors",
    activation="leaky_relu",
)


def _yolov6(block: str, bins: int) -> Table:
    """meituan/YOLOv6 0.2.0, re-parameterised for deployment; `block` is what stages consist of."""
    return Table(
        (
            _conv(64),
            _conv(128),
            Layer(block, 128, 6),
            _conv(256),
            Layer(block, 256, 12),
            _conv(512),
            Layer(block, 512, 18),
            _conv(1024),
            Layer(block, 1024, 6),
            Layer("sppf", 1024),
            _conv(256, 1, 1),
            Layer("transpose"),
            _concat(-1, 6),
            Layer(block, 256, 12),
            _conv(128, 1, 1),
            Layer("transpose"),
            _concat(-1, 4),
            Layer(block, 128, 12),
            _conv(128),
            _concat(-1, 14),
            Layer(block, 256, 12),
            _conv(256),
            _concat(-1, 10),
            Layer(block, 512, 12),
        ),
        (17, 20, 23),
        "plain",
        activation="relu",
        bins=bins,
    )


def _csp(channels: int, repeats: int, shortcut: bool = False) -> Layer:
    return Layer("csp", channels, repeats, options=(shortcut,))


# Megvii-BaseDetection/YOLOX, yolox/models/yolo_pafpn.py and darknet.py
YOLOX = Table(
    (
        Layer("focus", 64, options=(3,)),
        _conv(128),
        _csp(128, 3, True),
        _conv(256),
        _csp(256, 9, True),
        _conv(512),
        _csp(512, 9, True),
        _conv(1024),
        Layer("spp", 1024, options=((5, 9, 13),)),
        _csp(1024, 3),
        _conv(512, 1, 1),
        _UP,
        _concat(-1, 6),
        _csp(512, 3),
        _conv(256, 1, 1),
        _UP,
        _concat(-1, 4),
        _csp(256, 3),
        _conv(256),
        _concat(-1, 14),
        _csp(512, 3),
        _conv(512),
        _concat(-1, 10),
        _csp(1024, 3),
    ),
    (17, 20, 23),
    "objectness",
    bins=1,
)

YOLOV6 = _yolov6("repeat", 1)
YOLOV6_CSP = _yolov6("bepc3", 17)
