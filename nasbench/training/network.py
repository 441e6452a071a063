"""Training of stand-alone networks, from scratch or from inherited weights, with or without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from nasbench.tasks.base import Task
from nasbench.training.evaluation import batches, fit_size, fixed_subset
from nasbench.training.loop import Batch, History, fit
from nasbench.training.losses import smoothed_loss, soft_loss
from nasbench.training.precision import choose_device, device_of
from nasbench.training.progress import ProgressCallback
from nasbench.training.recipe import Recipe, RecipeOptions
from search_spaces import Archs, UserError
from search_spaces.depthwise import fast_depthwise
from search_spaces.supernet import Supernet, calibrate

Teacher = Callable[[Tensor], Tensor]


def train_network(
    network: nn.Module,
    task: Task,
    input_shape: Sequence[int],
    *,
    device: str = "auto",
    teacher: Teacher | Tensor | None = None,
    distillation_weight: float = 0.5,
    temperature: float = 1.0,
    auxiliary: Callable[[Tensor], Tensor] | None = None,
    save_every_s: float = 30.0,
    until: int | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    log_dir: Path | None = None,
    progress: ProgressCallback | None = None,
    **options: Unpack[RecipeOptions],
) -> History:
    """Train one network, in place; it is left in eval mode, on the device where it was.

    Args:
        input_shape: `(channels, height, width)` that the network takes; images are resized to it.
        teacher: gives logits for prepared images of the task's own size (see `subnet_teacher`), or, where the task does
            not augment, is its logits `(n, classes)` for the training images; None trains on labels.
        distillation_weight: of the teacher in the loss, 0..1.
        temperature: softens the teacher's output and the network's alike (Hinton et al. 2015).
        auxiliary: a further term of the loss, asked for after the forward pass with the prepared images of the task's
            own size, such as `Imitation.loss`.
        until: stop after so many of the epochs; called again with its checkpoint, training goes on from there, to the
            bits of one that was never stopped.
        device, save_every_s, seed, checkpoint, log_dir, progress: as in `train_supernet`.
        options: keys of `Recipe`: `epochs`, `batch_size`, `lr` and the like, with its defaults.

    Returns:
        One row per epoch: `epoch`, `loss`, `accuracy_train` (in training mode, augmented), `lr`, `images_per_s`,
        `seconds`.

    Raises:
        UserError: a value out of range, a loss that is no longer finite, or a checkpoint that does not fit.
    """
    recipe = Recipe(**options)
    check_distillation(distillation_weight, temperature)
    weight = distillation_weight if teacher is not None else 0.0

    def backward(batch: Batch) -> dict[str, float]:
        x = task.prepare(batch.images)
        with batch.precision.autocast():
            logits = network(fit_size(x, input_shape)).float()
        loss = (1 - weight) * smoothed_loss(task, logits, batch.labels, recipe.label_smoothing)
        if teacher is not None and weight:
            with torch.no_grad():
                target = teacher[batch.rows].to(x.device) if isinstance(teacher, Tensor) else teacher(x)
            loss = loss + weight * soft_loss(logits, target, temperature)
        if auxiliary is not None:
            loss = loss + auxiliary(x)
        batch.precision.scaled(loss).backward()
        return {"loss": float(loss.detach()), "accuracy_train": task.accuracy(logits.detach(), batch.labels)}

    settings = {
        "task": task.name,
        "input_shape": list(input_shape),
        "distillation_weight": weight,
        "temperature": temperature if weight else 1.0,
    }
    with fast_depthwise(network):
        return fit(
            network,
            task,
            recipe,
            backward,
            settings=settings,
            seed=seed,
            device=choose_device(device),
            checkpoint=checkpoint,
            save_every_s=save_every_s,
            until=until,
            log_dir=log_dir,
            progress=progress,
        )


def check_distillation(weight: float, temperature: float) -> None:
    """Raises UserError where a teacher's weight or temperature is out of range."""
    if not 0 <= weight <= 1:
        raise UserError(f"distillation_weight = {weight}: expected a weight in 0..1")
    if not temperature > 0:
        raise UserError(f"temperature = {temperature}: expected above 0")


def subnet_teacher(
    supernet: Supernet, arch: Archs, task: Task, calibration_images: int = 1000, seed: int = 0
) -> Teacher:
    """One architecture `(K,)` of a trained supernet as a teacher, its statistics calibrated on training images."""
    images = fixed_subset(task.split("train"), calibration_images, seed).images
    stats = calibrate(supernet, arch, batches(task, images, 250, device=device_of(supernet)))
    return lambda x: supernet(x.to(device_of(supernet)), arch, stats).to(x.device)
