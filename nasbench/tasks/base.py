"""The contract of tasks: data splits, input shape, loss and metrics."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

SplitName = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, whole in memory.

    Args:
        images: `(n, channels, height, width)` as `Task.prepare` takes them: uint8 for pictures, float32 for signals,
            which have height 1. `channels_last` is not required.
        labels: `(n,)` int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Task(ABC):
    """What a network is to learn.

    Life: built once per run. Search and stages ask for `train` and `val`; `test` is asked for once, by the report. A
    subclass gives `input_shape`, `class_names` and `split`; loss, metric, normalisation and augmentation have defaults
    for image classification.
    """

    name: str = "task"

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)` of the stored images."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @abstractmethod
    def split(self, name: SplitName) -> Split:
        """The images and labels of one split; the same on every call.

        Raises:
            UserError: data missing or corrupt, with the file and what was expected.
        """

    @abstractmethod
    def prepare(self, images: Tensor) -> Tensor:
        """Stored images `(n, c, h, w)` as normalised float32 network input, in `channels_last` memory format.

        The result lies on the device of the images.
        """

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what networks are trained and judged on: class names, and the splits `train` and `val`.

        Empty where there is nothing to read.
        """
        digest = hashlib.sha256(repr(self.class_names).encode())
        splits: tuple[SplitName, ...] = ("train", "val")
        for name in splits:
            split = self.split(name)
            for tensor in (split.images, split.labels):
                array = tensor.contiguous().numpy()
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(array.data)
        return digest.hexdigest()

    def preprocessing(self) -> dict[str, Any]:
        """What `prepare` does, as JSON-able values, for the manifest beside an exported network."""
        return {}

    @property
    def augments(self) -> bool:
        """Whether training images differ from epoch to epoch."""
        return type(self).augment is not Task.augment

    def augment(self, images: Tensor, seed: int) -> Tensor:
        """Randomly changed training images, as they are stored; all randomness from `seed`. None by default."""
        return images

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Training loss: cross-entropy, mean over the batch."""
        import torch.nn.functional as F

        return F.cross_entropy(logits, labels)

    def accuracy(self, logits: Tensor, labels: Tensor) -> float:
        """The metric `accuracy` of a whole split, 0..1, from all its logits `(n, classes)`."""
        return float((logits.argmax(1) == labels).double().mean())
