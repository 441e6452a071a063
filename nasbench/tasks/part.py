"""A part of a task as a task of its own: some classes, some images, some people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nasbench.tasks.base import Split, SplitName, Task
from search_spaces.errors import UserError


class PartOfTask(Task):
    """Other splits of a task's own kind of data, prepared and augmented as the task does.

    Args:
        task: gives preparation, augmentation, loss and metric.
        splits: its splits; labels are those of `class_names`.
        class_names: in label order; by default the task's own.
    """

    def __init__(self, task: Task, splits: Mapping[SplitName, Split], class_names: Sequence[str] | None = None) -> None:
        self.whole = task
        self.name = task.name
        self._splits = dict(splits)
        self._class_names = tuple(class_names or task.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.whole.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._class_names

    def split(self, name: SplitName) -> Split:
        return self._splits[name]

    def prepare(self, images: Tensor) -> Tensor:
        return self.whole.prepare(images)

    def preprocessing(self) -> dict[str, Any]:
        return self.whole.preprocessing()

    @property
    def augments(self) -> bool:
        return self.whole.augments

    def augment(self, images: Tensor, seed: int) -> Tensor:
        return self.whole.augment(images, seed)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.whole.loss(logits, labels)

    def accuracy(self, logits: Tensor, labels: Tensor) -> float:
        return self.whole.accuracy(logits, labels)


def of_classes(
    task: Task, classes: Sequence[int], *, images: int = 0, relabel: bool = True, seed: int = 0
) -> PartOfTask:
    """The part of a task with some of its classes.

    Args:
        classes: labels of the task.
        images: training images, drawn from `seed`, as many of each class; 0 for all.
        relabel: number the classes anew from 0, in the order given; else labels and class names stay.

    Raises:
        UserError: a class that the task does not have, or too few images of one.
    """
    for label in classes:
        if not 0 <= label < task.num_classes:
            raise UserError(f"classes: {label} is not among 0..{task.num_classes - 1}")
    generator = torch.Generator().manual_seed(seed)
    splits: dict[SplitName, Split] = {}
    names: tuple[SplitName, ...] = ("train", "val", "test")
    for name in names:
        split = task.split(name)
        rows = []
        for label in classes:
            found = torch.nonzero(split.labels == label).flatten()
            if name == "train" and images:
                wanted = images // len(classes)
                if wanted > len(found) or not wanted:
                    raise UserError(
                        f"images = {images}: class {label} has {len(found)}, {len(classes)} classes share them"
                    )
                found = found[torch.randperm(len(found), generator=generator)[:wanted]]
            rows.append(found)
        row = torch.cat(rows).sort().values
        labels = split.labels[row]
        if relabel:
            number = torch.full((task.num_classes,), -1)
            number[list(classes)] = torch.arange(len(classes))
            labels = number[labels]
        splits[name] = Split(split.images[row], labels)
    return PartOfTask(task, splits, [task.class_names[c] for c in classes] if relabel else None)
