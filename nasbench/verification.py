"""Predict, measure, correct: found networks are evaluated and measured, and where that was not as predicted, the search
goes on with corrected predictions.

A network that breaks a limit when measured is never called feasible, whatever was predicted of it. Predictions are
corrected by all measurements so far (`predictors.corrected`), and the search goes on with them, a bounded number of
rounds. Everything that a round depends on lies in the archive, so that a run that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hardware_profiles import Target
from hardware_profiles.paths import write_text
from nasbench.archive import arch_row, arch_text
from nasbench.evaluators.base import Evaluator, Proposals
from nasbench.objectives import Objective, minimised, violations
from nasbench.pareto import non_dominated_mask
from nasbench.pipeline import measure
from nasbench.plan import Plan
from nasbench.progress import Reporter
from nasbench.run import Run
from nasbench.searches import Front, evaluate, predicted_fronts
from nasbench.selection import select
from predictors import BoundPredictor
from predictors.corrected import CorrectedPredictor
from search_spaces import UserError
from search_spaces.base import Archs

FRONT, ROUNDS = "front.csv", "rounds.csv"


@dataclass
class _State:
    """What is known after some rounds.

    Args:
        frame: networks so far, as in `front.csv`.
        bound: the predictors of the next round.
        objectives: of the next round; measured ones ask a quantile of their predictions to keep the limit.
    """

    frame: pd.DataFrame
    bound: dict[str, BoundPredictor]
    objectives: tuple[Objective, ...]


def verify(
    plan: Plan,
    run: Run,
    fronts: Sequence[Front],
    evaluator: Evaluator,
    bound: dict[str, BoundPredictor],
    report: Reporter,
) -> pd.DataFrame:
    """Evaluate and measure a spread of the found fronts, and the references; again with corrected predictors, as
    `[verify]` says; `front.csv` and, where anything was measured, `rounds.csv`.

    Columns: `name`, `kind` (front or reference), `round` (0 for the first), `arch`; per objective `NAME_predicted`,
    when its round began, `NAME_evaluated` and `NAME_measured` as far as there are such values, and `NAME`, the best
    known of them; `violation`; `pareto`, whether on the front of what was found, on which no reference is.
    """
    section = plan.config.verify
    references = plan.references
    chosen = _spread(plan, fronts, bound, np.empty((0, len(plan.space.knobs)), dtype=plan.space.dtype))
    names = [f"front-{i:02d}" for i in range(len(chosen))] + list(references)
    kinds = ["front"] * len(chosen) + ["reference"] * len(references)
    archs = np.vstack([chosen, *(a[None] for a in references.values())])
    state = _State(pd.DataFrame(), bound, plan.objectives)
    told: list[dict[str, Any]] = []
    for number in range(section.rounds + 1):
        rows = _verified(plan, run, evaluator, state.bound, report, (names, kinds, archs), number, len(state.frame))
        state.frame = _judged(plan, pd.concat([state.frame, rows], ignore_index=True))
        summary = _summary(plan, state.frame, number)
        if not summary:
            break
        told += summary
        write_text(run.path / ROUNDS, pd.DataFrame(told).to_csv(index=False))
        for line in summary:
            broken = f", {line['broken']} break the limit" if line["broken"] else ""
            report.line(
                f"round {number}: {line['objective']} predicted within {line['mean_error']:.1%} of measured on average "
                f"({line['networks']} networks){broken}"
            )
        held = all(line["mean_error"] <= section.tolerance and not line["broken"] for line in summary)
        if held or number == section.rounds:
            break
        state = _corrected(plan, state)
        try:
            chosen = _again(plan, run, state, report, number + 1)
        except UserError as error:
            report.line(f"round {number + 1}: {error}")
            break
        if not len(chosen):
            break  # every network of the corrected front has been measured
        names = [f"front-{number + 1}-{i:02d}" for i in range(len(chosen))]
        kinds, archs = ["front"] * len(chosen), chosen
    write_text(run.path / FRONT, state.frame.to_csv(index=False))
    return state.frame


def measured_as(objective: Objective, target: Target, latency_ms: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """An objective's value from a measured latency; None for what does not follow from one."""
    if objective.metric == "latency_ms":
        return latency_ms
    if objective.metric == "throughput_ips":
        return 1e3 * target.batch / latency_ms
    return None


