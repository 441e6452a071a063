"""The procedure of gradient search on a mixture supernet; methods differ in how they weight its paths."""

from __future__ import annotations

import json
import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nasbench.evaluators.base import Proposals
from nasbench.objectives import Objective, violations
from nasbench.strategies.base import GradientStrategy
from nasbench.tasks.base import Task
from nasbench.training.checkpoint import check_settings, load_state, save_state
from nasbench.training.loop import deferred_interrupt, step_seed
from nasbench.training.precision import choose_device, device_of
from nasbench.training.progress import ProgressCallback, Update
from nasbench.variation import first_of_each
from predictors.base import BoundPredictor
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs
from search_spaces.supernet import MixtureSupernet


@dataclass(frozen=True)
class Sample:
    """Path weights of one forward pass.

    Args:
        weights: one vector per knob, each with the sum one; how they depend on the logits is the gradient's rule.
        run: one boolean vector per knob, choices that must be computed at weight zero too; None for no such.
    """

    weights: list[Tensor]
    run: list[Tensor] | None = None


class GradientSearch(GradientStrategy):
    """Differentiable search over knob probabilities: what DARTS, FBNet, GDAS and ProxylessNAS have in common.

    Every knob has a vector of logits. An epoch trains the weights on the first half of the training images, then, after
    a warm-up, the logits on the second half, by the gradient at the weights as they are: the first-order approximation
    of DARTS (Liu et al., ICLR 2019). Its second order, the gradient through a step of the weights, is not offered: it
    takes about three times as long a step, for 2.76 instead of 3.00 % error on CIFAR-10 in that paper.

    The logits' loss is the task's plus the cost that the predictors expect under independent choices: `limit_weight`
    times the relative excess where an objective has a limit, else `cost_weight` times its logarithm, as FBNet's loss
    has it (Wu et al., CVPR 2019). A limit's quantile counts when proposals are ordered; in the loss it is the mean.

    A subclass says how a pass weights the paths (`sample`). The sampling belongs to the search; the mixture supernet
    computes what it is told. The time and memory of a step are those of the paths that run.

    Args:
        epochs: passes over the training images, warm-up included.
        warmup_epochs: passes that train the weights alone.
        batch_size: images a step.
        lr: peak learning rate of the weights (SGD with momentum 0.9, half cosine).
        path_lr: learning rate of the logits (Adam).
        temperature: of the first and of the last epoch, with geometric steps between; by default the method's own.
        cost_weight: of costs without a limit.
        limit_weight: of costs with one.
        proposals: architectures to hand over: the most likely one, and distinct samples.
        device: `auto` takes CUDA where it is present, else the CPU; or `cpu`, `cuda`, `cuda:1`.

    Attributes:
        history: per epoch `loss` (of the weights), `path_loss`, `temperature`, `entropy` (mean over knobs, 1 at the
            start) and the expected costs by objective name.
        probabilities: per knob, those of its choices; after `run`.
    """

    default_temperature: ClassVar[tuple[float, float]] = (1.0, 1.0)

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        *,
        epochs: int = 20,
        warmup_epochs: int = 2,
        batch_size: int = 64,
        lr: float = 0.1,
        path_lr: float = 0.05,
        temperature: tuple[float, float] | None = None,
        cost_weight: float = 0.2,
        limit_weight: float = 5.0,
        proposals: int = 32,
        device: str = "auto",
    ) -> None:
        super().__init__(space, seed)
        if epochs <= warmup_epochs or warmup_epochs < 0:
            raise UserError(f"strategy.epochs: must be above warmup_epochs ({warmup_epochs}), got {epochs}")
        temperature = self.default_temperature if temperature is None else temperature
        if not all(0 < t < math.inf for t in temperature):
            raise UserError(f"strategy.temperature: both must be above 0, got {temperature}")
        numbers = {"lr": lr, "path_lr": path_lr, "cost_weight": cost_weight, "limit_weight": limit_weight}
        for key, value in numbers.items():
            if not 0 <= value < math.inf:
                raise UserError(f"strategy.{key}: must be a finite number, 0 or more, got {value}")
        if batch_size < 2:
            raise UserError(f"strategy.batch_size: must be at least 2, got {batch_size}")
        if proposals < 1:
            raise UserError(f"strategy.proposals: must be at least 1, got {proposals}")
        self.epochs, self.warmup_epochs, self.batch_size = epochs, warmup_epochs, batch_size
        self.lr, self.path_lr, self.temperature = lr, path_lr, temperature
        self.cost_weight, self.limit_weight, self.proposals = cost_weight, limit_weight, proposals
        try:
            choose_device(device)
        except UserError as error:
            raise UserError(f"strategy.{error}") from error
        self.device = device
        self.history: list[dict[str, float]] = []
        self.probabilities: list[NDArray[np.float64]] = []

    @abstractmethod
    def sample(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        """Path weights for a step of the logits, differentiable in them.

        Args:
            logits: one vector per knob; minus infinity where a choice has no chance.
            temperature: of this epoch.
            generator: of all that is drawn.
        """

    def sample_for_weights(self, logits: Sequence[Tensor], temperature: float, generator: torch.Generator) -> Sample:
        """Path weights for a step of the supernet's weights; no gradient reaches the logits. By default as `sample`."""
        return self.sample(logits, temperature, generator)

    def stepped(self, logits: Sequence[Tensor], before: Sequence[Tensor], sample: Sample) -> None:
        """Called without gradients after a step of the logits, with those before it; may adjust them in place."""

    def run(
        self,
        supernet: MixtureSupernet,
        task: Task,
        costs: Mapping[str, BoundPredictor],
        objectives: Sequence[Objective],
        *,
        checkpoint: Path | None = None,
        progress: ProgressCallback | None = None,
        save_every_s: float = 30.0,
    ) -> Proposals:
        """Search, from the checkpoint on if there is one; all else as the contract says.

        What a step draws follows from the seed and the step's number, so a search resumed from its checkpoint ends with
        the same bits as one that was never stopped, given the same number of threads. Ctrl-C saves a checkpoint after
        the running step; a second one stops at once.

        Args:
            save_every_s: seconds between checkpoints; the end of an epoch always makes one.

        Raises:
            UserError: the search broke down, or a checkpoint that is corrupt or was made with other settings.
        """
        device, home = choose_device(self.device), device_of(supernet)
        supernet.to(device).train()
        costly = [o for o in objectives if o.name in costs]
        # The logits stay on the CPU, where they are drawn from and cost nothing: all devices draw the same paths.
        paths = nn.ParameterList([self._start(knob) for knob in range(len(self.space.knobs))])
        trained, logits = nn.ModuleDict({"mixture": supernet, "paths": paths}), list(paths)
        weight_optimizer = torch.optim.SGD(supernet.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)
        path_optimizer = torch.optim.Adam(logits, lr=self.path_lr, betas=(0.5, 0.999))
        optimizers = (weight_optimizer, path_optimizer)
        train = task.split("train")
        rows = torch.randperm(len(train), generator=self._generator("halves", 0))
        halves = rows[: len(train) // 2], rows[len(train) // 2 :]
        counts = [len(self._batches(half, "weights", 0)) for half in halves]
        if not all(counts):
            raise UserError(f"task {task.name}: a gradient search needs 4 training images or more, got {len(train)}")
        settings = self._settings(task, objectives, len(train))
        self.history = []
        losses: list[float] = []
        path_losses: list[float] = []
        if checkpoint is not None and checkpoint.exists():
            state = load_state(checkpoint, trained, optimizers, {}, partial(check_settings, checkpoint, settings))
            self.history, losses, path_losses = state["history"], state["losses"], state["path_losses"]

        def save() -> None:
            if checkpoint is not None:
                state = {"history": self.history, "losses": losses, "path_losses": path_losses}
                save_state(checkpoint, trained, optimizers, {"settings": settings, **state}, {})

        def task_loss(rows: Tensor, step: int, sample: Sample) -> Tensor:
            images = task.augment(train.images[rows], step_seed(self.seed, "augment", step)).to(device)
            asked = {} if sample.run is None else {"run": [r.to(device) for r in sample.run]}
            weights = [w.to(device) for w in sample.weights]
            return task.loss(supernet(task.prepare(images), weights, **asked), train.labels[rows].to(device))

        def weight_step(rows: Tensor, step: int, temperature: float) -> float:
            with torch.no_grad():
                drawn = self.sample_for_weights(logits, temperature, self._generator("paths", step))
            loss = task_loss(rows, step, drawn)
            value = self._finite(loss, len(self.history))
            weight_optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(supernet.parameters(), 5.0)
            weight_optimizer.step()
            return value

        def path_step(rows: Tensor, step: int, temperature: float) -> float:
            drawn = self.sample(logits, temperature, self._generator("paths", step))
            loss = task_loss(rows, step, drawn).cpu() + self._cost_loss(logits, costs, costly)
            value = self._finite(loss, len(self.history))
            path_optimizer.zero_grad()
            loss.backward(inputs=logits)
            before = [v.detach().clone() for v in logits]
            path_optimizer.step()
            with torch.no_grad():
                self.stepped(logits, before, drawn)
            return value

        saved = started = time.monotonic()
        first = step = self._step_of(len(self.history), *counts) + len(losses) + len(path_losses)
        steps = self._step_of(self.epochs, *counts)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda), deferred_interrupt(checkpoint is not None) as interrupted:
            while (epoch := len(self.history)) < self.epochs:
                start, end = self.temperature
                temperature = start * (end / start) ** (epoch / max(self.epochs - 1, 1))
                for group in weight_optimizer.param_groups:
                    group["lr"] = self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
                batches = self._batches(halves[0], "weights", epoch)
                if epoch >= self.warmup_epochs:
                    batches += self._batches(halves[1], "logits", epoch)
                for number in range(len(losses) + len(path_losses), len(batches)):
                    torch.manual_seed(step_seed(self.seed, "layers", step))
                    if number < counts[0]:
                        losses.append(weight_step(batches[number], step, temperature))
                    else:
                        path_losses.append(path_step(batches[number], step, temperature))
                    step += 1
                    if progress is not None:
                        rate = (step - first) / (time.monotonic() - started)
                        mean = float(np.mean(path_losses or losses))
                        progress(Update(step, steps, rate * self.batch_size, mean, (steps - step) / rate))
                    last = number + 1 == len(batches)
                    if last:
                        self.history.append(
                            {
                                "loss": float(np.mean(losses)),
                                "path_loss": float(np.mean(path_losses)) if path_losses else float("nan"),
                                "temperature": temperature,
                                "entropy": _entropy(logits),
                                **{o.name: float(costs[o.name].expected(_softmax(logits)).detach()) for o in costly},
                            }
                        )
                        losses, path_losses = [], []
                    stop = interrupted.is_set()
                    if last or stop or time.monotonic() - saved > save_every_s:
                        save()
                        saved = time.monotonic()
                    if stop:
                        raise KeyboardInterrupt
        supernet.to(home)
        self.probabilities = [p.detach().double().numpy() for p in _softmax(logits)]
        archs = self._most_wanted(costs, costly)
        return Proposals(np.arange(len(archs), dtype=np.int64), archs)

    def _finite(self, loss: Tensor, epoch: int) -> float:
        """The loss as a number.

        Raises:
            UserError: the search broke down.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"gradient search broke down in epoch {epoch + 1} of {self.epochs}: loss {value:g}. Lower strategy.lr, "
                f"now {self.lr:g}, or strategy.path_lr, now {self.path_lr:g}"
            )
        return value

    def _start(self, knob: int) -> Tensor:
        """Equal logits of the choices that the space offers; the others have no chance, now or ever."""
        logits = torch.full((len(self.space.knobs[knob].choices),), -torch.inf)
        logits[torch.as_tensor(self.space.menu.choices(knob))] = 0.0
        return logits.requires_grad_()

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(step_seed(self.seed, purpose, step))

    def _batches(self, rows: Tensor, purpose: str, epoch: int) -> list[Tensor]:
        """Shuffled rows, batch by batch; a rest of one image is left out, since batch statistics need two."""
        rows = rows[torch.randperm(len(rows), generator=self._generator(f"order/{purpose}", epoch))]
        return [batch for batch in rows.split(self.batch_size) if len(batch) > 1]

    def _step_of(self, epoch: int, weight_steps: int, path_steps: int) -> int:
        """The number of an epoch's first step, by the steps of either kind in an epoch."""
        return epoch * weight_steps + max(epoch - self.warmup_epochs, 0) * path_steps

    def _settings(self, task: Task, objectives: Sequence[Objective], images: int) -> dict[str, Any]:
        """What the training depends on, as JSON gives it back."""
        settings = {
            "seed": self.seed,
            "epochs": self.epochs,
            "warmup_epochs": self.warmup_epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "path_lr": self.path_lr,
            "temperature": self.temperature,
            "cost_weight": self.cost_weight,
            "limit_weight": self.limit_weight,
            "space": self.space.name,
            "knobs": [
                [knob.name, self.space.menu.choices(index).tolist()] for index, knob in enumerate(self.space.knobs)
            ],
            "task": task.name,
            "images": images,
            "method": type(self).__name__,
            "objectives": [[o.name, o.maximise, o.limit] for o in objectives],
        }
        return cast(dict[str, Any], json.loads(json.dumps(settings)))

    def _cost_loss(
        self, logits: Sequence[Tensor], costs: Mapping[str, BoundPredictor], objectives: Sequence[Objective]
    ) -> Tensor:
        total = torch.zeros(())
        for objective in objectives:
            expected = costs[objective.name].expected(_softmax(logits))
            sign = -1.0 if objective.maximise else 1.0
            if objective.limit is None:
                total = total + self.cost_weight * sign * expected.clamp_min(1e-12).log()
            else:
                excess = sign * (expected - objective.limit) / max(abs(objective.limit), 1e-12)
                total = total + self.limit_weight * excess.clamp_min(0.0)
        return total

    def _most_wanted(self, costs: Mapping[str, BoundPredictor], objectives: Sequence[Objective]) -> Archs:
        """The most likely architecture and distinct samples: those that keep all limits first, then by likelihood."""
        rng = np.random.default_rng(self.seed)
        columns = [rng.choice(len(p), size=64 * self.proposals, p=p / p.sum()) for p in self.probabilities]
        best = np.array([p.argmax() for p in self.probabilities])
        archs = first_of_each(
            self.space.canonical(np.vstack([best, np.column_stack(columns)]).astype(self.space.dtype))
        )
        permitted = self.space.permits(archs)
        redrawn = not permitted.any()
        if redrawn:  # the likely choices are permitted one by one, but not together
            archs = first_of_each(self.space.sample(self.proposals, rng))
            permitted = self.space.permits(archs)
        logs = [np.log(np.maximum(p, 1e-300)) for p in self.probabilities]
        each = np.column_stack([log[column] for log, column in zip(logs, archs.T, strict=True)])
        likelihood = (each * self.space.active(archs)).sum(axis=1)
        excess = np.zeros(len(archs))
        for objective in (o for o in objectives if o.limit is not None):
            estimate = costs[objective.name].predict(archs)
            value = estimate.mean if objective.quantile is None else estimate.quantile(objective.quantile)
            excess += violations(value[:, None], (objective,))[:, 0]
        # The most likely architecture is the search's answer: among those that keep the limits it stands first.
        if not redrawn:
            likelihood[0] = np.inf
        order = np.lexsort((-likelihood, excess))
        return archs[order[permitted[order]][: self.proposals]]


def _softmax(logits: Sequence[Tensor]) -> list[Tensor]:
    return [F.softmax(vector, dim=0) for vector in logits]


def _entropy(logits: Sequence[Tensor]) -> float:
    """Mean entropy of the knobs with a choice, relative to that of uniform choices."""
    shares = [
        float(-(p * p.clamp_min(1e-12).log()).sum() / np.log(len(p)))
        for p in (q.detach() for q in _softmax(logits))
        if len(p) > 1
    ]
    return float(np.mean(shares)) if shares else 0.0
