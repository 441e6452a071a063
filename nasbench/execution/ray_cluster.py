"""Workers on a Ray cluster: one actor each, on one processor of any node."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from hardware_profiles.extras import load
from nasbench.evaluators.base import Evaluation, Proposals
from nasbench.execution.base import Backend, Died, Ready, Refused, Reply
from nasbench.execution.worker import Recipe, answer, build
from search_spaces.errors import UserError

# Seconds between attempts to reach a cluster, and after which no further one is made; Ray's own take up to 50.
_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_PATIENCE_S = 30.0


class _Actor:
    """What runs on the cluster."""

    def __init__(self, recipe: Recipe) -> None:
        self.evaluator = build(recipe)

    def ready(self) -> Refused | Ready:
        return self.evaluator if isinstance(self.evaluator, Refused) else Ready()

    def evaluate(self, proposals: Proposals) -> Evaluation | Refused:
        return self.evaluator if isinstance(self.evaluator, Refused) else answer(self.evaluator, proposals)


class RayCluster(Backend):
    """Ray's actors (Moritz et al., OSDI 2018), one processor each; Ray finds a node for each, and another one when a
    node goes away.

    A Ray that is running already in this process is used, and left running.

    Args:
        recipe: of the evaluator; its paths must be readable on all nodes.
        workers: 0 for one per processor of the cluster.
        address: of the cluster: `auto`, `HOST:PORT` or `ray://HOST:PORT`; empty starts Ray on this machine.

    Raises:
        UserError: Ray is not installed, or the cluster is not reached within a minute or so.
    """

    def __init__(self, recipe: Recipe, workers: int = 0, address: str = "") -> None:
        self._ray: Any = load("ray", "ray")
        self.recipe = recipe
        self._own = not self._ray.is_initialized()
        if self._own:
            self._connect(address, workers)
        super().__init__(workers or max(1, int(self._ray.cluster_resources().get("CPU", 1))))
        # A worker that dies is replaced by the run, which knows what it was at.
        self._actor = self._ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(_Actor)
        self._waiting: dict[Any, Any] = {}  # per actor, what it is asked

    def _connect(self, address: str, workers: int) -> None:
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        if workers and not address:
            options["num_cpus"] = workers
        began = time.monotonic()
        for wait in (*_WAITS_S, None):
            try:
                self._ray.init(log_to_driver=False, configure_logging=False, **options)
                return
            except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError, TimeoutError and its own
                if wait is None or not address or time.monotonic() - began > _PATIENCE_S:
                    where = f"the cluster at execution.address = {address!r}" if address else "a Ray of its own"
                    raise UserError(
                        f"execution: cannot reach {where}: {str(error).splitlines()[0]}. See that "
                        "`ray status` answers there; what was finished is kept, go on with nasbench run --resume"
                    ) from error
                time.sleep(wait)

    def start(self) -> Any:
        actor = self._actor.remote(self.recipe)
        self._waiting[actor] = actor.ready.remote()
        return actor

    def send(self, worker: Any, proposals: Proposals) -> None:
        self._waiting[worker] = worker.evaluate.remote(proposals)

    def wait(self, workers: Collection[Any], timeout_s: float) -> list[tuple[Any, Reply]]:
        asked = {self._waiting[worker]: worker for worker in workers}
        done, _ = self._ray.wait(list(asked), num_returns=1, timeout=timeout_s)
        replies: list[tuple[Any, Reply]] = []
        for reference in done:
            try:
                reply = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                reply = Died(str(error).strip().splitlines()[0])
            if isinstance(reply, Died):
                self._waiting.pop(asked[reference])
            replies.append((asked[reference], reply))
        return replies

    def stop(self, worker: Any) -> None:
        self._waiting.pop(worker, None)
        self._ray.kill(worker)

    def close(self) -> None:
        if self._own:
            self._ray.shutdown()
