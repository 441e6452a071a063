"""The space of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.config import Config
from nasbench.planning.sections import find, naming
from nasbench.registry import options, resolve
from nasbench.tasks.none import NoTask
from search_spaces import SearchSpace, UserError, load_space, presets

if TYPE_CHECKING:
    from nasbench.tasks.base import Task


def make_space(config: Config, task: Task, where: Path | None) -> SearchSpace:
    """The space of a configuration, for the task's channels and classes.

    Raises:
        UserError: an unknown name, a wrong key, or a space that does not take the task's data.
    """
    space = _space(config, task, where)
    searched = not (config.networks or isinstance(task, NoTask))
    if searched and (task.input_shape[1] == 1) != (space.input_shape[1] == 1):
        raise UserError(
            f"space.name = {config.space.name!r} takes inputs of shape {tuple(space.input_shape)}, task.name = "
            f"{config.task.name!r} gives {tuple(task.input_shape)}: windows of signals, of height 1, need a space for "
            "signals, such as sensor_1d, and images one for images"
        )
    return space


def _space(config: Config, task: Task, where: Path | None) -> SearchSpace:
    section = config.space
    shape = () if isinstance(task, NoTask) else (task.input_shape[0], task.num_classes)
    if section.name.endswith(".toml"):
        section.name = find(section.name, "space.name", where)
    if section.name in presets() or section.name.endswith(".toml"):
        with naming("space"):
            return load_space(section.name, *shape, **section.options)
    try:
        space_class = resolve("space", section.name, where)
    except UserError as error:
        raise UserError(f"{error} Presets: {', '.join(presets())}.") from error
    given = options(space_class, section.options, "space")
    if section.name == "elastic":
        if isinstance(given["network"], str):
            with naming("space"):
                given["network"] = resolve("network", given["network"], where)
        if given["weights"]:
            section.__pydantic_extra__["weights"] = given["weights"] = find(given["weights"], "space.weights", where)  # type: ignore[index]
    with naming("space"):
        space: SearchSpace = space_class(*shape, **given)
    if not isinstance(space, SearchSpace):
        raise UserError(f"space.name = {section.name!r} is no SearchSpace")
    return space
