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
    split = task.split("train")
    batch = min(recipe.batch_size, len(split))
    per_epoch = len(split) // batch
    steps = recipe.epochs * per_epoch
    last = steps if until is None else min(until, recipe.epochs) * per_epoch
    parts = _parts(batch, recipe.accumulate, ranks)
    settings = json.loads(json.dumps({**asdict(recipe), **settings, "seed": seed, "images": len(split)}))
    home = device_of(model)
    device = device or home
    copies = {name: module for name, (_, module) in (snapshots or {}).items()}
    for module in (model, *copies.values()):
        module.to(device)
    optimizer = recipe.make_optimizer(model)
    precision = Precision(recipe.precision, device)
    average = WeightAverage(model, recipe.ema)
    kept = {f"ema/{name}": tensor for name, tensor in average.tensors.items()}
    kept |= {f"{name}/{key}": tensor for name, copy in copies.items() for key, tensor in copy.state_dict().items()}

    history: History = []
    step, sums, epoch_s = 0, dict[str, float](), 0.0
    found = ranks.broadcast(checkpoint if checkpoint is not None and checkpoint.exists() else None)
    if found is not None:
        check = partial(check_settings, found, settings)
        state = load_state(found, model, [optimizer], kept, check)
        history, step, sums, epoch_s = state["history"], state["step"], state["sums"], state["epoch_s"]
        precision.scaler.load_state_dict(state.get("scaler", {}))
    else:
        ranks.broadcast_([*model.state_dict().values(), *average.tensors.values()])
    checkpoint = checkpoint if ranks.first else None
    log = TensorBoard(log_dir if ranks.first else None, step)

    def broke_down(why: str) -> BrokeDown:
        kept = f"; the last good state is kept in {checkpoint}" if checkpoint and checkpoint.exists() else ""
        return BrokeDown(f"training broke down at step {step + 1} of {steps}: {why}. Lower lr, or raise warmup{kept}")

    def save() -> None:
        if checkpoint is not None:
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                raise broke_down("weights are no longer finite")
            state = {"settings": settings, "history": history, "step": step, "sums": sums, "epoch_s": epoch_s}
            save_state(checkpoint, model, [optimizer], state | {"scaler": precision.scaler.state_dict()}, kept)

    model.train()
    saved = started = time.monotonic()
    first = step
    interruptible = checkpoint is not None or ranks.count > 1
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), deferred_interrupt(interruptible) as interrupted, closing(log):
        while step < last:
            epoch, within = divmod(step, per_epoch)
            if within == 0 or step == first:
                generator = torch.Generator().manual_seed(step_seed(seed, "order", epoch))
                order = torch.randperm(len(split), generator=generator)
            began = time.monotonic()
            for at, copy in (snapshots or {}).values():
                if at == step:
                    with average.applied():
                        copy.load_state_dict(model.state_dict())
            rows = order[within * batch : (within + 1) * batch]
            torch.manual_seed(step_seed(seed, "layers", step))
            images = task.augment(split.images[rows], step_seed(seed, "augment", step))
            lr = recipe.lr_at(step, steps, restarts)
            optimizer.zero_grad(set_to_none=True)
            losses: dict[str, float] = {}
            for number, part in parts.items():
                torch.manual_seed(step_seed(seed, _purpose("layers", number), step))
                given = Batch(
                    images[part].to(device), split.labels[rows[part]].to(device), rows[part], step, number, precision
                )
                for name, value in backward(given).items():
                    losses[name] = losses.get(name, 0.0) + value / len(parts)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            if recipe.accumulate > 1:
                torch._foreach_div_(gradients, recipe.accumulate)
            ranks.mean_(gradients)
            losses = ranks.means(losses | {"stop": float(interrupted.is_set())}, device)
            stop = losses.pop("stop") > 0
            precision.scaler.unscale_(optimizer)
            limit = recipe.clip_norm or math.inf
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
            overflow = precision.scaler.is_enabled() and not math.isfinite(norm) and precision.scaler.get_scale() > 1
            if not math.isfinite(sum(losses.values()) + (0 if overflow else norm)):
                raise broke_down(f"loss {losses['loss']:g}, gradient norm {norm:g}, lr {lr:g}")
            for group in optimizer.param_groups:
                group["lr"] = lr
            precision.scaler.step(optimizer)
            precision.scaler.update()
            step += 1
            average.update(step)
            log.step(step, losses | {"lr": lr, "gradient_norm": norm})
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            epoch_s += time.monotonic() - began
            if within + 1 == per_epoch:
                row = {"epoch": epoch + 1, **{name: total / per_epoch for name, total in sums.items()}, "lr": lr}
                row |= {"images_per_s": per_epoch * batch / epoch_s, "seconds": epoch_s}
                if epoch_metrics is not None:
                    with average.applied():
                        model.eval()
                        row |= epoch_metrics(step)
                    model.train()
                history.append(row)
                log.epoch(step, row)
            if progress is not None and ranks.first:
                spent = time.monotonic() - started
                rate = (step - first) / spent
                progress(Update(step, steps, rate * batch, sums["loss"] / (within + 1), (steps - step) / rate))
            if within + 1 == per_epoch:
                sums, epoch_s = {}, 0.0
            stop |= interrupted.is_set() and ranks.count == 1
            if within + 1 == per_epoch or stop or time.monotonic() - saved > save_every_s:
                save()
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    average.put()
    for module in (model, *copies.values()):
        module.to(home)
    model.eval()
    return history


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
