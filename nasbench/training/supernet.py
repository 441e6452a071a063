"""Supernet training: sandwich rule, progressive shrinking, or single paths, with distillation in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from nasbench.tasks.base import Task
from nasbench.training.evaluation import fixed_subset, subnet_accuracy
from nasbench.training.loop import History, fit, step_seed
from nasbench.training.losses import alpha_loss, soft_loss
from nasbench.training.precision import choose_device
from nasbench.training.processes import joined
from nasbench.training.progress import ProgressCallback
from nasbench.training.recipe import Optimizer, PrecisionName, Recipe, Schedule, check_choice
from nasbench.training.shrinking import Shrinking, named_phases
from nasbench.training.step import Subnets, SupernetStep
from nasbench.training.workers import workers
from search_spaces import Archs, SearchSpace, UserError
from search_spaces.supernet import Supernet

Method = Literal["sandwich", "progressive_shrinking", "single_path"]
Distillation = Literal["kl", "alpha", "none"]
_RANDOM_JUDGED = 2


def train_supernet(
    supernet: Supernet,
    space: SearchSpace,
    task: Task,
    *,
    method: Method = "sandwich",
    epochs: int = 8,
    batch_size: int = 64,
    lr: float = 0.3,
    random_subnets: int | None = None,
    phases: dict[str, float] | None = None,
    distillation: Distillation | None = None,
    distillation_weight: float = 1.0,
    optimizer: Optimizer = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: Schedule = "cosine",
    warmup: float = 0.05,
    clip_norm: float = 5.0,
    label_smoothing: float = 0.1,
    ema: float = 0.0,
    precision: PrecisionName = "fp32",
    accumulate: int = 1,
    device: str = "auto",
    validation_images: int = 500,
    save_every_s: float = 30.0,
    seed: int = 0,
    checkpoint: Path | None = None,
    log_dir: Path | None = None,
    progress: ProgressCallback | None = None,
) -> History:
    """Train all architectures of a space at once, in place.

    Three methods decide which architectures a step trains. They work with any `Supernet`:

    - `sandwich` (Yu and Huang, ICCV 2019; BigNAS, Yu et al., ECCV 2020): the largest on the labels, random ones and
      the smallest on the largest's output.
    - `progressive_shrinking` (once-for-all: Cai et al., ICLR 2020): the largest alone; then it is frozen as the
      teacher of random ones whose knobs open phase by phase. The schedule of the learning rate runs for the largest,
      and once more for all phases together.
    - `single_path` (SPOS: Guo et al., ECCV 2020): one random architecture on the labels.

    Gradients of a step's architectures are added up. They run side by side, as many as torch has threads, and with as
    many threads each the result is the same to the bit. Started by `torchrun`, several processes take their parts of
    every batch, and the result is that of one process up to rounding, but for what dropout draws; the layers of
    `search_spaces.shared_layers` normalise by the batches of all processes.

    Args:
        method: see above.
        epochs: passes over the training images; 0 leaves the supernet as it is.
        batch_size: images a step, over all processes.
        lr: peak learning rate, reached by linear warm-up.
        random_subnets: random architectures a step: 2 unless given; `single_path` has one.
        phases: of `progressive_shrinking`: regular expressions for names of knobs, in the order in which they open,
            each with its share of the steps, as in `{kernel = 0.2, depth = 0.2, "expansion|width" = 0.3}`; the rest,
            before them, trains the largest. See `nasbench.training.shrinking`.
        distillation: what is minimised against the teacher: `kl`, the Kullback-Leibler divergence; `alpha`, the
            adaptive alpha-divergence (AlphaNet: Wang et al., ICML 2021); `none`, so that all learn from labels. `kl`
            unless given; `single_path` has no teacher.
        distillation_weight: of the teacher in the loss; the labels have the rest. 0..1.
        optimizer: `sgd` with Nesterov momentum, or `adamw`.
        momentum: of SGD, and the first beta of AdamW.
        weight_decay: on matrices and kernels, not on biases and normalisation.
        schedule: of the learning rate after the warm-up: `cosine` or `linear` to zero, `step` (a tenth after half, a
            hundredth after three quarters), `constant`.
        warmup: share of the steps until the peak learning rate.
        clip_norm: largest norm of the gradient, 0 for any.
        label_smoothing: share of the target that is uniform.
        ema: decay of an exponential moving average of the weights, which is validated and left in the supernet; 0 is
            off. Weights that a step does not use are averaged too.
        precision: `fp32`, or `bf16` or `fp16` for mixed precision. On CPUs bf16 makes transformers faster where the
            hardware has it, and networks with depthwise convolutions slower.
        accumulate: parts that a process computes its images in, one after the other, to save memory; normalisation by
            the batch sees a part at a time.
        device: `auto` takes CUDA where it is present, else the CPU; or `cpu`, `cuda`, `cuda:1`.
        validation_images: after every epoch, judge the smallest, the largest and two fixed random architectures on so
            many validation images, and write their accuracies to the history; 0 for never.
        save_every_s: seconds between checkpoints.
        seed: of everything random.
        checkpoint: file to resume from, if it exists, and to save to.
        log_dir: directory for TensorBoard's event files; needs `pip install nasbench-hw[tensorboard]`.
        progress: called after every step.

    Returns:
        One row per epoch: `epoch`, `loss` (mean over the architectures), `loss_largest` (of the sandwich), `lr`,
        `images_per_s`, `seconds`, `phase` (of progressive shrinking, the last step's), `accuracy_smallest`,
        `accuracy_random` (mean of the two), `accuracy_largest`.

    Raises:
        UserError: a value out of range, a loss that is no longer finite, or a checkpoint that does not fit.
    """
    recipe = Recipe(
        epochs=epochs, batch_size=batch_size, lr=lr, optimizer=optimizer, momentum=momentum, weight_decay=weight_decay,
        warmup=warmup, clip_norm=clip_norm, label_smoothing=label_smoothing, schedule=schedule, ema=ema,
        precision=precision, accumulate=accumulate,
    )  # fmt: skip
    count, divergence = _checked(method, random_subnets, phases, distillation, distillation_weight)
    smallest, largest = sandwich_ends(space)
    images = len(task.split("train"))
    steps = epochs * (images // min(batch_size, images))
    shrinking = Shrinking(space, largest, phases, steps) if method == "progressive_shrinking" else None
    # The space is no part of the weights. In eval mode there is no dropout; the batch still normalises.
    frozen = copy.deepcopy(supernet, {id(space): space}).eval().requires_grad_(False) if shrinking else None

    def subnets(step: int) -> Subnets:
        rng = np.random.default_rng(step_seed(seed, "archs", step))
        if shrinking is None:
            drawn = space.sample(count, rng)
            return Subnets(largest, [*drawn, smallest]) if method == "sandwich" else Subnets(None, list(drawn))
        if step < shrinking.begin:
            return Subnets(largest, [])
        assert frozen is not None
        return Subnets(None, list(shrinking.draw(count, step, rng)), (frozen, largest))

    judged = {"accuracy_smallest": [smallest], "accuracy_random": _fixed(space, seed), "accuracy_largest": [largest]}

    def epoch_metrics(step: int) -> dict[str, Any]:
        phase = {} if shrinking is None else {"phase": shrinking.phase(step - 1)}
        if not validation_images:
            return phase
        return phase | {
            name: float(np.mean([subnet_accuracy(supernet, arch, task, calibration, validation) for arch in archs]))
            for name, archs in judged.items()
        }

    if validation_images:
        calibration = fixed_subset(task.split("train"), validation_images, seed).images
        validation = fixed_subset(task.split("val"), validation_images, seed)
    settings = {
        "space": space.name,
        "knobs": [[k.name, len(k.choices)] for k in space.knobs],
        "task": task.name,
        "method": method,
        "random_subnets": count,
        "phases": [] if shrinking is None else [[p.name, p.begin, p.end] for p in shrinking.phases],
        "distillation": (distillation or "kl") if divergence else "none",
        "distillation_weight": distillation_weight if divergence else 0.0,
        "validation_images": validation_images,
    }
    where = choose_device(device)
    # A device other than the CPU has one queue, and processes meet within layers, in the order of the subnets.
    with joined(where) as ranks, workers(2 + count, ranks.count > 1 or where.type != "cpu") as executor:
        settings |= {"processes": ranks.count}
        step = SupernetStep(supernet, task, subnets, divergence, distillation_weight, label_smoothing, executor, seed)
        return fit(
            supernet,
            task,
            recipe,
            step,
            settings=settings,
            seed=seed,
            device=where,
            ranks=ranks,
            restarts=(0,) if shrinking is None else (0, shrinking.begin),
            snapshots={} if shrinking is None or frozen is None else {"teacher": (shrinking.begin, frozen)},
            epoch_metrics=epoch_metrics if validation_images or shrinking else None,
            checkpoint=checkpoint,
            save_every_s=save_every_s,
            log_dir=log_dir,
            progress=progress,
        )


def check_training(space: SearchSpace, options: Mapping[str, Any]) -> None:
    """Refuse what `train_supernet` would refuse of its keys, without the cost of beginning.

    Args:
        options: all keys with their values.

    Raises:
        UserError: a value out of range, or values that do not go together.
    """
    Recipe(**{field.name: options[field.name] for field in fields(Recipe)})
    if options["validation_images"] < 0:
        raise UserError(f"validation_images = {options['validation_images']}: expected 0 (never) or more")
    if not options["save_every_s"] >= 0:
        raise UserError(f"save_every_s = {options['save_every_s']}: expected seconds, 0 (after every step) or more")
    keys = ("method", "random_subnets", "phases", "distillation", "distillation_weight")
    _checked(*(options[key] for key in keys))
    choose_device(options["device"])
    if options["method"] == "progressive_shrinking":
        named_phases(space, options["phases"])


def _checked(
    method: str, random_subnets: int | None, phases: dict[str, float] | None, distillation: str | None, weight: float
) -> tuple[int, Callable[[Tensor, Tensor], Tensor] | None]:
    """How many random architectures a step has, and what is minimised against the teacher.

    Raises:
        UserError: values out of range, or that do not go together.
    """
    check_choice("method", method, get_args(Method))
    single = method == "single_path"
    if random_subnets is not None and random_subnets < (method == "progressive_shrinking"):
        least = "1 or more" if method == "progressive_shrinking" else "0 or more"
        raise UserError(f"random_subnets = {random_subnets}: expected {least}")
    if single and random_subnets not in (None, 1):
        raise UserError(
            f"random_subnets = {random_subnets}: expected 1, or leave it out: method = 'single_path' has one"
        )
    if phases and method != "progressive_shrinking":
        raise UserError(f"phases = {phases}: expected none; only method = 'progressive_shrinking' has phases")
    if distillation is not None:
        check_choice("distillation", distillation, get_args(Distillation))
    if single and distillation not in (None, "none"):
        raise UserError(f"distillation = {distillation!r}: expected 'none'; method = 'single_path' has no teacher")
    if not 0 <= weight <= 1:
        raise UserError(f"distillation_weight = {weight}: expected a weight in 0..1")
    count = random_subnets if random_subnets is not None else 1 if single else 2
    name = distillation or ("none" if single else "kl")
    return count, None if weight == 0 else {"kl": soft_loss, "alpha": alpha_loss, "none": None}[name]


def _fixed(space: SearchSpace, seed: int) -> list[Archs]:
    """The random architectures that are judged after every epoch: the same ones throughout."""
    return list(space.sample(_RANDOM_JUDGED, np.random.default_rng(step_seed(seed, "judged", 0))))


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
