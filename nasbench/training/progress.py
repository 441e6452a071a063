"""What a training loop tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Update:
    """Where a loop stands.

    Args:
        step, steps: finished and all.
        images_per_s: training images per second since the loop was started or resumed.
        loss: running mean of the current epoch.
        seconds_left: expected.
    """

    step: int
    steps: int
    images_per_s: float
    loss: float
    seconds_left: float

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return f"{self.images_per_s:,.0f} images/s · loss {self.loss:.3f} · {minutes}:{seconds:02d} left"


ProgressCallback = Callable[[Update], None]
