"""The procedure of gradient search on a mixture supernet; methods differ in how they weight its paths."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from nasbench.evaluators.base import Proposals
from nasbench.objectives import Objective, violations
from nasbench.strategies.base import GradientStrategy
from nasbench.tasks.base import Split, Task
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
    ) -> Proposals:
        generator = torch.Generator().manual_seed(self.seed)
        costly = [o for o in objectives if o.name in costs]
        logits = [self._start(knob) for knob in range(len(self.space.knobs))]
        train = task.split("train")
        order = torch.randperm(len(train), generator=generator)
        halves = order[: len(train) // 2], order[len(train) // 2 :]
        weight_optimizer = torch.optim.SGD(supernet.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(weight_optimizer, self.epochs)
        path_optimizer = torch.optim.Adam(logits, lr=self.path_lr, betas=(0.5, 0.999))
        supernet.train()
        self.history = []
        for epoch in range(self.epochs):
            start, end = self.temperature
            temperature = start * (end / start) ** (epoch / max(self.epochs - 1, 1))

            def task_loss(images: Tensor, labels: Tensor, sample: Sample) -> Tensor:
                asked = {} if sample.run is None else {"run": sample.run}
                return task.loss(supernet(task.prepare(images), sample.weights, **asked), labels)

            losses, path_losses = [], []
            for images, labels in self._batches(task, train, halves[0], generator):
                with torch.no_grad():
                    drawn = self.sample_for_weights(logits, temperature, generator)
                loss = task_loss(images, labels, drawn)
                weight_optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(supernet.parameters(), 5.0)
                weight_optimizer.step()
                losses.append(self._finite(loss, epoch))
            schedule.step()
            if epoch >= self.warmup_epochs:
                for images, labels in self._batches(task, train, halves[1], generator):
                    drawn = self.sample(logits, temperature, generator)
                    loss = task_loss(images, labels, drawn) + self._cost_loss(logits, costs, costly)
                    path_optimizer.zero_grad()
                    loss.backward(inputs=logits)
                    before = [v.detach().clone() for v in logits]
                    path_optimizer.step()
                    with torch.no_grad():
                        self.stepped(logits, before, drawn)
                    path_losses.append(self._finite(loss, epoch))
            self.history.append(
                {
                    "loss": float(np.mean(losses)),
                    "path_loss": float(np.mean(path_losses)) if path_losses else float("nan"),
                    "temperature": temperature,
                    "entropy": _entropy(logits),
                    **{o.name: float(costs[o.name].expected(_softmax(logits)).detach()) for o in costly},
                }
            )
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

    def _batches(
        self, task: Task, split: Split, rows: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled, augmented batches; a rest of one image is left out, since batch statistics need two."""
        rows = rows[torch.randperm(len(rows), generator=generator)]
        for batch in rows.split(self.batch_size):
            if len(batch) > 1:
                seed = int(torch.randint(2**31, (), generator=generator))
                yield task.augment(split.images[batch], seed), split.labels[batch]

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
