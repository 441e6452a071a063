"""The training loop that supernets and stand-alone networks share."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasbench.tasks.base import Task
from nasbench.training.averaging import WeightAverage
from nasbench.training.checkpoint import check_settings, load_state, save_state
from nasbench.training.logs import TensorBoard
from nasbench.training.precision import Precision, device_of
from nasbench.training.processes import ALONE, Ranks
from nasbench.training.progress import ProgressCallback, Update
from nasbench.training.recipe import Recipe
from search_spaces.errors import UserError

History = list[dict[str, Any]]


class BrokeDown(UserError):
    """Training whose loss, gradient or weights are no longer finite."""


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Args:
        images: `(batch, channels, height, width)` as stored, augmented.
        labels: `(batch,)` int64.
        rows: `(batch,)` int64, where they stand in the training split.
        step: counted from 0.
        part: which part of the step's images these are, counted over all processes; each has its own dropout.
        precision: of the forward passes, and the scale of losses.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    step: int
    part: int
    precision: Precision

    def generator(self, seed: int, purpose: str) -> torch.Generator:
        """For what this part of the step draws for one purpose, on the device of the images."""
        generator = torch.Generator(self.images.device)
        return generator.manual_seed(step_seed(seed, _purpose(purpose, self.part), self.step))


# Runs the forward and backward passes of a batch and adds the gradients to those in the parameters; returns the mean
# losses by name, `loss` first among them.
Backward = Callable[[Batch], dict[str, float]]


def step_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step: what a step draws depends on nothing that was drawn before."""
    words = np.random.SeedSequence([seed, *purpose.encode(), step]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    backward: Backward,
    *,
    settings: Mapping[str, Any],
    seed: int,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    restarts: Sequence[int] = (0,),
    snapshots: Mapping[str, tuple[int, nn.Module]] | None = None,
    epoch_metrics: Callable[[int], dict[str, Any]] | None = None,
    checkpoint: Path | None = None,
    save_every_s: float = 30.0,
    until: int | None = None,
    log_dir: Path | None = None,
    progress: ProgressCallback | None = None,
) -> History:
    """Optimise `model` on the task's training images. It ends in eval mode, where it was, with averaged weights if any.

    What a step draws (order, augmentation, architectures, dropout) follows from the seed and the step's number, so a
    run resumed from its checkpoint ends with the same bits as one that was never stopped, given the same number of
    threads. Ctrl-C saves a checkpoint after the running step; a second one stops at once.

    Args:
        backward: one step, see `Backward`.
        settings: what else the result depends on; a checkpoint made with other settings is refused.
        device: to train on; None stays where the model is.
        ranks: the processes that train together; all call this with equal arguments.
        restarts: steps from which the schedule of the learning rate begins anew.
        snapshots: modules by name that take over the model's (averaged) weights before the given step, to teach it.
        epoch_metrics: called after every epoch with the number of finished steps, the model in eval mode with averaged
            weights; its values join the history.
        checkpoint: file to resume from, if it exists, and to save to; None saves nothing.
        save_every_s: seconds between checkpoints; the end of an epoch always makes one.
        until: stop after so many epochs of the schedule; called again with its checkpoint, it goes on from there.
        log_dir: for TensorBoard's event files.

    Returns:
        One row per epoch: `epoch`, mean losses by name, `lr`, `images_per_s`, `seconds`, and the epoch's metrics.

    Raises:
        UserError: the loss or a gradient is no longer finite (weights and checkpoint stay as they were before the
            step), a checkpoint that is corrupt or was made with other settings, or a batch that cannot be divided.
    """
    training = _Training(model, task, recipe, settings, seed, device, ranks, restarts, snapshots or {})
    training.resume(checkpoint)
    last = training.steps if until is None else min(until, recipe.epochs) * training.per_epoch
    log = TensorBoard(log_dir if ranks.first else None, training.step)
    model.train()
    saved = started = time.monotonic()
    first = training.step
    interruptible = training.checkpoint is not None or ranks.count > 1
    cuda = [training.device] if training.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), deferred_interrupt(interruptible) as interrupted, closing(log):
        while training.step < last:
            began = time.monotonic()
            losses, stop = training.gradients(backward, interrupted)
            update = training.update(losses)
            log.step(training.step, losses | update)
            training.count(losses, time.monotonic() - began)
            if progress is not None and ranks.first:
                rate = (training.step - first) / (time.monotonic() - started)
                left = (training.steps - training.step) / rate
                progress(Update(training.step, training.steps, rate * training.batch, training.mean("loss"), left))
            ended = training.within == 0
            if ended:
                log.epoch(training.step, training.end_epoch(update["lr"], epoch_metrics))
            stop |= interrupted.is_set() and ranks.count == 1
            if ended or stop or time.monotonic() - saved > save_every_s:
                training.save()
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    training.release()
    return training.history


