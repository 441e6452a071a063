"""What a worker does: build the experiment's evaluator from its configuration, and evaluate what it is sent."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals
from nasbench.execution.base import Refused, guarded
from search_spaces.errors import UserError

if TYPE_CHECKING:
    from nasbench.plan import Plan

SUPERNET = "supernet.safetensors"


@dataclass(frozen=True)
class Recipe:
    """All that a worker needs to build the evaluator of a run: text and paths, which it must be able to read.

    Args:
        config: resolved, as TOML.
        where: directory of the experiment file, for user modules; None for none.
        directory: of the run, for the supernet's weights and what evaluators keep.
    """

    config: str
    where: str | None
    directory: str

    @classmethod
    def of(cls, plan: Plan, directory: Path, where: Path | None) -> Recipe:
        """That of a plan."""
        from nasbench.config import dump_config

        return cls(dump_config(plan.config), str(where.resolve()) if where else None, str(directory.resolve()))

    def build(self) -> Evaluator:
        """The evaluator, with one thread.

        Raises:
            UserError: something that the configuration names is not here.
        """
        import torch

        from nasbench.config import parse_config
        from nasbench.plan import make_plan
        from nasbench.training import load_weights

        torch.set_num_threads(1)
        plan = make_plan(parse_config(tomllib.loads(self.config)), Path(self.where) if self.where else None)
        supernet = None
        if plan.needs_supernet:
            supernet = plan.space.supernet()
            load_weights(supernet, Path(self.directory) / SUPERNET)
        return plan.make_evaluator(supernet, Path(self.directory))


def build(recipe: Recipe) -> Evaluator | Refused:
    """The evaluator, or why there is none."""
    try:
        return recipe.build()
    except UserError as error:
        return Refused(f"a worker cannot build the evaluator: {error}")
    except Exception as error:
        return Refused(f"a worker cannot build the evaluator: {type(error).__name__}: {error}")


def answer(evaluator: Evaluator, proposals: Proposals) -> Evaluation | Refused:
    """The result of one proposal, or why the run cannot go on."""
    try:
        return guarded(evaluator, proposals)
    except UserError as error:
        return Refused(str(error))
