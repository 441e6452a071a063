"""From a configuration to the objects it names, all checked before anything is written or trained."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hardware_profiles import Meter, Target, load_target, meter_for
from hardware_profiles.extras import require
from hardware_profiles.meter_choice import with_meter
from hardware_profiles.profile import shipped_files
from nasbench.config import Component, Config, ObjectiveSection, TaskSection
from nasbench.evaluators.base import Evaluator
from nasbench.objectives import METRICS, Objective, check_contradictions, given_as, make_objective
from nasbench.registry import options, resolve
from nasbench.selection import named_networks
from nasbench.stages.base import Form, Stage, check_order
from nasbench.strategies.base import GradientStrategy, Strategy
from nasbench.strategies.fit import check_strategy, undemanding_strategies
from nasbench.support import supported_space
from nasbench.tasks.none import NoTask
from predictors.accuracy import MIN_SAMPLES
from predictors.choice import PREDICTORS, TABLES
from search_spaces import SearchSpace, UserError, load_space, nearest, presets
from search_spaces.base import Archs

if TYPE_CHECKING:
    from nasbench.tasks.base import Task
    from search_spaces.supernet import Supernet


class MakeEvaluator(Protocol):
    """Makes the evaluator."""

    def __call__(self, supernet: Supernet | None, directory: Path | None = None) -> Evaluator:
        """From a trained supernet, and a directory to keep files in; both where they are needed."""
        ...


@dataclass(frozen=True)
class Plan:
    """Everything an experiment needs, built and checked.

    Args:
        config: with every component's defaults filled in.
        make_evaluator: from the trained supernet (None where the evaluator needs none) and the directory that
            evaluators may keep files in (None for none).
        evaluator_parts: metrics of each evaluator that it is made of, and whether that one needs the supernet.
        space: without what the targets do not run (see `nasbench.support`).
        stages: name and stage, in order; the order is known to be possible.
        notes: what of the space the targets do not run, for people.
        where: directory of the experiment file, where the user's modules are.
    """

    config: Config
    task: Task
    space: SearchSpace
    objectives: tuple[Objective, ...]
    targets: dict[str, Target]
    strategy: type[Strategy] | type[GradientStrategy]
    strategy_options: dict[str, Any]
    make_evaluator: MakeEvaluator
    evaluator_parts: tuple[tuple[tuple[str, ...], bool], ...]
    needs_supernet: bool
    training_options: dict[str, Any]
    stages: list[tuple[str, Stage]]
    notes: tuple[str, ...] = ()
    where: Path | None = None

    @property
    def evaluator_metrics(self) -> tuple[str, ...]:
        """What the evaluator gives."""
        return tuple(metric for metrics, _ in self.evaluator_parts for metric in metrics)

    @property
    def references(self) -> dict[str, Archs]:
        """The space's named architectures that all targets run."""
        return {name: arch for name, arch in self.space.references.items() if self.space.permits(arch[None])[0]}

    @property
    def predicted(self) -> tuple[Objective, ...]:
        """The objectives that predictors answer."""
        return tuple(o for o in self.objectives if given_as(o, self.evaluator_metrics) is None)

    def measurable(self, target: Target) -> bool:
        """Whether networks are measured on a target: it is here, or the experiment or the user's own profile says how.

        A shipped profile may say how too, but not that the device is at hand: `targets.meters` does.
        """
        own = target.profile.meter is not None and target.profile.name not in shipped_files()
        return target.profile.local or own or target.name in self.config.targets.meters

    def meter_for(self, target: Target) -> Meter:
        """What measures on a target.

        Raises:
            UserError: it cannot be measured from here.
        """
        return _meter_for(self.config, target)

    @property
    def gradient(self) -> bool:
        """Whether the strategy is of the gradient family."""
        return issubclass(self.strategy, GradientStrategy)


