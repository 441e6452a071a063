"""Hardware-aware neural architecture search: experiments, strategies, evaluators, stages, reports and the command line.

`import nasbench as nb` offers the public names of all four packages (`search_spaces`, `hardware_profiles`, `predictors`
and this one), each imported on first use.
"""

import importlib
from typing import Any

# Where each public name of this package lives; the other packages list their own in `__all__`.
_OWN = {
    "ArchitectureTable": "nasbench.evaluators.table",
    "Archive": "nasbench.archive",
    "Comparison": "nasbench.comparison.result",
    "Config": "nasbench.config",
    "Evaluation": "nasbench.evaluators.base",
    "Evaluator": "nasbench.evaluators.base",
    "FeasibleSampler": "nasbench.sampling",
    "GradientStrategy": "nasbench.strategies.base",
    "Objective": "nasbench.objectives",
    "ParetoArchive": "nasbench.pareto",
    "Proposals": "nasbench.evaluators.base",
    "Stage": "nasbench.stages.base",
    "Status": "nasbench.evaluators.base",
    "Strategy": "nasbench.strategies.base",
    "TableEvaluator": "nasbench.evaluators.table",
    "Task": "nasbench.tasks.base",
    "check_limits": "nasbench.feasibility",
    "compare": "nasbench.comparison.study",
    "export_network": "nasbench.exporting",
    "export_target": "nasbench.exporting",
    "hypervolume": "nasbench.pareto",
    "latest_run": "nasbench.run",
    "load_config": "nasbench.config",
    "load_run": "nasbench.run",
    "make_objective": "nasbench.objectives",
    "measure_networks": "nasbench.measurements",
    "named_network": "nasbench.networks",
    "non_dominated_mask": "nasbench.pareto",
    "non_dominated_sort": "nasbench.pareto",
    "parse_config": "nasbench.config",
    "run_experiment": "nasbench.experiment",
    "sample_feasible": "nasbench.sampling",
    "search": "nasbench.search",
    "suite_networks": "nasbench.networks",
}
_PACKAGES = ("search_spaces", "hardware_profiles", "predictors")


def __getattr__(name: str) -> Any:
    if name in _OWN:
        # `search` is a function and a module; the function is what the public name means.
        value = getattr(importlib.import_module(_OWN[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        for package in _PACKAGES:
            module = importlib.import_module(package)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    names = [n for p in _PACKAGES for n in importlib.import_module(p).__all__]
    return sorted({*_OWN, *names})
