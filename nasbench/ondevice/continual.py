"""Continual learning: a network meets tasks one after the other, and is judged on all of them after each."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasbench.ondevice.streams import Stream
from nasbench.tasks.base import SplitName, Task
from nasbench.training.evaluation import fit_size, predict_logits
from nasbench.training.loop import Backward, BrokeDown, fit, step_seed
from nasbench.training.precision import device_of
from nasbench.training.recipe import ConstantRate
from search_spaces.errors import UserError

# For classes that have not been met: no softmax gives them anything, and no sum with it overflows.
UNMET = -1e9


@dataclass(frozen=True, kw_only=True)
class Training(ConstantRate):
    """How every step of a stream is trained: replay adds as many old samples to a batch. Beside `ConstantRate`'s keys:

    Args:
        seed: of order, augmentation and what is remembered.
    """

    epochs: int = 3
    lr: float = 0.02
    momentum: float = 0.9
    clip_norm: float = 5.0
    seed: int = 0


class ContinualMethod(ABC):
    """A way to learn from a stream.

    Life: `begin` once, with a network that is copied; then for every task of the stream `learn` (which a method that
    trains nothing leaves empty) and `remember`; `logits` at any time. One object may go through several streams.

    The first task that is learned trains normalisation by batch statistics. From then on its statistics stay, since a
    batch of few classes, or of one person, would overwrite them; scales and shifts go on learning.
    """

    name = "method"
    network: nn.Module

    def __init__(self, training: Training | None = None) -> None:
        self.training = training or Training()
        self.training.recipe()

    def begin(self, network: nn.Module, input_shape: Sequence[int], classes: int) -> None:
        """Forget everything, and start from a copy of a network."""
        self.network = copy.deepcopy(network)
        self.input_shape = tuple(input_shape)
        self.met = torch.zeros(classes, dtype=torch.bool)
        self.started = False

    @abstractmethod
    def learn(self, task: Task, step: int) -> None:
        """Train on a task's training split.

        Raises:
            BrokeDown: the loss is no longer finite.
        """

    def remember(self, task: Task, step: int) -> None:
        """Keep of a task, once learned, what later steps need.

        Raises:
            BrokeDown: what is to be kept is not finite.
        """
        self.met[task.split("train").labels.unique()] = True
        self.started = True

    def logits(self, x: Tensor) -> Tensor:
        """Logits `(batch, classes)` of prepared images; classes that were not met come last."""
        return self.network(x).float().masked_fill(~self.met.to(x.device), UNMET)

    @property
    def memory_bytes(self) -> int:
        """What is kept beside the network's own weights."""
        return 0

    def run(self, task: Task, step: int, backward: Backward, free_statistics: bool = False) -> None:
        """Train the network by a backward pass; statistics of normalisation stay, but for the first task's."""
        kept = [m for m in self.network.modules() if isinstance(m, _BatchNorm)]

        def with_statistics(batch: Any) -> dict[str, float]:
            if self.started and not free_statistics:
                for module in kept:
                    module.eval()
            return backward(batch)

        seed = step_seed(self.training.seed, "continual", step)
        fit(self.network, task, self.training.recipe(), with_statistics, settings={}, seed=seed)

    def prepare(self, task: Task, images: Tensor) -> Tensor:
        """Stored images as network input."""
        return fit_size(task.prepare(images), self.input_shape)

    def among(self, task: Task) -> Tensor:
        """Which classes were met, those of this task included."""
        met = self.met.clone()
        met[task.split("train").labels.unique()] = True
        return met


