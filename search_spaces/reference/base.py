"""What a reference network is: a row of a table, and the network that it stands for. Without torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from search_spaces.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from search_spaces.operators import Workload

Task = Literal["classification", "detection", "segmentation", "pose", "features", "super-resolution"]
InputShape = tuple[int, int, int]


@dataclass(frozen=True)
class Design:
    """One row of a table of designs: everything about a network but its operators.

    Args:
        name: lower case; a width multiplier follows as a suffix, as in `mobilenet_v2_0.5`.
        family: all widths and depths of one design.
        factory: `"module:function"`, called as `function(input_shape, num_classes, **options)`; it gives a module that
            takes `(batch, *input_shape)`. Named, not imported, so that a list of networks needs no torch.
        source: the reference implementation that the parameters were counted in, or the paper.
        options: further arguments of the factory, hashable.
        params: learned values (normalisation scales and shifts included, running statistics not) for the default
            input and classes: an exact count, or the rounded figure of a paper as text, such as `"4.2M"`; followed by
            `without normalisation`, `with folded normalisation` or `truncated` where the source counts so. Where widths
            differ, a mapping from width to either.
        operations: published operations, two per multiply-accumulate, rounded, such as `"7.7G"`; or
            `"4.09G multiply-accumulates"`. Where widths differ, a mapping from width.
        widths: published width multipliers besides 1. With none, the design has no width. Others than these build too.
        resolution: default height and width in pixels.
        in_channels, num_classes: defaults. `num_classes` counts a background class where the reference has one.
        task: detectors and segmenters give raw maps: no anchors, no suppression.
        deviations: where this network differs from its source, and whether that changes its cost.
    """

    name: str
    family: str
    factory: str
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    params: int | str | Mapping[float, int | str] | None = None
    operations: str | Mapping[float, str] = ""
    widths: tuple[float, ...] = ()
    resolution: int | tuple[int, int] = 224
    in_channels: int = 3
    num_classes: int = 1000
    task: Task = "classification"
    deviations: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The name, and with each published width."""
        return (self.name, *(f"{self.name}_{width}" for width in self.widths))

    @property
    def size(self) -> tuple[int, int]:
        """Default height and width."""
        return self.resolution if isinstance(self.resolution, tuple) else (self.resolution, self.resolution)

    def published(self, width: float) -> tuple[int | str | None, str]:
        """The published parameters and operations at `width`; None and empty where there are none."""
        params = self.params if isinstance(self.params, Mapping) else {1.0: self.params}
        operations = self.operations if isinstance(self.operations, Mapping) else {1.0: self.operations}
        return params.get(width), operations.get(width, "")


@dataclass(frozen=True)
class ReferenceNetwork:
    """A published network, ready to be built or traced. Equal ones compare and hash equal.

    Args:
        name: of the design with its width; resolution, channels and classes are not part of it.
        family: all widths and depths of one design.
        input_shape: (channels, height, width).
        params: exact published number of learned values, None where no exact one is known for this input and classes.
        rounded_params: a paper's rounded figure, such as `"4.2M"`, where no exact one is known; else empty.
        operations: published work, rounded: `"7.7G"`, two per multiply-accumulate, or `"4.09G multiply-accumulates"`;
            else empty.
    """

    name: str
    family: str
    task: Task
    input_shape: InputShape
    num_classes: int
    params: int | None
    rounded_params: str
    operations: str
    source: str
    deviations: str
    factory: str
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """A fresh, initialised module that takes `(batch, *input_shape)`."""
        import torch

        return self._make().to(memory_format=torch.channels_last)

    def workload(self) -> Workload:
        """Its operators, traced without allocating any weight; computed once per process.

        Raises:
            UserError: the input is too small for the network.
        """
        return _workload(self)

    def _make(self) -> Any:
        module, _, function = self.factory.partition(":")
        make = getattr(importlib.import_module(module), function)
        return make(self.input_shape, self.num_classes, **dict(self.options))


@lru_cache(maxsize=1024)
def _workload(network: ReferenceNetwork) -> Workload:
    import torch

    from search_spaces.tracing import trace

    with torch.device("meta"):
        module = network._make()
    try:
        return trace(module, network.input_shape)
    except UserError as error:
        raise UserError(f"reference network {network.name!r}: {error}") from error
