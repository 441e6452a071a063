"""The report of a comparison of strategies: figures, a page, and the same in Markdown."""

from __future__ import annotations

import base64
from importlib import metadata
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hardware_profiles.paths import atomic, write_text
from nasbench.comparison.settings import dump_settings
from nasbench.report.page import cells, png, template
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nasbench.comparison.result import Comparison

# Okabe-Ito colours, then the same dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABELS = {"hypervolume": "hypervolume, share of the best", "regret": "simple regret"}
SIGNIFICANT = 0.05
_COLUMNS = 3  # panels beside each other


def curves_figure(result: Comparison, what: str, against: str = "evaluations") -> Figure:
    """Medians over seeds with quartile bands, one panel per problem.

    Args:
        what: `hypervolume` or `regret`.
        against: `evaluations` or `seconds`.

    Raises:
        UserError: anything else.
    """
    if what not in LABELS or against not in ("evaluations", "seconds"):
        raise UserError(f"there is no figure of {what!r} against {against!r}")
    frame = result.curves if against == "evaluations" else result.time_curves
    names = list(result.problems)
    columns = 2 if len(names) == 4 else min(_COLUMNS, len(names))
    rows = ceil(len(names) / columns)
    figure = Figure(figsize=(1.2 + 3.9 * columns, 0.9 + 3.0 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).reshape(-1)
    for axes, problem in zip(panels, names, strict=False):
        for place, strategy in enumerate(result.strategies):
            part = frame[(frame["problem"] == problem) & (frame["strategy"] == strategy)]
            line, dash = COLOURS[place % len(COLOURS)], "-" if place < len(COLOURS) else "--"
            axes.fill_between(part[against], part[f"{what}_low"], part[f"{what}_high"], color=line, alpha=0.16, lw=0)
            axes.plot(part[against], part[what], c=line, ls=dash, lw=1.6, label=strategy)
        axes.set_title(problem, loc="left", fontsize=10)
        _scale(axes, frame[frame["problem"] == problem], what, against)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("distinct evaluations" if against == "evaluations" else "seconds of strategy and evaluations",
                     fontsize=10)  # fmt: skip
    figure.supylabel(LABELS[what], fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), fontsize=8.5, frameon=False)
    return figure


def _scale(axes: Axes, part: pd.DataFrame, what: str, against: str) -> None:
    if against == "seconds":
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlim(left=0)
    if what == "regret":
        positive = part.loc[part["regret"] > 0, "regret"]
        if len(positive):
            axes.set_yscale("log")
            axes.set_ylim(max(positive.min() / 2, 1e-4), 1.1)
    else:
        # What every strategy reaches at once would press the differences against the upper edge.
        reached = part.groupby("strategy")["hypervolume_low"].quantile(0.1).min()
        axes.set_ylim(max(0.0, min(0.9, reached)), 1.01)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def ranks_figure(result: Comparison) -> Figure:
    """Average ranks against the budget; 1 is best, and at the top."""
    ranks = result.ranks
    budgets = list(ranks.columns)
    figure = Figure(figsize=(6.6, 0.9 + 0.42 * max(3, len(ranks))), layout="constrained")
    axes = figure.subplots()
    for place, strategy in enumerate(result.strategies):
        line, dash = COLOURS[place % len(COLOURS)], "-" if place < len(COLOURS) else "--"
        axes.plot(range(len(budgets)), ranks.loc[strategy], c=line, ls=dash, marker="o", lw=1.6, ms=5)
    last = ranks[budgets[-1]]
    spots = _apart(last.to_numpy(), 0.055 * (len(ranks) + 1))
    for strategy, spot in zip(last.index, spots, strict=True):
        place = result.strategies.index(strategy)
        axes.annotate(f"{strategy}  {last[strategy]:.2f}", (len(budgets) - 1, spot), xytext=(9, 0), va="center",
                      textcoords="offset points", fontsize=8.5, color=COLOURS[place % len(COLOURS)])  # fmt: skip
    axes.set_xticks(range(len(budgets)), [f"{b}" for b in budgets])
    axes.set_xlim(-0.15, len(budgets) - 1 + 0.75)
    axes.set_ylim(len(ranks) + 0.3, 0.7)
    axes.set(xlabel="distinct evaluations", ylabel="average rank, 1 is best")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _apart(values: np.ndarray[Any, Any], least: float) -> np.ndarray[Any, Any]:
    """Rising values moved downwards, so that labels at them do not overlap."""
    out = values.astype(float).copy()
    for i in range(1, len(out)):
        out[i] = max(out[i], out[i - 1] + least)
    return out


