"""Objectives of a configuration: for which device, which way, and who gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hardware_profiles import Target, load_target
from nasbench.config import Config, ObjectiveSection
from nasbench.objectives import METRICS, Objective, check_contradictions, given_as, make_objective
from nasbench.planning.sections import naming
from nasbench.registry import resolve
from search_spaces import UserError

_EVALUATED = ("accuracy", "accuracy_int8")  # that only an evaluator gives


def _for_each(sections: dict[str, ObjectiveSection], devices: list[str]) -> dict[str, ObjectiveSection]:
    """Sections with those of target `each` in place for every device."""
    found: dict[str, ObjectiveSection] = {}
    for name, section in sections.items():
        if section.target != "each":
            found[name] = section
            continue
        for device in devices:
            metric = section.metric or name.partition("@")[0]
            found.setdefault(f"{name}@{device}", section.model_copy(update={"metric": metric, "target": device}))
    return {name: sections.get(name, section) for name, section in found.items()}


def configured_objectives(
    config: Config, targets: dict[str, Target], metrics: tuple[str, ...], where: Path | None
) -> tuple[Objective, ...]:
    """The objectives of a configuration, whose sections are completed in place: metric, target and direction.

    Args:
        targets: by name; the first is that of objectives which name none.
        metrics: that the evaluator gives.
        where: the directory that the user's own objectives are looked for in.

    Raises:
        UserError: an objective of another target, or that nothing gives, a limit that makes no sense, or objectives
            that contradict each other.
    """
    objectives = []
    config.objectives = _for_each(config.objectives, config.targets.devices)
    for name, section in config.objectives.items():
        bare = make_objective(name, **section.model_dump())
        given = given_as(bare, metrics)
        # The evaluator's own targets are its business; what it gives by the metric alone belongs to none.
        objective = bare if given else make_objective(name, **section.model_dump(), default_target=next(iter(targets)))
        if objective.target and given in (None, objective.metric):
            with naming(f"objectives.{name}"):
                target = load_target(objective.target)
            if target.name not in targets:
                raise UserError(
                    f"objectives.{name}: target {target.name!r} is not among targets.devices = {list(targets)}"
                )
            objective = replace(objective, target=target.name)
        own = ":" in objective.metric
        if given is None and (objective.metric in _EVALUATED or not (own or objective.metric in METRICS)):
            raise UserError(
                f"objectives.{name}: nothing gives the metric {objective.metric!r}; the evaluator "
                f"{config.evaluator.name!r} gives {', '.join(metrics)}"
            )
        for key, side in objective.sides if objective.metric in METRICS else ():
            if not 0 < side.limit <= (1 if objective.metric in _EVALUATED else np.inf):  # type: ignore[operator]
                raise UserError(f"objectives.{name}.{key} = {side.limit}: accuracy is 0..1, costs are above 0")
        objectives.append(objective)
        config.objectives[name] = section.model_copy(
            update={
                "metric": objective.metric,
                "target": objective.target or None,
                "direction": "maximise" if objective.maximise else "minimise",
            }
        )
        if given is None and own:
            resolve("objective", objective.metric, where)
    check_contradictions(objectives)
    return tuple(objectives)
