"""What a person sees while a run goes on: a bar per phase in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasbench.training.progress import Update

_SECONDS_BETWEEN_LINES = 15.0


class Phase:
    """One phase under way. `progress(unit)` and `done(text)` may be called any number of times."""

    def __init__(self, title: str, show: Callable[[int, int, str], None]) -> None:
        self.title = title
        self.summary = ""
        self._show = show

    def progress(self, unit: str) -> Callable[..., None]:
        """A callback `(done, total, text="")` that shows how far the phase is, with rate and time left."""
        start = time.monotonic()
        first: list[int] = []

        def show(done: int, total: int, text: str = "") -> None:
            if not first:
                first.append(done - 1 if done else 0)
            seconds = time.monotonic() - start
            rate = (done - first[0]) / seconds if seconds > 0 else 0.0
            left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
            self._show(done, total, f"{done:,}/{total:,} {unit}{', ' + text if text else ''}{left}")

        return show

    def steps(self, unit: str) -> Callable[[str, int, int], None]:
        """A callback `(what, done, total)`, as calibration calls it."""
        show = self.progress(unit)
        return lambda what, done, total: show(done, total, what)

    def training(self) -> Callable[[Update], None]:
        """A callback for the training procedures of `nasbench.training`."""
        return lambda u: self._show(u.step, u.steps, str(u))

    def done(self, summary: str) -> None:
        """What to say of the phase when it ends."""
        self.summary = summary


class Reporter:
    """Tells the phases of a run on standard error.

    Args:
        quiet: say nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def line(self, text: str) -> None:
        """One line."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def phase(self, title: str) -> Iterator[Phase]:
        """A phase with its bar; its end is told with the time it took."""
        start = time.perf_counter()
        if self.quiet:
            yield Phase(title, lambda *_: None)
            return
        if sys.stderr.isatty():
            with self._bar(title) as show:
                phase = Phase(title, show)
                yield phase
        else:
            phase = Phase(title, _lines(title))
            yield phase
        ending = f"  {phase.summary}" if phase.summary else ""
        self.line(f"{title:<26} {time.perf_counter() - start:7.1f} s{ending}")

    @contextmanager
    def _bar(self, title: str) -> Iterator[Callable[[int, int, str], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns: list[Any] = [
            SpinnerColumn(),
            TextColumn(f"{title:<24}"),
            BarColumn(24),
            TextColumn("{task.description}"),
        ]
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def _lines(title: str) -> Callable[[int, int, str], None]:
    last = time.monotonic()

    def show(done: int, total: int, text: str) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{title:<26} {text}", file=sys.stderr, flush=True)

    return show
