"""The searches of a run: on predictions, with every proposal evaluated, and by gradient; each can be resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from hardware_profiles.paths import write_text
from nasbench.asynchronous import asynchronous_search
from nasbench.cross_device import searches
from nasbench.evaluators.base import Evaluator, Proposals, Status
from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.evaluators.recorded import RecordedEvaluator
from nasbench.objectives import Objective, minimised
from nasbench.pareto import ParetoArchive, non_dominated_mask
from nasbench.plan import Plan
from nasbench.progress import Reporter
from nasbench.run import Run, load_state, save_state
from nasbench.sampling import limited_space
from nasbench.search import search
from nasbench.selection import nearest_each
from nasbench.strategies.base import Costs, GradientStrategy, Strategy
from predictors import BoundPredictor, predictor_for
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

MIXTURE = "mixture.safetensors"
SEARCH = "search.npz"


def fit_predictors(
    plan: Plan, run: Run, evaluator: Evaluator, costs: dict[str, BoundPredictor], report: Reporter
) -> dict[str, BoundPredictor]:
    """Evaluate a sample of architectures and fit a predictor per evaluated objective to it."""
    from predictors.accuracy import AccuracyPredictor

    archs = spread_sample(plan.space, plan.config.evaluator.samples, plan.config.seed, costs)
    proposals = Proposals(np.arange(len(archs), dtype=np.int64), archs)
    values, ok = evaluate(plan, run, "sample", evaluator, costs, proposals, report)
    fitted: dict[str, AccuracyPredictor] = {}
    for column, objective in enumerate(plan.objectives):
        if objective in plan.predicted:
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
    chosen = np.zeros(len(pool), dtype=bool)
    chosen[rng.choice(len(pool), n // 2, replace=False)] = True
    order = np.argsort(log_cost, kind="stable")
    positions = np.linspace(log_cost.min(), log_cost.max(), n - n // 2)
    chosen[order[nearest_each(log_cost[order], positions, chosen[order])]] = True
    return pool[rng.permutation(np.flatnonzero(chosen))]


def make_strategy(plan: Plan, space: SearchSpace | None = None, first: Sequence[Archs] = ()) -> Strategy:
    """The ask/tell strategy of the plan, in its initial state.

    Args:
        space: the plan's, or as it is drawn under limits.
        first: architectures that it proposes before all others.
    """
    initial = list(first)
    if plan.config.strategy.seed_references:
        initial += [arch for arch in plan.references.values() if not any((arch == row).all() for row in first)]
    kind = cast(type[Strategy], plan.strategy)
    start = np.stack(initial) if initial else None
    return kind(space or plan.space, plan.config.seed, start, **plan.strategy_options)


def known_costs(plan: Plan, costs: Mapping[str, BoundPredictor]) -> Costs:
    """The objectives that predictors answer for any architecture, for strategies that evaluate the others."""
    columns = [(column, costs[o.name]) for column, o in enumerate(plan.objectives) if o.name in costs]

    def known(archs: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        values = np.full((len(archs), len(plan.objectives)), np.nan)
        for column, predictor in columns:
            values[:, column] = predictor.predict(archs).mean
        return minimised(values, plan.objectives)

    return known


@dataclass(frozen=True)
class Front:
    """What one search of a run found.

    Args:
        name: the device that it was for, `all`, or empty where there is one search.
        objectives: that it is a front of.
        archs: `(n, K)`.
    """

    name: str
    objectives: tuple[Objective, ...]
    archs: Archs


def predicted_fronts(
    plan: Plan,
    run: Run,
    bound: dict[str, BoundPredictor],
    report: Reporter,
    start: Archs | None = None,
    number: int = 0,
) -> list[Front]:
    """Search on predictions, for each device and for all of them where objectives are of several.

    Args:
        start: `(m, K)` architectures that are known to keep the limits, to start random draws from.
        number: of the round; later ones are with corrected predictions.
    """
    fronts = []
    for one in searches(plan.space, plan.objectives, bound, plan.config.seed):
        # Of an evaluated objective the limit is judged at the end; draws keep those on costs.
        costs = [o for o in one.objectives if o in plan.predicted]
        space = limited_space(plan.space, costs, bound, seed=plan.config.seed, start=start)
        label = "-".join(part for part in (one.name.replace(":", "-"), f"round{number}" if number else "") if part)
        fronts.append(Front(one.name, one.objectives, predicted_search(plan, run, one.evaluator, report, space, label)))
    return fronts


def predicted_search(
    plan: Plan, run: Run, evaluator: PredictedEvaluator, report: Reporter, space: SearchSpace, label: str = ""
) -> Archs:
    """One search on predictions; `(n, K)` architectures of the predicted front. Its state is saved every few seconds.

    Args:
        space: the plan's, or as it is drawn under limits.
        label: of this search among those of the run.
    """
    objectives = evaluator.objectives
    strategy, archive = make_strategy(plan, space), ParetoArchive(plan.space, len(objectives))
    strategy.use_predictors(evaluator.bound, objectives)
    file = run.path / (f"search-{label}.npz" if label else SEARCH)
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
        title = f"search {label}" if label else "search"
        with report.phase(title) as phase, run.phase(title, "predicted architectures") as done:
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
                evaluator,
                objectives,
                evaluations=total,
                batch=batch,
                archive=archive,
                on_batch=on_batch,
            )
            save()
            phase.done(f"{archive.evaluated:,} architectures proposed, {len(archive)} on the predicted front")
    if not len(archive):
        raise nothing_found(archive, objectives)
    return archive.archs


def nothing_found(archive: ParetoArchive, objectives: tuple[Objective, ...]) -> UserError:
    """Says that a search ended without a network to show, and how near to the limits it came."""
    if archive.failed == archive.evaluated:
        return UserError(
            f"all {archive.evaluated} evaluations failed; `message` in the archive's evaluations says why each did"
        )
    nearest = minimised(archive.nearest[None], objectives)[0]
    values = ", ".join(f"{o.name} {v:.4g}{o.limits_text}" for o, v in zip(objectives, nearest, strict=True))
    return UserError(
        f"none of {archive.evaluated} architectures keeps all limits; the nearest has {values}. Loosen a limit, or "
        "raise strategy.evaluations"
    )


def evaluated_search(
    plan: Plan,
    run: Run,
    evaluator: Evaluator,
    costs: dict[str, BoundPredictor],
    report: Reporter,
    start: Archs | None = None,
) -> np.ndarray[Any, np.dtype[Any]]:
    """Search with every proposal really evaluated; a resumed run replays the recorded rows through the strategy."""
    space = limited_space(plan.space, plan.predicted, costs, seed=plan.config.seed, start=start)
    archive = ParetoArchive(plan.space, len(plan.objectives))
    total = plan.config.strategy.evaluations
    with report.phase("search") as phase, run.phase("search", "evaluations") as done:
        progress = phase.progress("evaluations")
        recorded = _recorded(plan, run, evaluator, costs, "search")
        show = lambda *_: progress(archive.evaluated, total)  # noqa: E731

        def strategy(first: Sequence[Archs] = ()) -> Strategy:
            made = make_strategy(plan, space, first)
            if costs:
                made.use_costs(known_costs(plan, costs))
            if len(plan.predicted) == len(plan.objectives):
                made.use_predictors(costs, plan.objectives)
            return made

        try:
            if plan.config.execution.asynchronous:
                asynchronous_search(strategy, recorded, archive, evaluations=total, on_row=show)
            else:
                search(
                    strategy(),
                    recorded,
                    plan.objectives,
                    evaluations=total,
                    batch=plan.config.strategy.batch or 16,
                    archive=archive,
                    on_batch=show,
                )
        finally:
            done[0] = recorded.evaluated
        failed = f", {archive.failed} without a result" if archive.failed else ""
        phase.done(f"{archive.evaluated} architectures evaluated{failed}, {len(archive)} on the front")
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
    values, ok = evaluate(plan, run, "search", evaluator, costs, proposals, report)
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


def evaluate(
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
