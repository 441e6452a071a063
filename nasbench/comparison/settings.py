"""The file of a comparison: strategies x problems x seeds, validated."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ConfigDict, Field, ValidationError, field_validator

from hardware_profiles.paths import read_toml
from nasbench.config import apply_override
from nasbench.keys import Keys
from search_spaces.errors import UserError, explain

NAME = r"^[A-Za-z0-9_.@+-]+$"
_BUDGETS = 3  # budgets that are reported where none are named: the whole one, halved and halved again


class StrategySettings(Keys):
    """`[strategies.NAME]`: one of those compared. Further keys are the strategy's own.

    Keys:
        name: as in an experiment's `[strategy]`, also `module:Class` of your own; the section's name by default.
        batch: proposals per ask, by default the comparison's.
    """

    model_config = ConfigDict(extra="allow")
    name: str = ""
    batch: int | None = Field(default=None, ge=1)

    @property
    def options(self) -> dict[str, Any]:
        """The strategy's own keys as given."""
        return dict(self.__pydantic_extra__ or {})


class Settings(Keys):
    """A whole comparison.

    Keys:
        name: of the comparison; its directory is `runs/compare-NAME`.
        evaluations: distinct architectures that each search evaluates.
        budgets: numbers of evaluations at which strategies are compared; by default all, half, and a quarter of them.
        seeds: how many (0, 1, ...), or a list.
        batch: proposals per ask.
        note: a sentence for the report, such as what the values are.
        problem: sections that all problems share.
        problems: an experiment's sections `space`, `evaluator`, `objectives`, `targets` and `task`, without a strategy.
            `objectives` may be a list of names.
        strategies: see `StrategySettings`.
    """

    model_config = ConfigDict(extra="forbid")
    name: str = Field(default="comparison", pattern=NAME)
    evaluations: int = Field(default=100, ge=2)
    budgets: list[int] = Field(default_factory=list)
    seeds: int | list[int] = 10
    batch: int = Field(default=5, ge=1)
    note: str = ""
    problem: dict[str, Any] = Field(default_factory=dict)
    problems: dict[str, dict[str, Any]] = Field(min_length=1)
    strategies: dict[str, StrategySettings] = Field(min_length=1)

    @field_validator("seeds")
    @classmethod
    def _some(cls, value: int | list[int]) -> int | list[int]:
        numbers = list(range(value)) if isinstance(value, int) else value
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise ValueError("must be a number of seeds, 1 or more, or a list of distinct seeds, 0 or more")
        return value

    @property
    def seed_list(self) -> list[int]:
        """The seeds, one by one."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def budget_list(self) -> list[int]:
        """The budgets, rising."""
        if self.budgets:
            return sorted(set(self.budgets))
        return sorted({max(1, self.evaluations // 2**i) for i in range(_BUDGETS)})

    def sections_of(self, problem: str) -> dict[str, Any]:
        """The sections of one problem, those that all share included; its own keys win."""
        return _merged(self.problem, self.problems[problem])


def load_settings(path: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read and validate the file of a comparison; without one, that of the default comparison.

    Args:
        overrides: `key=value` with a TOML value, as of `--set`.

    Raises:
        UserError: an unreadable file, an unknown key, or a value that makes no sense; file and key are named.
    """
    if path is None:
        where = "the default comparison"
        text = resources.files("nasbench.comparison").joinpath("default.toml").read_text(encoding="utf-8")
        data = tomllib.loads(text)
    else:
        where, data = str(path), read_toml(path)
    for override in overrides:
        apply_override(data, override)
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(error, where, Settings.model_fields)) from error
    for kind, names in (("problems", settings.problems), ("strategies", settings.strategies)):
        for name in names:
            if not set(name) <= _ALLOWED:
                raise UserError(f"{where}: {kind}.{name}: a name has letters, digits and any of _ . @ + - alone")
    if settings.budgets and not 1 <= min(settings.budgets) <= max(settings.budgets) <= settings.evaluations:
        raise UserError(
            f"{where}: budgets = {settings.budgets}: must be within 1..evaluations ({settings.evaluations})"
        )
    return settings


_ALLOWED = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.@+-")


def dump_settings(settings: Settings) -> str:
    """The settings as TOML, all defaults written out."""
    return tomli_w.dumps(settings.model_dump(exclude_none=True))


def _merged(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in own.items():
        here = out.get(key)
        out[key] = _merged(here, value) if isinstance(here, Mapping) and isinstance(value, Mapping) else value
    return out
