"""Evaluators of a configuration, before they are made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from hardware_profiles import Target
from nasbench.config import Component, Config
from nasbench.evaluators.base import Evaluator
from nasbench.objectives import Objective, given_as, minimised
from nasbench.planning.sections import naming, plain, with_files
from nasbench.planning.targets import meter_of
from nasbench.registry import options, resolve
from nasbench.tasks.none import NoTask
from search_spaces import SearchSpace, UserError

if TYPE_CHECKING:
    from nasbench.tasks.base import Task
    from search_spaces.supernet import Supernet


class MakeEvaluator(Protocol):
    """Makes the evaluator."""

    def __call__(self, supernet: Supernet | None, directory: Path | None = None) -> Evaluator:
        """From a trained supernet, and a directory to keep files in; both where they are needed."""
        ...


@dataclass(frozen=True)
class EvaluatorPart:
    """An evaluator before it is made: its metrics, the fidelities that it knows, and the space that it leaves.

    Args:
        alone: whether other work on this machine would spoil its values.
        measures: whether they come from a device.
        files: that its values come from, by the names that messages give them.
        built: the evaluator itself, where it reads no task's data.
    """

    metrics: tuple[str, ...]
    make: MakeEvaluator
    needs_supernet: bool
    space: SearchSpace
    fidelities: tuple[str, ...] | None
    check_fidelity: Callable[[str, Sequence[float]], None] = lambda *_: None
    alone: bool = False
    measures: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)
    built: Evaluator | None = None


def evaluator_parts(
    config: Config, space: SearchSpace, task: Task, targets: dict[str, Target], where: Path | None
) -> list[EvaluatorPart]:
    """The evaluators of a configuration; each may leave a smaller space to the next."""
    sections: dict[str, Component] = {"evaluator": config.evaluator}
    sections |= {f"evaluator.also[{index}]": section for index, section in enumerate(config.evaluator.also)}
    parts: list[EvaluatorPart] = []
    for place, section in sections.items():
        part = _evaluator(config, section, place, space, task, targets, where)
        if twice := {m for p in parts for m in p.metrics} & set(part.metrics):
            raise UserError(f"{place}: gives {min(twice)!r}, which an evaluator before it gives already")
        parts.append(part)
        space = part.space
    if config.evaluator.cache:
        config.evaluator.cache = str(Path(config.evaluator.cache).expanduser().resolve())
    return parts


def check_workers(config: Config, parts: Sequence[EvaluatorPart]) -> None:
    """Refuse several workers where they would disturb measurements on this machine.

    Raises:
        UserError: naming their number.
    """
    section = config.execution
    if section.backend != "in_process" and section.workers != 1 and any(part.alone for part in parts):
        raise UserError(
            f"execution.workers = {section.workers}: measurements on this machine would be disturbed by other workers; "
            'take workers = 1, or backend = "in_process"'
        )


def known_values(parts: Sequence[EvaluatorPart], objectives: Sequence[Objective]) -> NDArray[np.float64] | None:
    """Minimised values `(n, M)` of all architectures where a table has them, else None.

    NaN in the columns of objectives that are not of the table.
    """
    from nasbench.evaluators.table import TableEvaluator

    table = parts[0].built if len(parts) == 1 else None
    given = tuple(o for o in objectives if given_as(o, parts[0].metrics))
    if not isinstance(table, TableEvaluator) or not given or (values := table.values_of(given)) is None:
        return None
    known = np.full((len(values), len(objectives)), np.nan)
    known[:, [objectives.index(o) for o in given]] = minimised(values, given)
    return known


def composed(parts: Sequence[EvaluatorPart], supernet: Supernet | None, directory: Path | None = None) -> Evaluator:
    """One evaluator of all."""
    made = [part.make(supernet, directory) for part in parts]
    if len(made) == 1:
        return made[0]
    from nasbench.evaluators.composed import ComposedEvaluator

    return ComposedEvaluator(made)


def _evaluator(
    config: Config,
    section: Component,
    place: str,
    space: SearchSpace,
    task: Task,
    targets: dict[str, Target],
    where: Path | None,
) -> EvaluatorPart:
    """One evaluator, the keys of whose section are completed."""
    with naming(place):
        component = resolve("evaluator", section.name, where)
    if not (inspect.isclass(component) and issubclass(component, Evaluator)):
        from nasbench.evaluators.function import FunctionEvaluator

        complete = options(FunctionEvaluator, section.options, place)
        section.__pydantic_extra__.update(plain(complete))  # type: ignore[union-attr]
        metrics = tuple(complete["metrics"])
        return EvaluatorPart(metrics, lambda *_: FunctionEvaluator(space, component, **complete), False, space, None)
    complete = options(component, with_files(component, section.options, place, where), place)
    section.__pydantic_extra__.update(plain(complete))  # type: ignore[union-attr]
    positional = [
        p.name
        for p in inspect.signature(component).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if "task" in positional and isinstance(task, NoTask):
        raise UserError(f"{place}: {section.name!r} needs a task's data, and task.name is 'none'")
    available = {"space": space, "task": task, "targets": targets, "meter_for": partial(meter_of, config)}
    later = ("supernet", "directory")
    measures = "meter_for" in positional
    if unknown := [n for n in positional if n not in (*available, *later)]:
        raise UserError(
            f"{place}: {section.name!r}: its positional parameter {unknown[0]!r} is unknown; the runner gives "
            f"{', '.join((*available, *later))}"
        )

    def make(supernet: Supernet | None, directory: Path | None = None) -> Evaluator:
        given = available | {"supernet": supernet, "directory": directory}
        evaluator: Evaluator = component(*(given[n] for n in positional), **complete)
        return evaluator

    if not component.reads_task:
        with naming(place):
            built = make(None, None)
        return EvaluatorPart(
            built.metrics,
            lambda *_: built,
            False,
            getattr(built, "space", space),
            built.fidelities,
            alone=component.alone(complete, targets),
            measures=measures,
            files=component.files(complete),
            built=built,
        )
    return EvaluatorPart(
        component.columns(complete, targets),
        make,
        "supernet" in positional,
        space,
        component.fidelities,
        partial(component.check_fidelity, complete),
        component.alone(complete, targets),
        measures,
        component.files(complete),
    )
