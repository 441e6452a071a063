"""Measured networks of a target: taking them, and keeping them in a CSV file that anybody can read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from hardware_profiles import Measurement, Meter, Target, meter_for
from hardware_profiles.measuring import Progress, convert_and_measure, measuring_progress
from hardware_profiles.paths import locked, read_csv, write_text
from hardware_profiles.tools import implausible
from nasbench.networks import NamedNetwork, network_of, space_network
from predictors.calibration import MeasuredRow
from search_spaces import SearchSpace, UserError, nearest
from search_spaces.errors import in_words

COLUMNS = (
    "network", "target", "latency_ms", "energy_mj", "peak_memory_bytes", "throttled", "runtime", "runtime_version",
    "precision", "threads", "batch", "passes", "repeats", "statistic", "device", "measured", "note",
)  # fmt: skip
# Units that a column may be given in, and how many of ours they are.
_UNITS = {
    "latency_ms": {"latency_us": 1e-3, "latency_s": 1e3, "latency_ns": 1e-6},
    "energy_mj": {"energy_j": 1e3, "energy_uj": 1e-3},
}


@dataclass(frozen=True)
class Measured:
    """A network with its measurement, or with why there is none; never both."""

    network: NamedNetwork
    measurement: Measurement | None
    error: str = ""

    @property
    def row(self) -> MeasuredRow | None:
        """For fitting; None where it failed."""
        return None if self.measurement is None else MeasuredRow.of(self.network.family, self.measurement)


def measure_networks(
    target: Target,
    networks: Sequence[NamedNetwork],
    *,
    meter: Meter | None = None,
    progress: Progress | None = None,
) -> list[Measured]:
    """Convert and measure networks on a target, all together, so that passes over them are interleaved.

    One that cannot be converted or run gets its reason, and the others their numbers.

    Args:
        networks: of different names.
        meter: instead of the target's own.
        progress: called with (phase, done, total): `convert`, in networks, then `measure`, in passes or runs.

    Raises:
        UserError: the target cannot be measured from here, or not one network could be.
    """
    meter = meter or meter_for(target, measuring_progress(progress))
    taken = convert_and_measure(target, {n.name: partial(n.artifact, target) for n in networks}, meter, progress)
    if not taken.measured:
        raise UserError(f"{target.name}: no network could be measured: {next(iter(taken.failures.values()))}")
    return [Measured(n, taken.measured.get(n.name), taken.failures.get(n.name, "")) for n in networks]


def append_measurements(path: Path, target: Target, measured: Sequence[Measured]) -> int:
    """Add measurements to a CSV file, which is made where there is none; written whole or not at all.

    Several processes may add to one file at a time. Adding none tells whether it can be done.

    Returns:
        How many were added; failed ones are not.

    Raises:
        UserError: the file is there and is no such table, or another process holds it.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    rows = [_csv_row(one, target, now) for one in measured if one.measurement is not None]
    text = io.StringIO()
    with locked(path):
        before = _read_text(path) if path.exists() else ""
        header = next(csv.reader(io.StringIO(before)), [])
        if before and tuple(header) != COLUMNS:
            raise UserError(
                f"{path}: its columns are not those of measurements ({', '.join(COLUMNS[:4])}, ...); name another file"
            )
        if not rows:
            return 0
        if before and not before.endswith("\n"):
            before += "\n"
        csv.writer(text, lineterminator="\n").writerows(rows if before else [COLUMNS, *rows])
        write_text(path, before + text.getvalue())
    return len(rows)


def _csv_row(one: Measured, target: Target, now: str) -> list[object]:
    m = one.measurement
    assert m is not None
    p = m.protocol
    energy = "" if m.energy_mj is None else f"{m.energy_mj:.6g}"
    name = str(one.network.file.resolve()) if one.network.file else one.network.name  # read in other folders too
    return [
        name, target.name, f"{m.latency_ms:.6g}", energy, m.peak_memory_bytes or "",
        str(m.throttled).lower(), p.runtime, p.runtime_version, p.precision, p.threads, p.batch, p.passes, p.repeats,
        p.statistic, p.host, now, " ".join(m.note.split()),
    ]  # fmt: skip


