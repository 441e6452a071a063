"""Evaluation by a command of the user's own, in a process of its own."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hardware_profiles.subprocesses import ToolError, ending, run
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.evaluators.function import metric_row
from search_spaces import SearchSpace, UserError


class CommandEvaluator(Evaluator):
    """Runs a command once per architecture: JSON in, JSON out. Any language, any environment.

    On standard input the command gets `{"id": 7, "architecture": {knob: choice, ...}, "fidelity": {...}}`. The last
    line that it prints must be JSON: a number, or `{metric: number}`; what it prints before is ignored. It is started
    without a shell, must end with exit code 0, and may print 16 MB.

    A run that fails or takes too long is repeated `retries` times; then its row is `FAILED` or `TIMEOUT`, with the end
    of what it printed on standard error as its message. The command's whole process group is killed at the end.

    Args:
        space: that the architectures come from.
        command: program and arguments, as a list or as one line to be split as a shell would.
        metrics: names of what it prints, in the order of the columns.
        timeout_s: seconds that one run may take.
        retries: further runs after a failed one.

    Raises:
        UserError: an empty command, a program that does not exist, or a number out of range.
    """

    fidelities = None

    def __init__(
        self,
        space: SearchSpace,
        *,
        command: str | list[str],
        metrics: Sequence[str] = ("accuracy",),
        timeout_s: float = 3600.0,
        retries: int = 0,
    ) -> None:
        self.space = space
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command:
            raise UserError("evaluator.command: is empty; a program and its arguments were expected")
        if shutil.which(self.command[0]) is None:
            raise UserError(f"evaluator.command: no program {self.command[0]!r} on the path, or not executable")
        if not timeout_s > 0:
            raise UserError(f"evaluator.timeout_s: must be above 0, got {timeout_s}")
        if retries < 0:
            raise UserError(f"evaluator.retries: must be at least 0, got {retries}")
        self.metrics = tuple(metrics)
        self.timeout_s = timeout_s
        self.retries = retries

    def evaluate(self, proposals: Proposals) -> Evaluation:
        values = np.full((len(proposals), len(self.metrics)), np.nan)
        status = np.full(len(proposals), Status.OK, dtype=np.uint8)
        seconds = np.zeros(len(proposals))
        messages = {}
        for row in range(len(proposals)):
            request = json.dumps(
                {
                    "id": int(proposals.ids[row]),
                    "architecture": self.space.decode(proposals.archs[row]),
                    "fidelity": proposals.fidelity_of(row),
                }
            )
            start = time.perf_counter()
            for _ in range(1 + self.retries):
                try:
                    values[row] = self._run(request)
                except (ValueError, OSError, ToolError) as error:
                    timeout = isinstance(error, ToolError) and error.transient
                    status[row] = Status.TIMEOUT if timeout else Status.FAILED
                    messages[row] = str(error)
                else:
                    status[row] = Status.OK
                    messages.pop(row, None)
                    break
            seconds[row] = time.perf_counter() - start
        return Evaluation(values, status, seconds=seconds, messages=messages)

    def _run(self, request: str) -> list[float]:
        finished = run(self.command, self.timeout_s, stdin=request + "\n")
        if finished.returncode != 0:
            complaint = finished.stderr.strip()[-2000:]
            raise ValueError(ending(finished.returncode) + (f": {complaint}" if complaint else ""))
        lines = finished.stdout.strip().splitlines()
        if not lines:
            raise ValueError("printed nothing; the last line must be JSON")
        try:
            result: Any = json.loads(lines[-1])
        except json.JSONDecodeError:
            raise ValueError(f"the last line printed is not JSON: {lines[-1][:80]!r}") from None
        return metric_row(result, self.metrics)
