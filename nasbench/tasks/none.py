"""No task: for experiments in which nothing is trained."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from nasbench.tasks.base import Split, SplitName, Task
from search_spaces.errors import UserError


class NoTask(Task):
    """Nothing to learn, for evaluators that read no data, such as tables: the space's own defaults give the networks.

    An experiment with such an evaluator and no `[task]` has it.
    """

    name = "none"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        raise self._error()

    @property
    def class_names(self) -> tuple[str, ...]:
        raise self._error()

    def split(self, name: SplitName) -> Split:
        raise self._error()

    def prepare(self, images: Any) -> Any:
        raise self._error()

    @cached_property
    def fingerprint(self) -> str:
        return ""

    def _error(self) -> UserError:
        return UserError("task.name is 'none': there are no data; name a task for what trains or judges networks")
