"""Teachers of a stage: the supernet's largest network, a reference network, the user's own, or several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasbench.networks import space_network
from nasbench.registry import resolve
from nasbench.stages.base import StageContext
from nasbench.training import evaluate_network, load_weights, sandwich_ends, save_weights, train_network
from nasbench.training.evaluation import batches, fit_size, fixed_subset
from search_spaces import load_space, presets
from search_spaces.errors import UserError
from search_spaces.supernet import calibrate

SUPERNET = "supernet"


class Ensemble(nn.Module):
    """Several networks as one: the mean of their logits, the geometric mean of what they say (Hinton et al. 2015)."""

    def __init__(self, members: Sequence[tuple[nn.Module, tuple[int, ...]]]) -> None:
        super().__init__()
        self.members = nn.ModuleList(network for network, _ in members)
        self.shapes = [shape for _, shape in members]

    def forward(self, x: Tensor) -> Tensor:
        said = [member(fit_size(x, shape)) for member, shape in zip(self.members, self.shapes, strict=True)]
        return torch.stack(said).mean(0)


def make_teacher(
    names: Sequence[str], weights: Sequence[str], training: dict[str, Any], context: StageContext
) -> tuple[nn.Module, tuple[int, ...]]:
    """The teacher in eval mode and the input shape that it takes.

    Args:
        names: `supernet`, a reference network (`resnet18@32`), `SPACE:ARCHITECTURE` with weights, or `module:function`,
            called with the input shape and the number of classes; more than one make an ensemble.
        weights: checkpoints, one per name; an empty one means the teacher's own, or those of training it here.
        training: of `train_network`, for reference networks without weights; what was trained is kept beside the
            stage's directory, and taken from there the next time.

    Raises:
        UserError: no such teacher, weights of another network, or a teacher that would be untrained.
    """
    if len(names) == 1:
        network, shape = _member(names[0], weights[0] if weights else "", training, context)
    else:
        files = list(weights) or [""] * len(names)
        members = [_member(name, file, training, context) for name, file in zip(names, files, strict=True)]
        network, shape = Ensemble(members), tuple(context.task.input_shape)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        x = next(batches(context.task, context.task.split("val").images[:2], 2, shape))
        said = network.eval()(x)
    if said.shape != (len(x), context.task.num_classes):
        raise UserError(
            f"teacher {', '.join(names)}: gives outputs {tuple(said.shape[1:])}, the task has "
            f"{context.task.num_classes} classes"
        )
    if not bool(torch.isfinite(said).all()):
        raise UserError(f"teacher {', '.join(names)}: its outputs are not finite")
    return network.eval(), shape


def _member(
    name: str, weights: str, training: dict[str, Any], context: StageContext
) -> tuple[nn.Module, tuple[int, ...]]:
    task = context.task
    if name == SUPERNET:
        if context.supernet is None:
            raise UserError("teacher = 'supernet': this run has none; name a reference network or a function of yours")
        _, largest = sandwich_ends(context.space)
        images = fixed_subset(task.split("train"), 1000, context.seed).images
        stats = calibrate(context.supernet, largest, batches(task, images, 250))
        network = context.supernet.extract(largest, stats)
        return network, getattr(network, "input_shape", tuple(context.space.input_shape))
    if name.partition(":")[0] in presets():
        if not weights:
            raise UserError(f"teacher {name!r} has random weights: give teacher_weights")
        label, _, arch = name.partition(":")
        searched = space_network(load_space(label, task.input_shape[0], task.num_classes), arch, label)
        network = searched.build()
        load_weights(network, Path(weights))
        return network, getattr(network, "input_shape", searched.input_shape)
    if ":" in name:
        make: Callable[..., Any] = resolve("teacher", name)
        made = make(context.input_shape, task.num_classes)
        if not isinstance(made, nn.Module):
            raise UserError(f"teacher {name!r}: returned a {type(made).__name__}, a torch module was expected")
        if weights:
            load_weights(made, Path(weights))
        return made, getattr(made, "input_shape", context.input_shape)
    from search_spaces import reference_network

    base, at, size = name.partition("@")
    if at and not size.isdigit():
        raise UserError(f"teacher {name!r}: expected NAME@RESOLUTION with a number of pixels")
    reference = reference_network(
        base,
        resolution=int(size) if at else (context.input_shape[1], context.input_shape[2]),
        in_channels=task.input_shape[0],
        num_classes=task.num_classes,
    )
    torch.manual_seed(context.seed)
    network, shape = reference.build(), reference.input_shape
    kept = context.directory.parent / f"teacher-{name}.safetensors"
    if weights or kept.is_file():
        load_weights(network, Path(weights) if weights else kept)
    elif not training["epochs"]:
        raise UserError(f"teacher {name!r} has random weights: give teacher_weights, or teacher_epochs to train it")
    else:
        checkpoint = kept.with_suffix(".training.safetensors")
        train_network(network, task, shape, **training, seed=context.seed, checkpoint=checkpoint)
        save_weights(kept, network, {"accuracy": evaluate_network(network, task, "val", shape)})
        checkpoint.unlink(missing_ok=True)
    return network, shape
