"""Supernet training: sandwich rule, in-place distillation (Yu and Huang, ICCV 2019; BigNAS, Yu et al., ECCV 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nasbench.tasks.base import Task
from nasbench.training.evaluation import fixed_subset, subnet_accuracy
from nasbench.training.loop import Batch, History, Recipe, fit, smoothed_loss, soft_loss, step_seed
from nasbench.training.progress import ProgressCallback
from nasbench.training.workers import workers
from search_spaces import Archs, SearchSpace, UserError
from search_spaces.supernet import Supernet


def train_supernet(
    supernet: Supernet,
    space: SearchSpace,
    task: Task,
    *,
    epochs: int = 8,
    batch_size: int = 64,
    lr: float = 0.3,
    random_subnets: int = 2,
    distillation: float = 1.0,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: float = 0.05,
    clip_norm: float = 5.0,
    label_smoothing: float = 0.1,
    validation_images: int = 500,
    save_every_s: float = 30.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: ProgressCallback | None = None,
) -> History:
    """Train all architectures of a space at once, in place.

    Every step trains the largest architecture on the labels, `random_subnets` random ones and the smallest on the
    largest's output, and applies the sum of their gradients. They run side by side, as many as torch has threads, and
    with as many threads each the result is the same to the bit.

    Args:
        epochs: passes over the training images; 0 leaves the supernet as it is.
        batch_size: images a step.
        lr: peak learning rate, reached by linear warm-up and brought to zero by a half cosine.
        random_subnets: random architectures a step, beside the largest and the smallest.
        distillation: weight of the largest's output in the others' loss; the labels have the rest. 0..1.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        momentum: of SGD, and the first beta of AdamW.
        weight_decay: on matrices and kernels, not on biases and normalisation.
        warmup: share of the steps until the peak learning rate.
        clip_norm: largest norm of the gradient, 0 for any.
        label_smoothing: share of the target that is uniform.
        validation_images: after every epoch, judge the smallest and the largest architecture on so many validation
            images, and write their accuracies to the history; 0 for never.
        save_every_s: seconds between checkpoints.
        seed: of everything random.
        checkpoint: file to resume from, if it exists, and to save to.
        progress: called after every step.

    Returns:
        One row per epoch: `epoch`, `loss` (mean over the architectures), `loss_largest`, `lr`, `images_per_s`,
        `seconds`, `accuracy_smallest`, `accuracy_largest`.

    Raises:
        UserError: a value out of range, a loss that is no longer finite, or a checkpoint that does not fit.
    """
    recipe = Recipe(epochs, batch_size, lr, optimizer, momentum, weight_decay, warmup, clip_norm, label_smoothing)
    if random_subnets < 0:
        raise UserError(f"random_subnets = {random_subnets}: expected 0 or more")
    if not 0 <= distillation <= 1:
        raise UserError(f"distillation = {distillation}: expected a weight in 0..1")
    smallest, largest = sandwich_ends(space)
    parameters = [p for p in supernet.parameters() if p.requires_grad]

    def backward(batch: Batch) -> dict[str, float]:
        x = task.prepare(batch.images)
        drawn = space.sample(random_subnets, np.random.default_rng(step_seed(seed, "archs", batch.step)))
        teacher: Future[Tensor] = Future()

        def logits_of(arch: Archs, index: int) -> Tensor:
            generator = torch.Generator().manual_seed(step_seed(seed, f"layers-{index}", batch.step))
            logits: Tensor = supernet(x, arch, generator=generator)
            return logits

        def lead() -> tuple[float, tuple[Tensor | None, ...]]:
            try:
                logits = logits_of(largest, 0)
            except BaseException as error:
                teacher.set_exception(error)  # else the others would wait for ever
                raise
            teacher.set_result(logits.detach())
            return gradients(smoothed_loss(task, logits, batch.labels, label_smoothing))

        def follow(arch: Archs, index: int) -> tuple[float, tuple[Tensor | None, ...]]:
            logits = logits_of(arch, index)
            loss = distillation * soft_loss(logits, teacher.result()) if distillation else logits.new_zeros(())
            if distillation < 1:
                loss = loss + (1 - distillation) * smoothed_loss(task, logits, batch.labels, label_smoothing)
            return gradients(loss)

        def gradients(loss: Tensor) -> tuple[float, tuple[Tensor | None, ...]]:
            return float(loss.detach()), torch.autograd.grad(loss, parameters, allow_unused=True)

        # The largest begins, for all others wait for its logits; the smallest fills the gap that remains at the end.
        followers = enumerate((*drawn, smallest), start=1)
        subnets = [executor.submit(lead), *(executor.submit(follow, arch, i) for i, arch in followers)]
        losses, parts = zip(*(subnet.result() for subnet in subnets), strict=True)
        for parameter, *grads in zip(parameters, *parts, strict=True):
            parameter.grad = add(grads)
        return {"loss": sum(losses) / len(losses), "loss_largest": losses[0]}

    def epoch_metrics() -> dict[str, float]:
        ends = {"accuracy_smallest": smallest, "accuracy_largest": largest}
        return {n: subnet_accuracy(supernet, a, task, calibration, validation) for n, a in ends.items()}

    if validation_images:
        calibration = fixed_subset(task.split("train"), validation_images, seed).images
        validation = fixed_subset(task.split("val"), validation_images, seed)
    settings = {
        "space": space.name,
        "knobs": [[k.name, len(k.choices)] for k in space.knobs],
        "task": task.name,
        "random_subnets": random_subnets,
        "distillation": distillation,
        "validation_images": validation_images,
    }
    with workers(2 + random_subnets) as executor:
        return fit(
            supernet,
            task,
            recipe,
            backward,
            settings=settings,
            seed=seed,
            epoch_metrics=epoch_metrics if validation_images else None,
            checkpoint=checkpoint,
            save_every_s=save_every_s,
            progress=progress,
        )


def add(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """The sum in the given order, a tensor of its own; None where no gradient has a part in it."""
    present = [g for g in gradients if g is not None]
    return sum(present[1:], present[0].clone()) if present else None


def sandwich_ends(space: SearchSpace) -> tuple[Archs, Archs]:
    """The smallest and the largest architecture of a space by multiply-accumulates, then parameters; each `(K,)`.

    Knob by knob from the first and the last choices on, until nothing changes: exact where each knob's choices rank
    alike whatever the others are (as in once-for-all spaces), a local optimum elsewhere.
    """

    def cost(arch: Archs) -> tuple[int, int]:
        workload = space.workload(arch)
        return workload.macs, workload.params

    def climb(arch: Archs, sign: int) -> Archs:
        arch = space.canonical(arch[None])[0]
        best = cost(arch)
        improved = True
        while improved:
            improved = False
            for knob, choices in enumerate(space.cardinalities):
                for choice in range(choices):
                    trial = arch.copy()
                    trial[knob] = choice
                    trial = space.canonical(trial[None])[0]
                    if np.array_equal(trial, arch):
                        continue
                    found = cost(trial)
                    if (found > best) if sign > 0 else (found < best):
                        arch, best, improved = trial, found, True
        return arch

    first = np.zeros(len(space.knobs), dtype=space.dtype)
    last = (space.cardinalities - 1).astype(space.dtype)
    return climb(first, -1), climb(last, +1)