def make_plan(config: Config, where: Path | None = None) -> Plan:
    """Build what a configuration names.

    Args:
        where: directory of the experiment file; user modules and relative paths are looked for there too.

    Raises:
        UserError: an unknown name or key, a wrong value, or parts that do not fit together.
    """
    config = config.model_copy(deep=True)
    _settle_data(config, where)
    task = _component("task", config.task.name, config.task, "task", where)
    space = make_space(config, task, where)
    searched = not (config.networks or isinstance(task, NoTask))
    if searched and (task.input_shape[1] == 1) != (space.input_shape[1] == 1):
        raise UserError(
            f"space.name = {config.space.name!r} takes inputs of shape {tuple(space.input_shape)}, task.name = "
            f"{config.task.name!r} gives {tuple(task.input_shape)}: windows of signals, of height 1, need a space for "
            "signals, such as sensor_1d, and images one for images"
        )
    targets = {t.name: t for t in map(load_target, config.targets.devices)}
    _settle_targets(config, targets, where)
    evaluators = _evaluators(config, space, task, targets, where)
    metrics, space = tuple(m for part in evaluators for m in part.metrics), evaluators[-1].space
    make_evaluator, needs_supernet = partial(_composed, evaluators), any(part.needs_supernet for part in evaluators)
    objectives = _objectives(config, targets, metrics, where)
    if isinstance(task, NoTask):
        make_evaluator(None, None).check_limits(objectives)
    used = [targets[name] for name in dict.fromkeys(o.target for o in objectives) if name in targets]
    supported = supported_space(space, used, config.targets.fallback)
    space = supported.space

    strategy = resolve("strategy", config.strategy.name, where)
    if not (inspect.isclass(strategy) and issubclass(strategy, Strategy | GradientStrategy)):
        raise UserError(f"strategy.name = {config.strategy.name!r} is no Strategy or GradientStrategy")
    if issubclass(strategy, GradientStrategy) and isinstance(task, NoTask):
        raise UserError(
            f"strategy.name = {config.strategy.name!r} trains a supernet on a task's data, and task.name is 'none', as "
            f"the evaluator {config.evaluator.name!r} needs none; that goes with "
            f"{undemanding_strategies()}"
        )
    strategy_options = options(strategy, config.strategy.options, "strategy")
    config.strategy = config.strategy.model_copy(update=_plain(strategy_options))
    check_strategy(config, strategy(space, config.seed, **strategy_options), space, objectives, evaluators)
    evaluated = not issubclass(strategy, GradientStrategy) and any(given_as(o, metrics) for o in objectives)
    if evaluated and config.evaluator.samples and space.size < MIN_SAMPLES:
        raise UserError(
            f"evaluator.samples = {config.evaluator.samples}: the space has {space.size} architectures, too few for an "
            f"accuracy predictor, which needs {MIN_SAMPLES}; 0 evaluates every proposal instead"
        )
    _check_selection(config, space, objectives)
    _settle_paths(config, where)

    stages: list[tuple[str, Stage]] = []
    for index, section in enumerate(config.stages):
        stages.append((section.name, _component("stage", section.name, section, f"stages[{index}]", where)))
    for name in config.networks or ("",):
        file = bool(name) and config.networks[name].source.endswith(".onnx")
        check_order(stages, Form.ARTIFACT if file else Form.FLOAT)

    from nasbench.training.supernet import check_training, train_supernet

    training = options(train_supernet, config.supernet.options, "supernet") if needs_supernet else {}
    given = {k: v for k, v in training.items() if k not in _RUNNER_KEYS}
    config.supernet = config.supernet.model_copy(update=_plain(given))
    if (wrong := _RUNNER_KEYS & config.supernet.options.keys()) and needs_supernet:
        raise UserError(f"supernet: unknown key {sorted(wrong)[0]!r}")
    if needs_supernet and given["epochs"]:
        try:
            check_training(space, given)  # told now, not after the targets were calibrated
        except UserError as error:
            raise UserError(f"supernet.{error}") from error
        if config.supernet.tensorboard:
            require("tensorboard")
    return Plan(
        config,
        task,
        space,
        objectives,
        targets,
        strategy,
        strategy_options,
        make_evaluator,
        tuple((part.metrics, part.needs_supernet) for part in evaluators),
        needs_supernet,
        given,
        stages,
        supported.notes,
        where,
    )


# Parameters of `train_supernet` that the runner gives.
_RUNNER_KEYS = {"seed", "checkpoint", "log_dir", "progress"}


