"""The contracts of search strategies: ask/tell, and gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.variation import sample_distinct
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

if TYPE_CHECKING:
    from nasbench.objectives import Objective
    from nasbench.tasks.base import Task
    from nasbench.training.progress import ProgressCallback
    from predictors.base import BoundPredictor
    from search_spaces.supernet import MixtureSupernet


# Objectives `(n, M)` of architectures that cost nothing to know, minimised as in `tell`; NaN in the columns of others.
Costs = Callable[[Archs], NDArray[np.float64]]


class Strategy(ABC):
    """Proposes architectures and learns from results; never evaluates.

    Life: built once per run, asked with `check` whether it can work with the objectives, and told with `use_costs`
    which of them are free, where some are; then `ask(n)` and `tell(...)` in turn, each batch told completely and in ask
    order before the next ask. All randomness comes from `seed`: the same asks and tells give the same proposals.
    `state_dict` holds everything that the next ask depends on, as JSON-able values and numpy arrays:
    `load_state_dict(state_dict())` on a fresh object continues identically.

    Args:
        space: to search.
        seed: of the strategy's own random generator.
        initial: `(m, K)` architectures to propose first (reference networks, an earlier front); may be empty.

    Raises:
        UserError: initial architectures that the space does not have or does not permit.
    """

    needs_predictors: ClassVar[bool] = False  # of every objective, by `use_predictors`
    needs_fidelity: ClassVar[bool] = False  # an evaluator that knows those in `fidelities`
    fidelities: Mapping[str, Sequence[float]] = MappingProxyType({})  # values that it asks for, by name of the fidelity

    def __init__(self, space: SearchSpace, seed: int = 0, initial: Archs | None = None) -> None:
        self.space = space
        self.rng = np.random.default_rng(seed)
        self.next_id = 0
        self.initial = space.canonical(space.check(initial)) if initial is not None and len(initial) else None
        if self.initial is not None:
            self._check_permitted(self.initial, "starts from")

    def check(self, objectives: Sequence[Objective]) -> None:  # noqa: B027 (most take any)
        """Refuse objectives that this strategy cannot work with, before anything is evaluated.

        Raises:
            UserError: why, and what would do.
        """

    def check_values(  # noqa: B027 (most take any)
        self, objectives: Sequence[Objective], values: NDArray[np.float64]
    ) -> None:
        """Refuse values that this strategy cannot work with, where they are known before anything is evaluated.

        Args:
            values: `(n, M)` of all architectures, minimised; NaN in the columns of objectives that are not known.

        Raises:
            UserError: why, and what would do.
        """

    def remark(self, evaluations: int) -> str:
        """What a person should know of a search of so many evaluations; empty for nothing."""
        return ""

    def use_costs(self, costs: Costs) -> None:  # noqa: B027  (most strategies have no use for it)
        """Objectives that are known of any architecture before it is evaluated, such as predicted costs.

        Called before the first ask, and again before a restored strategy goes on. `tell` gives these objectives too.

        Args:
            costs: deterministic, batched and fast.
        """

    def use_predictors(  # noqa: B027  (nor for this)
        self, predictors: Mapping[str, BoundPredictor], objectives: Sequence[Objective]
    ) -> None:
        """Called before the first ask where every objective is predicted; by default of no consequence.

        Args:
            predictors: by objective name.
        """

    @property
    def preferred_batch(self) -> int:
        """How many to ask for at a time where evaluation is cheap."""
        return 1000

    def _proposals(self, archs: Archs) -> Proposals:
        """Number new architectures in ask order.

        Raises:
            UserError: a restricted space does not permit them; `space.menu` and `nasbench.variation` keep to it.
        """
        self._check_permitted(archs, "proposes")
        ids = np.arange(self.next_id, self.next_id + len(archs), dtype=np.int64)
        self.next_id += len(archs)
        return Proposals(ids, archs)

    def _check_permitted(self, archs: Archs, does: str) -> None:
        if self.space.restricted and len(wrong := np.flatnonzero(~self.space.permits(archs))):
            raise UserError(
                f"strategy {type(self).__name__} {does} {len(wrong)} architectures that not all targets run, the first "
                f"{self.space.decode(archs[wrong[0]])}; draw choices from space.menu and ask space.permits"
            )

    def _untaught(self, n: int) -> Archs:
        """`n` architectures that need no results: what is left of `initial`, then distinct random ones."""
        given = self.initial[self.next_id : self.next_id + n] if self.initial is not None else None
        if given is None or not len(given):
            return sample_distinct(self.space, n, self.rng)
        return np.concatenate([given, sample_distinct(self.space, n - len(given), self.rng, given)])

    @abstractmethod
    def ask(self, n: int) -> Proposals:
        """`n` architectures to evaluate next; fewer, or none, where the strategy has no more to propose."""

    @abstractmethod
    def tell(
        self,
        proposals: Proposals,
        values: NDArray[np.float64],
        violations: NDArray[np.float64],
        status: NDArray[np.uint8],
    ) -> None:
        """Results of what was asked.

        Args:
            values: `(n, M)`, all to be minimised; NaN in failed rows.
            violations: `(n, L)` >= 0, relative excess over each hard limit; 0 where kept.
            status: `(n,)`, see `Status`; failed rows are told too.
        """

    def state_dict(self) -> dict[str, Any]:
        """What the next `ask` depends on. Subclasses add their own entries."""
        return {"rng": self.rng.bit_generator.state, "next_id": self.next_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.rng.bit_generator.state = state["rng"]
        self.next_id = int(state["next_id"])


class GradientStrategy(ABC):
    """Searches by gradient descent on the path weights of a mixture supernet.

    The second family: it trains for itself instead of asking for evaluations, and hands over architectures that the
    runner evaluates and archives like any other's. Configured in the same section, under the same limits.
    """

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        self.space = space
        self.seed = seed

    def check(self, objectives: Sequence[Objective]) -> None:  # noqa: B027 (most take any)
        """Refuse objectives that this strategy cannot work with, before anything is trained.

        Raises:
            UserError: why, and what would do.
        """

    @abstractmethod
    def run(
        self,
        supernet: MixtureSupernet,
        task: Task,
        costs: Mapping[str, BoundPredictor],
        objectives: Sequence[Objective],
        *,
        checkpoint: Path | None = None,
        progress: ProgressCallback | None = None,
    ) -> Proposals:
        """Search, and return the architectures found, most wanted first.

        Args:
            supernet: fresh; its parameters are trained here.
            task: training data (the search splits it in two for weights and path weights; validation stays unseen).
            costs: bound predictor per objective name, for all objectives but accuracy.
            objectives: with their limits.
            checkpoint: file to resume from, if it exists, and to save to; None saves nothing.
            progress: called after every step.
        """
