"""A gradient search under way: the weights and the logits of the paths, trained in turn, stopped and resumed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasbench.strategies.path_costs import PathCosts
from nasbench.tasks.base import Task
from nasbench.training.checkpoint import check_settings, load_state, save_state
from nasbench.training.loop import deferred_interrupt, step_seed
from nasbench.training.precision import choose_device, device_of
from nasbench.training.progress import ProgressCallback, Update
from search_spaces import SearchSpace, UserError
from search_spaces.supernet import MixtureSupernet

if TYPE_CHECKING:
    from nasbench.strategies.gradient import GradientSearch, Sample


class PathTraining:
    """Trains the weights of a mixture supernet on one half of the training images, and its paths' logits on the other.

    What a step draws follows from the seed and the step's number, so a training resumed from its checkpoint ends with
    the same bits as one that was never stopped, given the same number of threads.

    Args:
        method: whose options, path weights and losses are used.
        supernet: trained in place; it ends where it was.
        costs: how they enter the logits' loss.
        checkpoint: to resume from, if it exists, and to save to; None for neither.

    Attributes:
        logits: one vector per knob. They stay on the CPU, where they are drawn from and cost nothing: all devices draw
            the same paths.
        history, trajectory: see `GradientSearch`.

    Raises:
        UserError: too few images, or a checkpoint that is corrupt or was made with other settings.
    """

    def __init__(
        self, method: GradientSearch, supernet: MixtureSupernet, task: Task, costs: PathCosts, checkpoint: Path | None
    ) -> None:
        self.method, self.supernet, self.task, self.costs, self.checkpoint = method, supernet, task, costs, checkpoint
        self.device, self.home = choose_device(method.device), device_of(supernet)
        supernet.to(self.device).train()
        paths = nn.ParameterList([start_logits(method.space, knob) for knob in range(len(method.space.knobs))])
        self.logits: list[Tensor] = list(paths)
        self._trained = nn.ModuleDict({"mixture": supernet, "paths": paths, "costs": costs})
        self._weight_optimizer = torch.optim.SGD(
            supernet.parameters(), lr=method.lr, momentum=0.9, weight_decay=method.weight_decay
        )
        self._path_optimizer = torch.optim.Adam(self.logits, lr=method.path_lr, betas=(0.5, 0.999))
        self._train = task.split("train")
        rows = torch.randperm(len(self._train), generator=self._generator("halves", 0))
        self._halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        self._steps = [len(self._batches(half, "weights", 0)) for half in self._halves]  # in an epoch, of either kind
        if not all(self._steps):
            raise UserError(f"task {task.name}: a gradient search needs 4 training images or more, got {len(rows)}")
        self._settings = cast(
            dict[str, Any],
            json.loads(
                json.dumps(
                    method.settings()
                    | {
                        "task": task.name,
                        "images": len(rows),
                        "objectives": [[o.name, o.maximise, o.limit, o.opposite] for o in costs.objectives],
                    }
                )
            ),
        )
        self.history: list[dict[str, float]] = []
        self.trajectory: list[list[list[float]]] = []
        self._losses: list[float] = []  # of this epoch's steps so far
        self._path_losses: list[float] = []
        if checkpoint is not None and checkpoint.exists():
            check = partial(check_settings, checkpoint, self._settings)
            optimizers = (self._weight_optimizer, self._path_optimizer)
            state = load_state(checkpoint, self._trained, optimizers, {}, check)
            self.history, self.trajectory = state["history"], state["trajectory"]
            self._losses, self._path_losses = state["losses"], state["path_losses"]

    def run(self, progress: ProgressCallback | None = None, save_every_s: float = 30.0) -> None:
        """Train to the end. Ctrl-C saves a checkpoint after the running step; a second one stops at once.

        Args:
            save_every_s: seconds between checkpoints; the end of an epoch always makes one.

        Raises:
            UserError: the search broke down.
        """
        saved = started = time.monotonic()
        first = step = self._first_step(len(self.history)) + self._done
        steps = self._first_step(self.method.epochs)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []))
            interrupted = stack.enter_context(deferred_interrupt(self.checkpoint is not None))
            while (epoch := len(self.history)) < self.method.epochs:
                temperature = self.method.temperature_at(epoch)
                self._set_lr(epoch)
                plan = self._plan(epoch)
                for of_paths, rows in plan[self._done :]:
                    torch.manual_seed(step_seed(self.method.seed, "layers", step))
                    if of_paths:
                        self._path_losses.append(self._path_step(rows, step, temperature))
                    else:
                        self._losses.append(self._weight_step(rows, step, temperature))
                    step += 1
                    if progress is not None:
                        rate = (step - first) / (time.monotonic() - started)
                        mean = float(np.mean(self._path_losses or self._losses))
                        progress(Update(step, steps, rate * self.method.batch_size, mean, (steps - step) / rate))
                    last, stop = self._done == len(plan), interrupted.is_set()
                    if last:
                        self._close_epoch(temperature)
                    if last or stop or time.monotonic() - saved > save_every_s:
                        self._save()
                        saved = time.monotonic()
                    if stop:
                        raise KeyboardInterrupt
        self.supernet.to(self.home)

    @property
    def _done(self) -> int:
        """Steps of the running epoch that are behind."""
        return len(self._losses) + len(self._path_losses)

    def _first_step(self, epoch: int) -> int:
        """The number of an epoch's first step."""
        return epoch * self._steps[0] + max(epoch - self.method.warmup_epochs, 0) * self._steps[1]

    def _plan(self, epoch: int) -> list[tuple[bool, Tensor]]:
        """The steps of an epoch in order: whether each trains the logits, and on which rows."""
        weights = [(False, rows) for rows in self._batches(self._halves[0], "weights", epoch)]
        if epoch < self.method.warmup_epochs:
            return weights
        paths = [(True, rows) for rows in self._batches(self._halves[1], "logits", epoch)]
        if self.method.alternate == "epoch":
            return weights + paths
        both = min(len(weights), len(paths))
        return [*chain(*zip(paths, weights, strict=False)), *paths[both:], *weights[both:]]

    def _batches(self, rows: Tensor, purpose: str, epoch: int) -> list[Tensor]:
        """Shuffled rows, batch by batch; a rest of one image is left out, since batch statistics need two."""
        rows = rows[torch.randperm(len(rows), generator=self._generator(f"order/{purpose}", epoch))]
        return [batch for batch in rows.split(self.method.batch_size) if len(batch) > 1]

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(step_seed(self.method.seed, purpose, step))

    def _set_lr(self, epoch: int) -> None:
        for group in self._weight_optimizer.param_groups:
            group["lr"] = self.method.lr * (1 + math.cos(math.pi * epoch / self.method.epochs)) / 2

    def _weight_step(self, rows: Tensor, step: int, temperature: float) -> float:
        with torch.no_grad():
            drawn = self.method.sample_for_weights(self.logits, temperature, self._generator("paths", step))
        loss = self._task_loss(rows, step, drawn)
        value = self._finite(loss)
        self._weight_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.supernet.parameters(), 5.0)
        self._weight_optimizer.step()
        return value

    def _path_step(self, rows: Tensor, step: int, temperature: float) -> float:
        drawn = self.method.sample(self.logits, temperature, self._generator("paths", step))
        expected = self.costs.expected(self.method.cost_probabilities(self.logits, drawn))
        loss = self.costs(self._task_loss(rows, step, drawn).cpu(), expected)
        value = self._finite(loss)
        self._path_optimizer.zero_grad()
        loss.backward(inputs=self.logits)
        before = [v.detach().clone() for v in self.logits]
        self._path_optimizer.step()
        with torch.no_grad():
            self.method.stepped(self.logits, before, drawn)
        self.costs.stepped(expected)
        return value

    def _task_loss(self, rows: Tensor, step: int, sample: Sample) -> Tensor:
        images = self.task.augment(self._train.images[rows], step_seed(self.method.seed, "augment", step))
        asked = {} if sample.run is None else {"run": [r.to(self.device) for r in sample.run]}
        weights = [w.to(self.device) for w in sample.weights]
        outputs = self.supernet(self.task.prepare(images.to(self.device)), weights, **asked)
        return self.task.loss(outputs, self._train.labels[rows].to(self.device))

    def _finite(self, loss: Tensor) -> float:
        """The loss as a number.

        Raises:
            UserError: the search broke down.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"gradient search broke down in epoch {len(self.history) + 1} of {self.method.epochs}: loss {value:g}. "
                f"Lower strategy.lr, now {self.method.lr:g}, or strategy.path_lr, now {self.method.path_lr:g}"
            )
        return value

    def _close_epoch(self, temperature: float) -> None:
        with torch.no_grad():
            expected = self.costs.expected(softmax(self.logits))
        self.history.append(
            {
                "loss": float(np.mean(self._losses)),
                "path_loss": float(np.mean(self._path_losses)) if self._path_losses else float("nan"),
                "temperature": temperature,
                "entropy": entropy(self.logits),
                **{name: float(value) for name, value in expected.items()},
            }
        )
        self.trajectory.append([p.detach().tolist() for p in softmax(self.logits)])
        self._losses, self._path_losses = [], []

    def _save(self) -> None:
        if self.checkpoint is not None:
            state: dict[str, Any] = {"history": self.history, "trajectory": self.trajectory}
            state |= {"losses": self._losses, "path_losses": self._path_losses}
            optimizers = (self._weight_optimizer, self._path_optimizer)
            save_state(self.checkpoint, self._trained, optimizers, state | {"settings": self._settings}, {})


def start_logits(space: SearchSpace, knob: int) -> Tensor:
    """Equal logits of the choices that the space offers; the others have no chance, now or ever."""
    logits = torch.full((len(space.knobs[knob].choices),), -torch.inf)
    logits[torch.as_tensor(space.menu.choices(knob))] = 0.0
    return logits.requires_grad_()


def softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    """The probabilities of each knob's choices."""
    return [F.softmax(vector, dim=-1) for vector in logits]


def entropy(logits: Sequence[Tensor]) -> float:
    """Mean entropy of the knobs with a choice, relative to that of uniform choices."""
    shares = [
        float(-(p * p.clamp_min(1e-12).log()).sum() / np.log(len(p)))
        for p in (q.detach() for q in softmax(logits))
        if len(p) > 1
    ]
    return float(np.mean(shares)) if shares else 0.0