def _settle_data(config: Config, where: Path | None) -> None:
    """What an experiment needs no data for, and what follows where the evaluator reads none: its answers are free.

    Then the default is no task, no accuracy predictor between the evaluator and the search, and the whole front.
    """
    component = resolve("evaluator", config.evaluator.name, where)
    if not (inspect.isclass(component) and issubclass(component, Evaluator)) or component.reads_task:
        return
    if "task" not in config.model_fields_set:
        config.task = TaskSection(name="none")
    given = config.evaluator.model_fields_set
    free = {"samples": 0, "verify": 1000}
    config.evaluator = config.evaluator.model_copy(update={k: v for k, v in free.items() if k not in given})
    if config.task.name == "none" and config.stages:
        raise UserError(
            f"stages[0]: {config.stages[0].name!r} needs data to train or judge networks by, and task.name is 'none'; "
            "name a task, or leave the stages out"
        )


def _check_selection(config: Config, space: SearchSpace, objectives: tuple[Objective, ...]) -> None:
    """Refuse what would only fail after the search."""
    section = config.selection
    if section.rule == "named":
        for name, arch in named_networks(space, section.networks).items():
            if not space.permits(arch[None])[0]:
                raise UserError(f"selection.networks: {name!r} has operators that a target does not run")
    names = [o.name for o in objectives]
    if section.objective is not None and section.objective not in names:
        raise UserError(
            f"selection.objective = {section.objective!r} is no objective. {nearest(section.objective, names)}"
        )
    if 0 < config.evaluator.samples < MIN_SAMPLES:
        raise UserError(
            f"evaluator.samples = {config.evaluator.samples}: an accuracy predictor needs {MIN_SAMPLES} or more; "
            "0 evaluates every proposal instead"
        )


def _settle_paths(config: Config, where: Path | None) -> None:
    """Make paths absolute, so that the run can be resumed from anywhere."""
    if config.supernet.checkpoint:
        config.supernet.checkpoint = str(_find(config.supernet.checkpoint, where))
    if config.supernet.weights:
        config.supernet.weights = str(_find(config.supernet.weights, where))
    for network in config.networks.values():
        if network.weights:
            network.weights = str(_find(network.weights, where))
        if network.source.endswith(".onnx"):
            network.source = str(_find(network.source, where))
    config.targets.calibration = {n: str(_find(f, where)) for n, f in config.targets.calibration.items()}


def _settle_targets(config: Config, targets: dict[str, Target], where: Path | None) -> None:
    """Let what is said per target go by full target names, and refuse predictors and meters that there are not.

    A target with a meter from the experiment takes its place in `targets`, so that networks are converted for that.
    """
    section = config.targets
    for key in ("calibration", "predictors", "meters"):
        given = getattr(section, key)
        full = {load_target(name).name: value for name, value in given.items()}
        for name in full:
            if name not in targets:
                raise UserError(f"targets.{key}: {name!r} is not among targets.devices = {list(targets)}")
        setattr(section, key, full)
    for name, predictor in section.predictors.items():
        if predictor.startswith(TABLES):
            kind, _, file = predictor.partition(":")
            section.predictors[name] = f"{kind}:{_find(file, where)}"
        elif ":" in predictor:
            resolve("predictor", predictor, where)
        elif predictor not in PREDICTORS:
            raise UserError(
                f"targets.predictors: {name}: unknown predictor {predictor!r}. {nearest(predictor, PREDICTORS)} "
                'Your own: "module:Class".'
            )
    for name, spec in section.meters.items():
        kind, _, rest = spec.partition(":")
        if kind == "replay":
            spec = f"replay:{_find(rest, where)}"
        elif spec.endswith(".toml"):
            spec = str(_find(spec, where))
        elif kind not in ("adb", "ssh") and rest:
            resolve("meter", spec, where)
        section.meters[name] = spec
        targets[name], _ = with_meter(targets[name], spec)


def _find(path: str, where: Path | None) -> Path:
    """The absolute path of a file or folder named in an experiment: from here, or beside the experiment's file.

    Raises:
        UserError: neither is there, or it begins with an environment variable that is not set.
    """
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"{path}: the environment variable {unset[1]} is not set; set it, or write the path out")
    here = Path(expanded).expanduser()
    found = [p for p in (here, *([where / here] if where else [])) if p.exists()]
    if not found:
        raise UserError(f"{path}: no such file or folder" + (f", here or in {where}" if where else ""))
    return found[0].resolve()


