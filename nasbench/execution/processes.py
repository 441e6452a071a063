"""Worker processes on this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import NoReturn

from hardware_profiles.subprocesses import ending
from nasbench.evaluators.base import Proposals
from nasbench.execution.base import Backend, Died, Ready, Refused, Reply
from nasbench.execution.worker import Recipe, answer, build
from search_spaces.errors import UserError

# What an evaluation may still do (end its own processes, say) when its worker is told to end.
_GRACE_S = 5.0
# One thread each: workers share the cores.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class _Worker:
    def __init__(self, process: SpawnProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection


class Processes(Backend):
    """Freshly started Python processes, one torch thread each, told what to do over a pipe.

    A worker ends when its driver does, however that ended. Ctrl-C is the driver's business.

    Args:
        recipe: of the evaluator.
        workers: 0 for one per processor.
    """

    def __init__(self, recipe: Recipe, workers: int = 0) -> None:
        super().__init__(workers or len(os.sched_getaffinity(0)))
        self.recipe = recipe
        self._context = multiprocessing.get_context("spawn")

    def start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self.recipe), daemon=False)
        with _bare_start():
            try:
                process.start()
            except OSError as error:
                raise UserError(f"execution: no worker process can be started: {error}") from error
        theirs.close()  # so that its end is seen
        return _Worker(process, ours)

    def send(self, worker: _Worker, proposals: Proposals) -> None:
        with contextlib.suppress(OSError):
            worker.connection.send(proposals)

    def wait(self, workers: Collection[_Worker], timeout_s: float) -> list[tuple[_Worker, Reply]]:
        by_connection = {worker.connection: worker for worker in workers}
        replies: list[tuple[_Worker, Reply]] = []
        for connection in wait(list(by_connection), timeout_s):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                reply = worker.connection.recv()
            except (EOFError, OSError):
                reply = Died(self._why(worker))
            replies.append((worker, reply))
        return replies

    def _why(self, worker: _Worker) -> str:
        self.stop(worker)
        return f"process {worker.process.pid} {ending(worker.process.exitcode or 0)}"

    def stop(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.join(0.05)
        if worker.process.is_alive():
            worker.process.terminate()
            worker.process.join(_GRACE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


@contextlib.contextmanager
def _bare_start() -> Iterator[None]:
    """Processes that are started meanwhile have one thread, and do not run the user's script once more."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, recipe: Recipe) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_driver, daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        evaluator = build(recipe)
        connection.send(evaluator if isinstance(evaluator, Refused) else Ready())
        while not isinstance(evaluator, Refused):
            connection.send(answer(evaluator, connection.recv()))


def _leave(*_: object) -> NoReturn:
    sys.exit(1)  # as an exception, so that evaluators clear up


def _follow_driver() -> None:
    """End this process when the driver has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)
