"""Reference networks by name."""

from __future__ import annotations

import re
from functools import lru_cache

from search_spaces.errors import UserError, nearest
from search_spaces.reference import classic_designs, dense_designs, mobile_designs
from search_spaces.reference.base import Design, ReferenceNetwork

# One line per table of designs.
_TABLES = (classic_designs.DESIGNS, mobile_designs.DESIGNS, dense_designs.DESIGNS)

_WIDTH = re.compile(r"(?P<name>.+)_(?P<width>\d+(\.\d+)?)")


@lru_cache(maxsize=1)
def designs() -> dict[str, Design]:
    """Name without width -> design, in the order of the tables."""
    rows = [row for table in _TABLES for row in table]
    found = {row.name: row for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"two designs of one name among {[row.name for row in rows]}")
    return found


def reference_networks() -> tuple[str, ...]:
    """The names of all reference networks, published width multipliers included. Does not import torch."""
    return tuple(name for design in designs().values() for name in design.names)


def reference_network(
    name: str,
    *,
    resolution: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
) -> ReferenceNetwork:
    """A published network by name, such as `resnet50` or `mobilenet_v2_0.5`. Does not import torch.

    Args:
        name: one of `reference_networks()`; designs with a width take any positive one as a suffix.
        resolution: pixels of a square input, or (height, width); else that of the publication.
        in_channels, num_classes: else those of the publication.

    Raises:
        UserError: an unknown name (the nearest is named), a width where the design has none, a value that is not
            positive.
    """
    design, width = _find(name)
    given = {"resolution": resolution, "in_channels": in_channels, "num_classes": num_classes}
    for key, value in given.items():
        values = value if isinstance(value, tuple) else (value,)
        if value is not None and (not all(isinstance(v, int) and v > 0 for v in values) or len(values) > 2):
            raise UserError(f"reference network {name!r}: {key}: expected a positive whole number, got {value!r}")
    size = design.size if resolution is None else resolution
    height, width_px = size if isinstance(size, tuple) else (size, size)
    channels = in_channels or design.in_channels
    classes = num_classes or design.num_classes
    as_published = (channels, height, width_px, classes) == (design.in_channels, *design.size, design.num_classes)
    params, operations = design.published(width) if as_published else (None, "")
    return ReferenceNetwork(
        name=design.name if width == 1 else f"{design.name}_{width}",
        family=design.family,
        task=design.task,
        input_shape=(channels, height, width_px),
        num_classes=classes,
        params=params if isinstance(params, int) else None,
        rounded_params=params if isinstance(params, str) else "",
        operations=operations,
        source=design.source,
        deviations=design.deviations,
        factory=design.factory,
        options=(*design.options.items(), *((("width", width),) if design.widths else ())),
    )


def _find(name: str) -> tuple[Design, float]:
    """The design of that name, and the width multiplier that the name ends in."""
    known = designs()
    if name in known:
        return known[name], 1.0
    match = _WIDTH.fullmatch(name)
    if match and match["name"] in known:
        design = known[match["name"]]
        if not design.widths:
            raise UserError(f"reference network {name!r}: {design.name} has no width multiplier")
        if float(match["width"]) <= 0:
            raise UserError(f"reference network {name!r}: the width multiplier must be above 0")
        return design, float(match["width"])
    raise UserError(f"unknown reference network {name!r}. {nearest(name, reference_networks())}")
