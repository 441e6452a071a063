"""Measuring in a process of its own: fast as a fresh one, whatever this one did before, and no crash takes it along."""

from __future__ import annotations

import math
import os
import pickle  # only what this module and its own child write, in a folder that no other user can enter
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hardware_profiles.meter import Artifact, Measurement
from hardware_profiles.paths import atomic
from hardware_profiles.profile import Target
from hardware_profiles.subprocesses import Finished, ToolError, run

if TYPE_CHECKING:
    from hardware_profiles.passes import LocalMeter

# The parent's modules, a user's among them, are found where it finds them.
_CHILD = """
import pickle, sys
with open(sys.argv[1], "rb") as file:
    sys.path[:] = pickle.load(file)
    from hardware_profiles.isolation import serve
    serve(file)
"""
_PLACE = struct.Struct("3q")  # artifact at hand (-1: none yet), passes done, passes planned
_issued: dict[Any, int] = {}  # warnings of such processes, so that each is shown once by default


@dataclass(frozen=True)
class _Request:
    """What the process is to measure, and where it writes how far it is and what came of it."""

    meter: LocalMeter
    artifacts: tuple[Artifact, ...]
    target: Target
    seed: tuple[int, ...]
    budget_s: float
    parent: int
    folder: Path

    @property
    def place(self) -> Path:
        return self.folder / "place"

    @property
    def result(self) -> Path:
        return self.folder / "result"


def can_isolate(meter: LocalMeter) -> bool:
    """Whether another process finds the meter's class: one of a script or a notebook it does not."""
    cls = type(meter)
    return bool(sys.executable) and cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def measure_isolated(
    meter: LocalMeter, artifacts: Sequence[Artifact], target: Target, seed: tuple[int, ...], budget_s: float
) -> list[Measurement]:
    """As the meter's `measure_open`, in a process of its own. A file that ends the process gets an error; the others
    are measured again without it. Warnings that the meter issued there are issued here.

    Raises:
        ToolError: the process ended before it came to any file; or the meter raised what cannot be sent from there.
        Exception: what the meter raised there.
    """
    results: dict[int, Measurement] = {}
    left = list(range(len(artifacts)))
    while left:
        with tempfile.TemporaryDirectory(prefix="nasbench-measure-") as folder:
            some = tuple(artifacts[i] for i in left)
            request = _Request(meter, some, target, seed, budget_s, os.getpid(), Path(folder))
            finished, place = _served(request, meter.progress)
            if request.result.is_file():
                found, warned = pickle.loads(request.result.read_bytes())
                for message, file, line in warned:
                    warnings.warn_explicit(message, None, file, line, registry=_issued)
                if isinstance(found, Exception):
                    raise found
                results.update((i, replace(m, artifact=artifacts[i])) for i, m in zip(left, found, strict=True))
                break
        if not 0 <= place < len(left):
            raise ToolError(f"{target.name}: the process that measures {finished.ending}")
        at = left.pop(place)
        error = f"{artifacts[at].label}: {meter.title} ended on this file: its process {finished.ending}"
        results[at] = meter.failed(artifacts[at], target, error)
    return [results[i] for i in range(len(artifacts))]


def _served(request: _Request, progress: Callable[[int, int], None] | None) -> tuple[Finished, int]:
    """Run the process to its end; what it ended with, and the artifact that it was at."""
    file = request.folder / "request"
    with file.open("wb") as stream:
        pickle.dump(sys.path, stream)
        pickle.dump(request, stream)
    request.place.write_bytes(_PLACE.pack(-1, 0, 0))
    told = (0, 0)

    def watch() -> None:
        nonlocal told
        _, *passes = _PLACE.unpack(request.place.read_bytes())
        if progress and tuple(passes) != told:
            told = (passes[0], passes[1])
            progress(*told)

    finished = run([sys.executable, "-c", _CHILD, str(file)], math.inf, watch=watch)
    watch()
    return finished, _PLACE.unpack(request.place.read_bytes())[0]


def serve(file: IO[bytes]) -> None:
    """What the process does: measure what the request says, and leave the measurements, or what went wrong."""
    request: _Request = pickle.load(file)
    place = os.open(request.place, os.O_WRONLY)
    at, passes = -1, (0, 0)

    def note() -> None:
        os.lseek(place, 0, os.SEEK_SET)
        os.write(place, _PLACE.pack(at, *passes))

    def reached(index: int) -> None:
        nonlocal at
        at = index
        note()

    def progress(done: int, total: int) -> None:
        nonlocal passes
        passes = done, total
        note()
        if os.getppid() != request.parent:  # it was killed; nobody reads what comes
            os._exit(1)

    request.meter.progress = progress
    found: list[Measurement] | Exception
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")  # the other side has the user's filters
        try:
            found = request.meter.measure_open(
                request.artifacts, request.target, request.seed, request.budget_s, reached
            )
            pickle.dumps(found)  # of which a meter's own measurements may be incapable
        except Exception as error:
            said = f"{request.target.name}: {request.meter.title} raised {type(error).__name__}: {error}"
            found = error if _can_be_sent(error) else ToolError(said)
    told = []
    for one in warned:
        message = one.message if _can_be_sent(one.message) else UserWarning(f"{one.category.__name__}: {one.message}")
        told.append((message, one.filename, one.lineno))
    with atomic(request.result) as temporary:
        temporary.write_bytes(pickle.dumps((found, told)))
    sys.stdout.flush()
    os._exit(0)  # closing hundreds of sessions takes seconds, and some runtimes crash at it


def _can_be_sent(value: object) -> bool:
    """Whether another process can read a pickle of it, which of exceptions is not known before it is tried."""
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True
