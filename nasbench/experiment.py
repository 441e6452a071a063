"""The procedure of an experiment, from configuration to report.

    plan -> calibrate targets -> check limits -> train supernet -> sample and fit the accuracy predictor -> search
         -> verify (evaluate and measure the front) -> select -> stages -> test once -> report

Every step finds what an earlier process finished and goes on from there, so that a run that was killed at any moment
ends, resumed, as if it had not been. Copy this file to change the procedure: each step is one function of a `Plan` and
a `Run`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from hardware_profiles.paths import atomic, write_text
from nasbench.archive import arch_row, arch_text
from nasbench.config import Config
from nasbench.evaluators.base import Evaluator, Proposals, Status
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.evaluators.recorded import RecordedEvaluator
from nasbench.feasibility import check_limits
from nasbench.objectives import Objective, minimised, violations
from nasbench.pareto import ParetoArchive, non_dominated_mask
from nasbench.pipeline import measure, run_stages
from nasbench.plan import Plan, make_plan
from nasbench.progress import Reporter
from nasbench.run import Run, RunView, load_run, load_state, peak_memory_mb, save_state
from nasbench.search import search
from nasbench.selection import named_networks, select
from nasbench.strategies.base import GradientStrategy, Strategy
from predictors import BoundPredictor, Calibration, calibrate, predictor_for
from predictors.calibration import kept_calibration
from predictors.choice import TABLES
from search_spaces import SearchSpace, UserError

if TYPE_CHECKING:
    from nasbench.training import Update
    from search_spaces.supernet import Supernet

SUPERNET, MIXTURE = "supernet.safetensors", "mixture.safetensors"
SEARCH, FRONT = "search.npz", "front.csv"


def run_experiment(
    config: Config,
    path: Path | None = None,
    *,
    resume: bool = False,
    where: Path | None = None,
    report: Reporter | None = None,
) -> RunView:
    """Run an experiment to its end, or continue one.

    Args:
        path: the run directory; by default a new one below `runs/`. With `resume`, an existing one.
        where: the directory of the experiment file, for user modules and relative paths.
        report: where progress is told; silent by default.

    Returns:
        The finished run, open for reading.

    Raises:
        UserError: anything the user can mend; what was finished stays, and `resume` goes on from it.
    """
    import torch

    from nasbench.training.processes import launched_rank

    if launched_rank():
        raise UserError("a run belongs to the launcher's first process; the others call nasbench.experiment.assist")
    report = report or Reporter(quiet=True)
    plan = make_plan(config, where)
    if config.threads:
        torch.set_num_threads(config.threads)
    if resume:
        if path is None:
            raise UserError("resume needs the directory of the run")
        run = Run.resume(path)
    else:
        run = Run.create(path or new_directory(config.name), plan.config)
    run.mark(status="running", where=str(where.resolve()) if where else "", threads=torch.get_num_threads(), error="")
    try:
        _procedure(plan, run, report)
    except KeyboardInterrupt:
        run.mark(status="interrupted")
        raise
    except Exception as error:
        run.mark(status="failed", error=str(error))
        raise
    finally:
        run.close()
    return load_run(run.path)


def assist(config: Config, where: Path | None = None) -> None:
    """What all but the first process of torch's launcher do of a run: they train the supernet along, and write nothing.

    Raises:
        UserError: anything the user can mend.
    """
    import torch

    from nasbench.training import train_supernet

    plan = make_plan(config, where)
    if config.threads:
        torch.set_num_threads(config.threads)
    if plan.needs_supernet and plan.training_options["epochs"]:
        train_supernet(new_supernet(plan), plan.space, plan.task, **plan.training_options, seed=plan.config.seed)


def _procedure(plan: Plan, run: Run, report: Reporter) -> None:
    from nasbench.report import write_report

    # Made first, trained later: missing data and options that make no sense are told before anything costs time.
    for note in plan.notes:
        report.line(f"targets: {note}")
    run.mark(notes=list(plan.notes))
    supernet = new_supernet(plan) if plan.needs_supernet else None
    if supernet is not None and plan.config.supernet.weights and not (run.path / SUPERNET).is_file():
        load_published(plan, supernet)
    evaluator = plan.make_evaluator(supernet)
    costs = bind_costs(plan, run, report)
    check_feasible(plan, costs, report)
    if supernet is not None:
        train(plan, run, supernet, report)
    bound = costs
    if plan.gradient:
        front = gradient_search(plan, run, evaluator, costs, report)
    elif plan.config.evaluator.samples:
        bound = fit_predictors(plan, run, evaluator, costs, report) | costs
        front = predicted_search(plan, run, bound, report)
    else:
        front = evaluated_search(plan, run, evaluator, costs, report)
    verified = verify(plan, run, front, evaluator, bound, report)
    chosen = choose(plan, verified)
    run_stages(plan, run, chosen, evaluator if supernet else None, report)
    run.mark(peak_memory_mb=max(peak_memory_mb(), run.state.get("peak_memory_mb", 0.0)))
    run.mark(status="finished", finished=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    with report.phase("report"):
        write_report(run.path)


def new_directory(name: str) -> Path:
    """A path below `runs/` that is not taken: the experiment's name and the time."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, again = Path("runs") / stem, 1
    while path.exists():
        again += 1
        path = Path("runs") / f"{stem}-{again}"
    return path


