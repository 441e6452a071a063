"""What a deployed network meets one after the other: new classes, or new people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nasbench.tasks.base import Split, SplitName, Task
from nasbench.tasks.part import PartOfTask, of_classes
from nasbench.tasks.recordings import RecordingsTask
from search_spaces.errors import UserError


@dataclass(frozen=True)
class Stream:
    """Tasks that come one after the other; all have the same labels, so that one head serves them.

    Args:
        tasks: each with splits of its own.
        names: of the steps, for tables and figures.

    Raises:
        UserError: fewer than two tasks, or tasks of different shapes or labels.
    """

    tasks: tuple[Task, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or len(self.tasks) != len(self.names):
            raise UserError(
                f"stream: {len(self.tasks)} tasks with {len(self.names)} names: expected two or more, each with a name"
            )
        kinds = {(task.input_shape, task.class_names) for task in self.tasks}
        if len(kinds) > 1:
            raise UserError("stream: the tasks differ in input shape or class names; they must share both")

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def classes(self) -> int:
        """Outputs that a network needs."""
        return self.tasks[0].num_classes


def class_stream(task: Task, steps: Sequence[Sequence[int]], *, images: int = 0, seed: int = 0) -> Stream:
    """New classes at every step (class-incremental); labels stay those of the task.

    Args:
        steps: the classes of each.
        images: training images per class, drawn from `seed`; 0 for all.

    Raises:
        UserError: a class in two steps, unknown, or with too few images.
    """
    flat = [label for step in steps for label in step]
    if len(set(flat)) != len(flat) or not all(steps):
        raise UserError(f"steps = {[list(s) for s in steps]}: expected one class or more each, no class in two steps")
    tasks = tuple(of_classes(task, step, images=images * len(step), relabel=False, seed=seed) for step in steps)
    return Stream(tasks, tuple(", ".join(task.class_names[label] for label in step) for step in steps))


def person_stream(task: RecordingsTask, people: Sequence[int | Sequence[int]], *, share: float = 0.6) -> Stream:
    """The same classes from other people at every step (domain-incremental).

    Args:
        people: who is met at each step, one person or several.
        share: of each recording that is for training, the beginning; the rest is validation and test alike.

    Raises:
        UserError: nobody of that number, or somebody in two steps.
    """
    groups = [(step,) if isinstance(step, int) else tuple(step) for step in people]
    flat = [person for group in groups for person in group]
    if len(set(flat)) != len(flat) or not all(groups):
        raise UserError(f"people = {groups}: expected one person or more each, nobody in two steps")
    names = tuple(f"person {g[0]}" if len(g) == 1 else "people " + ", ".join(map(str, g)) for g in groups)
    return Stream(tuple(_together(task, group, share) for group in groups), names)


def _together(task: RecordingsTask, people: Sequence[int], share: float) -> Task:
    """The recordings of several people as one task."""
    own = [task.of_person(person, share) for person in people]
    parts: tuple[SplitName, ...] = ("train", "val", "test")
    splits: dict[SplitName, Split] = {
        name: Split(
            torch.cat([o.split(name).images for o in own]),
            torch.cat([o.split(name).labels for o in own]),
        )
        for name in parts
    }
    return PartOfTask(task, splits)
