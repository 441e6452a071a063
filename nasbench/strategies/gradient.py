"""Gradient search on a mixture supernet: what its methods share; they differ in how they weight paths and costs."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasbench.evaluators.base import Proposals
from nasbench.objectives import Objective
from nasbench.strategies.base import GradientStrategy
from nasbench.strategies.discretise import most_wanted
from nasbench.strategies.path_costs import PathCosts
from nasbench.strategies.path_training import PathTraining, softmax
from nasbench.tasks.base import Task
from nasbench.training.precision import choose_device
from nasbench.training.progress import ProgressCallback
from predictors.base import BoundPredictor
from search_spaces import SearchSpace, UserError
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


class GradientOptions(TypedDict, total=False):
    """The keys of `GradientSearch`, for methods that add some of their own."""

    epochs: int
    warmup_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    path_lr: float
    temperature: tuple[float, float] | None
    cost_weight: float | None
    limit_weight: float
    proposals: int
    device: str


class GradientSearch(GradientStrategy):
    """Differentiable search over knob probabilities: what DARTS, FBNet, GDAS, ProxylessNAS and LightNAS have in common.

    Every knob has a vector of logits. The weights learn from the first half of the training images; after a warm-up,
    the logits learn from the second half, by the gradient at the weights as they are: the first-order approximation of
    DARTS (Liu et al., ICLR 2019). Its second order, the gradient through a step of the weights, is not offered: it
    takes about three times as long a step, for 2.76 instead of 3.00 % error on CIFAR-10 in that paper.

    The logits' loss is the task's with the costs that the predictors expect under independent choices (`make_costs`):
    by default `limit_weight` times the relative excess is added where an objective has a limit, else `cost_weight`
    times the logarithm.

    A subclass says how a pass weights the paths (`sample`). The sampling belongs to the search; the mixture supernet
    computes what it is told. The time and memory of a step are those of the paths that run. What is handed over are the
    likely architectures, those that keep the limits first (see `nasbench.strategies.discretise`).

    Args:
        epochs: passes over the training images, warm-up included.
        warmup_epochs: passes that train the weights alone.
        batch_size: images a step.
        lr: peak learning rate of the weights (SGD with momentum 0.9, half cosine).
        weight_decay: of the weights.
        path_lr: learning rate of the logits (Adam).
        temperature: of the first and of the last epoch; by default the method's own.
        cost_weight: of costs without a limit; by default the method's own.
        limit_weight: of costs with one.
        proposals: architectures to hand over.
        device: `auto` takes CUDA where it is present, else the CPU; or `cpu`, `cuda`, `cuda:1`.

    Attributes:
        history: per epoch `loss` (of the weights), `path_loss`, `temperature`, `entropy` (mean over knobs, 1 at the
            start) and the expected costs by objective name.
        trajectory: per epoch and knob, the probabilities of its choices at the end of the epoch.
        probabilities: per knob, those at the end; after `run`.
    """

    default_temperature: ClassVar[tuple[float, float]] = (1.0, 1.0)
    default_cost_weight: ClassVar[float] = 0.2
    alternate: ClassVar[Literal["step", "epoch"]] = "step"  # whether weights and logits take turns by steps or epochs
    linear_temperature: ClassVar[bool] = False  # from epoch to epoch in equal differences, else in equal ratios

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        *,
        epochs: int = 20,
        warmup_epochs: int = 2,
        batch_size: int = 64,
        lr: float = 0.1,
        weight_decay: float = 1e-4,
        path_lr: float = 0.05,
        temperature: tuple[float, float] | None = None,
        cost_weight: float | None = None,
        limit_weight: float = 5.0,
        proposals: int = 32,
        device: str = "auto",
    ) -> None:
        super().__init__(space, seed)
        if epochs <= warmup_epochs or warmup_epochs < 0:
            raise UserError(f"strategy.epochs: must be above warmup_epochs ({warmup_epochs}), got {epochs}")
        temperature = self.default_temperature if temperature is None else temperature
        cost_weight = self.default_cost_weight if cost_weight is None else cost_weight
        if not all(0 < t < math.inf for t in temperature):
            raise UserError(f"strategy.temperature: both must be above 0, got {temperature}")
        check_numbers(
            lr=lr, weight_decay=weight_decay, path_lr=path_lr, cost_weight=cost_weight, limit_weight=limit_weight
        )
        if batch_size < 2:
            raise UserError(f"strategy.batch_size: must be at least 2, got {batch_size}")
        if proposals < 1:
            raise UserError(f"strategy.proposals: must be at least 1, got {proposals}")
        self.epochs, self.warmup_epochs, self.batch_size = epochs, warmup_epochs, batch_size
        self.lr, self.weight_decay, self.path_lr, self.temperature = lr, weight_decay, path_lr, temperature
        self.cost_weight, self.limit_weight, self.proposals = cost_weight, limit_weight, proposals
        try:
            choose_device(device)
        except UserError as error:
            raise UserError(f"strategy.{error}") from error
        self.device = device
        self.history: list[dict[str, float]] = []
        self.trajectory: list[list[list[float]]] = []
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

    def make_costs(self, costs: Mapping[str, BoundPredictor], objectives: Sequence[Objective]) -> PathCosts:
        """How costs enter the logits' loss."""
        return PathCosts(costs, objectives, cost_weight=self.cost_weight, limit_weight=self.limit_weight)

    def cost_probabilities(self, logits: Sequence[Tensor], sample: Sample) -> list[Tensor]:
        """The probabilities whose cost counts in a step of the logits: by default those of all choices."""
        return softmax(logits)

    def targets(self, objectives: Sequence[Objective]) -> dict[str, float]:
        """Costs to land on, by objective name; by default there are only limits to keep."""
        return {}

    def temperature_at(self, epoch: int) -> float:
        """From the first epoch's to the last one's."""
        (start, end), share = self.temperature, epoch / max(self.epochs - 1, 1)
        return start + (end - start) * share if self.linear_temperature else start * (end / start) ** share

    def settings(self) -> dict[str, Any]:
        """What the training depends on; a checkpoint of other settings is refused. Subclasses add their own keys."""
        return {
            "seed": self.seed,
            "epochs": self.epochs,
            "warmup_epochs": self.warmup_epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "path_lr": self.path_lr,
            "temperature": self.temperature,
            "cost_weight": self.cost_weight,
            "limit_weight": self.limit_weight,
            "space": self.space.name,
            "knobs": [
                [knob.name, self.space.menu.choices(index).tolist()] for index, knob in enumerate(self.space.knobs)
            ],
            "method": type(self).__name__,
        }

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
        """Search, from the checkpoint on if there is one (see `PathTraining`); all else as the contract says.

        Args:
            save_every_s: seconds between checkpoints; the end of an epoch always makes one.

        Raises:
            UserError: objectives that the method cannot work with, a search that broke down, or a checkpoint that is
                corrupt or was made with other settings.
        """
        self.check(objectives)
        training = PathTraining(self, supernet, task, self.make_costs(costs, objectives), checkpoint)
        training.run(progress, save_every_s)
        self.history, self.trajectory = training.history, training.trajectory
        self.probabilities = [p.detach().double().numpy() for p in softmax(training.logits)]
        rng, targets = np.random.default_rng(self.seed), self.targets(objectives)
        archs = most_wanted(self.space, self.probabilities, self.proposals, costs, objectives, targets, rng)
        return Proposals(np.arange(len(archs), dtype=np.int64), archs)


def check_numbers(**numbers: float) -> None:
    """Raise a UserError unless all keys have finite numbers of zero or more."""
    for key, value in numbers.items():
        if not 0 <= value < math.inf:
            raise UserError(f"strategy.{key}: must be a finite number, 0 or more, got {value}")
