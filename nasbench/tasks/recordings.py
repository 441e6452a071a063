"""What tasks share that classify windows of multichannel recordings of people: windows, splits by person, standards."""

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
from nasbench.tasks.part import PartOfTask
from search_spaces.errors import UserError


@dataclass(frozen=True)
class Recordings:
    """Recordings of people doing one thing each.

    Args:
        signals: one array `(samples, channels)` of finite numbers each, with any numbers of samples.
        labels: class of each, `(n,)` integers from 0.
        persons: who was recorded, `(n,)` integers.
        class_names: in label order.
    """

    signals: Sequence[NDArray[np.floating[Any]]]
    labels: NDArray[np.integer[Any]]
    persons: NDArray[np.integer[Any]]
    class_names: tuple[str, ...]


class RecordingsTask(Task):
    """Classification of windows of fixed length, cut out of recordings.

    A person's windows are all in one split, so that validation and test are of people whom no network has seen; who
    goes where follows from a hash of the seed. Windows are "images" `(channels, 1, window)` in float32. Every channel
    is standardised by its mean and standard deviation over the training people. A subclass provides `load`, called
    once, on first use.

    Args:
        window: samples.
        overlap: share of a window that it has in common with the one before it.
        validation_persons, test_persons: how many people are held out.
        seed: of who is held out.
        scale: standard deviation of the random factor of a training window's channels (the strength of a movement).
        noise: standard deviation of noise added to training windows, in units of a channel's own.
    """

    def __init__(
        self,
        *,
        window: int = 128,
        overlap: float = 0.5,
        validation_persons: int = 2,
        test_persons: int = 2,
        seed: int = 0,
        scale: float = 0.1,
        noise: float = 0.0,
    ) -> None:
        rules = {
            "window": (window, window >= 2, "2 samples or more"),
            "overlap": (overlap, 0 <= overlap < 1, "a share in 0..1, below 1"),
            "validation_persons": (validation_persons, validation_persons >= 1, "1 or more"),
            "test_persons": (test_persons, test_persons >= 1, "1 or more"),
            "scale": (scale, 0 <= scale < float("inf"), "0 (off) or more"),
            "noise": (noise, 0 <= noise < float("inf"), "0 (off) or more"),
        }
        for key, (value, right, expected) in rules.items():
            if not right:
                raise UserError(f"task.{key} = {value}: expected {expected}")
        self.window = window
        self.step = max(1, round(window * (1 - overlap)))
        self.held_out: dict[SplitName, int] = {"val": validation_persons, "test": test_persons}
        self.seed = seed
        self.scale = scale
        self.noise = noise

    @abstractmethod
    def load(self) -> Recordings:
        """Read the data.

        Raises:
            UserError: missing or corrupt, with the file and what was expected.
        """

    @cached_property
    def recordings(self) -> Recordings:
        """The data, read on first use and kept."""
        return self.load()

    @cached_property
    def persons(self) -> dict[SplitName, tuple[int, ...]]:
        """Who is in which split.

        Raises:
            UserError: too few people.
        """
        everyone = sorted({int(p) for p in self.recordings.persons}, key=self._order)
        if len(everyone) <= sum(self.held_out.values()):
            raise UserError(
                f"task: validation_persons and test_persons = {list(self.held_out.values())} leave none of "
                f"{len(everyone)} people to train on"
            )
        parts, start = dict[SplitName, tuple[int, ...]](), 0
        for name, count in self.held_out.items():
            parts[name] = tuple(everyone[start : start + count])
            start += count
        return {"train": tuple(everyone[start:]), **parts}

    def _order(self, person: int) -> bytes:
        return hashlib.sha256(f"{self.seed}:{person}".encode()).digest()

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.recordings.signals[0].shape[1], 1, self.window

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.recordings.class_names

    @cached_property
    def _splits(self) -> dict[SplitName, Split]:
        return {name: self._windows(people) for name, people in self.persons.items()}

    def split(self, name: SplitName) -> Split:
        return self._splits[name]

    def _windows(self, people: Sequence[int], begin: float = 0.0, end: float = 1.0) -> Split:
        """The windows of some people that lie within a share of each recording's length."""
        windows, labels = [], []
        for row in np.flatnonzero(np.isin(self.recordings.persons, people)).tolist():
            signal = np.asarray(self.recordings.signals[row], dtype=np.float32)
            signal = signal[round(begin * len(signal)) : round(end * len(signal))]
            if len(signal) < self.window:
                continue
            cut = np.lib.stride_tricks.sliding_window_view(signal, self.window, axis=0)[:: self.step]
            windows.append(cut[:, :, None, :])
            labels += [int(self.recordings.labels[row])] * len(cut)
        if not windows:
            longest = max(map(len, self.recordings.signals))
            raise UserError(f"task.window = {self.window}: longer than recordings are, {longest} samples at most")
        return Split(torch.from_numpy(np.concatenate(windows)), torch.tensor(labels))

    def of_person(self, person: int, share: float = 0.4) -> PartOfTask:
        """One person's recordings: the first `share` of each to train on, the rest for validation and test alike.

        For personalisation. Standards (mean and deviation of the channels) stay those of the task's training people.

        Raises:
            UserError: nobody of that number, a share outside 0..1, or recordings too short for it.
        """
        if person not in self.recordings.persons:
            raise UserError(f"person = {person}: the recordings are of {sorted(set(self.recordings.persons.tolist()))}")
        if not 0 < share < 1:
            raise UserError(f"share = {share}: expected a share of each recording, between 0 and 1")
        rest = self._windows([person], share, 1.0)
        return PartOfTask(self, {"train": self._windows([person], 0.0, share), "val": rest, "test": rest})

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(channels,)` float32 over the training people's windows."""
        values = self.split("train").images.double()
        mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3), correction=0)
        # A constant channel carries nothing: leave it at zero instead of blowing up rounding errors.
        return mean.float(), torch.where(std < 1e-6, torch.ones_like(std), std).float()

    def prepare(self, images: Tensor) -> Tensor:
        mean, std = (value.to(images.device)[:, None, None] for value in self.normalisation)
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

    def preprocessing(self) -> dict[str, Any]:
        mean, std = self.normalisation
        return {"scale": 1.0, "mean": mean.tolist(), "std": std.tolist(), "channel_order": "stored"}

    @property
    def augments(self) -> bool:
        return bool(self.scale or self.noise)

    def augment(self, images: Tensor, seed: int) -> Tensor:
        if not self.augments:
            return images
        generator = torch.Generator().manual_seed(seed)
        n, channels = images.shape[:2]
        factors = 1 + self.scale * torch.randn(n, channels, 1, 1, generator=generator)
        noise = self.noise * self.normalisation[1][:, None, None]
        return images * factors + noise * torch.randn(images.shape, generator=generator)
