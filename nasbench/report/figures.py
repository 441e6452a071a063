"""Figures of a run. Predicted and measured values never share a marker."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nasbench.objectives import Objective

if TYPE_CHECKING:
    from nasbench.run import RunView

# Okabe-Ito colours: distinguishable with any colour vision.
FRONT, GREY, REFERENCE, LIMIT = "#0072B2", "#9A9A9A", "#D55E00", "#CC79A7"
STAGES = ("#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = ("s", "^", "v", "P", "X")


def axes_of(objectives: tuple[Objective, ...], x: str | None, y: str | None) -> tuple[Objective, Objective]:
    """The two objectives to draw: what is maximised upwards, the first other one to the right, unless named."""
    by_name = {o.name: o for o in objectives}
    up = by_name[y] if y else next((o for o in objectives if o.maximise and o.name != x), objectives[0])
    across = by_name[x] if x else next((o for o in objectives if o is not up), up)
    return across, up


def pareto_figure(view: RunView, x: str | None = None, y: str | None = None) -> Figure:
    """The front of a run in two of its objectives.

    Filled markers are measured (or really evaluated) values, hollow ones predictions; a thin line joins the two of one
    network. Grey dots are all evaluated architectures at their predicted cost. The chosen networks appear once more per
    stage. All accuracies are of the validation split.

    Args:
        x, y: objective names; by default the first cost across and the first maximised objective upwards.
    """
    objectives = view.objectives
    across, up = axes_of(objectives, x, y)
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    axes = figure.subplots()
    frame = view.front()
    sampled = view.evaluations()

    def known_as(objective: Objective) -> str:
        return f"{objective.metric} {'evaluated' if f'{objective.name}_evaluated' in frame else 'predicted'}"

    if {across.name, up.name} <= set(sampled.columns):
        cloud = sampled[sampled["phase"] != "verify"]
        axes.scatter(cloud[across.name], cloud[up.name], s=9, c=GREY, alpha=0.5, lw=0, zorder=1,
                     label=f"sampled ({len(cloud)}): {known_as(up)}, {known_as(across)}")  # fmt: skip
    networks = frame[frame["kind"] == "front"]
    known = networks[[across.name, up.name]].notna().all(axis=1)
    predicted = _predicted(networks, across, up)
    if predicted is not None:
        axes.plot([predicted[0], networks[across.name]], [predicted[1], networks[up.name]],
                  c=FRONT, lw=0.6, alpha=0.45, zorder=2)  # fmt: skip
        axes.scatter(
            *predicted, s=26, facecolors="none", edgecolors=FRONT, lw=0.9, zorder=3, label="front as predicted"
        )
    other = networks[known & ~networks["pareto"]]
    axes.scatter(other[across.name], other[up.name], s=22, c=FRONT, alpha=0.4, lw=0, zorder=3)
    best = networks[known & networks["pareto"]].sort_values(across.name)
    _staircase(axes, best[across.name].to_numpy(), best[up.name].to_numpy(), across, up)
    axes.scatter(best[across.name], best[up.name], s=34, c=FRONT, zorder=5, label="front")
    references = frame[frame["kind"] == "reference"]
    axes.scatter(references[across.name], references[up.name], marker="D", s=34, c=REFERENCE, zorder=4,
                 label="references")  # fmt: skip
    for _, row in references.iterrows():
        axes.annotate(row["name"], (row[across.name], row[up.name]), xytext=(5, -10), textcoords="offset points",
                      fontsize=7, color=REFERENCE)  # fmt: skip
    _draw_stages(axes, view, across, up)
    for objective, line in ((across, axes.axvline), (up, axes.axhline)):
        draw_limits(line, objective)
    images = "from a table" if view.config.task.name == "none" else "validation images"
    axes.set_xlabel(f"{across.label}, {source_of(frame, across, images)}")
    axes.set_ylabel(f"{up.label}, {source_of(frame, up, images)}")
    _zoom(axes, frame, up)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7.5, loc="lower right", frameon=True, framealpha=0.9)
    axes.set_title(f"{view.config.name}: {up.metric} against {across.metric}", loc="left", fontsize=11)
    return figure


def draw_limits(line: Callable[..., Any], objective: Objective) -> None:
    """The hard limits of an objective, on either side, by `axvline` or `axhline` of the axes."""
    for key, side in objective.sides:
        text = f"{key.replace('_', ' ')} {side.limit:g} {side.unit}".rstrip()
        line(side.limit, c=LIMIT, ls="--", lw=1.2, label=text)


def source_of(frame: pd.DataFrame, objective: Objective, judged_on: str = "validation images") -> str:
    """What the best known values of an objective in a front are: measured, evaluated, or predicted."""
    for source in ("measured", "evaluated"):
        if f"{objective.name}_{source}" in frame:
            return source if objective.metric != "accuracy" else judged_on
    return "predicted"


def _predicted(networks: pd.DataFrame, across: Objective, up: Objective) -> tuple[Any, Any] | None:
    columns = [f"{o.name}_predicted" for o in (across, up)]
    return tuple(networks[c] for c in columns) if set(columns) <= set(networks.columns) else None  # type: ignore[return-value]


def _staircase(axes: Axes, x: Any, y: Any, across: Objective, up: Objective) -> None:
    if len(x) and not across.maximise and up.maximise:
        axes.step(x, y, where="post", c=FRONT, lw=1.3, zorder=4)


def _draw_stages(axes: Axes, view: RunView, across: Objective, up: Objective) -> None:
    rows = view.stages()
    # Stages have validation accuracy, counts, and latency per target: only what is an axis here may be drawn.
    x, y = (f"{o.metric}@{o.target}" if o.target else o.metric for o in (across, up))
    if not {x, y} <= set(rows.columns):
        return
    first = rows[rows["step"] == 0].set_index("network")
    for _, group in rows[rows["step"] > 0].groupby("step"):
        stage, index = group["stage"].iloc[0], (int(group["step"].iloc[0]) - 1) % len(STAGES)
        axes.scatter(group[x], group[y], marker=MARKERS[index], s=46, c=STAGES[index], zorder=6,
                     edgecolors="white", lw=0.6, label=f"after {stage}, measured")  # fmt: skip
    last = rows[rows["step"] == rows["step"].max()].set_index("network")
    for name in first.index.intersection(last.index) if rows["step"].max() > 0 else []:
        path = rows[rows["network"] == name].sort_values("step")
        axes.plot(path[x], path[y], c="#444444", lw=0.7, ls=":", zorder=5)


def _zoom(axes: Axes, frame: pd.DataFrame, up: Objective) -> None:
    """Leave out the far tail of the worst samples, which would press the front against the edge."""
    values = frame[up.name].dropna()
    if len(values) > 1 and up.maximise:
        spread = values.max() - values.min()
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, values.min() - 0.8 * spread), high)


def prediction_figure(view: RunView) -> Figure | None:
    """Predicted against measured (or evaluated) values of the verified networks; None where nothing has both."""
    frame = view.front()
    pairs = []
    for objective in view.objectives:
        for source in ("measured", "evaluated"):
            if {f"{objective.name}_predicted", f"{objective.name}_{source}"} <= set(frame.columns):
                pairs.append((objective, source))
                break
    if not pairs:
        return None
    figure = Figure(figsize=(4.4 * len(pairs), 4.2), layout="constrained")
    for axes, (objective, source) in zip(np.atleast_1d(figure.subplots(1, len(pairs))), pairs, strict=True):
        both = frame[[f"{objective.name}_predicted", f"{objective.name}_{source}", "kind"]].dropna()
        predicted, real = both.iloc[:, 0].to_numpy(), both.iloc[:, 1].to_numpy()
        for kind, colour in (("front", FRONT), ("reference", REFERENCE)):
            rows = both["kind"] == kind
            axes.scatter(real[rows], predicted[rows], s=24, c=colour, label=kind, zorder=3)
        ends = np.array([min(predicted.min(), real.min()), max(predicted.max(), real.max())])
        ends += np.array([-0.04, 0.04]) * np.ptp(ends)
        axes.plot(ends, ends, c="black", lw=0.9, zorder=2)
        if objective.metric != "accuracy":
            axes.fill_between(ends, ends * 0.9, ends * 1.1, color=GREY, alpha=0.2, lw=0, label="±10 %")
        axes.set(xlim=ends, ylim=ends, xlabel=f"{objective.label}, {source}", ylabel="predicted")
        axes.set_title(agreement(predicted, real, objective.metric == "accuracy"), loc="left", fontsize=9)
        axes.set_aspect("equal")
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7.5)
    return figure


def agreement(predicted: np.ndarray[Any, Any], real: np.ndarray[Any, Any], absolute: bool) -> str:
    """One line on how well predictions agree: rank correlation, and the share within 10 % or the mean difference."""
    rank = pd.Series(predicted).rank().corr(pd.Series(real).rank()) if len(real) > 2 else float("nan")
    if absolute:
        return f"{len(real)} networks: Spearman {rank:.2f}, mean difference {np.abs(predicted - real).mean():.3f}"
    within = np.mean(np.abs(predicted - real) <= 0.1 * real)
    return f"{len(real)} networks: Spearman {rank:.2f}, {within:.0%} within 10 %"


def training_figure(view: RunView) -> Figure | None:
    """Training curves of the supernet; None where there are none."""
    history = view.history()
    if not len(history) or "loss" not in history:
        return None
    curves = [c for c in history.columns if re.search("accuracy", c)]
    figure = Figure(figsize=(4.4 * (1 + bool(curves)), 3.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 1 + bool(curves)))
    epochs = history["epoch"] if "epoch" in history else history.index + 1
    panels[0].plot(epochs, history["loss"], marker="o", ms=3, c=FRONT)
    panels[0].set(xlabel="epoch", ylabel="training loss")
    if curves:
        for colour, column in zip((FRONT, REFERENCE, *STAGES), curves, strict=False):
            panels[1].plot(epochs, history[column], marker="o", ms=3, c=colour, label=column.replace("_", " "))
        panels[1].set(xlabel="epoch", ylabel="validation accuracy")
        panels[1].legend(fontsize=7.5)
    for axes in panels:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
