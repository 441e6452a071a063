"""The evaluator of a run, where `[execution]` wants it to run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hardware_profiles.measuring import conditions
from nasbench.config import Component
from nasbench.evaluators.base import Evaluator
from nasbench.evaluators.cached import Cache, CachedEvaluator, file_key, settings_key
from nasbench.execution.base import Backend, Spread
from nasbench.execution.worker import SUPERNET, Recipe
from nasbench.plan import Plan
from nasbench.planning.evaluators import EvaluatorPart


def executed(plan: Plan, evaluator: Evaluator, directory: Path, where: Path | None = None) -> Evaluator:
    """`evaluator`, run where and as the plan's `[execution]` says, after a look into the cache where there is one.

    Args:
        evaluator: built in this process; workers build their own.
        directory: of the run.
        where: directory of the experiment file.

    Raises:
        UserError: Ray is not installed, its cluster cannot be reached, or the cache cannot be used.
    """
    cache = plan.config.evaluator.cache
    if not cache:
        return _placed(plan, evaluator, directory, where)
    opened = Cache(Path(cache))
    return CachedEvaluator(plan.space, _placed(plan, evaluator, directory, where), opened, _parts(plan, directory))


def _parts(plan: Plan, directory: Path) -> list[tuple[Callable[[], str], tuple[str, ...]]]:
    """What the values of each evaluator depend on beside architecture and fidelity, and its metrics."""
    config = plan.config
    sections: list[Component] = [config.evaluator, *config.evaluator.also]
    basis = {"task": config.task.model_dump(), "space": [config.space.model_dump(), repr(plan.space.knobs)]}
    basis |= {"code": [own_code(config.task.name), own_code(config.space.name)], "data": plan.task.fingerprint}

    def settings(section: Component, part: EvaluatorPart) -> str:
        weights = file_key(directory / SUPERNET) if part.needs_supernet else ""
        devices = _devices(plan, part) if part.measures else []
        code = [own_code(section.name), *map(file_key, part.files.values())]
        return settings_key(basis, section.name, section.options, devices, weights, *code)

    return [(partial(settings, *both), both[1].metrics) for both in zip(sections, plan.evaluators, strict=True)]


def _devices(plan: Plan, part: EvaluatorPart) -> list[Any]:
    """What figures measured on devices depend on: how, and the files and code that meters name."""
    named = {metric.partition("@")[2] for metric in part.metrics} & plan.targets.keys()
    targets = [plan.targets[name] for name in sorted(named) or list(plan.targets)[:1]]
    meters = [plan.config.targets.meters.get(target.name, "") for target in targets]
    return [
        [conditions(target, plan.meter_for(target)) for target in targets],
        [[meter, own_code(meter), file_key(Path(meter.partition(":")[2]))] for meter in meters],
    ]


def own_code(name: str) -> str:
    """A hash of the file that a loaded component of the user's own, `"module:Class"`, is from; empty for others."""
    module = sys.modules.get(name.partition(":")[0]) if ":" in name else None
    return file_key(Path(module.__file__)) if module is not None and module.__file__ else ""


def _placed(plan: Plan, evaluator: Evaluator, directory: Path, where: Path | None) -> Evaluator:
    section = plan.config.execution
    if section.backend == "in_process":
        from nasbench.execution.in_process import InProcess

        return InProcess(evaluator, retries=section.retries)
    recipe = Recipe.of(plan, directory, where)
    backend: Backend
    if section.backend == "ray":
        from nasbench.execution.ray_cluster import RayCluster

        backend = RayCluster(recipe, section.workers, section.address)
    else:
        from nasbench.execution.processes import Processes

        backend = Processes(recipe, section.workers)
    return Spread(evaluator, backend, retries=section.retries, timeout_s=section.timeout_s)
