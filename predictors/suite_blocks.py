"""The building blocks of made-up networks, as torch modules; what published families are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS: dict[str, Any] = {
    "": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "hard_swish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "hard_sigmoid": nn.Hardsigmoid,
}


def _conv(
    channels: int, out: int, kernel: int | tuple[int, int] = 1, stride: int = 1, act: str = "relu", *,
    groups: int = 1, norm: bool = True, dilation: int = 1,
) -> nn.Sequential:  # fmt: skip
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (dilation * (size[0] - 1) // 2, dilation * (size[1] - 1) // 2)
    layers: list[nn.Module] = [nn.Conv2d(channels, out, size, stride, padding, dilation, groups, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(out))
    if act:
        layers.append(_ACTIVATIONS[act]())
    return nn.Sequential(*layers)


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    """What a residual sum adds: its input, projected where the shape changes."""
    return nn.Identity() if channels == out and stride == 1 else _conv(channels, out, 1, stride, "")


def _doubled(channels: int, out: int, kernel: int) -> nn.ConvTranspose2d:
    """A map of twice the size, by a kernel of 2, 3 or 4."""
    return nn.ConvTranspose2d(channels, out, kernel, 2, (kernel - 1) // 2, 1 if kernel == 3 else 0)


class _Halved(nn.Module):
    """Pooled to half the size, as long as there is more than one pixel: OpenVINO pools no fewer than the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True) if min(x.shape[2:]) > 1 else x


class _Sum(nn.Module):
    """Two branches added, and an activation."""

    def __init__(self, body: nn.Module, side: nn.Module, act: str = "") -> None:
        super().__init__()
        self.body, self.side, self.act = body, side, _ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.body(x) + self.side(x))
        return result


