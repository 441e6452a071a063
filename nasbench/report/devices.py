"""Figures of a run with several devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from nasbench.cross_device import of_target, targets_of
from nasbench.report.figures import FRONT, GREY, REFERENCE, draw_limits, source_of
from search_spaces import UserError

if TYPE_CHECKING:
    from nasbench.run import RunView


def fronts_figure(view: RunView) -> Figure:
    """A panel per device: all verified networks, the device's own front, and those within the limits of all devices.

    Raises:
        UserError: objectives of fewer than two devices, or none without a device to draw upwards.
    """
    objectives, targets = view.objectives, targets_of(view.objectives)
    shared = [o for o in objectives if not o.target]
    if len(targets) < 2 or not shared:
        raise UserError("this run has not several devices with an objective that needs none; plot_front draws it")
    up = next((o for o in shared if o.maximise), shared[0])
    columns = 2 if len(targets) in (2, 4) else 3
    rows = -(-len(targets) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.7 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).reshape(-1)
    frame = view.front()
    networks, everywhere = frame[frame["kind"] == "front"], view.front("all")
    for axes, target in zip(panels, targets, strict=False):
        across = next(o for o in of_target(objectives, target) if o.target)
        own = view.front(target).sort_values(across.name)
        axes.scatter(networks[across.name], networks[up.name], s=12, c=GREY, alpha=0.6, lw=0, label="verified")
        if any(o.limited for o in objectives):
            axes.scatter(everywhere[across.name], everywhere[up.name], s=52, facecolors="none", edgecolors=REFERENCE,
                         lw=1.0, zorder=4, label="within the limits of all devices")  # fmt: skip
        axes.step(own[across.name], own[up.name], where="post", c=FRONT, lw=1.3, zorder=3)
        axes.scatter(own[across.name], own[up.name], s=26, c=FRONT, zorder=5, label="front of this device")
        draw_limits(axes.axvline, across)
        axes.set_xlabel(f"{across.label}, {source_of(frame, across)}", fontsize=8)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(targets) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(f"{up.label}, {source_of(frame, up)}")
    panels[0].legend(fontsize=7, loc="lower right", framealpha=0.9)
    return figure


def cross_device_figure(view: RunView, measure: str = "cost_ratio") -> Figure:
    """What specialising for a device costs on another, as a heat map with its numbers.

    Raises:
        UserError: see `nasbench.cross_device.cross_device`.
    """
    table = view.cross_device(measure)
    frame, targets = view.front(), list(table.index)
    size = 2.6 + 0.85 * len(targets)
    figure = Figure(figsize=(size + 1.4, size), layout="constrained")
    axes = figure.subplots()
    values = table.to_numpy()
    image = axes.imshow(values, cmap="Blues")
    finite = values[np.isfinite(values)]
    middle = (finite.min() + finite.max()) / 2 if len(finite) else 0.0
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        text = "–" if np.isnan(value) else f"{value:.2f}" if measure == "cost_ratio" else f"{value:.3f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=9,
                  color="white" if value > middle else "black")  # fmt: skip
    axes.set_xticks(range(len(targets)), targets, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(targets)), targets, fontsize=8)
    axes.set(xlabel="runs on", ylabel="specialised for")
    cost = next(o for o in view.objectives if o.target)
    source = source_of(frame, cost)
    what = f"{cost.metric} over the best of equal quality" if measure == "cost_ratio" else "quality lost at equal cost"
    axes.set_title(f"{what} ({source})", fontsize=9, loc="left")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