def make_space(config: Config, task: Task, where: Path | None) -> SearchSpace:
    """The space of a configuration, for the task's channels and classes."""
    section = config.space
    shape = () if isinstance(task, NoTask) else (task.input_shape[0], task.num_classes)
    if section.name.endswith(".toml"):
        section.name = str(_find(section.name, where))
    if section.name in presets() or section.name.endswith(".toml"):
        return load_space(section.name, *shape, **section.options)
    try:
        space_class = resolve("space", section.name, where)
    except UserError as error:
        raise UserError(f"{error} Presets: {', '.join(presets())}.") from error
    given = options(space_class, section.options, "space")
    if section.name == "elastic":
        if isinstance(given["network"], str):
            given["network"] = resolve("network", given["network"], where)
        if given["weights"]:
            section.__pydantic_extra__["weights"] = given["weights"] = str(_find(given["weights"], where))  # type: ignore[index]
    space: SearchSpace = space_class(*shape, **given)
    if not isinstance(space, SearchSpace):
        raise UserError(f"space.name = {section.name!r} is no SearchSpace")
    return space


def _component(family: str, name: str, section: Any, where: str, directory: Path | None) -> Any:
    """Build a component from its section, and write its defaults into the section."""
    component = resolve(family, name, directory)
    complete = options(component, _found(section.options, directory), where)
    section.__pydantic_extra__.update(_plain(complete))
    return component(**complete)


def _found(given: dict[str, Any], where: Path | None) -> dict[str, Any]:
    """A component's keys with the files that `path` names made absolute; an empty one names nothing."""
    path = given.get("path")
    if isinstance(path, str) and path:
        return given | {"path": str(_find(path, where))}
    if isinstance(path, list) and all(isinstance(p, str) for p in path):
        return given | {"path": [str(_find(p, where)) for p in path]}
    return given


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What can be written to a TOML file."""
    return {k: (str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v) for k, v in values.items()}


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


def _objectives(
    config: Config, targets: dict[str, Target], metrics: tuple[str, ...], where: Path | None
) -> tuple[Objective, ...]:
    objectives = []
    config.objectives = _for_each(config.objectives, config.targets.devices)
    for name, section in config.objectives.items():
        bare = make_objective(name, **section.model_dump())
        given = given_as(bare, metrics)
        # The evaluator's own targets are its business; what it gives by the metric alone belongs to none.
        objective = bare if given else make_objective(name, **section.model_dump(), default_target=next(iter(targets)))
        if objective.target and given in (None, objective.metric):
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


def _meter_for(config: Config, target: Target) -> Meter:
    spec = config.targets.meters.get(target.name)
    return with_meter(target, spec)[1] if spec else meter_for(target)


@dataclass(frozen=True)
class EvaluatorPart:
    """An evaluator before it is made: its metrics, the fidelities that it knows, and the space that it leaves."""

    metrics: tuple[str, ...]
    make: MakeEvaluator
    needs_supernet: bool
    space: SearchSpace
    fidelities: tuple[str, ...] | None
    check_fidelity: Callable[[str, Sequence[float]], None] = lambda *_: None


def _evaluators(
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


def _composed(parts: Sequence[EvaluatorPart], supernet: Supernet | None, directory: Path | None = None) -> Evaluator:
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
    component = resolve("evaluator", section.name, where)
    if not (inspect.isclass(component) and issubclass(component, Evaluator)):
        from nasbench.evaluators.function import FunctionEvaluator

        complete = options(FunctionEvaluator, section.options, place)
        section.__pydantic_extra__.update(_plain(complete))  # type: ignore[union-attr]
        metrics = tuple(complete["metrics"])
        return EvaluatorPart(metrics, lambda *_: FunctionEvaluator(space, component, **complete), False, space, None)
    complete = options(component, _found(section.options, where), place)
    section.__pydantic_extra__.update(_plain(complete))  # type: ignore[union-attr]
    positional = [
        p.name
        for p in inspect.signature(component).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if "task" in positional and isinstance(task, NoTask):
        raise UserError(f"{place}: {section.name!r} needs a task's data, and task.name is 'none'")
    available = {"space": space, "task": task, "targets": targets, "meter_for": partial(_meter_for, config)}
    later = ("supernet", "directory")
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
        built = make(None, None)
        return EvaluatorPart(built.metrics, lambda *_: built, False, getattr(built, "space", space), built.fidelities)
    return EvaluatorPart(
        component.columns(complete, targets),
        make,
        "supernet" in positional,
        space,
        component.fidelities,
        partial(component.check_fidelity, complete),
    )
