"""Search spaces by name: tables that ship with the package, and the user's own TOML files."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from search_spaces.autoformer import AutoFormerSpace
from search_spaces.base import SearchSpace
from search_spaces.chain import ChainSpace
from search_spaces.elastic import elastic_space
from search_spaces.errors import UserError, nearest
from search_spaces.mnasnet import MnasNetSpace
from search_spaces.mobile_hybrid import MobileHybridSpace
from search_spaces.mobilenet_v3 import MobileNetV3Space
from search_spaces.nasbench201 import NASBench201Space
from search_spaces.resnet import ResNetSpace

# `family` of a table: the class that it configures. Other classes are named "module:Class" in an experiment instead.
FAMILIES: dict[str, Callable[..., SearchSpace]] = {
    "autoformer": AutoFormerSpace,
    "chain": ChainSpace,
    "elastic": elastic_space,
    "mnasnet": MnasNetSpace,
    "mobile_hybrid": MobileHybridSpace,
    "mobilenet_v3": MobileNetV3Space,
    "nasbench201": NASBench201Space,
    "resnet": ResNetSpace,
}

_TABLES = files("search_spaces") / "preset_tables"


@lru_cache(maxsize=1)
def _tables() -> dict[str, str]:
    """Name -> TOML text of the shipped tables."""
    return {
        entry.name.removesuffix(".toml"): entry.read_text(encoding="utf-8")
        for entry in sorted(_TABLES.iterdir(), key=lambda e: e.name)
        if entry.name.endswith(".toml")
    }


def presets() -> dict[str, str]:
    """Name -> one-line description of the spaces that `load_space` knows by name."""
    return {name: str(tomllib.loads(text)["description"]) for name, text in _tables().items()}


def preset_text(name: str) -> str:
    """The TOML text of a shipped space, or of a file of one's own.

    Raises:
        UserError: no space of that name, or an unreadable file.
    """
    if Path(name).suffix == ".toml":
        return _file_text(Path(name))
    if name not in _tables():
        raise UserError(f"unknown space {name!r}. {nearest(name, _tables())}")
    return _tables()[name]


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"space file {path}: cannot read it: {reason}") from error


def template(name: str) -> str:
    """The commented TOML text of a new chain of blocks, with all there is to choose; `name` stands in its comments."""
    text = (files("search_spaces") / "templates" / "chain.toml").read_text(encoding="utf-8")
    return text.replace("{name}", name)


def load_space(
    name: str | Path, in_channels: int | None = None, num_classes: int | None = None, **overrides: Any
) -> SearchSpace:
    """A space from a preset's name or a TOML file.

    A file has `family` (such as `mobilenet_v3`), optionally `description`, and the keyword arguments of the family's
    class; see `search_spaces/preset_tables` for examples.

    Args:
        name: a name of `presets()`, or a path that ends in `.toml`.
        in_channels, num_classes: of the task; by default those of the family, most often 3 and 1000.
        overrides: replace keys of the table, as `resolutions=[96]`.

    Raises:
        UserError: unknown preset, unreadable file, unknown key or impossible value; file and key are named.
    """
    path = Path(name)
    if path.suffix == ".toml":
        where, title = str(path), path.stem
        text = _file_text(path)
    elif str(name) in _tables():
        where, title = str(name), str(name)
        text = _tables()[title]
    else:
        raise UserError(
            f"unknown space {str(name)!r}. {nearest(str(name), _tables())} A file of your own ends in .toml."
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from error

    family = table.pop("family", None)
    if family not in FAMILIES:
        raise UserError(f"{where}: family: unknown or missing, got {family!r}. {nearest(str(family), FAMILIES)}")
    table.pop("description", None)
    table.update(overrides)
    make = FAMILIES[family]
    parameters = inspect.signature(make).parameters.values()
    keys = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name != "name"]
    for key in table:
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}. {nearest(key, keys)}")
    if "stages" in keys and "stages" not in table:
        raise UserError(f"{where}: key 'stages' is missing: the table has one [[stages]] per stage")
    for p in parameters:
        if p.kind is inspect.Parameter.KEYWORD_ONLY and p.default is inspect.Parameter.empty and p.name not in table:
            raise UserError(f"{where}: key {p.name!r} is missing")
    task = {"in_channels": in_channels, "num_classes": num_classes}
    return make(**{k: v for k, v in task.items() if v is not None}, **table, name=title if title == where else where)
