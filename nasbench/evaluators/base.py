"""The contract of evaluators, and the proposals and statuses that pass between strategies and evaluators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from search_spaces import UserError
from search_spaces.base import Archs

if TYPE_CHECKING:
    from hardware_profiles import Target
    from nasbench.objectives import Objective


class Status(IntEnum):
    """What became of an evaluation. Values are NaN only where the status is not OK."""

    OK = 0
    FAILED = 1
    TIMEOUT = 2
    UNSUPPORTED = 3  # a target cannot run the architecture


@dataclass(frozen=True)
class Proposals:
    """Architectures to evaluate, as columns.

    Args:
        ids: `(n,)` int64, unique within a run and ascending in the order asked.
        archs: `(n, K)` canonical.
        fidelity: named float columns `(n,)`, such as `epochs` or `images`; NaN, or no column, means full fidelity.
        known: values `(n,)` of metrics that need not be found again, NaN where they are not known; an evaluator may
            ignore them.
    """

    ids: NDArray[np.int64]
    archs: Archs
    fidelity: dict[str, NDArray[Any]] = field(default_factory=dict)
    known: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Proposals:
        columns = [{k: v[rows] for k, v in part.items()} for part in (self.fidelity, self.known)]
        return Proposals(self.ids[rows], self.archs[rows], *columns)

    @property
    def full(self) -> NDArray[np.bool_]:
        """Which rows are of full fidelity, `(n,)` bool: only these may stand on a front."""
        full = np.ones(len(self), dtype=bool)
        for column in self.fidelity.values():
            full &= np.isnan(column)
        return full

    def fidelity_of(self, row: int) -> dict[str, float]:
        """What one row is reduced to; empty at full fidelity. Whole numbers come as `int`."""
        values = {name: float(column[row]) for name, column in self.fidelity.items() if not np.isnan(column[row])}
        return {name: int(value) if value.is_integer() else value for name, value in values.items()}


@dataclass(frozen=True)
class Evaluation:
    """Results of a batch of proposals, row for row.

    Args:
        values: `(n, M)` float64 in the metrics' own units, NaN where the status is not OK.
        status: `(n,)` uint8, see `Status`.
        limit_values: `(n, M)` the values that limits apply to (a chosen quantile of a prediction); None: `values`.
            A run records none, and refuses an evaluator that gives them; `search` takes them.
        seconds: `(n,)` cost of each row, for the ledger; None where it is nothing to speak of.
        messages: why rows failed, by row.
    """

    values: NDArray[np.float64]
    status: NDArray[np.uint8]
    limit_values: NDArray[np.float64] | None = None
    seconds: NDArray[np.float64] | None = None
    messages: dict[int, str] = field(default_factory=dict)


class Evaluator(ABC):
    """Turns proposals into objective values.

    Life: built once per process that evaluates; `evaluate` or `stream` is called with batches in ask order; `close` at
    the end. It never proposes, and one bad architecture never stops a batch: its row gets a status. Where rows are
    recorded, as many as `preferred_batch` are evaluated between two commits.

    An evaluator that does not read the task's data (`reads_task = False`) is built with the plan, before anything is
    written, and its `space`, which may be a part of the one that it was given, is the one that is searched. A metric of
    a target is named as `latency_ms@raspi4`; the target need not be one that this project knows.
    """

    metrics: tuple[str, ...]
    preferred_batch: int = 1
    fidelities: tuple[str, ...] | None = ()  # names of fidelities that it knows; None for any
    reads_task: bool = True
    shipped: ClassVar[Mapping[str, Path]] = MappingProxyType({})  # by the names that its key `path` may give

    @classmethod
    def columns(cls, options: Mapping[str, Any], targets: Mapping[str, Target]) -> tuple[str, ...]:
        """The `metrics` of an evaluator with these options, before it is built.

        Args:
            options: complete, by key.
            targets: of the experiment, by name; the first is the default.
        """
        return tuple(options.get("metrics") or ()) or tuple(getattr(cls, "metrics", ()))

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> dict[str, Path]:
        """Files that the values of an evaluator with these options come from, by the names that messages give them.

        A run keeps their hashes, and cannot be resumed where one has changed.

        Args:
            options: complete, by key.
        """
        return {}

    @classmethod
    def alone(cls, options: Mapping[str, Any], targets: Mapping[str, Target]) -> bool:
        """Whether other work on this machine would spoil the values of an evaluator with these options.

        Args:
            options, targets: as in `columns`.
        """
        return False

    @classmethod  # noqa: B027 (most have room for any)
    def check_fidelity(cls, options: Mapping[str, Any], name: str, values: Sequence[float]) -> None:
        """Refuse values of a fidelity that it knows, where its options leave no room for them.

        Args:
            options: complete, by key.

        Raises:
            UserError: what would do.
        """

    @abstractmethod
    def evaluate(self, proposals: Proposals) -> Evaluation:
        """Values of all proposals, one column per entry of `metrics`."""

    def check_limits(self, objectives: Sequence[Objective]) -> None:  # noqa: B027 (most evaluators know nothing before)
        """Refuse limits that nothing keeps, where that is known before anything is evaluated.

        Raises:
            UserError: naming the limit and the best that there is.
        """

    def stream(self, parts: Iterable[Proposals]) -> Iterator[tuple[Proposals, Evaluation]]:
        """Results of small batches as they come, in any order; the next part is taken when there is room for it."""
        for part in parts:
            yield part, self.evaluate(part)

    def close(self) -> None:  # noqa: B027 (most have nothing to let go of)
        """Let go of processes, connections and the like. It is not used afterwards."""


class Wrapped(Evaluator):
    """An evaluator that answers for another one, in its name."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.metrics = evaluator.metrics
        self.fidelities = evaluator.fidelities
        self.preferred_batch = evaluator.preferred_batch

    def check_limits(self, objectives: Sequence[Objective]) -> None:
        self.evaluator.check_limits(objectives)

    def evaluate(self, proposals: Proposals) -> Evaluation:
        starts = range(0, len(proposals), self.preferred_batch)
        parts = (proposals[start : start + self.preferred_batch] for start in starts)
        return joined(proposals, self.stream(parts), len(self.metrics))

    def close(self) -> None:
        self.evaluator.close()


def without_limits(result: Evaluation) -> Evaluation:
    """The result, which is one of an evaluator in a run.

    Raises:
        UserError: it has `limit_values`, which nothing records.
    """
    if result.limit_values is not None:
        raise UserError(
            "evaluator: gave limit_values, which a run does not record; give them as a metric of their own, and set "
            "limits on that"
        )
    return result


def joined(proposals: Proposals, results: Iterable[tuple[Proposals, Evaluation]], metrics: int) -> Evaluation:
    """One evaluation in the order of the proposals, from results of parts of them in any order."""
    row_of = {id: row for row, id in enumerate(proposals.ids.tolist())}
    values, status = np.full((len(proposals), metrics), np.nan), np.zeros(len(proposals), dtype=np.uint8)
    seconds = np.zeros(len(proposals))
    messages: dict[int, str] = {}
    for part, result in results:
        rows = [row_of[id] for id in part.ids.tolist()]
        values[rows], status[rows] = result.values, result.status
        seconds[rows] = 0.0 if result.seconds is None else result.seconds
        messages |= {rows[row]: message for row, message in result.messages.items()}
    return Evaluation(values, status, seconds=seconds, messages=messages)
