"""What a training tells TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hardware_profiles.extras import require

_STEPS_BETWEEN = 10


class TensorBoard:
    """Losses and learning rate of every tenth step, and everything of every epoch, as TensorBoard's event files.

    A resumed training writes another file to the same directory, which hides what an earlier one wrote beyond its step.

    Args:
        directory: for the event files; None writes nothing.
        step: finished before.

    Raises:
        UserError: TensorBoard is not installed; says what to install.
    """

    def __init__(self, directory: Path | None, step: int) -> None:
        self._writer: Any = None
        if directory is not None:
            require("tensorboard", "tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(directory), purge_step=step or None)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """What a step gave, by name."""
        if self._writer is not None and step % _STEPS_BETWEEN == 0:
            self._add("step", step, values)

    def epoch(self, step: int, row: Mapping[str, Any]) -> None:
        """A row of the history."""
        if self._writer is not None:
            self._add("epoch", step, row)
            self._writer.flush()

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer is not None:
            self._writer.close()

    def _add(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(f"{group}/{name}", value, step)
