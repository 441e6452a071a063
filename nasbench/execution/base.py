"""Spreading evaluations over workers that may die: the contract of backends, and the evaluator that uses one."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status, Wrapped, without_limits
from search_spaces import UserError

# An evaluation whose worker died so often is given up.
_DEATHS = 3
# Without a single worker for so long, there is no hope of one.
_START_S = 600.0


@dataclass(frozen=True)
class Ready:
    """A worker has built its evaluator."""


@dataclass(frozen=True)
class Refused:
    """A worker cannot go on for a reason that a person can mend."""

    message: str


@dataclass(frozen=True)
class Died:
    """A worker is gone."""

    reason: str


Reply = Ready | Refused | Died | Evaluation


class Backend(ABC):
    """Workers that build the experiment's evaluator, each its own, and evaluate one proposal at a time.

    Life: built once per run; workers are started, replaced when they died, and stopped by `Spread`. A worker is any
    hashable handle; its first reply is `Ready`, and every proposal sent to it gets one more.

    Args:
        workers: how many at a time.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    @abstractmethod
    def start(self) -> Any:
        """A new worker, which gets ready by itself.

        Raises:
            UserError: none can be had.
        """

    @abstractmethod
    def send(self, worker: Any, proposals: Proposals) -> None:
        """Give a worker that is ready one proposal; that it died meanwhile is told by `wait`."""

    @abstractmethod
    def wait(self, workers: Collection[Any], timeout_s: float) -> list[tuple[Any, Reply]]:
        """Replies of these workers as soon as there are some; none where there are none within the time."""

    @abstractmethod
    def stop(self, worker: Any) -> None:
        """End a worker at once, whatever it does."""

    def close(self) -> None:  # noqa: B027 (processes need no more than that all have stopped)
        """Let go of the backend, once all workers are stopped."""


@dataclass(eq=False)
class _Attempt:
    proposals: Proposals  # one
    failures: int = 0
    deaths: int = 0
    began: float = 0.0