def bind_costs(plan: Plan, run: Run, report: Reporter) -> dict[str, BoundPredictor]:
    """A bound predictor per cost objective.

    Targets that can be measured are calibrated first, which is frozen in the run; so is a calibration of another target
    that lies in the user's directory, and any file that a predictor is made of.
    """
    calibrations: dict[str, Calibration] = {}
    predictors = {n: _frozen(p, n, run) for n, p in plan.config.targets.predictors.items()}
    for name in sorted({o.target for o in plan.predicted if o.metric in ("latency_ms", "energy_mj")}):
        target = plan.targets[name]
        if predictors.get(name, "auto") not in ("auto", "operator_model", "scale"):
            continue
        latency = any(o.target == name and o.metric == "latency_ms" for o in plan.predicted)
        file = run.directory("calibration") / f"{name.replace(':', '-')}.json"
        given = plan.config.targets.calibration.get(name)
        if file.is_file():
            calibrations[name] = Calibration.load(file)
        elif given:
            calibrations[name] = Calibration.load(Path(given))
            calibrations[name].save(file)
        elif (not target.profile.local or predictors.get(name) == "scale") and (kept := kept_calibration(target)):
            report.line(f"{name}: {kept.basis('latency_ms')}")
            calibrations[name] = kept
            kept.save(file)
        elif latency and plan.measurable(target) and (target.profile.local or target.profile.meter is not None):
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
    return {
        o.name: predictor_for(
            plan.targets.get(o.target), o.metric, calibrations.get(o.target), _predictor_of(o, predictors)
        ).bind(plan.space)
        for o in plan.predicted
    }


def _frozen(predictor: str, target: str, run: Run) -> str:
    """The predictor, from the run's own copy of the file that it is made of."""
    if not predictor.startswith(TABLES):
        return predictor
    kind, _, file = predictor.partition(":")
    copy = run.directory("calibration") / f"{target.replace(':', '-')}{Path(file).suffix}"
    if not copy.is_file():
        with atomic(copy) as temporary:
            shutil.copyfile(file, temporary)
    return f"{kind}:{copy}"


def _predictor_of(objective: Objective, predictors: Mapping[str, str]) -> str:
    """The predictor that the experiment names for an objective; counts need none."""
    return predictors.get(objective.target, "auto") if objective.metric in ("latency_ms", "energy_mj") else "auto"


