"""The procedure of an experiment, from configuration to report.

    plan -> calibrate targets -> check limits -> train supernet -> sample and fit the accuracy predictor -> search
         -> verify (evaluate and measure the front) -> select -> stages -> test once -> report

Where the configuration names networks, they go through the stages and nothing is searched.

Every step finds what an earlier process finished and goes on from there, so that a run that was killed at any moment
ends, resumed, as if it had not been. Copy this file to change the procedure: each step is one function of a `Plan` and
a `Run`.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hardware_profiles.paths import sha256_of, write_text
from nasbench.archive import arch_row
from nasbench.config import Config
from nasbench.costs import bind_costs, check_feasible
from nasbench.evaluators.base import Evaluator
from nasbench.evaluators.table import TableEvaluator
from nasbench.execution.choice import executed
from nasbench.objectives import minimised, violations
from nasbench.pareto import hypervolume, hypervolume_box
from nasbench.pipeline import run_stages
from nasbench.plan import Plan, make_plan
from nasbench.progress import Reporter
from nasbench.run import Run, RunView, load_run, now, peak_memory_mb
from nasbench.searches import Front, evaluated_search, fit_predictors, gradient_search, predicted_fronts
from nasbench.selection import named_networks, select
from nasbench.starts import given_networks, searched
from nasbench.verification import verify
from search_spaces import UserError

if TYPE_CHECKING:
    from nasbench.training import Update
    from search_spaces.supernet import Supernet

SUPERNET = "supernet.safetensors"


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
    try:
        data = {name: sha256_of(file) for part in plan.evaluators for name, file in part.files.items()}
        if images := plan.task.fingerprint:
            data["task"] = images
        run.freeze(data)
        where_text = str(where.resolve()) if where else ""
        run.mark(status="running", where=where_text, threads=torch.get_num_threads(), error="")
    except BaseException:
        run.close()
        raise
    try:
        _procedure(plan, run, where, report)
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


def _procedure(plan: Plan, run: Run, where: Path | None, report: Reporter) -> None:
    from nasbench.report import write_report

    # Made first, trained later: missing data and options that make no sense are told before anything costs time.
    for note in plan.notes:
        report.line(note)
    run.mark(notes=list(plan.notes))
    if plan.config.networks:
        starts = given_networks(plan, where)
        run_stages(plan, run, starts, None, report, first="given")
    else:
        _search(plan, run, where, report)
    run.mark(peak_memory_mb=max(peak_memory_mb(), run.state.get("peak_memory_mb", 0.0)))
    run.mark(status="finished", finished=now())
    with report.phase("report"):
        write_report(run.path)


def _search(plan: Plan, run: Run, where: Path | None, report: Reporter) -> None:
    """From the supernet to the stages of the networks that were chosen."""
    supernet = new_supernet(plan) if plan.needs_supernet else None
    if supernet is not None and plan.config.supernet.weights and not (run.path / SUPERNET).is_file():
        load_published(plan, supernet)
    local = plan.make_evaluator(supernet, run.path)
    with closing(executed(plan, local, run.path, where)) as evaluator:
        costs = bind_costs(plan, run, report)
        start = check_feasible(plan, costs, report)
        if supernet is not None:
            train(plan, run, supernet, report)
        bound = costs
        if plan.gradient:
            fronts = [Front("", plan.objectives, gradient_search(plan, run, evaluator, costs, report))]
        elif plan.config.evaluator.samples:
            bound = fit_predictors(plan, run, evaluator, costs, report) | costs
            fronts = predicted_fronts(plan, run, bound, report, start)
        else:
            fronts = [Front("", plan.objectives, evaluated_search(plan, run, evaluator, costs, report, start))]
        verified = verify(plan, run, fronts, evaluator, bound, report)
        run.mark(hypervolume=front_quality(plan, local, verified))
    chosen = choose(plan, verified)
    source = local if hasattr(local, "extract") else None
    run_stages(plan, run, searched(plan, chosen, source), getattr(source, "network", None), report)


def new_directory(name: str) -> Path:
    """A path below `runs/` that is not taken: the experiment's name and the time."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, again = Path("runs") / stem, 1
    while path.exists():
        again += 1
        path = Path("runs") / f"{stem}-{again}"
    return path


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


def front_quality(plan: Plan, evaluator: Evaluator, verified: pd.DataFrame) -> dict[str, Any]:
    """Hypervolume of the verified front as a share of the best there is, where a table knows all there is; else none.

    Both are taken from the table's worst value of each objective.
    """
    if not isinstance(evaluator, TableEvaluator) or (every := evaluator.values_of(plan.objectives)) is None:
        return {}
    feasible = every[(violations(every, plan.objectives) == 0).all(axis=1)]
    found = verified.loc[verified["pareto"], [o.name for o in plan.objectives]].to_numpy(dtype=float)
    worst = hypervolume_box(minimised(every, plan.objectives))[1]
    best = hypervolume(minimised(feasible, plan.objectives), worst)
    share = hypervolume(minimised(found, plan.objectives), worst) / best if best else 1.0
    return {"share": share, "of": f"the front of all {len(every):,} rows of {Path(evaluator.table.source).name}"}


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
