"""One step of supernet training: some architectures run side by side, and their gradients are added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import torch
from torch import Tensor

from nasbench.tasks.base import Task
from nasbench.training.loop import Batch
from nasbench.training.losses import smoothed_loss
from search_spaces import Archs
from search_spaces.supernet import Supernet

# A loss with its gradients by parameter; None where a parameter has no part in it.
_Gradients = tuple[float, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Subnets:
    """The architectures of a step.

    Args:
        leader: learns from labels and teaches the others; None where none does.
        followers: learn from their teacher, or from labels where there is none.
        teacher: a frozen supernet and which of its architectures teaches, instead of the leader.
    """

    leader: Archs | None
    followers: Sequence[Archs]
    teacher: tuple[Supernet, Archs] | None = None


@dataclass(frozen=True)
class SupernetStep:
    """Forward and backward passes of a step's subnets: a `Backward` for `fit`.

    Args:
        subnets: of a step, by its number.
        divergence: of a student's logits from its teacher's; None where all learn from labels.
        weight: of the teacher, the labels have the rest.
        executor: runs subnets in the order in which they are submitted.
        seed: of what layers draw.
    """

    supernet: Supernet
    task: Task
    subnets: Callable[[int], Subnets]
    divergence: Callable[[Tensor, Tensor], Tensor] | None
    weight: float
    label_smoothing: float
    executor: Executor
    seed: int

    def __call__(self, batch: Batch) -> dict[str, float]:
        x = self.task.prepare(batch.images)
        subnets = self.subnets(batch.step)
        parameters = [p for p in self.supernet.parameters() if p.requires_grad]
        ends = held_ends(parameters)
        said: Future[Tensor] | None = None
        if self.divergence is not None and (subnets.leader is not None or subnets.teacher is not None):
            said = Future()

        def logits_of(arch: Archs, index: int) -> Tensor:
            generator = batch.generator(self.seed, f"layers-{index}")
            with batch.precision.autocast():
                logits: Tensor = self.supernet(x, arch, generator=generator)
            return logits.float()

        def ask(supernet: Supernet, arch: Archs) -> Tensor:
            with torch.no_grad(), batch.precision.autocast():
                logits: Tensor = supernet(x, arch)
            return logits.float()

        def tell(function: Callable[..., Tensor], *arguments: object) -> Tensor:
            """A teacher's logits, told to those that wait for them; what goes wrong too, or they would for ever."""
            try:
                logits = function(*arguments)
            except BaseException as error:
                if said is not None:
                    said.set_exception(error)
                raise
            if said is not None:
                said.set_result(logits.detach())
            return logits

        def lead(arch: Archs) -> _Gradients:
            logits = tell(logits_of, arch, 0) if subnets.teacher is None else logits_of(arch, 0)
            return gradients(self._labels_loss(logits, batch))

        def follow(arch: Archs, index: int) -> _Gradients:
            logits = logits_of(arch, index)
            if said is None or self.divergence is None:
                return gradients(self._labels_loss(logits, batch))
            loss = self.weight * self.divergence(logits, said.result())
            if self.weight < 1:
                loss = loss + (1 - self.weight) * self._labels_loss(logits, batch)
            return gradients(loss)

        def gradients(loss: Tensor) -> _Gradients:
            scaled = batch.precision.scaled(loss)
            return float(loss.detach()), torch.autograd.grad(scaled, parameters, allow_unused=True)

        # Who teaches begins, for all others wait for the logits; the last fills the gap that remains at the end.
        asked = self.executor.submit(tell, ask, *subnets.teacher) if said and subnets.teacher else None
        jobs = [self.executor.submit(lead, subnets.leader)] if subnets.leader is not None else []
        jobs += [self.executor.submit(follow, arch, i) for i, arch in enumerate(subnets.followers, start=1)]
        if asked is not None:
            asked.result()
        losses, parts = zip(*(job.result() for job in jobs), strict=True)
        del ends
        for parameter, *grads in zip(parameters, *parts, strict=True):
            parameter.grad = add([parameter.grad, *grads])
        mean = {"loss": sum(losses) / len(losses)}
        return mean | {"loss_largest": losses[0]} if subnets.leader is not None and subnets.followers else mean

    def _labels_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return smoothed_loss(self.task, logits, batch.labels, self.label_smoothing)


def held_ends(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Keeps the nodes in which gradients of parameters end, as long as these views live.

    Such a node is made at a parameter's first use and forgotten with the last graph. Where two threads make one at
    once, the one may wait for its lock while it holds Python's, which the other needs to let go of it: torch 2.13 waits
    for ever. A node that Python itself holds is no better; one that a graph holds needs no lock of Python's.
    """
    return [parameter.view_as(parameter) for parameter in parameters]


def add(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum in the given order, a tensor of its own; None where no gradient has a part in it."""
    present = [g for g in gradients if g is not None]
    return sum(present[1:], present[0].clone()) if present else None