def calibration_summary(calibration: Calibration) -> str:
    """One line on how good a calibration is, by its figures of networks left out."""
    quality = calibration.models["latency_ms"].quality
    rank = f", Spearman {quality['spearman']:.3f}" if "spearman" in quality else ""
    return f"{len(calibration.rows)} networks, left-out ones within 10 %: {quality['within_10_percent']:.0%}{rank}"


def check_feasible(plan: Plan, costs: dict[str, BoundPredictor], report: Reporter) -> None:
    """Refuse limits on costs that no architecture can keep.

    Raises:
        UserError: naming the limit and the tightest achievable value.
    """
    if any(o.limit is not None for o in plan.predicted):
        with report.phase("check limits"):
            check_limits(plan.space, plan.predicted, costs, seed=plan.config.seed)


def new_supernet(plan: Plan) -> Supernet:
    """The supernet of the space, initialised from the run's seed."""
    import torch

    torch.manual_seed(plan.config.seed)
    return plan.space.supernet()


def load_published(plan: Plan, supernet: Supernet) -> None:
    """Start from published weights."""
    from search_spaces import load_weights

    section = plan.config.supernet
    load_weights(supernet, str(section.weights), keep=section.keep)


def train(plan: Plan, run: Run, supernet: Supernet, report: Reporter) -> None:
    """Train the supernet in place, from its checkpoint as far as that goes."""
    from nasbench.training import load_weights, save_weights, train_supernet

    frozen = run.path / SUPERNET
    if plan.config.supernet.checkpoint and not frozen.is_file():
        load_weights(supernet, Path(plan.config.supernet.checkpoint))
    if plan.training_options["epochs"] == 0:
        if frozen.is_file():
            load_weights(supernet, frozen)
        else:
            save_weights(frozen, supernet)
        return
    with report.phase("train supernet") as phase, run.phase("train supernet", "steps") as done:
        show = phase.training()

        def progress(update: Update) -> None:
            done[0] += 1
            show(update)

        history = train_supernet(
            supernet,
            plan.space,
            plan.task,
            **plan.training_options,
            seed=plan.config.seed,
            checkpoint=run.path / SUPERNET,
            log_dir=run.path / "tensorboard" if plan.config.supernet.tensorboard else None,
            progress=progress,
        )
        write_text(run.path / "training.csv", pd.DataFrame(history).to_csv(index=False))


def fit_predictors(
    plan: Plan, run: Run, evaluator: Evaluator, costs: dict[str, BoundPredictor], report: Reporter
) -> dict[str, BoundPredictor]:
    """Evaluate a sample of architectures and fit a predictor per evaluated objective to it."""
    from predictors.accuracy import AccuracyPredictor

    archs = spread_sample(plan.space, plan.config.evaluator.samples, plan.config.seed, costs)
    proposals = Proposals(np.arange(len(archs), dtype=np.int64), archs)
    values, ok = _evaluate(plan, run, "sample", evaluator, costs, proposals, report)
    fitted: dict[str, AccuracyPredictor] = {}
    for column, objective in enumerate(plan.objectives):
        if objective.metric not in plan.evaluator_metrics:
            continue
        file = run.path / f"predictor-{objective.name}.safetensors"
        if file.is_file():
            fitted[objective.name] = AccuracyPredictor.load(file, plan.space)
            continue
        title = f"fit {objective.name} predictor"
        with report.phase(title) as phase, run.phase(title, "architectures") as done:
            predictor = AccuracyPredictor(plan.space, plan.config.seed).fit(archs[ok], values[ok, column])
            predictor.save(file)
            fitted[objective.name], done[0] = predictor, int(ok.sum())
            phase.done(f"held-out Kendall tau {predictor.report['kendall_tau']:.2f}")
    write_text(run.path / "predictors.json", json.dumps({k: p.report for k, p in fitted.items()}, indent=2) + "\n")
    return dict(fitted)


