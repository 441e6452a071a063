"""Parts of an experiment that are not in the library: `own_parts.toml` names them as `own_parts:...`.

Nothing needs to be registered. A component's keyword-only parameters are the keys of its section in the file.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nasbench.evaluators.base import Proposals, Status
from nasbench.strategies.base import Strategy
from nasbench.variation import mutate
from search_spaces import SearchSpace


class HillClimb(Strategy):
    """Keeps the best architecture so far by the first objective, and proposes mutants of it.

    Args:
        rate: probability of each knob to change.
    """

    def __init__(self, space: SearchSpace, seed: int = 0, initial: Any = None, *, rate: float = 0.1) -> None:
        super().__init__(space, seed, initial)
        self.rate = rate
        self.best: Any = None
        self.best_value = np.inf

    def ask(self, n: int) -> Proposals:
        if self.best is None:
            return self._proposals(self.space.sample(n, self.rng))
        return self._proposals(mutate(self.space, np.repeat(self.best[None], n, axis=0), self.rng, rate=self.rate))

    def tell(self, proposals: Proposals, values: Any, violations: Any, status: Any) -> None:
        good = (status == Status.OK) & (violations.sum(axis=1) == 0)
        first = np.where(good, values[:, 0], np.inf)
        if len(first) and first.min() < self.best_value:
            self.best, self.best_value = proposals.archs[first.argmin()], float(first.min())

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"best": self.best, "best_value": self.best_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.best, self.best_value = state["best"], float(state["best_value"])


def evaluate(choices: dict[str, int | float | str]) -> float:
    """A stand-in for a measurement of your own: more depth, wider kernels and more pixels are better, to a point.

    A real one would train the network, or look it up in a table, or ask a service.
    """
    score = sum(float(v) for k, v in choices.items() if "depth" in k or "kernel" in k)
    return 1.0 - float(np.exp(-score / 20)) - 0.001 * len(choices)