@dataclass(frozen=True)
class ContinualResult:
    """How well a network knew every task after each.

    Args:
        method: name.
        names: of the T steps.
        matrix: `(T, T)` accuracy 0..1 on task j after step i; NaN where the stream ended before.
        baseline: `(T,)` accuracy of the same network with random weights.
        memory_bytes: kept beside the weights, at most at any step.
        stopped: why the stream ended early; empty if it did not.
    """

    method: str
    names: tuple[str, ...]
    matrix: NDArray[np.float64]
    baseline: NDArray[np.float64]
    memory_bytes: int
    stopped: str = ""
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def average_accuracy(self) -> float:
        """Mean over the tasks after the last step (Lopez-Paz & Ranzato, NeurIPS 2017)."""
        return float(self.matrix[-1].mean())

    @property
    def final_accuracy(self) -> float:
        """On the judged samples of all tasks together after the last step."""
        return float(np.average(self.matrix[-1], weights=self.sizes)) if len(self.sizes) else self.average_accuracy

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last: best accuracy before the last step minus the final (Chaudhry et al. 2018,
        eq. 3)."""
        return float((self.matrix[:-1, :-1].max(0) - self.matrix[-1, :-1]).mean())

    @property
    def backward_transfer(self) -> float:
        """Mean of final accuracy minus that right after the task; negative where tasks are forgotten (Lopez-Paz)."""
        return float((self.matrix[-1] - np.diag(self.matrix))[:-1].mean())

    @property
    def forward_transfer(self) -> float:
        """Mean of accuracy just before a task is learned minus that of random weights (Lopez-Paz).

        Where every step brings new classes it says nothing: they cannot be named before they are met.
        """
        return float((np.diag(self.matrix, 1) - self.baseline[1:]).mean())

    def frame(self) -> pd.DataFrame:
        """The matrix: a row per step, a column per task."""
        return pd.DataFrame(self.matrix, index=pd.Index(self.names, name="after"), columns=list(self.names))


def run_stream(
    method: ContinualMethod,
    network: nn.Module,
    stream: Stream,
    input_shape: Sequence[int] | None = None,
    *,
    pretrained: bool = False,
    judge: SplitName = "test",
) -> ContinualResult:
    """Lead a network through a stream.

    Where a loss is no longer finite the stream ends; the method keeps its network of the step before.

    Args:
        network: stays as it is.
        input_shape: that it takes; the tasks' own by default.
        pretrained: it has learned the first task already, which is then only remembered.
        judge: the split that accuracies are of.

    Raises:
        UserError: the network has not as many outputs as the stream has classes.
    """
    shape = tuple(input_shape or stream.tasks[0].input_shape)
    outputs = _outputs(network, shape)
    if outputs != stream.classes:
        raise UserError(f"stream: the network has {outputs} outputs, the tasks have {stream.classes} classes")
    count = len(stream)
    matrix = np.full((count, count), np.nan)
    splits = [task.split(judge) for task in stream.tasks]

    def accuracies(model: Any, device: torch.device) -> list[float]:
        logits = [
            predict_logits(model, t, s.images, shape, device=device) for t, s in zip(stream.tasks, splits, strict=True)
        ]
        return [t.accuracy(out, s.labels) for t, out, s in zip(stream.tasks, logits, splits, strict=True)]

    fresh = _fresh(network, method.training.seed)
    baseline = np.array(accuracies(fresh, device_of(fresh)))
    method.begin(network, shape, stream.classes)
    stopped, memory = "", 0
    for step, task in enumerate(stream.tasks):
        before = copy.deepcopy(method.network.state_dict())
        try:
            if step or not pretrained:
                method.learn(task, step)
            method.remember(task, step)
        except BrokeDown as error:
            method.network.load_state_dict(before)
            stopped = f"{method.name}, step {step + 1} ({stream.names[step]}): {error}"
            break
        method.network.eval()
        memory = max(memory, method.memory_bytes)
        matrix[step] = accuracies(method.logits, device_of(method.network))
    sizes = np.array([len(s) for s in splits])
    return ContinualResult(method.name, stream.names, matrix, baseline, memory, stopped, sizes)


def _outputs(network: nn.Module, shape: Sequence[int]) -> int:
    training = network.training
    with torch.no_grad():
        outputs = network.eval()(torch.zeros(1, *shape, device=device_of(network))).shape[-1]
    network.train(training)
    return int(outputs)


def _fresh(network: nn.Module, seed: int) -> nn.Module:
    """A copy with weights drawn anew."""
    copied = copy.deepcopy(network).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step_seed(seed, "baseline", 0))
        for module in copied.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return copied


def summary(results: Sequence[ContinualResult]) -> pd.DataFrame:
    """A row per result: accuracies and transfers (0..1), memory in bytes, and why it stopped."""
    keys = (
        "method", "final_accuracy", "average_accuracy", "forgetting", "backward_transfer", "forward_transfer",
        "memory_bytes", "stopped",
    )  # fmt: skip
    return pd.DataFrame([{key: getattr(result, key) for key in keys} for result in results])


def accuracy_figure(results: Sequence[ContinualResult]) -> Figure:
    """Heat maps of the accuracy matrices side by side, one panel a method."""
    if not results:
        raise UserError("accuracy_figure: no results to draw")
    columns = min(4, len(results))
    rows = -(-len(results) // columns)
    size = max(len(r.names) for r in results)
    side = 1.1 + 0.42 * size
    figure = Figure(figsize=(columns * side + 1.6, rows * (side + 0.5) + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for number, axes in enumerate(panels.flat):
        if number >= len(results):
            axes.set_visible(False)
            continue
        result = results[number]
        image = axes.imshow(100 * result.matrix, vmin=0, vmax=100, cmap="viridis")
        for (i, j), value in np.ndenumerate(result.matrix):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        ticks = range(len(result.names))
        axes.set_xticks(ticks, [str(t + 1) for t in ticks], fontsize=7)
        axes.set_yticks(ticks, [str(t + 1) for t in ticks], fontsize=7)
        axes.set_title(
            f"{result.method}\n{100 * result.average_accuracy:.1f} %, forgets {100 * result.forgetting:.1f}",
            fontsize=8, loc="left",
        )  # fmt: skip
        if number % columns == 0:
            axes.set_ylabel("after step", fontsize=8)
        if number + columns >= len(results):
            axes.set_xlabel("on the task of step", fontsize=8)
    if image is not None:
        scale = figure.colorbar(image, ax=panels, shrink=0.8)
        scale.set_label("accuracy (%)", fontsize=8)
        scale.ax.tick_params(labelsize=7)
    return figure
