"""The training loop that supernets and stand-alone networks share."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nasbench.tasks.base import Task
from nasbench.training.checkpoint import load_state, save_state
from nasbench.training.progress import ProgressCallback, Update
from search_spaces.errors import UserError

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Args:
        images: `(batch, channels, height, width)` uint8, augmented.
        labels: `(batch,)` int64.
        rows: `(batch,)` int64, where they stand in the training split.
        step: counted from 0.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    step: int


# Runs one step's forward and backward passes, gradients left in the parameters; returns the mean losses by name, `loss`
# first among them.
Backward = Callable[[Batch], dict[str, float]]


@dataclass(frozen=True)
class Recipe:
    """How to optimise. Keys as in `train_supernet`, where they are described.

    Raises:
        UserError: a value out of range.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip_norm: float = 5.0
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 2, "at least 2, since batch statistics need it"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "optimizer": (self.optimizer in ("sgd", "adamw"), "'sgd' or 'adamw'"),
            "momentum": (0 <= self.momentum < 1, "in 0..1, below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup": (0 <= self.warmup <= 1, "a share of the steps, 0..1"),
            "clip_norm": (self.clip_norm >= 0, "0 (off) or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in 0..1, below 1"),
        }
        for key, (right, expected) in rules.items():
            if not right:
                raise UserError(f"{key} = {getattr(self, key)!r}: expected {expected}")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of a step: linear warm-up, then a half cosine to zero (Loshchilov and Hutter, ICLR 2017)."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser, with weight decay on matrices and kernels only: not on biases and normalisation."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=(self.momentum, 0.999))
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)


def step_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step: what a step draws depends on nothing that was drawn before."""
    words = np.random.SeedSequence([seed, *purpose.encode(), step]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def smoothed_loss(task: Task, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The task's loss with label smoothing (Szegedy et al., CVPR 2016): a share of the target is uniform."""
    loss = task.loss(logits, labels)
    if not smoothing:
        return loss
    return (1 - smoothing) * loss - smoothing * logits.log_softmax(1).mean()


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against a teacher's softened output, times T^2 to keep gradients at size (Hinton et al. 2015)."""
    target = (teacher / temperature).softmax(1)
    return -(target * (logits / temperature).log_softmax(1)).sum(1).mean() * temperature**2


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    backward: Backward,
    *,
    settings: Mapping[str, Any],
    seed: int,
    epoch_metrics: Callable[[], dict[str, float]] | None = None,
    checkpoint: Path | None = None,
    save_every_s: float = 30.0,
    progress: ProgressCallback | None = None,
) -> History:
    """Optimise `model` on the task's training images.

    What a step draws (order, augmentation, architectures, dropout) follows from the seed and the step's number, so a
    run resumed from its checkpoint ends with the same bits as one that was never stopped, given the same number of
    threads. Ctrl-C saves a checkpoint after the running step; a second one stops at once.

    Args:
        backward: one step, see `Backward`.
        settings: what else the result depends on; a checkpoint made with other settings is refused.
        epoch_metrics: called after every epoch; its values join the history.
        checkpoint: file to resume from, if it exists, and to save to; None saves nothing.
        save_every_s: seconds between checkpoints; the end of an epoch always makes one.

    Returns:
        One row per epoch: `epoch`, mean losses by name, `lr`, `images_per_s`, `seconds`, and the epoch's metrics.

    Raises:
        UserError: the loss or a gradient is no longer finite (weights and checkpoint stay as they were before the
            step), or a checkpoint that is corrupt or was made with other settings.
    """
    split = task.split("train")
    batch = min(recipe.batch_size, len(split))
    per_epoch = len(split) // batch
    steps = recipe.epochs * per_epoch
    optimizer = recipe.make_optimizer(model)
    settings = json.loads(json.dumps({**asdict(recipe), **settings, "seed": seed, "images": len(split)}))

    history: History = []
    step, sums, epoch_s = 0, dict[str, float](), 0.0
    if checkpoint is not None and checkpoint.exists():
        state = load_state(checkpoint, model, optimizer)
        _check_settings(checkpoint, state.get("settings", {}), settings)
        history, step, sums, epoch_s = state["history"], state["step"], state["sums"], state["epoch_s"]

    def broke_down(why: str) -> UserError:
        kept = f"; the last good state is kept in {checkpoint}" if checkpoint and checkpoint.exists() else ""
        return UserError(f"training broke down at step {step + 1} of {steps}: {why}. Lower lr, or raise warmup{kept}")

    def save() -> None:
        if checkpoint is not None:
            if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                raise broke_down("weights are no longer finite")
            state = {"settings": settings, "history": history, "step": step, "sums": sums, "epoch_s": epoch_s}
            save_state(checkpoint, model, optimizer, state)

    model.train()
    saved = started = time.monotonic()
    first = step
    with torch.random.fork_rng(devices=[]), _deferred_interrupt(checkpoint is not None) as interrupted:
        while step < steps:
            epoch, within = divmod(step, per_epoch)
            if within == 0 or step == first:
                generator = torch.Generator().manual_seed(step_seed(seed, "order", epoch))
                order = torch.randperm(len(split), generator=generator)
            began = time.monotonic()
            rows = order[within * batch : (within + 1) * batch]
            torch.manual_seed(step_seed(seed, "layers", step))
            images = task.augment(split.images[rows], step_seed(seed, "augment", step))
            lr = recipe.lr_at(step, steps)
            optimizer.zero_grad(set_to_none=True)
            losses = backward(Batch(images, split.labels[rows], rows, step))
            limit = recipe.clip_norm or math.inf
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
            if not math.isfinite(norm + sum(losses.values())):
                raise broke_down(f"loss {losses['loss']:g}, gradient norm {norm:g}, lr {lr:g}")
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            step += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value
            epoch_s += time.monotonic() - began
            if within + 1 == per_epoch:
                row = {"epoch": epoch + 1, **{name: total / per_epoch for name, total in sums.items()}, "lr": lr}
                row |= {"images_per_s": per_epoch * batch / epoch_s, "seconds": epoch_s}
                if epoch_metrics is not None:
                    row |= epoch_metrics()
                    model.train()
                history.append(row)
            if progress is not None:
                spent = time.monotonic() - started
                rate = (step - first) / spent
                progress(Update(step, steps, rate * batch, sums["loss"] / (within + 1), (steps - step) / rate))
            if within + 1 == per_epoch:
                sums, epoch_s = {}, 0.0
            if within + 1 == per_epoch or interrupted.is_set() or time.monotonic() - saved > save_every_s:
                save()
                saved = time.monotonic()
            if interrupted.is_set():
                raise KeyboardInterrupt
    model.eval()
    return history


def _check_settings(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise UserError(
                f"{path}: this training was begun with {key} = {theirs.get(key)!r}, now it is {ours.get(key)!r}; "
                "continue with the same settings, or delete the file to train anew"
            )


@contextmanager
def _deferred_interrupt(active: bool) -> Iterator[threading.Event]:
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
