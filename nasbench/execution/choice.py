"""The evaluator of a run, where `[execution]` wants it to run."""

from __future__ import annotations

from pathlib import Path

from nasbench.evaluators.base import Evaluator
from nasbench.execution.base import Backend, Spread
from nasbench.plan import Plan


def executed(plan: Plan, evaluator: Evaluator, directory: Path, where: Path | None = None) -> Evaluator:
    """`evaluator`, run where and as the plan's `[execution]` says.

    Args:
        evaluator: built in this process; workers build their own.
        directory: of the run.
        where: directory of the experiment file.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    section = plan.config.execution
    if section.backend == "in_process":
        from nasbench.execution.in_process import InProcess

        return InProcess(evaluator, retries=section.retries)
    from nasbench.execution.worker import Recipe

    recipe = Recipe.of(plan, directory, where)
    backend: Backend
    if section.backend == "ray":
        from nasbench.execution.ray_cluster import RayCluster

        backend = RayCluster(recipe, section.workers, section.address)
    else:
        from nasbench.execution.processes import Processes

        backend = Processes(recipe, section.workers)
    return Spread(evaluator, backend, retries=section.retries, timeout_s=section.timeout_s)
