"""From a configuration to the objects it names, all checked before anything is written or trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardware_profiles import Meter, Target
from hardware_profiles.extras import require
from hardware_profiles.profile import shipped_files
from nasbench.config import Config, SupernetSection, TaskSection
from nasbench.evaluators.base import Evaluator
from nasbench.objectives import Objective, given_as
from nasbench.planning.evaluators import EvaluatorPart, check_workers, composed, evaluator_parts, known_values
from nasbench.planning.objectives import configured_objectives
from nasbench.planning.sections import component_of, naming, plain, settle_paths
from nasbench.planning.spaces import make_space
from nasbench.planning.targets import meter_of, settled_targets
from nasbench.registry import defaults, options, resolve
from nasbench.selection import named_networks
from nasbench.stages.base import Form, Stage, check_order
from nasbench.strategies.base import GradientStrategy, Strategy
from nasbench.strategies.fit import check_strategy, undemanding_strategies
from nasbench.support import supported_space
from nasbench.tasks.none import NoTask
from predictors.accuracy import MIN_SAMPLES
from search_spaces import SearchSpace, UserError, nearest
from search_spaces.base import Archs

if TYPE_CHECKING:
    from nasbench.tasks.base import Task
    from search_spaces.supernet import Supernet


@dataclass(frozen=True)
class Plan:
    """Everything an experiment needs, built and checked.

    Args:
        config: with every component's defaults filled in.
        evaluators: that make up the evaluator, before they are made.
        space: without what the targets do not run (see `nasbench.support`).
        stages: name and stage, in order; the order is known to be possible.
        notes: what a person should know before the search: of the targets, and of the strategy.
        where: directory of the experiment file, where the user's modules are.
    """

    config: Config
    task: Task
    space: SearchSpace
    objectives: tuple[Objective, ...]
    targets: dict[str, Target]
    strategy: type[Strategy] | type[GradientStrategy]
    strategy_options: dict[str, Any]
    evaluators: tuple[EvaluatorPart, ...]
    training_options: dict[str, Any]
    stages: list[tuple[str, Stage]]
    notes: tuple[str, ...] = ()
    where: Path | None = None

    @property
    def evaluator_metrics(self) -> tuple[str, ...]:
        """What the evaluator gives."""
        return tuple(metric for part in self.evaluators for metric in part.metrics)

    @property
    def needs_supernet(self) -> bool:
        """Whether an evaluator judges by a trained supernet."""
        return any(part.needs_supernet for part in self.evaluators)

    def make_evaluator(self, supernet: Supernet | None, directory: Path | None = None) -> Evaluator:
        """The evaluator.

        Args:
            supernet: trained; None where none is needed.
            directory: that evaluators may keep files in; None for none.
        """
        return composed(self.evaluators, supernet, directory)

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
        return meter_of(self.config, target)

    @property
    def gradient(self) -> bool:
        """Whether the strategy is of the gradient family."""
        return issubclass(self.strategy, GradientStrategy)


def make_plan(config: Config, where: Path | None = None) -> Plan:
    """Build what a configuration names.

    Args:
        where: directory of the experiment file; user modules and relative paths are looked for there too.

    Raises:
        UserError: an unknown name or key, a wrong value, or parts that do not fit together; names the file that the
            configuration was read from.
    """
    with naming(str(config.file)) if config.file else nullcontext():
        return _planned(config.model_copy(deep=True), where)


def _planned(config: Config, where: Path | None) -> Plan:
    _settle_data(config, where)
    task = component_of("task", config.task.name, config.task, "task", where)
    space = make_space(config, task, where)
    targets = settled_targets(config, where)
    evaluators = evaluator_parts(config, space, task, targets, where)
    check_workers(config, evaluators)
    metrics = tuple(metric for part in evaluators for metric in part.metrics)
    objectives = configured_objectives(config, targets, metrics, where)
    if isinstance(task, NoTask):
        composed(evaluators, None).check_limits(objectives)
    used = [targets[name] for name in dict.fromkeys(o.target for o in objectives) if name in targets]
    supported = supported_space(evaluators[-1].space, used, config.targets.fallback)
    strategy, strategy_options = _strategy(config, task, where)
    probe = strategy(supported.space, config.seed, **strategy_options)
    check_strategy(config, probe, supported.space, objectives, evaluators)
    if isinstance(probe, Strategy) and (values := known_values(evaluators, objectives)) is not None:
        probe.check_values(objectives, values)
    _check_samples(config, supported.space, probe, [o for o in objectives if given_as(o, metrics)])
    _check_selection(config, supported.space, objectives)
    settle_paths(config, where)
    stages = _stages(config, where)
    trained = any(part.needs_supernet for part in evaluators)
    training = _training(config, supported.space) if trained else {}
    notes = [f"targets: {note}" for note in supported.notes]
    if isinstance(probe, Strategy) and not config.networks and (remark := probe.remark(config.strategy.evaluations)):
        notes.append(f"strategy: {remark}")
    return Plan(
        config,
        task,
        supported.space,
        objectives,
        targets,
        strategy,
        strategy_options,
        tuple(evaluators),
        training,
        stages,
        tuple(notes),
        where,
    )


def _strategy(
    config: Config, task: Task, where: Path | None
) -> tuple[type[Strategy] | type[GradientStrategy], dict[str, Any]]:
    """The strategy, and its keys, which its section gets too."""
    strategy = resolve("strategy", config.strategy.name, where)
    if not (inspect.isclass(strategy) and issubclass(strategy, Strategy | GradientStrategy)):
        raise UserError(f"strategy.name = {config.strategy.name!r} is no Strategy or GradientStrategy")
    if issubclass(strategy, GradientStrategy) and isinstance(task, NoTask):
        raise UserError(
            f"strategy.name = {config.strategy.name!r} trains a supernet on a task's data, and task.name is 'none', as "
            f"the evaluator {config.evaluator.name!r} needs none; that goes with "
            f"{undemanding_strategies()}"
        )
    complete = options(strategy, config.strategy.options, "strategy")
    config.strategy = config.strategy.model_copy(update=plain(complete))
    return strategy, complete


def _stages(config: Config, where: Path | None) -> list[tuple[str, Stage]]:
    """The stages, in an order that is possible."""
    stages: list[tuple[str, Stage]] = []
    for index, section in enumerate(config.stages):
        stages.append((section.name, component_of("stage", section.name, section, f"stages[{index}]", where)))
    for name in config.networks or ("",):
        file = bool(name) and config.networks[name].source.endswith(".onnx")
        check_order(stages, Form.ARTIFACT if file else Form.FLOAT)
    return stages


# Parameters of `train_supernet` that the runner gives.
_RUNNER_KEYS = {"seed", "checkpoint", "log_dir", "progress"}


def _training(config: Config, space: SearchSpace) -> dict[str, Any]:
    """How the supernet is trained; its section gets the keys too."""
    from nasbench.training.supernet import check_training, train_supernet

    known = defaults(train_supernet).keys() - _RUNNER_KEYS | SupernetSection.model_fields.keys()
    if unknown := config.supernet.options.keys() - known:
        key = min(unknown)
        place = " The experiment's seed stands above all sections." if key == "seed" else ""
        raise UserError(f"supernet: unknown key {key!r}.{place} {nearest(key, known)}")
    complete = options(train_supernet, config.supernet.options, "supernet")
    training = {key: value for key, value in complete.items() if key not in _RUNNER_KEYS}
    config.supernet = config.supernet.model_copy(update=plain(training))
    if training["epochs"]:
        try:
            check_training(space, training)  # told now, not after the targets were calibrated
        except UserError as error:
            raise UserError(f"supernet.{error}") from error
        if config.supernet.tensorboard:
            require("tensorboard")
    return training


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


def _check_samples(
    config: Config, space: SearchSpace, strategy: Strategy | GradientStrategy, evaluated: Sequence[Objective]
) -> None:
    """Refuse an accuracy predictor of too few architectures."""
    samples = config.evaluator.samples
    if 0 < samples < MIN_SAMPLES:
        raise UserError(
            f"evaluator.samples = {samples}: an accuracy predictor needs {MIN_SAMPLES} or more; "
            "0 evaluates every proposal instead"
        )
    if samples and evaluated and isinstance(strategy, Strategy) and space.size < MIN_SAMPLES:
        raise UserError(
            f"evaluator.samples = {samples}: the space has {space.size} architectures, too few for an accuracy "
            f"predictor, which needs {MIN_SAMPLES}; 0 evaluates every proposal instead"
        )