class _Training:
    """A model on its way: optimiser, averaged weights, snapshots, and how far it has come. Arguments as in `fit`.

    Attributes:
        batch, per_epoch, steps: images a step, steps an epoch, and in all.
        step: how many were done.
        checkpoint: that this process writes, if any.
        history: rows of the epochs that were finished.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        settings: Mapping[str, Any],
        seed: int,
        device: torch.device | None,
        ranks: Ranks,
        restarts: Sequence[int],
        snapshots: Mapping[str, tuple[int, nn.Module]],
    ) -> None:
        self.model, self.task, self.recipe, self.seed, self.ranks = model, task, recipe, seed, ranks
        self.restarts, self.snapshots = restarts, snapshots
        self.split = task.split("train")
        self.batch = min(recipe.batch_size, len(self.split))
        self.per_epoch = len(self.split) // self.batch
        self.steps = recipe.epochs * self.per_epoch
        self._parts = _parts(self.batch, recipe.accumulate, ranks)
        depends = {**asdict(recipe), **settings, "seed": seed, "images": len(self.split)}
        self._settings = json.loads(json.dumps(depends))
        self._home = device_of(model)
        self.device = device or self._home
        self._move(self.device)
        self._optimizer = recipe.make_optimizer(model)
        self._precision = Precision(recipe.precision, self.device)
        self._average = WeightAverage(model, recipe.ema)
        self._kept = {f"ema/{name}": tensor for name, tensor in self._average.tensors.items()}
        for name, (_, copy) in snapshots.items():
            self._kept |= {f"{name}/{key}": tensor for key, tensor in copy.state_dict().items()}
        self.checkpoint: Path | None = None
        self.history: History = []
        self.step = 0
        self._sums: dict[str, float] = {}  # of the losses of this epoch's steps
        self._epoch_s = 0.0
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # an epoch's

    def _move(self, device: torch.device) -> None:
        for module in (self.model, *(copy for _, copy in self.snapshots.values())):
            module.to(device)

    def resume(self, checkpoint: Path | None) -> None:
        """Go on from a checkpoint, if it exists; else all processes begin with the first one's weights."""
        found = self.ranks.broadcast(checkpoint if checkpoint is not None and checkpoint.exists() else None)
        if found is not None:
            check = partial(check_settings, found, self._settings)
            state = load_state(found, self.model, [self._optimizer], self._kept, check)
            self.history, self.step = state["history"], state["step"]
            self._sums, self._epoch_s = state["sums"], state["epoch_s"]
            self._precision.scaler.load_state_dict(state.get("scaler", {}))
        else:
            self.ranks.broadcast_([*self.model.state_dict().values(), *self._average.tensors.values()])
        self.checkpoint = checkpoint if self.ranks.first else None

    def save(self) -> None:
        """Write the checkpoint, if there is to be one; never of weights that are not finite."""
        if self.checkpoint is None:
            return
        if not all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            raise self._broke_down("weights are no longer finite")
        state = {
            "settings": self._settings, "history": self.history, "step": self.step, "sums": self._sums,
            "epoch_s": self._epoch_s, "scaler": self._precision.scaler.state_dict(),
        }  # fmt: skip
        save_state(self.checkpoint, self.model, [self._optimizer], state, self._kept)

    @property
    def within(self) -> int:
        """Steps of the present epoch that were done."""
        return self.step % self.per_epoch

    def _rows(self) -> Tensor:
        """Which images this step trains on: the next of its epoch's order."""
        epoch = self.step // self.per_epoch
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(step_seed(self.seed, "order", epoch))
            self._order = epoch, torch.randperm(len(self.split), generator=generator)
        return self._order[1][self.within * self.batch : (self.within + 1) * self.batch]

    def gradients(self, backward: Backward, interrupted: threading.Event) -> tuple[dict[str, float], bool]:
        """The gradients of one step, of all its parts and processes; mean losses, and whether any was interrupted."""
        for at, copy in self.snapshots.values():
            if at == self.step:
                with self._average.applied():
                    copy.load_state_dict(self.model.state_dict())
        rows, step = self._rows(), self.step
        torch.manual_seed(step_seed(self.seed, "layers", step))
        images = self.task.augment(self.split.images[rows], step_seed(self.seed, "augment", step))
        self._optimizer.zero_grad(set_to_none=True)
        losses: dict[str, float] = {}
        for number, part in self._parts.items():
            torch.manual_seed(step_seed(self.seed, _purpose("layers", number), step))
            own = rows[part]
            x, labels = images[part].to(self.device), self.split.labels[own].to(self.device)
            for name, value in backward(Batch(x, labels, own, step, number, self._precision)).items():
                losses[name] = losses.get(name, 0.0) + value / len(self._parts)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.recipe.accumulate > 1:
            torch._foreach_div_(gradients, self.recipe.accumulate)
        self.ranks.mean_(gradients)
        losses = self.ranks.means(losses | {"stop": float(interrupted.is_set())}, self.device)
        return losses, losses.pop("stop") > 0

    def update(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Take the step, unless it has broken down; its learning rate, and the norm of its gradient."""
        scaler, lr = self._precision.scaler, self.recipe.lr_at(self.step, self.steps, self.restarts)
        scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm or math.inf))
        overflow = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > 1
        if not math.isfinite(sum(losses.values()) + (0 if overflow else norm)):
            raise self._broke_down(f"loss {losses['loss']:g}, gradient norm {norm:g}, lr {lr:g}")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scaler.step(self._optimizer)
        scaler.update()
        self.step += 1
        self._average.update(self.step)
        return {"lr": lr, "gradient_norm": norm}

    def count(self, losses: Mapping[str, float], seconds: float) -> None:
        """Account for a step in its epoch."""
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._epoch_s += seconds

    def mean(self, loss: str) -> float:
        """The mean of a loss over the steps of the epoch so far."""
        return self._sums[loss] / (self.within or self.per_epoch)

    def end_epoch(self, lr: float, metrics: Callable[[int], dict[str, Any]] | None) -> dict[str, Any]:
        """The row of an epoch whose last step was done."""
        row: dict[str, Any] = {"epoch": self.step // self.per_epoch}
        row |= {name: total / self.per_epoch for name, total in self._sums.items()}
        images_per_s = self.per_epoch * self.batch / self._epoch_s
        row |= {"lr": lr, "images_per_s": images_per_s, "seconds": self._epoch_s}
        if metrics is not None:
            with self._average.applied():
                self.model.eval()
                row |= metrics(self.step)
            self.model.train()
        self.history.append(row)
        self._sums, self._epoch_s = {}, 0.0
        return row

    def release(self) -> None:
        """The end: averaged weights, in eval mode, on the device where the model was."""
        self._average.put()
        self._move(self._home)
        self.model.eval()

    def _broke_down(self, why: str) -> BrokeDown:
        there = self.checkpoint is not None and self.checkpoint.exists()
        kept = f"; the last good state is kept in {self.checkpoint}" if there else ""
        return BrokeDown(
            f"training broke down at step {self.step + 1} of {self.steps}: {why}. Lower lr, or raise warmup{kept}"
        )


def _parts(batch: int, accumulate: int, ranks: Ranks) -> dict[int, slice]:
    """The parts of a batch that this process works on, by their numbers among the parts of all processes."""
    count = accumulate * ranks.count
    if batch % count or batch // count < 2:
        raise UserError(
            f"batch_size = {batch}: it is divided among accumulate = {accumulate} parts of {ranks.count} processes; "
            f"expected a multiple of {count}, and at least two images a part"
        )
    size = batch // count
    return {i: slice(i * size, (i + 1) * size) for i in range(ranks.rank * accumulate, (ranks.rank + 1) * accumulate)}


def _purpose(purpose: str, part: int) -> str:
    """What a part of a batch draws for; the first as if there were no others."""
    return f"{purpose}/{part}" if part else purpose


@contextmanager
def deferred_interrupt(active: bool) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that no step is cut in two; the second one has its usual effect."""
    event = threading.Event()
    if not active or threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