def spread_sample(
    space: SearchSpace, n: int, seed: int, costs: dict[str, BoundPredictor]
) -> np.ndarray[Any, np.dtype[Any]]:
    """`n` distinct architectures spread evenly over the logarithm of the first cost (MACs where there is none).

    Uniform knobs crowd in the middle of the cost range, while a front needs its ends: half are uniform, half are picked
    from a larger uniform sample at even steps of log cost.
    """
    rng = np.random.default_rng([seed, 1])
    pool = np.unique(np.vstack([space.sample(64 * n, rng), *(a[None] for a in space.references.values())]), axis=0)
    pool = pool[space.permits(pool)]
    if len(pool) <= n:
        return rng.permutation(pool)
    predictor = next(iter(costs.values()), None) or predictor_for("", "macs").bind(space)
    log_cost = np.log(np.maximum(predictor.predict(pool).mean, 1e-12))
    chosen = set(rng.choice(len(pool), n // 2, replace=False).tolist())
    order = np.argsort(log_cost, kind="stable")
    for position in np.linspace(log_cost.min(), log_cost.max(), n - len(chosen)):
        for candidate in order[np.argsort(np.abs(log_cost[order] - position), kind="stable")]:
            if int(candidate) not in chosen:
                chosen.add(int(candidate))
                break
    return pool[rng.permutation(sorted(chosen))]


def make_strategy(plan: Plan) -> Strategy:
    """The ask/tell strategy of the plan, in its initial state."""
    references = list(plan.references.values()) if plan.config.strategy.seed_references else []
    initial = np.stack(references) if references else None
    kind = cast(type[Strategy], plan.strategy)
    return kind(plan.space, plan.config.seed, initial, **plan.strategy_options)


def predicted_search(
    plan: Plan, run: Run, bound: dict[str, BoundPredictor], report: Reporter
) -> np.ndarray[Any, np.dtype[Any]]:
    """Search on predictions; `(n, K)` architectures of the predicted front. Its state is saved every few seconds."""
    strategy, archive = make_strategy(plan), ParetoArchive(plan.space, len(plan.objectives))
    file = run.path / SEARCH
    if file.is_file():
        state = load_state(file)
        strategy.load_state_dict(state["strategy"])
        archive.load_state_dict(state["archive"])
    total, earlier = plan.config.strategy.evaluations, archive.evaluated
    batch = plan.config.strategy.batch or strategy.preferred_batch
    saved = time.monotonic()

    def save() -> None:
        save_state(file, {"strategy": strategy.state_dict(), "archive": archive.state_dict()})

    if archive.evaluated < total:
        with report.phase("search") as phase, run.phase("search", "predicted architectures") as done:
            progress = phase.progress("architectures")

            def on_batch(*_: Any) -> None:
                nonlocal saved
                done[0] = archive.evaluated - earlier
                progress(archive.evaluated, total)
                if time.monotonic() - saved > 5:
                    save()
                    saved = time.monotonic()

            search(
                strategy,
                PredictedEvaluator(plan.objectives, bound),
                plan.objectives,
                evaluations=total,
                batch=batch,
                archive=archive,
                on_batch=on_batch,
            )
            save()
            phase.done(f"{archive.evaluated:,} architectures proposed, {len(archive)} on the predicted front")
    if not len(archive):
        raise nothing_found(archive, plan.objectives)
    return archive.archs


def nothing_found(archive: ParetoArchive, objectives: tuple[Objective, ...]) -> UserError:
    """Says that a search ended without a network to show, and how near to the limits it came."""
    if archive.failed == archive.evaluated:
        return UserError(
            f"all {archive.evaluated} evaluations failed; `message` in the archive's evaluations says why each did"
        )
    nearest = minimised(archive.nearest[None], objectives)[0]
    values = ", ".join(
        f"{o.name} {v:.4g}" + ("" if o.limit is None else f" (limit {o.limit:.4g})")
        for o, v in zip(objectives, nearest, strict=True)
    )
    return UserError(
        f"none of {archive.evaluated} architectures keeps all limits; the nearest has {values}. Loosen a limit, or "
        "raise strategy.evaluations"
    )


def evaluated_search(
    plan: Plan, run: Run, evaluator: Evaluator, costs: dict[str, BoundPredictor], report: Reporter
) -> np.ndarray[Any, np.dtype[Any]]:
    """Search with every proposal really evaluated; a resumed run replays the recorded rows through the strategy."""
    archive = ParetoArchive(plan.space, len(plan.objectives))
    total = plan.config.strategy.evaluations
    with report.phase("search") as phase, run.phase("search", "evaluations") as done:
        progress = phase.progress("evaluations")
        recorded = _recorded(plan, run, evaluator, costs, "search")
        search(
            make_strategy(plan),
            recorded,
            plan.objectives,
            evaluations=total,
            batch=plan.config.strategy.batch or 16,
            archive=archive,
            on_batch=lambda *_: progress(archive.evaluated, total),
        )
        done[0] = recorded.evaluated
        phase.done(f"{archive.evaluated} architectures evaluated, {len(archive)} on the front")
    if not len(archive):
        raise nothing_found(archive, plan.objectives)
    return archive.archs


def gradient_search(
    plan: Plan, run: Run, evaluator: Evaluator, costs: dict[str, BoundPredictor], report: Reporter
) -> np.ndarray[Any, np.dtype[Any]]:
    """Search by gradient on the mixture supernet, from its checkpoint on; evaluate what it found like anything else."""
    import torch

    file = run.path / SEARCH
    if file.is_file():
        archs = load_state(file)["archs"]
    else:
        with report.phase("search") as phase, run.phase("search", "architectures") as done:
            torch.manual_seed(plan.config.seed)
            kind = cast(type[GradientStrategy], plan.strategy)
            strategy = kind(plan.space, plan.config.seed, **plan.strategy_options)
            archs = strategy.run(
                plan.space.mixture_supernet(),
                plan.task,
                costs,
                plan.objectives,
                checkpoint=run.path / MIXTURE,
                progress=phase.training(),
            ).archs
            save_state(file, {"archs": archs})
            done[0] = len(archs)
    proposals = Proposals(np.arange(len(archs), dtype=np.int64), archs)
    values, ok = _evaluate(plan, run, "search", evaluator, costs, proposals, report)
    mask = np.flatnonzero(ok)[non_dominated_mask(minimised(values[ok], plan.objectives))]
    return archs[mask]


def _recorded(
    plan: Plan,
    run: Run,
    evaluator: Evaluator,
    costs: dict[str, BoundPredictor],
    phase_name: str,
    on_row: Callable[[int], None] | None = None,
) -> RecordedEvaluator:
    """All objectives of the plan, committed row by row under the phase's name."""
    predicted = PredictedEvaluator(plan.predicted, costs) if plan.predicted else None
    return RecordedEvaluator(plan.objectives, evaluator, predicted, run.archive, phase_name, on_row)


def _evaluate(
    plan: Plan,
    run: Run,
    phase_name: str,
    evaluator: Evaluator,
    costs: dict[str, BoundPredictor],
    proposals: Proposals,
    report: Reporter,
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Record all objectives of a list of architectures; values `(n, M)` and which rows are good."""
    with report.phase(f"evaluate {phase_name}") as phase, run.phase(f"evaluate {phase_name}", "evaluations") as done:
        progress = phase.progress("architectures")
        show = lambda n: progress(n, len(proposals))  # noqa: E731
        recorded = _recorded(plan, run, evaluator, costs, phase_name, show)
        result = recorded.evaluate(proposals)
        done[0] = recorded.evaluated
        ok = result.status == Status.OK
        if not ok.any():
            reason = next(iter(result.messages.values()), "no reason given")
            raise UserError(f"all {len(ok)} evaluations failed; the first: {reason}")
        if failed := int((~ok).sum()):
            phase.done(f"{failed} of {len(ok)} evaluations failed: {next(iter(result.messages.values()), '')}")
    return result.values, ok


def verify(
    plan: Plan,
    run: Run,
    front: np.ndarray[Any, np.dtype[Any]],
    evaluator: Evaluator,
    bound: dict[str, BoundPredictor],
    report: Reporter,
) -> pd.DataFrame:
    """Evaluate and measure a spread of the found front, and the references; `front.csv`.

    Columns: `name`, `kind` (front or reference), `arch`; per objective `NAME_predicted`, `NAME_evaluated` and
    `NAME_measured` as far as there are such values, and `NAME`, the best known of them; `violation`; `pareto`.
    """
    count = plan.config.evaluator.verify
    estimates = {name: predictor.predict(front).mean for name, predictor in bound.items()}
    if len(front) > count:
        known = tuple(o for o in plan.objectives if o.name in estimates)
        if known:
            chosen = select(np.stack([estimates[o.name] for o in known], axis=1), known, "spread", count)
        else:
            chosen = np.linspace(0, len(front) - 1, count).round().astype(int).tolist()
        front = front[chosen]
    references = plan.references
    archs = np.vstack([front, *(a[None] for a in references.values())])
    frame = pd.DataFrame(
        {
            "name": [f"front-{i:02d}" for i in range(len(front))] + list(references),
            "kind": ["front"] * len(front) + ["reference"] * len(references),
            "arch": [arch_text(a) for a in archs],
        }
    )
    for name, predictor in bound.items():
        frame[f"{name}_predicted"] = predictor.predict(archs).mean
    proposals = Proposals(np.arange(len(archs), dtype=np.int64), archs)
    values, _ = _evaluate(
        plan, run, "verify", evaluator, {o.name: bound[o.name] for o in plan.predicted}, proposals, report
    )
    for column, objective in enumerate(plan.objectives):
        if objective.metric in plan.evaluator_metrics:
            frame[f"{objective.name}_evaluated"] = values[:, column]
    for name, target in plan.targets.items():
        latency = [o.name for o in plan.predicted if o.metric == "latency_ms" and o.target == name]
        if latency and plan.measurable(target):
            networks = dict(zip(frame["name"], archs, strict=True))
            measured = measure(plan, run, target, networks, "verify", report)
            for column_name in latency:
                frame[f"{column_name}_measured"] = [measured[n] for n in frame["name"]]
    for objective in plan.objectives:
        # The strongest kind of value that there is; a network without one is on no front, whatever was predicted of it.
        kinds = (f"{objective.name}_{source}" for source in ("measured", "evaluated", "predicted"))
        frame[objective.name] = frame[next(kind for kind in kinds if kind in frame)]
    final = frame[[o.name for o in plan.objectives]].to_numpy(dtype=float)
    frame["violation"] = violations(final, plan.objectives).sum(1)
    good = (frame["violation"] == 0) & ~np.isnan(final).any(1) & (frame["kind"] == "front")
    frame["pareto"] = False
    frame.loc[good, "pareto"] = non_dominated_mask(minimised(final[good], plan.objectives))
    write_text(run.path / FRONT, frame.to_csv(index=False))
    return frame


def choose(plan: Plan, verified: pd.DataFrame) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Name and architecture of the networks that go through the stages.

    Raises:
        UserError: nothing within the limits, or an unknown name.
    """
    section = plan.config.selection
    if section.rule == "named":
        return named_networks(plan.space, section.networks)
    front = verified[verified["pareto"]]
    values = front[[o.name for o in plan.objectives]].to_numpy(dtype=float)
    rows = select(values, plan.objectives, section.rule, section.count, section.objective)
    return {front.iloc[i]["name"]: arch_row(front.iloc[i]["arch"]).astype(plan.space.dtype) for i in rows}