class _Concat(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, act: str) -> None:
        super().__init__()
        inner = max(4, channels // 4)
        self.down, self.up, self.act = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1), _ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.act(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        return x * weight


class _Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class _Split(nn.Module):
    """ShuffleNetV2's unit: half the channels pass by."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.halves = [channels // 2, channels - channels // 2]
        half = self.halves[1]
        self.body = nn.Sequential(_conv(half, half), _conv(half, half, 3, act="", groups=half), _conv(half, half))
        self.shuffle = _Shuffle(2 if channels % 2 == 0 else 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, convolved = x.split(self.halves, 1)
        y: Tensor = self.shuffle(torch.cat([kept, self.body(convolved)], 1))
        return y


class _Stacked(nn.Module):
    """The unit of recent YOLOs: halves, and a bottleneck's result beside both."""

    def __init__(self, channels: int, act: str = "silu") -> None:
        super().__init__()
        half = max(4, channels // 2)
        self.first = _conv(channels, 2 * half, act=act)
        self.body = nn.Sequential(_conv(half, half, 3, act=act), _conv(half, half, 3, act=act))
        self.last = _conv(3 * half, channels, act=act)

    def forward(self, x: Tensor) -> Tensor:
        kept, inner = self.first(x).chunk(2, 1)
        z: Tensor = self.last(torch.cat([kept, inner, inner + self.body(inner)], 1))
        return z


class _Pooled(nn.Module):
    """The same map pooled once, twice and three times, all beside each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = max(4, channels // 2)
        self.first, self.last = _conv(channels, half, act="silu"), _conv(4 * half, channels, act="silu")
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.first(x)]
        for _ in range(3):
            y.append(self.pool(y[-1]))
        z: Tensor = self.last(torch.cat(y, 1))
        return z


class _Ghost(nn.Module):
    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        half = out // 2
        self.main = _conv(channels, half, 1, stride)
        self.cheap = _conv(half, half, kernel, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        return torch.cat([y, self.cheap(y)], 1)


class _Hourglass(nn.Module):
    """Down, up, and the skipped map beside, as in a U-Net."""

    def __init__(self, channels: int, out: int, up: str, kernel: int) -> None:
        super().__init__()
        self.up = up
        self.down = _conv(channels, out, 3, 2)
        self.inner = _conv(out, out, kernel)
        self.grow = _doubled(out, out, (2, 3, 4)[channels % 3]) if up == "transposed" else nn.Identity()
        self.join = _conv(channels + out, out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grow(self.inner(self.down(x)))
        if self.up == "transposed":
            y = y[:, :, : x.shape[2], : x.shape[3]]
        else:
            corners = False if self.up == "bilinear" else None
            y = F.interpolate(y, size=x.shape[2:], mode=self.up, align_corners=corners)
        joined: Tensor = self.join(torch.cat([x, y], 1))
        return joined


class _Enlarged(nn.Module):
    """Few channels at many times the size."""

    def __init__(self, channels: int, out: int, factor: float) -> None:
        super().__init__()
        self.narrow, self.factor = nn.Conv2d(channels, out, 1), factor

    def forward(self, x: Tensor) -> Tensor:
        size = [round(side * self.factor) for side in x.shape[2:]]
        return F.interpolate(self.narrow(x), size=size, mode="bilinear", align_corners=False)


class _Detector(nn.Module):
    """Boxes at a map and at ever smaller ones: what is predicted at each pixel, in a row."""

    def __init__(self, channels: int, width: int, maps: int, anchors: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.outputs = outputs
        widths = [channels] + [width] * (maps - 1)
        self.smaller = nn.ModuleList(
            nn.Sequential(_conv(c, width // 2), _conv(width // 2, width, 3, 2)) for c in widths[:-1]
        )
        self.heads = nn.ModuleList(nn.Conv2d(c, anchors * outputs, kernel, padding=kernel // 2) for c in widths)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for smaller, head in zip([nn.Identity(), *self.smaller], self.heads, strict=True):
            x = smaller(x)
            found.append(head(x).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, self.outputs)))
        return torch.cat(found, 1)


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int, expansion: int, act: str) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), _ACTIVATIONS[act](), nn.Linear(expansion * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5, -1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, length, width))
        y: Tensor = x + self.mlp(self.second(x))
        return y


class _Patches(nn.Module):
    def __init__(self, channels: int, out: int, patch: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(x)).flatten(2).transpose(1, 2)


class _MobileAttention(nn.Module):
    """MobileViT's block: attention among the pixels of the same place in all patches."""

    def __init__(self, channels: int, width: int, depth: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.local = nn.Sequential(_conv(channels, channels, 3, act="silu"), nn.Conv2d(channels, width, 1))
        self.encoder = nn.Sequential(*(_Encoder(width, 4, 2, "silu") for _ in range(depth)))
        self.back = _conv(width, channels, act="silu")
        self.join = _conv(2 * channels, channels, 3, act="silu")

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        p = min(self.patch, *y.shape[2:])  # a map may be smaller than a patch
        y = y[:, :, : y.shape[2] // p * p, : y.shape[3] // p * p]
        n, c, h, w = y.shape
        tokens = y.reshape(n, c, h // p, p, w // p, p).permute(0, 3, 5, 2, 4, 1).reshape(n * p * p, h * w // p**2, c)
        tokens = self.encoder(tokens).reshape(n, p, p, h // p, w // p, c)
        y = self.back(tokens.permute(0, 5, 3, 1, 4, 2).reshape(n, c, h, w))
        joined: Tensor = self.join(torch.cat([x[:, :, :h, :w], y], 1))
        return joined


class _Mean(nn.Module):
    """Over positions or tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1).flatten(1) if x.dim() == 4 else x.mean(1)


def _layer(kind: str, c: int, a: dict[str, Any]) -> tuple[nn.Module, int]:
    """A block for `c` input channels, and its output channels."""
    if kind == "conv":
        return _conv(c, **a), a["out"]
    if kind == "max_pool":
        return nn.MaxPool2d(a["kernel"], a["stride"], a["kernel"] // 2, ceil_mode=False), c
    if kind == "avg_pool":
        return nn.AvgPool2d(a["kernel"], a["stride"], a["kernel"] // 2), c
    if kind == "flatten":
        return nn.Sequential(nn.AdaptiveAvgPool2d(a["pool"]) if a["pool"] == 1 else _Grid(a["pool"]), nn.Flatten()), (
            c * a["pool"] ** 2
        )
    if kind == "dense":
        return nn.Sequential(nn.Linear(c, a["out"]), _ACTIVATIONS[a["act"]]()), a["out"]
    if kind in ("residual", "bottleneck"):
        out, stride = a["out"], a["stride"]
        act = a.get("act", "relu")
        if kind == "residual":
            body = nn.Sequential(_conv(c, out, 3, stride, act), _conv(out, out, 3, act=""))
        else:
            inner = out // 4
            groups = a["groups"] if inner % a["groups"] == 0 else 1
            body = nn.Sequential(
                _conv(c, inner), _conv(inner, inner, 3, stride, groups=groups), _conv(inner, out, act="")
            )
        return _Sum(body, _shortcut(c, out, stride), act), out
    if kind == "separable":
        inner = c * a.get("times", 1)
        return nn.Sequential(
            _conv(c, inner, a["kernel"], a["stride"], a["act"], groups=c), _conv(inner, a["out"], act=a["act"])
        ), a["out"]
    if kind == "preactivated":
        out, inner = a["out"], c * a["times"]
        body = nn.Sequential(
            nn.ReLU(), _conv(c, inner, a["kernel"], a["stride"], "", groups=c), _conv(inner, out, act=""),
            nn.ReLU(), _conv(out, out, a["kernel"], act="", groups=out), _conv(out, out, act=""),
        )  # fmt: skip
        return _Sum(body, _shortcut(c, out, a["stride"])), out
    if kind in ("inverted", "fused"):
        out, stride, inner = a["out"], a["stride"], c * a["expansion"]
        layers = [_conv(c, inner, act=a["act"]), _conv(inner, inner, a["kernel"], stride, a["act"], groups=inner)] if (
            kind == "inverted"
        ) else [_conv(c, inner, 3, stride, a["act"])]  # fmt: skip
        if a.get("gate"):
            layers.append(_Gate(inner, a["gate"]))  # type: ignore[arg-type]
        body = nn.Sequential(*layers, _conv(inner, out, act=""))
        return (_Sum(body, nn.Identity()) if c == out and stride == 1 else body), out
    if kind == "growing":
        growth = a["growth"]
        head = [nn.BatchNorm2d(c), nn.ReLU()]
        if a["bottleneck"]:
            head.append(_conv(c, 4 * growth))
        inner = 4 * growth if a["bottleneck"] else c
        return _Concat(
            nn.Identity(), nn.Sequential(*head, nn.Conv2d(inner, growth, 3, padding=1, bias=False))
        ), c + growth
    if kind == "transition":
        return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, a["out"], 1), _Halved()), a["out"]
    if kind == "inception":
        long = int(a["long"] or 5)
        deep = nn.Sequential(_conv(c, a["reduce"]), *(
            [_conv(a["reduce"], a["reduce"], (1, long)), _conv(a["reduce"], a["fives"], (long, 1))] if a["long"]
            else [_conv(a["reduce"], a["fives"], 5)]
        ))  # fmt: skip
        branches = [
            _conv(c, a["ones"]),
            nn.Sequential(_conv(c, a["reduce"]), _conv(a["reduce"], a["threes"], 3)),
            deep,
            nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(c, a["pool"])),
        ]
        return _Concat(*branches), a["ones"] + a["threes"] + a["fives"] + a["pool"]
    if kind == "fire":
        squeeze, expand = a["squeeze"], a["expand"]
        wide = _Concat(_conv(squeeze, expand, norm=False), _conv(squeeze, expand, 3, norm=False))
        return nn.Sequential(_conv(c, squeeze, norm=False), wide), 2 * expand
    if kind == "shuffled":
        out, groups = a["out"], a["groups"]
        inner = out // 4 // groups * groups or groups
        first = _conv(c, inner, groups=groups if c % groups == 0 else 1)
        return nn.Sequential(
            first,
            _Shuffle(groups),
            _conv(inner, inner, 3, a["stride"], "", groups=inner),
            _conv(inner, out, groups=groups),
        ), out
    if kind == "split_unit":
        return _Split(c), c
    if kind == "split_bottlenecks":
        return _Stacked(c, **a), c
    if kind == "pooled_pyramid":
        return _Pooled(c), c
    if kind == "map":
        return nn.Conv2d(c, a["out"], 1), a["out"]
    if kind == "enlarged":
        return _Enlarged(c, **a), a["out"]
    if kind == "detector":
        return _Detector(c, **a), a["outputs"]
    if kind == "ghost":
        return _Ghost(c, a["out"], a["kernel"], a["stride"]), a["out"]
    if kind == "grown":
        return nn.Sequential(_doubled(c, a["out"], a["kernel"]), nn.BatchNorm2d(a["out"]), nn.ReLU()), a["out"]
    if kind == "hourglass":
        return _Hourglass(c, **a), a["out"]
    if kind == "pyramid":
        out = a["out"]
        return nn.Sequential(
            _Concat(
                _conv(c, out), _conv(c, out, 3, dilation=a["dilation"]), _conv(c, out, 3, dilation=2 * a["dilation"])
            ),
            _conv(3 * out, out),
        ), out
    if kind == "patches":
        return _Patches(c, a["out"], a["patch"]), a["out"]
    if kind == "encoder":
        return _Encoder(c, a["heads"], a["expansion"], a["act"]), c
    if kind == "mobile_attention":
        return _MobileAttention(c, **a), c
    raise ValueError(f"no block {kind!r}")


class _Grid(nn.Module):
    """A map of `size` x `size`, of a larger one by pooling and cropping, of a smaller one by adding zeros.

    Resizing by the nearest would do it in one step, but runtimes disagree on which is the nearest.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        side = min(int(x.shape[2]), int(x.shape[3]))
        if side >= 2 * self.size:
            x = F.avg_pool2d(x, side // self.size)
        missing = self.size - side
        return F.pad(x, (0, missing, 0, missing)) if missing > 0 else x[:, :, : self.size, : self.size]


def network(input_shape: Sequence[int], layers: Sequence[tuple[str, Any]], classes: int) -> nn.Module:
    """The module of a recipe."""
    made, channels, flat = [], input_shape[0], False
    for kind, arguments in layers:
        layer, channels = _layer(kind, channels, dict(arguments))
        made.append(layer)
        flat = flat or kind in ("flatten", "dense")
    if layers[-1][0] in ("map", "enlarged", "detector"):
        return nn.Sequential(*made)
    return nn.Sequential(*made, *([] if flat else [_Mean()]), nn.Linear(channels, classes))
