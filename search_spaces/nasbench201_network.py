"""Stand-alone networks of NAS-Bench-201, as plain static modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from search_spaces.nasbench201 import EDGES, NODES, STAGES, into
from search_spaces.reference.blocks import Residual, average_pool, classifier, conv, initialise

if TYPE_CHECKING:
    from search_spaces.nasbench201 import NASBench201Space


class ReluConvNorm(nn.Sequential):
    """ReLU, convolution without bias, batch normalisation: the benchmark's order."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int = 1) -> None:
        super().__init__(nn.ReLU(), conv(cin, cout, kernel, stride, bias=False), nn.BatchNorm2d(cout))


def operation(name: str, channels: int) -> nn.Module | None:
    """The module of an edge; `none` has none."""
    if name == "none":
        return None
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return average_pool(3)
    return ReluConvNorm(channels, channels, {"nor_conv_1x1": 1, "nor_conv_3x3": 3}[name])


class Cell(nn.Module):
    """Four nodes; `edges` holds the module of every edge that is there, by its name, such as `0->2`.

    Args:
        edges: per edge, in order, its module, which gives the node's term or None; None for no edge.
    """

    def __init__(self, edges: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {f"{a}->{b}": module for (a, b), module in zip(EDGES, edges, strict=True) if module is not None}
        )

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for node in range(1, NODES):
            total: Tensor | None = None
            for start in (EDGES[e][0] for e in into(node)):
                if (name := f"{start}->{node}") in self.edges:
                    term = self.edges[name](nodes[start])
                    if term is not None:
                        total = term if total is None else total + term
            nodes.append(nodes[-1] * 0.0 if total is None else total)
        return nodes[-1]


def reduction(cin: int, cout: int) -> Residual:
    """The residual block of stride 2 between stages; no activation follows."""
    body = nn.Sequential(ReluConvNorm(cin, cout, 3, 2), ReluConvNorm(cout, cout, 3))
    return Residual(body, nn.Sequential(nn.AvgPool2d(2), conv(cin, cout, bias=False)))


class NASBench201(nn.Module):
    """One network of the benchmark: `stem`, `stages[i][j]`, `head`.

    Takes images `(batch, channels, resolution, resolution)` of its `input_shape`, gives logits `(batch, classes)`.

    Args:
        space: gives channels, cells, input and classes.
        edge: makes the module of an edge from channels and the edge's index; None for no edge.
    """

    def __init__(self, space: NASBench201Space, edge: Callable[[int, int], nn.Module | None]) -> None:
        super().__init__()
        self.input_shape = space.input_shape
        widths = [space.channels << s for s in range(STAGES)]
        self.stem = nn.Sequential(conv(space.in_channels, widths[0], 3, bias=False), nn.BatchNorm2d(widths[0]))
        first: list[nn.Module] = [nn.Identity(), *(reduction(a, b) for a, b in pairwise(widths))]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(begin, *(Cell([edge(width, e) for e in range(len(EDGES))]) for _ in range(space.cells)))
                for begin, width in zip(first, widths, strict=True)
            )
        )
        last = widths[-1]
        self.head = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(), *classifier(last, space.num_classes))
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))