class Spread(Wrapped):
    """Evaluates on the workers of a backend; results come as they are ready.

    A failed evaluation is repeated `retries` times, as is one that took longer than `timeout_s`, whose worker is
    stopped. A worker that dies is replaced, and its evaluation repeated; an evaluation that killed three workers is
    `FAILED`.

    Args:
        evaluator: built in this process, for its metrics; it evaluates nothing.

    Raises (where results are asked for):
        UserError: workers cannot build the evaluator, or die one after the other without finishing anything.
    """

    def __init__(
        self, evaluator: Evaluator, backend: Backend, *, retries: int = 0, timeout_s: float | None = None
    ) -> None:
        super().__init__(evaluator)
        self.preferred_batch = 1
        self.backend = backend
        self.retries = retries
        self.timeout_s = timeout_s
        self._starting: set[Any] = set()
        self._idle: list[Any] = []
        self._deaths = 0  # since the last evaluation that came to an end

    def stream(self, parts: Iterable[Proposals]) -> Iterator[tuple[Proposals, Evaluation]]:
        source = (part[np.array([row])] for part in parts for row in range(len(part)))
        first = next(source, None)
        if first is None:
            return  # before workers are started for nothing
        again = deque([_Attempt(first)])
        busy: dict[Any, _Attempt] = {}
        try:
            while (attempt := self._next(again, source, busy)) or busy:
                if attempt:
                    worker = self._idle.pop()
                    attempt.began = time.monotonic()
                    busy[worker] = attempt
                    self.backend.send(worker, attempt.proposals)
                    continue
                replies, error = self._replies(busy)
                for worker, reply in replies:
                    attempt = busy.pop(worker)
                    result = self._settle(attempt, reply, again)
                    if result is not None:
                        yield attempt.proposals, result
                if error is not None:
                    raise error
        finally:
            for worker in busy:  # somebody lost interest, or an error ends the run
                self._idle = [w for w in self._idle if w is not worker]
                self.backend.stop(worker)

    def _next(self, again: deque[_Attempt], source: Iterator[Proposals], busy: dict[Any, _Attempt]) -> _Attempt | None:
        """What to send next; None where no worker is free or nothing is left. Waits for the first workers."""
        while not self._idle:
            if len(self._starting) + len(busy) < self.backend.workers:
                self._starting.add(self.backend.start())
            elif busy:
                return None
            else:
                self._first_worker()
        if again:
            return again.popleft()
        proposals = next(source, None)
        return None if proposals is None else _Attempt(proposals)

    def _first_worker(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._idle and self._starting:
            replies, error = self._replies({})
            assert not replies, "no worker was asked for anything"
            if error is not None:
                raise error
            if time.monotonic() > deadline:
                raise UserError(
                    f"execution: no worker got ready within {_START_S:.0f} s; there may be no room for one. What was "
                    "finished is kept, go on with nasbench run --resume"
                )

    def _replies(self, busy: dict[Any, _Attempt]) -> tuple[list[tuple[Any, Reply]], UserError | None]:
        """What busy workers have to say, timeouts included; workers that got ready, or died, are taken note of.

        Returns:
            The replies; and what ends the run once they are taken in, then evaluations only.
        """
        now = time.monotonic()
        limit = self.timeout_s or math.inf
        until = min((a.began + limit for a in busy.values()), default=math.inf)
        found: list[tuple[Any, Reply]] = []
        error: UserError | None = None
        for worker, reply in self.backend.wait([*busy, *self._starting], min(max(until - now, 0.0), 60.0)):
            self._starting.discard(worker)
            if isinstance(reply, Refused):
                busy.pop(worker, None)
                self.backend.stop(worker)
                error = UserError(reply.message)
                continue
            if isinstance(reply, Died):
                self._deaths += 1
                if self._deaths > 3 + 2 * self.backend.workers:
                    error = error or UserError(
                        f"execution: {self._deaths} workers died one after the other without finishing an evaluation; "
                        f"the last: {reply.reason}. What was finished is kept; with that mended, go on with nasbench "
                        "run --resume"
                    )
            else:
                self._idle.append(worker)
            if worker in busy:
                found.append((worker, reply))
        if error is not None:
            return [(worker, reply) for worker, reply in found if isinstance(reply, Evaluation)], error
        for worker, attempt in busy.items():
            if time.monotonic() - attempt.began > limit and all(worker is not w for w, _ in found):
                self.backend.stop(worker)
                message = f"took longer than {self.timeout_s:g} s"
                found.append((worker, failed(len(self.metrics), message, Status.TIMEOUT)))
        return found, None

    def _settle(self, attempt: _Attempt, reply: Reply, again: deque[_Attempt]) -> Evaluation | None:
        """The result of an attempt; None where it is to be repeated."""
        if isinstance(reply, Evaluation):
            self._deaths = 0
            attempt.failures += int(reply.status[0] in (Status.FAILED, Status.TIMEOUT))
            result, repeat = reply, 0 < attempt.failures <= self.retries and reply.status[0] != Status.OK
        else:
            assert isinstance(reply, Died)
            attempt.deaths += 1
            message = f"its worker died {attempt.deaths} times, the last time: {reply.reason}"
            result, repeat = failed(len(self.metrics), message), attempt.deaths < _DEATHS
        if repeat:
            again.append(attempt)
            return None
        if result.seconds is None:
            return replace(result, seconds=np.array([time.monotonic() - attempt.began]))
        return result

    def close(self) -> None:
        for worker in (*self._starting, *self._idle):
            self.backend.stop(worker)
        self._starting, self._idle = set(), []
        self.backend.close()
        super().close()


def failed(metrics: int, message: str, status: Status = Status.FAILED) -> Evaluation:
    """The evaluation of one row that gave nothing."""
    return Evaluation(np.full((1, metrics), np.nan), np.array([status], dtype=np.uint8), messages={0: message})


def guarded(evaluator: Evaluator, proposals: Proposals) -> Evaluation:
    """Evaluate one proposal; whatever it raises is its failure, bar what a person can mend."""
    try:
        return without_limits(evaluator.evaluate(proposals))
    except UserError:
        raise
    except Exception as error:
        return failed(len(evaluator.metrics), f"{type(error).__name__}: {error}")
