"""`report.html`: what was asked, what was found, how far predictions held, what it cost."""

from __future__ import annotations

import base64
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from hardware_profiles.paths import atomic, finished, write_text
from nasbench.config import dump_config
from nasbench.cross_device import targets_of
from nasbench.report.devices import cross_device_figure, fronts_figure
from nasbench.report.figures import pareto_figure, prediction_figure, training_figure
from nasbench.report.stage_figures import ratios, stage_targets, stages_figure
from nasbench.run import RunView, load_run


def write_report(path: Path) -> Path:
    """Draw `figures/*.png` and write `report.html` of the run in `path`; returns the page's path.

    Raises:
        UserError: no run there, or its search has not finished.
    """
    view = load_run(path)
    (path / "figures").mkdir(exist_ok=True)
    figures = {}
    searched = not view.config.networks
    for name, figure in (
        ("pareto", pareto_figure(view) if searched else None),
        ("predicted_vs_measured", prediction_figure(view) if searched else None),
        ("training", training_figure(view)),
        *_device_figures(view),
        ("stages", stages_figure(view)),
    ):
        if figure is not None:
            image = png(figure)
            with atomic(path / "figures" / f"{name}.png") as temporary:
                temporary.write_bytes(image)
            figures[name] = base64.b64encode(image).decode()
    page = template("report.html").render(figures=figures, **_contents(view))
    write_text(path / "report.html", page)
    return path / "report.html"


def _several_devices(view: RunView) -> bool:
    """Whether a run searched for several devices, with an objective beside that none of them changes."""
    shared = any(not o.target for o in view.objectives)
    return shared and len(targets_of(view.objectives)) > 1 and not view.config.networks


def _device_figures(view: RunView) -> list[tuple[str, Figure | None]]:
    """Of a run with objectives of several devices."""
    if not _several_devices(view):
        return []
    return [("devices", fronts_figure(view)), ("cross_device", cross_device_figure(view))]


def png(figure: Figure) -> bytes:
    """A figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def template(name: str) -> Template:
    """A page of this package."""
    loader = FunctionLoader(lambda file: resources.files("nasbench.report").joinpath(file).read_text(encoding="utf-8"))
    return Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def _contents(view: RunView) -> dict[str, Any]:
    searched = not view.config.networks
    front = view.front() if searched else pd.DataFrame({"name": [], "kind": [], "pareto": []})
    stages, ledger, measurements = view.stages(), view.ledger(), view.measurements()
    objectives = view.objectives
    columns = ["name", *view.value_columns(front)]
    pareto = front[front["pareto"]].sort_values(objectives[-1].name) if searched else front
    quality_file = view.path / "predictors.json"
    calibrations = [json.loads(f.read_text()) for f in finished(view.path / "calibration", "*.json")]
    protocols = sorted(set(measurements["protocol"])) if len(measurements) else []
    return {
        "name": view.config.name,
        "state": view.state,
        "config": dump_config(view.config),
        "objectives": objectives,
        "front": cells(pareto[columns]),
        "references": cells(front.loc[front["kind"] == "reference", columns]),
        "searched": searched,
        "stages": cells(_stage_table(stages)),
        "traps": _traps(stages),
        "stage_notes": [
            f"{r['network']}, step {r['step']}: {r['note']}" for r in stages.to_dict("records") if r["note"]
        ],
        "ledger": cells(ledger.assign(processor_hours=ledger["cpu_s"] / 3600) if len(ledger) else ledger),
        "processor_hours": float(ledger["cpu_s"].sum() / 3600) if len(ledger) else 0.0,
        "wall_minutes": float(ledger["wall_s"].sum() / 60) if len(ledger) else 0.0,
        "evaluations": len(view.evaluations()),
        "measurements": len(measurements),
        "notes": sorted(set(measurements["note"]) - {""}) if len(measurements) else [],
        "quality": json.loads(quality_file.read_text()) if quality_file.is_file() else {},
        "calibrations": [(c.get("target", ""), _quality(c)) for c in calibrations],
        "protocols": [json.loads(p) for p in protocols],
        "networks": len(front),
        "cross_device": cells(_cross_table(view)),
        "everywhere": len(view.front("all")) if searched else 0,
        "rounds": cells(_rounds_table(view.rounds())),
    }


def _quality(calibration: dict[str, Any]) -> dict[str, Any]:
    """How well a calibration predicts the latency of networks left out; runs of earlier versions keep none to read."""
    quality: dict[str, Any] = calibration.get("models", {}).get("latency_ms", {}).get("quality", {})
    return quality


def _cross_table(view: RunView) -> pd.DataFrame:
    """The matrix of what specialising costs, with its rows' names; empty where the run has one device."""
    return view.cross_device().reset_index() if _several_devices(view) else pd.DataFrame()


def _rounds_table(rounds: pd.DataFrame) -> pd.DataFrame:
    """Readable columns."""
    names = {"mean_error": "mean difference", "broken": "break the limit", "largest_excess": "by at most"}
    for column in ("mean_error", "bias", "largest_excess"):
        if column in rounds:
            rounds[column] = [f"{value:.1%}" for value in rounds[column]]
    return rounds.rename(columns=names)


def _stage_table(stages: pd.DataFrame) -> pd.DataFrame:
    """Readable columns, with sizes in KiB and the latency as a ratio to the network as searched."""
    if not len(stages):
        return stages
    table = stages[["network", "step", "stage"]].copy()
    for source, column in (("accuracy", "accuracy (validation)"), ("test_accuracy", "accuracy (test)")):
        if source in stages:
            table[column] = stages[source]
    targets = stage_targets(stages)
    if "macs" in stages:
        first = stages[stages["step"] == 0].set_index("network")["macs"]
        table["MACs, ratio to first"] = stages["macs"] / stages["network"].map(first)
    for target in targets:
        table[f"latency_ms on {target} (measured)"] = stages[f"latency_ms@{target}"]
        table[f"ratio to first on {target}"] = ratios(stages, target)["latency"]
    for column in stages.columns:
        if "_predicted@" in column:
            table[column.replace("_predicted@", " on ") + " (predicted)"] = stages[column]
    table["file KiB"] = stages["file_bytes"] / 1024
    if "peak_memory_bytes" in stages:
        table["peak activations KiB"] = stages["peak_memory_bytes"] / 1024
    table["final"] = ["yes" if final else "" for final in stages["final"]]
    table["file"] = stages["file"]
    return table


def _traps(stages: pd.DataFrame) -> list[str]:
    """Where operations fell and the measured latency did not, in words."""
    said = []
    for target in stage_targets(stages) if "macs" in stages else []:
        found = ratios(stages, target)
        for row, ratio in zip(stages[found["trap"]].itertuples(), found[found["trap"]].itertuples(), strict=True):
            said.append(
                f"{row.network} after {row.stage}: multiply-accumulates fell to {ratio.macs:.0%}, the latency measured "
                f"on {target} did not ({ratio.latency:.0%})"
            )
    return said


def cells(frame: pd.DataFrame) -> dict[str, Any]:
    """Column titles and formatted cells; numbers right-aligned."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return "–" if pd.isna(value) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    numeric = [pd.api.types.is_numeric_dtype(frame[c]) for c in frame.columns]
    rows = [
        [(cell(v), n) for v, n in zip(row, numeric, strict=True)] for row in frame.itertuples(index=False, name=None)
    ]
    return {"columns": list(zip(frame.columns, numeric, strict=True)), "rows": rows}
