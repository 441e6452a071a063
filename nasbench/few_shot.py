"""Few-shot transfer as commands use it: tables of other devices, what to measure next, and the adapted predictor."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware_profiles import Target
from hardware_profiles.paths import write_text
from nasbench.devices import REFUSED, calibration_networks, unsupported_operators
from nasbench.networks import NamedNetwork, space_network
from nasbench.planning.sections import naming
from predictors.calibration import MeasuredRow
from predictors.calibration_methods import Sample, unit_doubt
from predictors.few_shot import LEAST_SAMPLES, FewShot
from predictors.tables import MeasuredTable
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

# Left-out networks tell little below this many.
_LEAST_JUDGED = 5


@dataclass(frozen=True)
class Sources:
    """Tables of other devices on one space.

    Args:
        table: their latencies.
        space, label: of the architectures, and what `load_space` takes for it.
    """

    table: MeasuredTable
    space: SearchSpace
    label: str


def read_sources(
    path: Path, space: SearchSpace, label: str, target: Target, devices: Sequence[str] | None = None
) -> Sources:
    """Measurements of other devices: a CSV with a column `arch` and one of latencies per device, a table in HELP's
    layout, or a file of `MeasuredTable.save`.

    Columns named as the target are left out: a device is not predicted from itself.

    Args:
        devices: which columns; all by default.

    Raises:
        UserError: no such file or columns, fewer than two devices, or a table of another space.
    """
    table = MeasuredTable.read(path, space)
    if not table.belongs_to(space):
        raise UserError(
            f"{path}: its networks are those of {table.space!r}, which has other knobs or another input than "
            f"{space.name!r}; name the space that was measured (--space)"
        )
    own = {target.name, target.profile.name}
    if devices and (same := own & set(devices)):
        raise UserError(f"{path}: {sorted(same)[0]!r} is the device itself, and no source for it")
    return Sources(table.select(list(devices or [d for d in table.devices if d not in own])), space, label)


def suggest_networks(
    target: Target,
    space: SearchSpace,
    label: str,
    networks: int,
    sources: Sources | None = None,
    rows: Sequence[MeasuredRow] = (),
    seed: int = 0,
    origin: str = "",
) -> list[NamedNetwork]:
    """Architectures to measure on a target; those with operators that it refuses are passed over.

    With sources, those that tell most of the rest; else they are spread over what is predicted.

    Args:
        rows: what was measured on the target before, so that suggestions add to it.
        origin: the file that rows are from, for messages.

    Raises:
        UserError: none is left, or more than the table has, or rows that contradict each other.
    """
    if sources is None:
        return calibration_networks(target, networks, {label: space}, seed)
    learned = FewShot.learn(sources.table)
    if rows:
        archs, latency_ms = _measured(rows, sources)
        if len(archs) >= LEAST_SAMPLES:
            with naming(origin):
                learned = learned.adapt(archs, latency_ms)
    chosen = [
        space_network(space, [int(i) for i in arch], label)
        for arch in sources.table.archs[learned.suggest(networks, seed)]
    ]
    runnable = [n for n in chosen if all(then != REFUSED for *_, then in unsupported_operators(target, [n.workload]))]
    if not runnable:
        raise UserError(
            f"{target.name}: it refuses every network suggested; see `nasbench devices check --space {label}`"
        )
    return runnable


def write_suggestions(path: Path, networks: Sequence[NamedNetwork]) -> None:
    """A CSV with the columns `network` and `latency_ms`, the latter to be filled in where nothing measures.

    Raises:
        UserError: the file exists; it may hold measurements.
    """
    if path.exists():
        raise UserError(f"{path}: exists already and is not overwritten")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["network", "latency_ms"])
    writer.writerows([n.name, ""] for n in networks)
    write_text(path, text.getvalue())


def adapt_few_shot(
    target: Target, rows: Sequence[MeasuredRow], sources: Sources, origin: str = ""
) -> tuple[FewShot, dict[str, float], str]:
    """The few-shot predictor of a target, how well it predicts each measured network without it, and what is doubtful.

    Args:
        origin: the file that rows are from, for messages.

    Returns:
        The predictor; its figures: `networks`, and with enough of them those of `predictors.quality`; doubts in words.

    Raises:
        UserError: too few measured architectures of the space, or in the sources, or one in another unit.
    """
    from predictors.quality import figures, poor

    archs, latency_ms = _measured(rows, sources)
    if len(archs) < LEAST_SAMPLES:
        other = len(rows) - len(archs)
        raise UserError(
            f"{target.name}: few-shot transfer needs at least {LEAST_SAMPLES} measured architectures of "
            f"{sources.space.name!r}, got {len(archs)}{f' ({other} measured networks are none)' if other else ''}; "
            f"`nasbench devices suggest {target.name} --space {sources.label}` says which to measure"
        )
    learned = FewShot.learn(sources.table)
    workloads = [sources.space.workload(arch) for arch in archs]
    names = tuple(space_network(sources.space, arch.tolist(), sources.label).name for arch in archs)
    with naming(origin):
        adapted = learned.adapt(archs, latency_ms)
        doubt = unit_doubt(Sample(target, "latency_ms", names, names, workloads, latency_ms))
    found = {"networks": float(len(archs))}
    if len(archs) >= _LEAST_JUDGED:
        logs, inside = [], []
        for i in range(len(archs)):
            others = np.arange(len(archs)) != i
            estimate = learned.adapt(archs[others], latency_ms[others]).of(archs[[i]])
            logs.append(float(np.log(latency_ms[i] / estimate.quantile(0.5)[0])))
            inside.append(estimate.quantile(0.05)[0] <= latency_ms[i] <= estimate.quantile(0.95)[0])
        found |= figures(np.array(logs), latency_ms, float(np.mean(inside)))
    return adapted, found, "; ".join(w for w in (doubt, poor("latency_ms", found)) if w)


def _measured(rows: Sequence[MeasuredRow], sources: Sources) -> tuple[Archs, np.ndarray]:
    """Architectures of the sources' space among measured networks, and their latencies."""
    space = sources.space
    found = []
    for row in rows:
        head, _, arch = row.network.rpartition(":")
        if head in (sources.label, space.name):
            found.append((space_network(space, arch).arch, row.latency_ms))
    archs = np.array([arch for arch, _ in found], dtype=space.dtype).reshape(len(found), len(space.knobs))
    return space.canonical(archs), np.array([ms for _, ms in found])