def read_measurements(
    path: Path, target: Target | None = None, spaces: Mapping[str, SearchSpace] | None = None
) -> list[MeasuredRow]:
    """Measurements in a CSV file with the columns `network` and `latency_ms`, and as many others as there are.

    In place of `network` there may be `onnx` (paths, relative to the CSV) or, with one space, `arch` (choice indices
    joined by `_`, `.` or blanks, knob -> choice as JSON, or the name of a reference).
    `latency_us`, `latency_s` and `energy_j` are understood and converted. Where there is a column `target`, rows of
    other targets are passed over. A network that was measured again counts with its last row.

    Args:
        target: whose rows are taken; all where None.
        spaces: by name; of the architectures.

    Raises:
        UserError: no such file or columns, two latency columns, or with its line a network that there is not, or a
            value that is no positive number or that no device reaches.
    """
    header, lines = read_csv(path)
    key = next((c for c in ("network", "onnx", "arch") if c in header), None)
    if key is None:
        hint = nearest("network", header) if header else "It is empty."
        raise UserError(f"{path}: needs a column 'network' (or 'onnx', or 'arch'). {hint}")
    latency, factor = _column(path, header, "latency_ms")
    if latency is None:
        raise UserError(f"{path}: needs a column 'latency_ms'. {nearest('latency_ms', header)}")
    energy, energy_factor = _column(path, header, "energy_mj")
    spaces = spaces or {}
    known = {space.name: space for space in spaces.values()} | dict(spaces)
    rows: dict[str, MeasuredRow] = {}
    elsewhere: set[str] = set()
    for number, line in lines:
        values = dict(zip(header, (v.strip() for v in line), strict=True))
        if target is not None and values.get("target") and values["target"] != target.name:
            elsewhere.add(values["target"])
            continue
        if not values[key]:
            raise UserError(f"{path}: line {number}: {key} is empty")
        network = _network(path, number, key, values[key], spaces)
        try:
            family = network_of(network, known).family
        except UserError as error:
            raise UserError(f"{path}: line {number}: {error}") from error
        ms = factor * _positive(path, number, latency, values[latency])
        if why := implausible(ms):
            raise UserError(f"{path}: line {number}: {latency} is {values[latency]}, {why}")
        mj = None
        if energy is not None and values[energy]:
            mj = energy_factor * _positive(path, number, energy, values[energy])
            if why := implausible(ms, mj):
                raise UserError(
                    f"{path}: line {number}: {energy} is {values[energy]}, {why}; "
                    "the energy of one inference is expected"
                )
        row = MeasuredRow(
            network=network,
            family=family,
            latency_ms=ms,
            energy_mj=mj,
            throttled=values.get("throttled", "") == "true",
        )
        rows.pop(row.network, None)
        rows[row.network] = row
    if not rows:
        other = f"; it has {', '.join(sorted(elsewhere))}" if elsewhere else ""
        raise UserError(f"{path}: no measurements{f' of {target.name}' if target else ''}{other}")
    return list(rows.values())


def named_in(path: Path) -> list[str]:
    """The networks that a CSV names in its column `network`; whatever else it holds.

    Raises:
        UserError: no such file or column, or an empty name.
    """
    header, lines = read_csv(path)
    if "network" not in header:
        raise UserError(f"{path}: needs a column 'network'. {nearest('network', header) if header else 'It is empty.'}")
    at = header.index("network")
    for number, line in lines:
        if not line[at].strip():
            raise UserError(f"{path}: line {number}: network is empty")
    return [line[at].strip() for _, line in lines]


def _network(path: Path, number: int, key: str, text: str, spaces: Mapping[str, SearchSpace]) -> str:
    """The name of a network from the column `key`."""
    if key == "network":
        return text
    if key == "onnx":
        return str(path.parent / text)
    if len(spaces) != 1:
        raise UserError(f"{path}: the column 'arch' needs one space, whose architectures these are (--space)")
    ((name, space),) = spaces.items()
    try:
        if text.startswith("{"):
            text = ".".join(map(str, space.encode(json.loads(text))))
        return space_network(space, text if text in space.references else text.replace("_", "."), name).name
    except (UserError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: line {number}: arch: {error}") from error


def _column(path: Path, header: Sequence[str], name: str) -> tuple[str | None, float]:
    """The column of a quantity and the factor to our unit."""
    found = [(c, 1.0 if c == name else _UNITS[name][c]) for c in header if c == name or c in _UNITS[name]]
    if len(found) > 1:
        raise UserError(f"{path}: the columns {found[0][0]!r} and {found[1][0]!r} say the same in two units; keep one")
    return found[0] if found else (None, 1.0)


def _positive(path: Path, number: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{path}: line {number}: {column} is {text!r}, a number without unit was expected") from None
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{path}: line {number}: {column} is {text}, it must be positive and finite")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {in_words(error)}") from error
