"""Progress of long loops: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


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


class ProgressBar:
    """A progress callback that draws a bar in a terminal and writes a plain line every few seconds elsewhere.

        with ProgressBar("supernet") as progress:
            train_supernet(..., progress=progress)

    Args:
        label: what is going on.
        file: where to write; stderr by default.
        every_s: seconds between plain lines.
    """

    def __init__(self, label: str, file: IO[str] | None = None, every_s: float = 15.0) -> None:
        self.label = label
        self.file = file or sys.stderr
        self.every_s = every_s
        self.bar: Progress | None = None
        self.row = TaskID(0)
        self.last = time.monotonic()

    def __enter__(self) -> ProgressBar:
        if self.file.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
            self.bar = Progress(*columns, console=Console(file=self.file), transient=False)
            self.row = self.bar.add_task(self.label, total=None, status="")
            self.bar.start()
        return self

    def __call__(self, update: Update) -> None:
        if self.bar is not None:
            self.bar.update(self.row, completed=update.step, total=update.steps, status=str(update))
        elif update.step == update.steps or time.monotonic() - self.last >= self.every_s:
            self.last = time.monotonic()
            print(f"{self.label}: step {update.step}/{update.steps} · {update}", file=self.file, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
