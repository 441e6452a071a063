"""What image classification tasks share whose images fit in memory: normalisation, augmentation, fixed splits."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasbench.tasks.base import Split, SplitName, Task
from search_spaces.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """All splits of a task with the names of its classes, in label order."""

    splits: dict[SplitName, Split]
    class_names: tuple[str, ...]


class ArrayTask(Task):
    """Image classification with all images in memory as uint8.

    Images are scaled to 0..1 and normalised per channel with the mean and standard deviation of the training split.
    Training images are moved by up to `shift` pixels in both directions (edge pixels repeat) and mirrored with
    probability one half where `flip` says so. A subclass provides `load`, called once, on first use.

    Args:
        shift: largest random shift of a training image, in pixels of the stored images.
        flip: mirror training images left to right at random.
    """

    def __init__(self, *, shift: int = 0, flip: bool = False) -> None:
        if shift < 0:
            raise UserError(f"task.shift: pixels must be 0 or more, got {shift}")
        self.shift = shift
        self.flip = flip

    @abstractmethod
    def load(self) -> Dataset:
        """Read the data.

        Raises:
            UserError: missing or corrupt, with the file and what was expected.
        """

    @cached_property
    def dataset(self) -> Dataset:
        """The data, read on first use and kept.

        Raises:
            UserError: what `load` raises, or images that a shift could move out of sight.
        """
        found = self.load()
        height, width = found.splits["train"].images.shape[2:]
        if self.shift >= min(height, width):
            raise UserError(
                f"task.shift = {self.shift}: images have {height} x {width} pixels, so it must be below "
                f"{min(height, width)}"
            )
        return found

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.dataset.class_names

    @property
    def input_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.dataset.splits["train"].images.shape[1:]
        return channels, height, width

    def split(self, name: SplitName) -> Split:
        return self.dataset.splits[name]

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(channels,)` float32 of the training pixels, on the scale 0..1."""
        images = self.split("train").images
        values = torch.arange(256, dtype=torch.float64) / 255
        # A histogram per channel is exact and needs no float copy of the images.
        counts = torch.stack([torch.bincount(images[:, c].flatten(), minlength=256) for c in range(images.shape[1])])
        share = counts.double() / counts.sum(1, keepdim=True)
        mean = share @ values
        std = ((share @ values**2) - mean**2).clamp_min(1e-12).sqrt()
        # A constant channel carries nothing: leave it at zero instead of blowing up rounding errors.
        return mean.float(), torch.where(std < 1e-4, torch.ones_like(std), std).float()

    def prepare(self, images: Tensor) -> Tensor:
        mean, std = (value.to(images.device) for value in self.normalisation)
        scale, offset = 1 / (255 * std), -mean / std
        batch = images.to(torch.float32, memory_format=torch.channels_last)
        return batch.mul_(scale[:, None, None]).add_(offset[:, None, None])

    def preprocessing(self) -> dict[str, Any]:
        mean, std = self.normalisation
        return {"scale": 1 / 255, "mean": mean.tolist(), "std": std.tolist(), "channel_order": "stored"}

    @property
    def augments(self) -> bool:
        return bool(self.shift or self.flip)

    def augment(self, images: Tensor, seed: int) -> Tensor:
        if not self.augments:
            return images
        n, channels, height, width = images.shape
        generator = torch.Generator().manual_seed(seed)
        moves = torch.randint(-self.shift, self.shift + 1, (2, n, 1), generator=generator)
        rows = (torch.arange(height) + moves[0]).clamp_(0, height - 1)
        columns = (torch.arange(width) + moves[1]).clamp_(0, width - 1)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        # One gather does shift and mirror together.
        pixels = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width)
        moved = images.reshape(n, channels, -1).gather(2, pixels.expand(-1, channels, -1))
        return moved.view(n, channels, height, width)


def content_sha256(arrays: dict[str, NDArray[Any]]) -> str:
    """SHA-256 over names, shapes and bytes, in the order of the names: independent of the compression."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def to_split(images: NDArray[np.uint8], labels: NDArray[np.integer[Any]]) -> Split:
    """A split from `(n, c, h, w)` uint8 images and `(n,)` labels."""
    return Split(
        torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels.astype(np.int64))
    )


# The keys that say how much is cut off.
_SHARES: dict[SplitName, str] = {"val": "task.validation", "test": "task.test"}


def stratified(
    names: Sequence[str], labels: NDArray[np.integer[Any]], fractions: dict[SplitName, float], seed: int, where: str
) -> dict[SplitName, NDArray[np.int64]]:
    """Row numbers per split: `fractions` of every class, the rest is `train`; each split gets every class.

    Who goes where follows from a hash of seed and name, so it depends neither on the order of files nor on the version
    of a random generator.

    Args:
        names: `n` distinct names.
        labels: `(n,)`.
        fractions: share of the images per split that is to be cut off, each in (0, 1), their sum below 1.
        where: what the names belong to, for messages.

    Raises:
        UserError: impossible fractions, or a class with fewer images than splits.
    """
    for split, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise UserError(f"{_SHARES[split]} = {fraction}: the share of the images must lie between 0 and 1")
    if (total := sum(fractions.values())) >= 1:
        keys = " + ".join(_SHARES[split] for split in fractions)
        raise UserError(f"{keys} = {total:g}: leaves nothing to train on; the sum must be below 1")
    order = np.argsort([hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8] for name in names], kind="stable")
    rows: dict[SplitName, list[NDArray[np.int64]]] = {split: [] for split in ("train", *fractions)}
    for label in np.unique(labels):
        members = order[labels[order] == label]
        start = 0
        for split, fraction in fractions.items():
            count = max(1, round(fraction * len(members)))
            rows[split].append(members[start : start + count])
            start += count
        if start >= len(members):
            raise UserError(
                f"{where}: class {label} has {len(members)} images, too few for {len(fractions) + 1} splits; "
                f"at least {start + 1} are needed"
            )
        rows["train"].append(members[start:])
    return {split: np.sort(np.concatenate(parts)) for split, parts in rows.items()}