def _spread(plan: Plan, fronts: Sequence[Front], bound: Mapping[str, BoundPredictor], known: Archs) -> Archs:
    """Networks to verify, not among `known`: an equal part of each front, evenly along it."""
    seen = {arch_text(a) for a in known}
    found: list[np.ndarray[Any, Any]] = []
    count = -(-plan.config.evaluator.verify // len(fronts))
    for front in fronts:
        rows = [i for i, a in enumerate(front.archs) if arch_text(a) not in seen]
        archs = front.archs[rows]
        if len(archs) > count:
            known_to = tuple(o for o in front.objectives if o.name in bound)
            if known_to:
                values = np.stack([bound[o.name].predict(archs).mean for o in known_to], axis=1)
                archs = archs[select(values, known_to, "spread", count)]
            else:
                archs = archs[np.linspace(0, len(archs) - 1, count).round().astype(int)]
        seen |= {arch_text(a) for a in archs}
        found.append(archs)
    return np.concatenate(found)


def _verified(
    plan: Plan,
    run: Run,
    evaluator: Evaluator,
    bound: Mapping[str, BoundPredictor],
    report: Reporter,
    networks: tuple[list[str], list[str], Archs],
    number: int,
    first: int,
) -> pd.DataFrame:
    """The networks of one round with what is predicted, evaluated and measured of them."""
    names, kinds, archs = networks
    frame = pd.DataFrame({"name": names, "kind": kinds, "round": number, "arch": [arch_text(a) for a in archs]})
    for name, predictor in bound.items():
        frame[f"{name}_predicted"] = predictor.predict(archs).mean
    proposals = Proposals(np.arange(first, first + len(archs), dtype=np.int64), archs)
    costs = {o.name: bound[o.name] for o in plan.predicted}
    values, _ = evaluate(plan, run, "verify", evaluator, costs, proposals, report)
    for column, objective in enumerate(plan.objectives):
        if objective not in plan.predicted:
            frame[f"{objective.name}_evaluated"] = values[:, column]
    for name, target in plan.targets.items():
        wanted = [o for o in plan.predicted if o.target == name and measured_as(o, target, np.ones(1)) is not None]
        if wanted and plan.measurable(target):
            latency = measure(plan, run, target, dict(zip(names, archs, strict=True)), "verify", report)
            taken = np.array([latency[n] for n in names], dtype=float)
            for objective in wanted:
                frame[f"{objective.name}_measured"] = measured_as(objective, target, taken)
    return frame


def _judged(plan: Plan, frame: pd.DataFrame) -> pd.DataFrame:
    """With the best known value of each objective, what limits that breaks, and which networks are on the front."""
    frame = frame.drop(columns=[c for c in (*(o.name for o in plan.objectives), "violation", "pareto") if c in frame])
    for objective in plan.objectives:
        # The strongest kind of value that there is; a network without one is on no front, whatever was predicted of it.
        kinds = (f"{objective.name}_{source}" for source in ("measured", "evaluated", "predicted"))
        frame[objective.name] = frame[next(kind for kind in kinds if kind in frame)]
    final = frame[[o.name for o in plan.objectives]].to_numpy(dtype=float)
    frame["violation"] = violations(final, plan.objectives).sum(1)
    good = (frame["violation"] == 0) & ~np.isnan(final).any(1) & (frame["kind"] == "front")
    frame["pareto"] = False
    frame.loc[good, "pareto"] = non_dominated_mask(minimised(final[good], plan.objectives))
    return frame


def _measured(plan: Plan, frame: pd.DataFrame) -> list[Objective]:
    """The objectives that were measured."""
    return [o for o in plan.predicted if f"{o.name}_measured" in frame]


def _summary(plan: Plan, frame: pd.DataFrame, number: int) -> list[dict[str, Any]]:
    """How far the predictions of a round held, per measured objective; empty where nothing was measured."""
    rows = frame[(frame["round"] == number) & (frame["kind"] == "front")]
    told: list[dict[str, Any]] = []
    for objective in _measured(plan, frame):
        pair = rows[[f"{objective.name}_predicted", f"{objective.name}_measured"]].dropna().to_numpy(dtype=float)
        if not len(pair):
            continue
        error = pair[:, 0] / pair[:, 1] - 1.0
        excess = violations(pair[:, 1:], (objective,)).sum(1)
        told.append(
            {
                "round": number,
                "objective": objective.name,
                "networks": len(pair),
                "mean_error": float(np.abs(error).mean()),
                "bias": float(error.mean()),
                "broken": int((excess > 0).sum()),
                "largest_excess": float(excess.max()),
            }
        )
    return told


def _corrected(plan: Plan, state: _State) -> _State:
    """Predictors of measured costs corrected by all measurements so far; limits ask a quantile of them."""
    bound, objectives = dict(state.bound), []
    archs = np.stack([arch_row(text) for text in state.frame["arch"]]).astype(plan.space.dtype)
    measured = {o.name for o in _measured(plan, state.frame)}
    for objective in plan.objectives:
        name = objective.name
        if name in measured:
            first = bound[name]
            base = first.corrected if isinstance(first, CorrectedPredictor) else first
            values = state.frame[f"{name}_measured"].to_numpy(dtype=float)
            bound[name] = CorrectedPredictor(base, plan.space, archs, values)
            if objective.limited and objective.quantile is None:
                quantile = plan.config.verify.quantile
                objective = replace(objective, quantile=1.0 - quantile if objective.maximise else quantile)
        objectives.append(objective)
    return _State(state.frame, bound, tuple(objectives))


def _again(plan: Plan, run: Run, state: _State, report: Reporter, number: int) -> Archs:
    """Networks of the fronts by corrected predictions that were not verified yet."""
    known = np.stack([arch_row(text) for text in state.frame["arch"]]).astype(plan.space.dtype)
    good = state.frame["violation"].to_numpy() == 0
    if plan.config.evaluator.samples and not plan.gradient:
        corrected = replace(plan, objectives=state.objectives)
        fronts = predicted_fronts(corrected, run, state.bound, report, known[good], number)
    else:
        fronts = [Front("", state.objectives, _reselected(plan, run, state))]
    return _spread(plan, fronts, state.bound, known)


def _reselected(plan: Plan, run: Run, state: _State) -> Archs:
    """The front among everything that the search evaluated, by corrected predictions of the costs."""
    rows = run.archive.evaluations("search")
    rows = rows[rows["status"] == 0]
    archs = np.stack([arch_row(text) for text in rows["arch"]]).astype(plan.space.dtype)
    values, limits = np.full((2, len(archs), len(state.objectives)), np.nan)
    for column, objective in enumerate(state.objectives):
        if objective.name in state.bound:
            estimate = state.bound[objective.name].predict(archs)
            values[:, column] = limits[:, column] = estimate.mean
            if objective.quantile is not None:
                limits[:, column] = estimate.quantile(objective.quantile)
        else:
            values[:, column] = limits[:, column] = rows[objective.name].to_numpy(dtype=float)
    good = np.flatnonzero((violations(limits, state.objectives).sum(1) == 0) & ~np.isnan(values).any(1))
    front: Archs = archs[good[non_dominated_mask(minimised(values[good], state.objectives))]]
    return np.unique(front, axis=0)
