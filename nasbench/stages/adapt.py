"""Learning on the device as a stage: a network is trained further within the memory that a device has for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from hardware_profiles.paths import write_text
from nasbench.ondevice.memory import Update
from nasbench.ondevice.methods import LiteResidual, Method, method_memory
from nasbench.ondevice.sparse import choose_updates, contributions
from nasbench.ondevice.transfer import adapt
from nasbench.stages.base import Candidate, Form, Stage, StageContext
from nasbench.tasks.base import Task
from nasbench.tasks.recordings import RecordingsTask
from nasbench.training.evaluation import evaluate_network
from nasbench.training.recipe import Recipe
from search_spaces import UserError

if TYPE_CHECKING:
    from torch import nn


class Adapt(Stage):
    """Trains some of a float network's parameters, and keeps in memory only what that needs (see `nasbench.ondevice`).

    `NAME-adapt.json` tells what trained, the memory that a step takes, and the history.

    Args:
        method: `last` layer, `bias`, `lite_residual` (those, and a small branch that is added beside each block; the
            network that is measured and exported has them), `sparse` (layers and channels chosen for `budget_kb`), or
            `full`.
        budget_kb: of activations, gradients and optimiser state; needed by `sparse`, a limit for the others.
        person: whose recordings to learn from, the first 40 % of each, where the task has people's; None for the
            task's training data.
        epochs: passes over the training data.
        batch_size: samples a step.
        lr: peak learning rate.
        momentum: 0 needs no optimiser state.

    Raises:
        UserError: a value out of range.
    """

    accepts = frozenset({Form.FLOAT})
    produces = Form.FLOAT

    def __init__(
        self,
        *,
        method: Method = "bias",
        budget_kb: float | None = None,
        person: int | None = None,
        epochs: int = 5,
        batch_size: int = 8,
        lr: float = 0.02,
        momentum: float = 0.9,
    ) -> None:
        Recipe(epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum)  # refuses what makes no sense
        if budget_kb is not None and not budget_kb > 0:
            raise UserError(f"budget_kb = {budget_kb}: expected above 0")
        if method == "sparse" and budget_kb is None:
            raise UserError("budget_kb is missing: method = 'sparse' chooses what trains to keep it")
        self.method, self.budget_kb, self.person = method, budget_kb, person
        self.epochs, self.batch_size, self.lr, self.momentum = epochs, batch_size, lr, momentum

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with an adapted copy of its network.

        Raises:
            UserError: a method that takes more than the budget, a task without people, or a loss that is not finite.
        """
        network, shape = candidate.network, context.input_shape
        assert network is not None
        task = self._data(context.task)
        optimizer: Literal["momentum", "sgd"] = "momentum" if self.momentum else "sgd"
        recipe: dict[str, Any] = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "momentum": self.momentum,
            "seed": context.seed,
        }
        updates: Mapping[str, Update] | None = None
        if self.method == "sparse":
            assert self.budget_kb is not None

            def accuracy(tried: Mapping[str, Update]) -> float:
                adapted, _ = adapt(network, task, shape, method="sparse", updates=tried, **recipe)
                return evaluate_network(adapted, task, "val", shape)

            gains = contributions(network, shape, accuracy, shares=(0.5, 1.0))
            updates = choose_updates(
                network, shape, gains, int(self.budget_kb * 1024), batch=self.batch_size, optimizer=optimizer
            )
        memory, _ = method_memory(network, shape, self.method, updates, batch=self.batch_size, optimizer=optimizer)
        if self.budget_kb is not None and memory.total > self.budget_kb * 1024:
            raise UserError(
                f"budget_kb = {self.budget_kb:g}: training {candidate.name!r} by method {self.method!r} takes "
                f"{memory.total / 1024:.0f} KB at batch {self.batch_size}; choose 'sparse', or a smaller batch"
            )
        adapted, history = adapt(network, task, shape, method=self.method, updates=updates, **recipe)
        said = {
            "method": self.method,
            "training_memory_bytes": memory.total,
            "updates": {n: {"weights": u.weights, "bias": u.bias} for n, u in (updates or {}).items()},
            "history": history,
        }
        write_text(context.directory / f"{candidate.name}-adapt.json", json.dumps(said, indent=1) + "\n")
        return replace(candidate, network=adapted, metrics={}, notes=_added(network, adapted))

    def _data(self, task: Task) -> Task:
        if self.person is None:
            return task
        if not isinstance(task, RecordingsTask):
            raise UserError(f"person = {self.person}: task {task.name!r} has no people's recordings")
        return task.of_person(self.person)


def _added(before: nn.Module, after: nn.Module) -> tuple[str, ...]:
    """What a person should know of a network that has more modules than before."""
    branches = sum(isinstance(module, LiteResidual) for module in after.modules())
    more = sum(p.numel() for p in after.parameters()) - sum(p.numel() for p in before.parameters())
    return (f"adapt added {branches} lite residuals with {more:,} parameters",) if more else ()
