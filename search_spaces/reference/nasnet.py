"""NASNet-A (Zoph et al., CVPR 2018): searched cells of separable convolutions, each fed by the two before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.reference.base import InputShape
from search_spaces.reference.blocks import ConvBnAct, average_pool, classifier, conv, initialise, max_pool


class Separable(nn.Sequential):
    """Twice ReLU, separable convolution and normalisation; the stride is on the first."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        layers: list[nn.Module] = []
        for channels, step in ((cin, stride), (cout, 1)):
            layers += [
                nn.ReLU(),
                conv(channels, channels, kernel, step, groups=channels, bias=False),
                conv(channels, cout, bias=False),
                nn.BatchNorm2d(cout),
            ]
        super().__init__(*layers)


class Halve(nn.Module):
    """Half the size from every second pixel, and from those one further down and right, half of the channels each."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(1, 2)
        self.even = conv(cin, cout // 2, bias=False)
        self.odd = conv(cin, cout // 2, bias=False)
        self.norm = nn.BatchNorm2d(cout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(self.pool(x)), self.odd(self.pool(shifted))], 1))


class Cell(nn.Module):
    """What normal and reduction cells share: both inputs brought to `channels`.

    Args:
        previous: channels of the output of the cell before the last.
        halve: whether that is twice as large as the output of the last.
        project: whether it is brought to `channels` at all; the first cell has none and takes its own input.
    """

    def __init__(self, cin: int, previous: int, channels: int, halve: bool, project: bool = True) -> None:
        super().__init__()
        self.here = nn.Sequential(nn.ReLU(), ConvBnAct(cin, channels, activation=""))
        self.before: nn.Module = nn.Identity()
        if project and halve:
            self.before = Halve(previous, channels)
        elif project and previous != channels:
            self.before = nn.Sequential(nn.ReLU(), ConvBnAct(previous, channels, activation=""))


class Normal(Cell):
    """Keeps the size; six times `channels`."""

    def __init__(self, cin: int, previous: int, channels: int, halve: bool) -> None:
        super().__init__(cin, previous, channels, halve)
        self.separable = nn.ModuleList(Separable(channels, channels, k) for k in (5, 3, 5, 3, 3))
        self.pool = average_pool(3)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        h, p = self.here(x), self.before(p)
        a, b, c, d, e = self.separable
        parts = [p, a(h) + b(p), c(p) + d(p), self.pool(h) + p, self.pool(p) + self.pool(p), e(h) + h]
        return torch.cat(parts, 1)


class Reduction(Cell):
    """Halves the size; four times `channels`."""

    def __init__(self, cin: int, previous: int, channels: int, halve: bool, project: bool = True) -> None:
        super().__init__(cin, previous, channels, halve, project)
        p = channels if project else previous
        shapes = ((channels, 5, 2), (p, 7, 2), (p, 7, 2), (p, 5, 2), (channels, 3, 1))
        self.separable = nn.ModuleList(Separable(c, channels, k, stride) for c, k, stride in shapes)
        self.largest = max_pool(3, 2)
        self.mean = average_pool(3, 2)
        self.smooth = average_pool(3)

    def forward(self, x: Tensor, p: Tensor) -> Tensor:
        h, p = self.here(x), self.before(p)
        a, b, c, d, e = self.separable
        one = a(h) + b(p)
        two = self.largest(h) + c(p)
        three = self.mean(h) + d(p)
        return torch.cat([two, three, self.smooth(one) + two, e(one) + self.largest(h)], 1)


class NasNet(nn.Module):
    """Stem, two reductions, and three groups of `repeats` normal cells with a reduction between them.

    Args:
        stem: channels of the first convolution.
        channels: of the cells of the first group; each group doubles them.
        skip: whether the cell after a reduction looks past it (the large network).
    """

    def __init__(
        self, in_channels: int, num_classes: int, stem: int, channels: int, repeats: int, skip: bool, dropout: float
    ) -> None:
        super().__init__()
        self.stem = ConvBnAct(in_channels, stem, 3, 2, padding="valid", activation="")
        self.skip = skip
        cells: list[nn.Module] = []
        now, before = stem, stem  # channels of the last two outputs
        scale, scale_before = 2, 2  # how much smaller than the image they are

        def add(make: Callable[..., Cell], width: int, keep: bool = False) -> None:
            nonlocal now, before, scale, scale_before
            options = {} if cells else {"project": False}
            cells.append(make(now, before, width, scale != scale_before, **options))
            if not keep:
                before, scale_before = now, scale
            reduces = make is Reduction
            now, scale = width * (4 if reduces else 6), scale * (2 if reduces else 1)

        add(Reduction, channels // 4)
        add(Reduction, channels // 2)
        for group in range(3):
            if group:
                add(Reduction, channels * 2**group, keep=skip)
            for _ in range(repeats):
                add(Normal, channels * 2**group)
        self.cells = nn.ModuleList(cells)
        self.head = nn.Sequential(nn.ReLU(), classifier(now, num_classes, dropout))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = before = self.stem(x)
        for i, cell in enumerate(self.cells):
            y = cell(x, before)
            if not (self.skip and i > 1 and isinstance(cell, Reduction)):
                before = x
            x = y
        return self.head(x)


def nasnet(
    input_shape: InputShape, num_classes: int, *, stem: int, channels: int, repeats: int, skip: bool, dropout: float
) -> nn.Module:
    """NASNet-A, `repeats` @ 24 times `channels`."""
    return NasNet(input_shape[0], num_classes, stem, channels, repeats, skip, dropout)
