"""Components of a configuration, and the files that it names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nasbench.config import Config
from nasbench.registry import options, resolve
from search_spaces import UserError


def component_of(family: str, name: str, section: Any, where: str, directory: Path | None) -> Any:
    """Build a component from its section, and write its defaults into the section."""
    with naming(where):
        component = resolve(family, name, directory)
        complete = options(component, with_files(component, section.options, where, directory), where)
        section.__pydantic_extra__.update(plain(complete))
        return component(**complete)


@contextmanager
def naming(place: str) -> Iterator[None]:
    """Errors begin with the file, section or key that they come from, which what raises them need not know."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(place):
            raise
        raise UserError(f"{place}: {error}") from error


def with_files(component: Any, given: dict[str, Any], section: str, where: Path | None) -> dict[str, Any]:
    """A component's keys with the files that `path` names made absolute; an empty one names nothing.

    What ships with the component keeps its name.
    """
    shipped = getattr(component, "shipped", {})

    def absolute(path: str) -> str:
        return path if path in shipped else find(path, f"{section}.path", where)

    path = given.get("path")
    if isinstance(path, str) and path:
        return given | {"path": absolute(path)}
    if isinstance(path, list) and all(isinstance(p, str) for p in path):
        return given | {"path": [absolute(p) for p in path]}
    return given


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """What can be written to a TOML file."""
    return {k: (str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v) for k, v in values.items()}


def find(path: str, key: str, where: Path | None) -> str:
    """The absolute path of a file or folder that a key of an experiment names: from here, or beside its file.

    Raises:
        UserError: neither is there, or it begins with an environment variable that is not set.
    """
    expanded = os.path.expandvars(path)
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UserError(f"{key}: {path}: the environment variable {unset[1]} is not set; set it, or write the path out")
    here = Path(expanded).expanduser()
    found = [p for p in (here, *([where / here] if where else [])) if p.exists()]
    if not found:
        raise UserError(f"{key}: {path}: no such file or folder" + (f", here or in {where}" if where else ""))
    return str(found[0].resolve())


def settle_paths(config: Config, where: Path | None) -> None:
    """Make paths absolute, so that the run can be resumed from anywhere."""
    if config.supernet.checkpoint:
        config.supernet.checkpoint = find(config.supernet.checkpoint, "supernet.checkpoint", where)
    if config.supernet.weights:
        config.supernet.weights = find(config.supernet.weights, "supernet.weights", where)
    for name, network in config.networks.items():
        if network.weights:
            network.weights = find(network.weights, f"networks.{name}.weights", where)
        if network.source.endswith(".onnx"):
            network.source = find(network.source, f"networks.{name}.source", where)
    calibration = config.targets.calibration
    for name, file in calibration.items():
        calibration[name] = find(file, f"targets.calibration: {name}", where)
