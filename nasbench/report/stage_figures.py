"""What the stages made of networks: the compressed front over the original, and fewer operations that cost as much."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nasbench.pareto import non_dominated_mask
from nasbench.report.figures import FRONT, GREY, MARKERS, REFERENCE, STAGES
from search_spaces.errors import UserError, nearest

if TYPE_CHECKING:
    from nasbench.run import RunView

# Operations that fell by more than this while the measured latency did not are pointed out.
FEWER = 0.10


def stage_targets(rows: pd.DataFrame) -> list[str]:
    """Targets that the stages were measured on, in the order of the columns."""
    return [c.removeprefix("latency_ms@") for c in rows.columns if c.startswith("latency_ms@")]


def ratios(rows: pd.DataFrame, target: str) -> pd.DataFrame:
    """Per stage result, `macs` and `latency` as ratios to the network before the first stage, and `trap`.

    `trap` is True where operations fell by more than a tenth and the measured latency not at all.
    """
    first = rows[rows["step"] == 0].set_index("network")
    found = pd.DataFrame(index=rows.index)
    for name, column in (("macs", "macs"), ("latency", f"latency_ms@{target}")):
        found[name] = rows[column] / rows["network"].map(first[column]) if column in rows else np.nan
    found["trap"] = (found["macs"] < 1 - FEWER) & (found["latency"] >= 1)
    return found


def stages_figure(view: RunView, target: str | None = None) -> Figure | None:
    """Validation accuracy against measured latency, one panel per target: the original front, and the compressed one.

    Grey dots are the verified networks of the search, where there was one. A dotted line leads each network from stage
    to stage; the form that it ends with has a dark edge.

    Args:
        target: only this one.

    Raises:
        UserError: it was not measured.
    """
    rows = view.stages()
    targets = stage_targets(rows)
    if target is not None and target not in targets:
        raise UserError(f"no stage was measured on {target!r}. {nearest(target, targets)}")
    targets = [target] if target is not None else targets
    if not targets or "accuracy" not in rows:
        return None
    figure = Figure(figsize=(6.4 * len(targets), 4.8), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(targets))), targets, strict=True):
        _panel(axes, view, rows, name)
    return figure


def _panel(axes: Axes, view: RunView, rows: pd.DataFrame, target: str) -> None:
    x = f"latency_ms@{target}"
    good = rows[rows[[x, "accuracy"]].notna().all(axis=1)]
    before = _verified(view, target)
    if len(before):
        axes.scatter(before["x"], before["y"], s=14, c=GREY, alpha=0.7, lw=0, label="verified after the search")
    start = good[good["step"] == 0]
    label = "front before the stages" if len(before) else "before the stages"
    _front(axes, pd.concat([before, start[[x, "accuracy"]].set_axis(["x", "y"], axis=1)]), GREY, label)
    _front(axes, good.loc[good["final"], [x, "accuracy"]].set_axis(["x", "y"], axis=1), FRONT, "front after the stages")
    for _, path in good.groupby("network"):
        path = path.sort_values("step")
        axes.plot(path[x], path["accuracy"], c="#444444", lw=0.7, ls=":", zorder=3)
    for step in sorted(set(good["step"].astype(int))):
        group = good[good["step"] == step]
        colour = REFERENCE if step == 0 else STAGES[(step - 1) % len(STAGES)]
        marker = "D" if step == 0 else MARKERS[(step - 1) % len(MARKERS)]
        names = " / ".join(dict.fromkeys(group["stage"]))
        edges = ["black" if f else "white" for f in group["final"]]
        axes.scatter(group[x], group["accuracy"], marker=marker, s=46, c=colour, edgecolors=edges, lw=0.9, zorder=5,
                     label=f"{step}: {names}")  # fmt: skip
    for _, row in good[good["final"]].iterrows():
        axes.annotate(
            row["network"], (row[x], row["accuracy"]), xytext=(5, -10), textcoords="offset points", fontsize=7
        )
    axes.set(xlabel=f"latency on {target} (ms), measured", ylabel="accuracy, validation images")
    if len(good) and good[x].max() > 8 * good[x].min():
        axes.set_xscale("log")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="best", framealpha=0.9)
    axes.set_title(f"{view.config.name}: stages on {target}", loc="left", fontsize=10)


def _verified(view: RunView, target: str) -> pd.DataFrame:
    """Measured latency `x` and evaluated accuracy `y` of the search's verified networks; empty where nothing was
    searched or measured there."""
    empty = pd.DataFrame({"x": [], "y": []}, dtype=float)
    if view.config.networks:
        return empty
    front = view.front()
    latency = [
        n for n, o in view.config.objectives.items()
        if (o.metric or n.partition("@")[0]) == "latency_ms" and o.target == target and f"{n}_measured" in front
    ]  # fmt: skip
    accuracy = [n for n in front.columns if n.startswith("accuracy") and n.endswith("_evaluated")]
    if not latency or not accuracy:
        return empty
    known = front[[f"{latency[0]}_measured", accuracy[0]]].dropna()
    return known.set_axis(["x", "y"], axis=1)


def _front(axes: Axes, points: pd.DataFrame, colour: str, label: str) -> None:
    """The staircase of what is not dominated."""
    points = points.dropna()
    if len(points) < 2:
        return
    costs = np.stack([points["x"].to_numpy(dtype=float), -points["y"].to_numpy(dtype=float)], axis=1)
    best = points[non_dominated_mask(costs)].sort_values("x")
    if len(best) < 2:
        return
    axes.step(best["x"], best["y"], where="post", c=colour, lw=1.3, zorder=2, label=label)
