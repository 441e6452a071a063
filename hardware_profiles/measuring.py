"""Converting networks and measuring them, all together: what `calibrate` and `nasbench devices measure` do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hardware_profiles.meter import Artifact, Measurement, Meter
from hardware_profiles.profile import Target
from search_spaces.errors import UserError

Progress = Callable[[str, int, int], None]


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
    """Convert networks to the format of a target's runtime and measure them, so that passes over them are interleaved.

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
        taken = meter.measure(list(artifacts.values()), target) if artifacts else []
    measured = dict(zip(artifacts, taken, strict=True))
    failures.update((name, m.error) for name, m in measured.items() if m.error)
    return Taken(
        {name: m for name, m in measured.items() if not m.error},
        failures,
        {"convert": converted - start, "measure": time.perf_counter() - converted},
    )


def measuring_progress(progress: Progress | None) -> Callable[[int, int], None] | None:
    """What a meter calls to say how far it is, as `(measure, done, total)`."""
    return partial(progress, "measure") if progress else None
