"""Evaluation by a Python function of the user's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from search_spaces import SearchSpace


class FunctionEvaluator(Evaluator):
    """Calls a function once per architecture.

    The function takes the architecture as a dict `{knob: choice}` (active knobs only), and fidelities as keyword
    arguments where proposals have them; it returns a number, or `{metric: number}`. A row whose call raises or returns
    anything else is `FAILED`, with the reason as its message.

    Args:
        space: that the architectures come from.
        function: the user's.
        metrics: names of what it returns, in the order of the columns.

    Example:
        >>> FunctionEvaluator(space, lambda choices: 0.9 - 0.01 * choices["depth"])
    """

    fidelities = None

    def __init__(
        self, space: SearchSpace, function: Callable[..., Any], *, metrics: Sequence[str] = ("accuracy",)
    ) -> None:
        self.space = space
        self.function = function
        self.metrics = tuple(metrics)

    def evaluate(self, proposals: Proposals) -> Evaluation:
        values = np.full((len(proposals), len(self.metrics)), np.nan)
        status = np.full(len(proposals), Status.OK, dtype=np.uint8)
        seconds = np.zeros(len(proposals))
        messages = {}
        for row, arch in enumerate(proposals.archs):
            fidelity = proposals.fidelity_of(row)
            start = time.perf_counter()
            try:
                values[row] = metric_row(self.function(self.space.decode(arch), **fidelity), self.metrics)
            except Exception as error:  # whatever the user's code raises is that row's failure
                status[row] = Status.FAILED
                messages[row] = f"{type(error).__name__}: {error}"
            seconds[row] = time.perf_counter() - start
        return Evaluation(values, status, seconds=seconds, messages=messages)


def metric_row(result: Any, metrics: Sequence[str]) -> list[float]:
    """What a user's function or command gave, as one finite number per metric.

    Raises:
        ValueError: anything else, with what was expected.
    """
    wanted = "{" + ", ".join(f'"{m}": number' for m in metrics) + "}"
    if isinstance(result, Mapping):
        missing = [m for m in metrics if m not in result]
        if missing:
            raise ValueError(f"no {missing[0]!r} in the result {_short(result)}; expected {wanted}")
        row = [result[m] for m in metrics]
    elif len(metrics) == 1:
        wanted += " or a number"
        row = [result]
    else:
        raise ValueError(f"expected {wanted}, got {_short(result)}")
    for metric, value in zip(metrics, row, strict=True):
        if isinstance(value, bool) or not isinstance(value, Real) or not np.isfinite(float(value)):
            raise ValueError(f"{metric!r} must be a finite number, got {_short(value)}; expected {wanted}")
    return [float(value) for value in row]


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
