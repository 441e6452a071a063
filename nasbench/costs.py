"""What networks cost: calibrated targets, a bound predictor per cost objective, and limits that can be kept."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hardware_profiles.paths import atomic
from nasbench.feasibility import check_limits
from nasbench.objectives import Objective
from nasbench.plan import Plan
from nasbench.planning.sections import naming
from nasbench.progress import Reporter
from nasbench.registry import resolve
from nasbench.run import Run
from predictors import BoundPredictor, Calibration, calibrate, predictor_for
from predictors.calibration import kept_calibration
from predictors.choice import TABLES, table_file
from predictors.derived import FunctionCost, Throughput
from predictors.training_memory import TrainingMemoryCount
from search_spaces.base import Archs

_FROM_LATENCY = ("latency_ms", "throughput_ips")
_CALIBRATED = (*_FROM_LATENCY, "energy_mj")


def bind_costs(plan: Plan, run: Run, report: Reporter) -> dict[str, BoundPredictor]:
    """A bound predictor per cost objective.

    Targets that can be measured are calibrated first, which is frozen in the run; so is a calibration of another target
    that lies in the user's directory, and any file that a predictor is made of.
    """
    calibrations: dict[str, Calibration] = {}
    predictors = {n: _frozen(p, n, plan, run) for n, p in plan.config.targets.predictors.items()}
    for name in sorted({o.target for o in plan.predicted if o.metric in _CALIBRATED}):
        target = plan.targets[name]
        named = predictors.get(name, "auto")
        if named not in ("auto", "operator_model", "scale", "roofline"):
            continue
        latency = any(o.target == name and o.metric in _FROM_LATENCY for o in plan.predicted)
        file = run.directory("calibration") / f"{name.replace(':', '-')}.json"
        given = plan.config.targets.calibration.get(name)
        if file.is_file():
            calibrations[name] = Calibration.load(file)
        elif given:
            calibrations[name] = Calibration.load(Path(given))
            calibrations[name].save(file)
        elif (not target.profile.local or named in ("scale", "roofline")) and (kept := kept_calibration(target)):
            if named in ("auto", kept.models["latency_ms"].method):
                report.line(f"{name}: {kept.basis('latency_ms')}")
            calibrations[name] = kept
            kept.save(file)
        elif (
            named != "roofline"
            and latency
            and plan.measurable(target)
            and (target.profile.local or target.profile.meter is not None)
        ):
            with report.phase(f"calibrate {name}") as phase, run.phase(f"calibrate {name}", "networks") as done:
                started = datetime.now(UTC)
                calibration = calibrate(
                    target,
                    plan.space,
                    networks=plan.config.targets.calibration_networks,
                    progress=phase.steps("networks"),
                )
                fresh = calibration.created >= started
                done[0] = len(calibration.rows) + len(calibration.failures) if fresh else 0
                phase.done(("" if fresh else "kept from an earlier run: ") + calibration_summary(calibration))
                calibration.save(file)
                calibrations[name] = calibration
    for name, calibration in calibrations.items():
        if calibration.warning:
            report.line(f"warning: {name}: {calibration.warning}")
    return {o.name: bound_cost(plan, o, calibrations, predictors) for o in plan.predicted}


def bound_cost(
    plan: Plan, objective: Objective, calibrations: Mapping[str, Calibration], predictors: Mapping[str, str]
) -> BoundPredictor:
    """What predicts one objective on the plan's space."""
    metric = objective.metric
    if ":" in metric:
        return FunctionCost(plan.space, resolve("objective", metric, plan.where), metric)
    if metric == "training_memory_bytes":
        return TrainingMemoryCount(objective.batch, objective.method).bind(plan.space)
    target = plan.targets.get(objective.target)
    if metric == "throughput_ips":
        assert target is not None
        latency = replace(objective, metric="latency_ms")
        return Throughput(bound_cost(plan, latency, calibrations, predictors), target.batch)
    spec = _predictor_of(objective, predictors)
    space = plan.space if spec.startswith(TABLES) else None  # what lies in the user's directory is not taken unasked
    return predictor_for(target, metric, calibrations.get(objective.target), spec, space).bind(plan.space)


def _frozen(predictor: str, target: str, plan: Plan, run: Run) -> str:
    """The predictor, from the run's own copy of the file that it is made of.

    Raises:
        UserError: the file, which is not copied then, gives no predictor of that target on the space.
    """
    if not predictor.startswith(TABLES):
        return predictor
    kind, file, column = table_file(predictor)
    copy = run.directory("calibration") / f"{target.replace(':', '-')}{Path(file).suffix}"
    if not copy.is_file():
        with naming(f"targets.predictors: {target}"):
            predictor_for(plan.targets[target], "latency_ms", predictor=predictor, space=plan.space).bind(plan.space)
        with atomic(copy) as temporary:
            shutil.copyfile(file, temporary)
    return f"{kind}:{copy}" + (f"@{column}" if column else "")


def _predictor_of(objective: Objective, predictors: Mapping[str, str]) -> str:
    """The predictor that the experiment names for an objective; counts need none."""
    return predictors.get(objective.target, "auto") if objective.metric in ("latency_ms", "energy_mj") else "auto"


def calibration_summary(calibration: Calibration) -> str:
    """One line on how good a calibration is, by its figures of networks left out."""
    quality = calibration.models["latency_ms"].quality
    rank = f", Spearman {quality['spearman']:.3f}" if "spearman" in quality else ""
    return f"{len(calibration.rows)} networks, left-out ones within 10 %: {quality['within_10_percent']:.0%}{rank}"


def check_feasible(plan: Plan, costs: dict[str, BoundPredictor], report: Reporter) -> Archs | None:
    """Refuse limits on costs that no architecture can keep; `(1, K)` that keeps them all, None without such limits.

    Raises:
        UserError: naming the limit and the tightest achievable value.
    """
    if not any(o.limited for o in plan.predicted):
        return None
    with report.phase("check limits"):
        found = check_limits(plan.space, plan.predicted, costs, seed=plan.config.seed)
    return None if found.arch is None else found.arch[None]
