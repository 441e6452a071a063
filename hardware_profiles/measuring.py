"""Converting networks and measuring them, all together: what `calibrate` and `nasbench devices measure` do."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hardware_profiles.host import host_fingerprint
from hardware_profiles.meter import Artifact, Measurement, Meter
from hardware_profiles.paths import user_data_dir
from hardware_profiles.profile import Target
from search_spaces.errors import UserError

Progress = Callable[[str, int, int], None]

_SILENT_S = 10.0  # of waiting for a device before it is told


@dataclass(frozen=True)
class Taken:
    """What came of measuring networks.

    Args:
        measured: measurements of those that ran, by name.
        failures: why the others did not, by name.
        seconds: what it took, by phase: `convert`, `measure`.
    """

    measured: dict[str, Measurement]
    failures: dict[str, str]
    seconds: dict[str, float]


def convert_and_measure(
    target: Target,
    networks: Mapping[str, Callable[[Path], Artifact]],
    meter: Meter,
    progress: Progress | None = None,
) -> Taken:
    """Convert networks to the format of a target's runtime and measure them, so that passes over them are interleaved
    and nothing else of this user is measured there meanwhile.

    Args:
        target: what they are converted for.
        networks: by name, what writes each to a file whose path, bar the suffix, it is given; it may raise UserError.
        meter: of the target.
        progress: called with (`convert`, done, total); a meter tells its own progress.
    """
    start = time.perf_counter()
    artifacts: dict[str, Artifact] = {}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="nasbench-measure-") as folder:
        for i, (name, convert) in enumerate(networks.items()):
            try:
                artifacts[name] = replace(convert(Path(folder) / str(i)), name=name)
            except UserError as error:
                failures[name] = str(error)
            if progress:
                progress("convert", i + 1, len(networks))
        converted = time.perf_counter()
        taken = measure_alone(meter, list(artifacts.values()), target)
    measured = dict(zip(artifacts, taken, strict=True))
    failures.update((name, m.error) for name, m in measured.items() if m.error)
    return Taken(
        {name: m for name, m in measured.items() if not m.error},
        failures,
        {"convert": converted - start, "measure": time.perf_counter() - converted},
    )


def measure_alone(meter: Meter, artifacts: Sequence[Artifact], target: Target) -> list[Measurement]:
    """As `meter.measure`, while nothing else of this user is measured on the device."""
    if not artifacts:
        return []
    with exclusive(target):
        return meter.measure(artifacts, target)


def conditions(target: Target, meter: Meter) -> dict[str, Any]:
    """What a figure measured on a target depends on beside the network, JSON-able: this machine, the operating point,
    the version of the runtime where it is here, and the way to a device that is elsewhere."""
    point, section = target.point, target.profile.meter
    of_point = {"precision", "runtime", "threads", "batch", "power_mode", "options"}
    return {
        "host": host_fingerprint(),
        "target": target.name,
        "point": point.model_dump(mode="json", include=of_point),
        "runtime": meter.runtime_version(),
        "meter": section.model_dump(mode="json") if section else None,
    }


@contextmanager
def exclusive(target: Target) -> Iterator[None]:
    """A device to oneself: other processes of this user that measure there wait, and say so.

    Where no lock can be written, in a home that is read-only, nobody waits.
    """
    lock = FileLock(user_data_dir() / "locks" / f"{target.profile.name}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_SILENT_S)
    except Timeout:
        warnings.warn(f"{target.name}: another process measures on this device; waiting for it to end", stacklevel=3)
        lock.acquire()
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()


def measuring_progress(progress: Progress | None) -> Callable[[int, int], None] | None:
    """What a meter calls to say how far it is, as `(measure, done, total)`."""
    return partial(progress, "measure") if progress else None
