"""One way to run another program: bounded in time and output, whole process group killed, stderr kept."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from search_spaces.errors import UserError

# No meter or evaluation prints more; a program that does has gone wrong, and its output must not fill the disk.
OUTPUT_LIMIT = 16 * 2**20
# How much of a program's complaint an error repeats.
_QUOTED = 300


@dataclass(frozen=True)
class Finished:
    """A program that ran to its end.

    Args:
        command: what was run.
        returncode: 0 for success.
        stdout, stderr: what it printed, as text.
        seconds: wall-clock time.
    """

    command: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def complaint(self) -> str:
        """The last thing that it said, on one line, for an error message."""
        text = self.stderr.strip() or self.stdout.strip() or "it printed nothing"
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(lines[-3:])[-_QUOTED:]

    @property
    def ending(self) -> str:
        """How it ended and what it last said, as in `exited with code 1: no such file`."""
        return f"{ending(self.returncode)}: {self.complaint}"


def ending(returncode: int) -> str:
    """How a process ended: `exited with code 1`, `was ended by SIGSEGV (Segmentation fault)`."""
    if returncode >= 0:
        return f"exited with code {returncode}"
    number = -returncode
    names = {s.value: s.name for s in signal.Signals}  # real-time signals have none
    meaning = "out of memory?" if number == signal.SIGKILL else signal.strsignal(number)
    return f"was ended by {names.get(number, f'signal {number}')} ({meaning})"


class ToolError(UserError):
    """A program that did not do what it should. `transient` if trying again may help (a timeout, a lost connection)."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


Runner = Callable[[Sequence[str], float], Finished]


def run(
    command: Sequence[str],
    timeout_s: float,
    output_limit: int = OUTPUT_LIMIT,
    stdin: str = "",
    watch: Callable[[], None] | None = None,
) -> Finished:
    """Run a program without a shell and wait for it. Nothing that it started outlives this call.

    Its output goes to files and not through pipes, so that a child that keeps a pipe open cannot hold us.

    Args:
        command: program and arguments.
        timeout_s: seconds after which it is killed, with everything it started.
        output_limit: bytes of output after which likewise.
        stdin: what it reads on standard input.
        watch: called now and then while it runs, twenty times a second at most.

    Returns:
        What it printed, whatever its exit code.

    Raises:
        ToolError: no such program, out of time, or too much output.
    """
    shown = shlex.join(command)
    start = time.monotonic()
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        try:
            process = subprocess.Popen(list(command), stdin=given, stdout=out, stderr=err, start_new_session=True)
        except OSError as error:
            raise ToolError(f"cannot run {command[0]!r}: {error.strerror or error}; is it installed?") from error
        wait = 0.002
        try:
            while process.poll() is None:
                if time.monotonic() - start > timeout_s:
                    _kill(process)
                    raise ToolError(
                        f"{shown}: not finished after {timeout_s:g} s, killed{_last_words(out, err)}", transient=True
                    )
                if os.fstat(out.fileno()).st_size + os.fstat(err.fileno()).st_size > output_limit:
                    _kill(process)
                    raise ToolError(f"{shown}: killed after printing more than {output_limit / 2**20:g} MB")
                if watch:
                    watch()
                time.sleep(wait)
                wait = min(2 * wait, 0.05)
        finally:
            _kill(process)
        return Finished(
            tuple(command), process.returncode, _text(out, output_limit), _text(err, output_limit),
            time.monotonic() - start,
        )  # fmt: skip


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group, and take its exit code, so that no zombie stays."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _text(file: IO[bytes], limit: int) -> str:
    file.seek(0)
    return file.read(limit).decode("utf-8", errors="replace").replace("\r\n", "\n")


def _last_words(out: IO[bytes], err: IO[bytes]) -> str:
    words = Finished((), 0, _text(out, OUTPUT_LIMIT), _text(err, OUTPUT_LIMIT), 0.0).complaint
    return "" if words == "it printed nothing" else f"; it last said: {words}"