def verdict(result: Comparison) -> str:
    """What the statistics say, in a few sentences."""
    if not result.rank_tests:
        return "One strategy alone: there is nothing to compare it with."
    budget = max(result.rank_tests)
    test = result.rank_tests[budget]
    best = min(test.ranks, key=lambda s: test.ranks[s])
    text = f"After {budget} evaluations {best} ranks first on average ({test.ranks[best]:.2f} of {len(test.ranks)})."
    if not np.isnan(test.friedman_p):
        differ = "do differ" if test.friedman_p < SIGNIFICANT else "cannot be told apart"
        text += f" Over all, the strategies {differ} (Friedman, p = {test.friedman_p:.2g})."
    won: list[str] = []
    open_: list[str] = []
    for row in test.pairs.to_dict("records"):
        if best in (row["first"], row["second"]):
            sides = ("first", "second") if row["first"] == best else ("second", "first")
            wins, losses = (int(row[f"{side}_wins"]) for side in sides)
            said = f"{row[sides[1]]} ({wins} to {losses}, p = {row['p_holm']:.2g})"
            (won if row["p_holm"] < SIGNIFICANT and wins > losses else open_).append(said)
    if won:
        text += f" It is better than {', '.join(won)}."
    if open_:
        text += f" Not settled: against {', '.join(open_)}."
    return text


def write_comparison(result: Comparison) -> None:
    """Draw `figures/*.png`, and write `summary.md` and `report.html`."""
    figures = {
        "hypervolume": result.plot_hypervolume(),
        "hypervolume_time": result.plot_hypervolume("seconds"),
        "regret": result.plot_regret(),
        "regret_time": result.plot_regret("seconds"),
    }
    if result.rank_tests:
        figures["ranks"] = result.plot_ranks()
    encoded = {}
    for name, figure in figures.items():
        image = png(figure)
        with atomic(result.path / "figures" / f"{name}.png") as temporary:
            temporary.write_bytes(image)
        encoded[name] = base64.b64encode(image).decode()
    settings = result.settings
    summary, ranks, tests = _summary(result), _ranks(result), _tests(result)
    problems = [
        (
            name,
            ", ".join(o.label + o.limits_text for o in problem.objectives),
            result.yardsticks[name].basis,
        )
        for name, problem in result.problems.items()
    ]
    said = verdict(result)
    page = template("comparison.html").render(
        name=settings.name, version=metadata.version("nasbench-hw"), strategies=len(result.strategies),
        problems=problems, seeds=len(settings.seed_list), evaluations=settings.evaluations, note=settings.note,
        verdict=said, figures=encoded, ranks=cells(ranks), blocks=len(settings.seed_list) * len(problems),
        summary=cells(summary), tests=cells(tests), settings=dump_settings(settings), priced=result.priced,
    )  # fmt: skip
    write_text(result.path / "report.html", page)
    parts = [f"# {settings.name}: comparison of search strategies", settings.note, said, _markdown(ranks)]
    parts += ["\n".join(f"- {name}: {axes}. Measured against {basis}." for name, axes, basis in problems)]
    parts += [_markdown(summary), _markdown(tests)]
    write_text(result.path / "summary.md", "\n\n".join(p for p in parts if p) + "\n")


def _ranks(result: Comparison) -> pd.DataFrame:
    frame = result.ranks.reset_index()
    return frame.rename(columns={b: f"rank at {b}" for b in frame.columns if b != "strategy"})


def _summary(result: Comparison) -> pd.DataFrame:
    frame = result.summary
    shown = frame[["problem", "evaluations", "strategy"]].copy()
    for what in ("hypervolume", "regret"):
        digits = ".4f" if what == "hypervolume" else ".3f"
        shown[what] = [
            f"{m:{digits}} ({low:{digits}}–{high:{digits}})"
            for m, low, high in zip(frame[what], frame[f"{what}_low"], frame[f"{what}_high"], strict=True)
        ]
    shown["to 99 %"] = frame["evaluations_to_99"]
    shown["strategy ms per proposal"] = frame["strategy_ms_per_proposal"]
    shown["rank"] = frame["rank"]
    return shown


def _tests(result: Comparison) -> pd.DataFrame:
    frame = result.tests
    if not len(frame):
        return frame
    columns = [
        "evaluations",
        "first",
        "second",
        "median_difference",
        "first_wins",
        "ties",
        "second_wins",
        "p",
        "p_holm",
    ]
    return frame[columns].rename(columns=lambda c: c.replace("_", " "))


def _markdown(frame: pd.DataFrame) -> str:
    """A table; empty for an empty frame."""
    if not len(frame):
        return ""
    table = cells(frame)
    head = [title for title, _ in table["columns"]]
    rule = ["---:" if number else "---" for _, number in table["columns"]]
    lines = [head, rule, *([text for text, _ in row] for row in table["rows"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
