"""Batched evaluation of networks and subnets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nasbench.tasks.base import Split, SplitName, Task
from nasbench.training.precision import device_of
from nasbench.training.workers import in_parts
from search_spaces.base import Archs
from search_spaces.errors import UserError
from search_spaces.supernet import Supernet, calibrate, fit


def fit_size(images: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Images `(n, c, h, w)` at the size of a network's `(c, height, width)`, as a supernet resizes them.

    Raises:
        UserError: the network wants other channels, or one takes windows of signals (height 1) and the other images.
    """
    channels, height, _ = input_shape
    if channels != images.shape[1] or (height == 1) != (images.shape[2] == 1):
        raise UserError(f"a network for {tuple(input_shape)} cannot take images of {tuple(images.shape[1:])}")
    return fit(images, input_shape)


def fixed_subset(split: Split, count: int, seed: int) -> Split:
    """`count` images drawn once from `seed`, in a fixed order; all of them where `count` is 0 or too large."""
    if not 0 < count < len(split):
        return split
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]
    return Split(split.images[rows].clone(), split.labels[rows].clone())


def batches(
    task: Task,
    images: Tensor,
    batch_size: int,
    input_shape: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Prepared batches of stored images on a device, resized where an input shape is given."""
    for start in range(0, len(images), batch_size):
        batch = task.prepare(images[start : start + batch_size].to(device))
        yield batch if input_shape is None else fit_size(batch, input_shape)


def predict_logits(
    model: Callable[[Tensor], Tensor],
    task: Task,
    images: Tensor,
    input_shape: Sequence[int] | None = None,
    batch_size: int = 256,
    device: torch.device | None = None,
) -> Tensor:
    """Logits `(n, classes)` float32, on the CPU, of stored images `(n, c, h, w)`; a module should be in eval mode.

    Args:
        device: where a function that is no module expects its images; a module's is known.
        input_shape: `(channels, height, width)` to resize to; None leaves the images at their stored size.
    """

    device = device or device_of(model)

    def run(part: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return [model(batch).cpu() for batch in batches(task, part, batch_size, input_shape, device)]

    if device.type != "cpu":
        return torch.cat(run(images))
    return torch.cat([logits for part in in_parts(run, images) for logits in part])


def evaluate_network(
    network: nn.Module, task: Task, split_name: SplitName, input_shape: Sequence[int], batch_size: int = 256
) -> float:
    """The task's accuracy (0..1) of a stand-alone network on a whole split, in eval mode."""
    split = task.split(split_name)
    mode = network.training
    network.eval()
    try:
        return task.accuracy(predict_logits(network, task, split.images, input_shape, batch_size), split.labels)
    finally:
        network.train(mode)


def subnet_accuracy(
    supernet: Supernet, arch: Archs, task: Task, calibration: Tensor, validation: Split, batch_size: int = 100
) -> float:
    """Accuracy (0..1) of one architecture `(K,)` of a supernet with statistics calibrated for it.

    Args:
        calibration: stored training images for the normalisation statistics.
        validation: images and labels to judge by.

    Returns:
        NaN where the logits are not finite.
    """
    device = device_of(supernet)
    with torch.inference_mode():
        stats = calibrate(supernet, arch, batches(task, calibration, batch_size, device=device))
        logits = predict_logits(
            lambda x: supernet(x, arch, stats), task, validation.images, batch_size=batch_size, device=device
        )
    return task.accuracy(logits, validation.labels) if bool(torch.isfinite(logits).all()) else float("nan")
