"""How to optimise: optimiser, schedule of the learning rate, averaging, precision; checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, TypedDict, get_args

import torch
from torch import nn

from search_spaces.errors import UserError, nearest

Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["cosine", "linear", "step", "constant"]
PrecisionName = Literal["fp32", "bf16", "fp16"]

# What is left of the peak learning rate after a share of the steps that follow the warm-up.
_SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov and Hutter, ICLR 2017, one cycle
    "linear": lambda done: 1 - done,
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),  # as residual networks on CIFAR (He et al., 2016)
    "constant": lambda done: 1.0,
}


class RecipeOptions(TypedDict, total=False):
    """The keys of `Recipe`, for what takes them beside its own."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: Optimizer
    momentum: float
    weight_decay: float
    warmup: float
    clip_norm: float
    label_smoothing: float
    schedule: Schedule
    ema: float
    precision: PrecisionName
    accumulate: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to optimise. Keys as in `train_supernet`, where they are described.

    Raises:
        UserError: a value out of range.
    """

    epochs: int = 8
    batch_size: int = 64
    lr: float = 0.3
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip_norm: float = 5.0
    label_smoothing: float = 0.1
    schedule: Schedule = "cosine"
    ema: float = 0.0
    precision: PrecisionName = "fp32"
    accumulate: int = 1

    def __post_init__(self) -> None:
        rules = {
            "epochs": (self.epochs >= 0, "0 or more"),
            "batch_size": (self.batch_size >= 2, "at least 2, since batch statistics need it"),
            "lr": (0 < self.lr < math.inf, "above 0"),
            "momentum": (0 <= self.momentum < 1, "in 0..1, below 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "warmup": (0 <= self.warmup <= 1, "a share of the steps, 0..1"),
            "clip_norm": (self.clip_norm >= 0, "0 (off) or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in 0..1, below 1"),
            "ema": (0 <= self.ema < 1, "a decay in 0..1, below 1; 0 is off, 0.999 averages about 1,000 steps"),
            "accumulate": (
                self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
                f"1 (off), or more parts that batch_size = {self.batch_size} can be divided into",
            ),
        }
        for key, (right, expected) in rules.items():
            if not right:
                raise UserError(f"{key} = {getattr(self, key)!r}: expected {expected}")
        for key, known in (("optimizer", Optimizer), ("schedule", Schedule), ("precision", PrecisionName)):
            check_choice(key, getattr(self, key), get_args(known))

    def lr_at(self, step: int, steps: int, restarts: Sequence[int] = (0,)) -> float:
        """Learning rate of a step: linear warm-up, then the schedule; anew from each of the ascending `restarts`."""
        begin = max(r for r in restarts if r <= step)
        end = min((r for r in restarts if r > step), default=steps)
        step, steps = step - begin, end - begin
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * _SCHEDULES[self.schedule]((step - warm) / max(1, steps - warm))

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


@dataclass(frozen=True, kw_only=True)
class ConstantRate:
    """As small devices train: plain SGD at a constant rate, on the labels as they are.

    Args:
        epochs: passes over the data.
        batch_size: samples a step.
        momentum: 0 needs no optimiser state.
        weight_decay: on matrices and kernels.
        clip_norm: of the gradient; 0 is off.
    """

    epochs: int = 1
    batch_size: int = 16
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0

    def recipe(self) -> Recipe:
        """As the training loop takes it, values checked."""
        given = {field.name: getattr(self, field.name) for field in fields(ConstantRate)}
        return Recipe(**given, warmup=0.0, label_smoothing=0.0, schedule="constant")


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raises UserError, with the nearest right one, where a value is not among the known ones."""
    if value not in known:
        raise UserError(f"{key} = {value!r}: expected one of {', '.join(known)}. {nearest(str(value), known)}")
