"""Which strategies can work with a space, its objectives and what evaluates them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nasbench.config import Config
from nasbench.objectives import Objective, given_as
from nasbench.registry import REGISTRY, resolve
from nasbench.strategies.base import GradientStrategy, Strategy
from search_spaces import SearchSpace, UserError

if TYPE_CHECKING:
    from nasbench.planning.evaluators import EvaluatorPart


def undemanding(kind: Any) -> bool:
    """Whether a strategy works with every evaluator: it asks for evaluations of full fidelity, and for nothing else."""
    asks = inspect.isclass(kind) and issubclass(kind, Strategy)
    return asks and not (kind.needs_fidelity or kind.needs_predictors)


def undemanding_strategies() -> str:
    """The names of the built-in ones. Imports all strategies."""
    return ", ".join(name for name in sorted(REGISTRY["strategy"]) if undemanding(resolve("strategy", name)))


def check_strategy(
    config: Config,
    strategy: Strategy | GradientStrategy,
    space: SearchSpace,
    objectives: Sequence[Objective],
    evaluators: Sequence[EvaluatorPart],
) -> None:
    """Refuse a strategy that cannot work with the space, the objectives or the evaluators.

    Raises:
        UserError: why, and which strategies can.
    """
    name = config.strategy.name
    metrics = tuple(metric for part in evaluators for metric in part.metrics)
    evaluated = [o.name for o in objectives if given_as(o, metrics)]
    strategy.check(objectives)
    if isinstance(strategy, GradientStrategy):
        if type(space).mixture_supernet is SearchSpace.mixture_supernet:
            raise UserError(
                f"strategy.name = {name!r} trains a mixture supernet, and space {space.name!r} has none. "
                f"Choose a space that has one (`nasbench spaces` tells), or one of {undemanding_strategies()}"
            )
        return
    if strategy.needs_predictors and not config.evaluator.samples and evaluated:
        raise UserError(
            f"strategy.name = {name!r} searches predictions of every objective, and with evaluator.samples = 0 nothing "
            f"predicts {', '.join(evaluated)}. Set evaluator.samples (80 is usual), or choose one of "
            f"{undemanding_strategies()}"
        )
    for fidelity, values in strategy.fidelities.items():
        _check_fidelity(config, fidelity, values, evaluated, evaluators)


def _check_fidelity(
    config: Config,
    fidelity: str,
    values: Sequence[float],
    evaluated: Sequence[str],
    evaluators: Sequence[EvaluatorPart],
) -> None:
    """Refuse a strategy that asks for values of a fidelity which nothing knows."""
    asks = f"strategy.name = {config.strategy.name!r} asks for evaluations at reduced {fidelity!r}"
    if not evaluated:
        raise UserError(f"{asks}, and all objectives are predicted: choose one of {undemanding_strategies()}")
    if config.evaluator.samples:
        raise UserError(
            f"{asks}, and with evaluator.samples = {config.evaluator.samples} it would search predictions alone. Set "
            f"evaluator.samples = 0, which evaluates every proposal, or choose one of {undemanding_strategies()}"
        )
    if config.execution.asynchronous:
        raise UserError(
            f"{asks}, whose rounds need a barrier; leave out execution.asynchronous, or choose one of "
            f"{undemanding_strategies()}"
        )
    knowing = [part for part in evaluators if part.fidelities is None or fidelity in part.fidelities]
    if not knowing:
        known = sorted({f for part in evaluators for f in part.fidelities or ()})
        raise UserError(
            f"{asks}, and the evaluator {config.evaluator.name!r} knows "
            + (f"{', '.join(map(repr, known))} alone: set strategy.fidelity" if known else "no fidelity")
            + f", take evaluator.name = 'train', which knows 'epochs', or choose one of {undemanding_strategies()}"
        )
    for part in knowing:
        part.check_fidelity(fidelity, values)
