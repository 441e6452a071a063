"""What channels, blocks and whole networks are worth: scores, and the loss on training images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasbench.pruning.groups import ChannelGroup
from nasbench.tasks.base import Split, Task
from nasbench.training.evaluation import fit_size
from search_spaces.errors import UserError

Importance = Literal["l1", "taylor", "bn_scale"]
Scores = dict[str, NDArray[np.float64]]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def channel_scores(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    importance: Importance,
    task: Task,
    images: Split,
    input_shape: Sequence[int],
) -> tuple[Scores, dict[str, str]]:
    """A score `(channels,)` per group, larger for what is worth more, and the groups that have none, with the reason.

    `l1`: sum of the absolute weights that make a channel (Li et al., ICLR 2017). `bn_scale`: mean absolute scale of its
    batch normalisations (Liu et al., ICCV 2017). `taylor`: the squared first-order change of the loss where the weights
    that read the channel become zero, mean over batches of `images` (Molchanov et al., CVPR 2019, on the readers' side,
    which holds for shared and gated channels too). Scores compare channels of one group.

    Raises:
        UserError: a loss or gradient that is not finite.
    """
    if importance == "taylor":
        return _taylor(network, groups, task, images, input_shape), {}
    scores, without = {}, {}
    for group in groups:
        total, found = np.zeros(group.channels), 0
        for member in group.members:
            module = network.get_submodule(member.module)
            normalises = isinstance(module, _BATCH_NORMS)
            if member.side == "in" or normalises != (importance == "bn_scale") or module.weight is None:
                continue
            weight = module.weight.detach().abs().double()  # type: ignore[operator]
            rows = weight if normalises else weight.flatten(1).sum(1)
            if isinstance(module, nn.ConvTranspose2d):
                rows = weight.sum((0, 2, 3))
            total += rows.cpu().numpy()[member.index].sum(1)
            found += 1
        if found:
            scores[group.name] = total / found
        else:
            without[group.name] = "no batch normalisation scales its channels"
    return scores, without


def _taylor(
    network: nn.Module, groups: Sequence[ChannelGroup], task: Task, images: Split, input_shape: Sequence[int]
) -> Scores:
    mode = network.training
    network.eval()
    scores = {group.name: np.zeros(group.channels) for group in groups}
    count = 0
    try:
        for x, labels in prepared(task, images, input_shape):
            network.zero_grad(set_to_none=True)
            loss = task.loss(network(x), labels)
            if not bool(torch.isfinite(loss)):
                raise UserError(f"taylor importance: the loss on training images is {float(loss):g}")
            loss.backward()
            for group in groups:
                change = np.zeros(group.channels)
                for member in group.members:
                    if member.side == "in":
                        change += _by_reader(network.get_submodule(member.module))[member.index].sum(1)
                scores[group.name] += change**2
            count += 1
    finally:
        network.zero_grad(set_to_none=True)
        network.train(mode)
    return {name: total / max(count, 1) for name, total in scores.items()}


def _by_reader(module: nn.Module) -> NDArray[np.float64]:
    """Gradient times weight, summed per input channel of a layer."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.grad is None:
        return np.zeros(weight.shape[1])
    product = (weight.detach() * weight.grad).double()
    dims = tuple(d for d in range(product.dim()) if d != (0 if isinstance(module, nn.ConvTranspose2d) else 1))
    return product.sum(dims).cpu().numpy()


def prepared(task: Task, images: Split, input_shape: Sequence[int], batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images as a network takes them, with their labels."""
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        yield fit_size(task.prepare(images.images[rows]), input_shape), images.labels[rows]


def mean_loss(network: nn.Module, task: Task, images: Split, input_shape: Sequence[int]) -> float:
    """The task's loss on images, in eval mode; infinite where it is not a number."""
    mode = network.training
    network.eval()
    total = 0.0
    try:
        with torch.inference_mode():
            for x, labels in prepared(task, images, input_shape, 256):
                total += float(task.loss(network(x), labels)) * len(labels)
    finally:
        network.train(mode)
    return total / len(images) if np.isfinite(total) else float("inf")


def recalibrate(network: nn.Module, task: Task, images: Split, input_shape: Sequence[int]) -> None:
    """Take the statistics of batch normalisations anew from images, in place; other layers stay in eval mode."""
    layers = [m for m in network.modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
        layer.train()
    try:
        with torch.no_grad():
            for x, _ in prepared(task, images, input_shape):
                if len(x) > 1:
                    network(x)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        network.eval()


def strongest(scores: Mapping[str, NDArray[np.float64]], counts: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """Per group the channels with the highest scores, in ascending order; the first of equal ones."""
    return {
        name: np.sort(np.argsort(-scores[name], kind="stable")[:count]).astype(np.int64)
        for name, count in counts.items()
    }
