"""Measured networks of a target: taking them, and keeping them in a CSV file that anybody can read."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from hardware_profiles import Measurement, Meter, Target, meter_for
from hardware_profiles.measuring import Progress, convert_and_measure, measuring_progress
from hardware_profiles.paths import locked, read_csv, write_text
from hardware_profiles.tools import implausible
from nasbench.networks import NamedNetwork, network_of, space_network
from predictors.calibration import MeasuredRow
from predictors.tables import POINT, check_point, means
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
_NETWORK = ("network", "onnx", "arch")  # columns that say which network a row is of
# A column as much like one that is read, which is not there, is that one misspelt: `enrgy_mj`, `thread`.
_ALIKE = 0.85


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
    other targets are passed over; a device alone means its default operating point. A network that was measured again
    counts with its last row, in a table that says when each was `measured`, as `append_measurements` writes.

    Args:
        target: whose rows are taken; all where None.
        spaces: by name; of the architectures.

    Raises:
        UserError: no such file or columns, a misspelt one, two latency columns, or with its line a network that there
            is not, two networks in one row, a network with two results, another operating point or unit than the
            target's (of rows that name no target) or the column's, or a value that is no positive number or that no
            device reaches.
    """
    header, lines = read_csv(path)
    keys = [c for c in _NETWORK if c in header]
    if not keys:
        hint = nearest("network", header) if header else "It is empty."
        raise UserError(f"{path}: needs a column 'network' (or 'onnx', or 'arch'). {hint}")
    latency, factor = _column(path, header, "latency_ms")
    if latency is None:
        raise UserError(f"{path}: needs a column 'latency_ms'. {nearest('latency_ms', header)}")
    energy, energy_factor = _column(path, header, "energy_mj")
    _check_spelling(path, header, energy)
    unit = latency.rpartition("_")[2]
    spaces = spaces or {}
    known = {space.name: space for space in spaces.values()} | dict(spaces)
    rows: dict[object, tuple[int, MeasuredRow]] = {}
    elsewhere: set[str] = set()
    for number, line in lines:
        values = dict(zip(header, (v.strip() for v in line), strict=True))
        if target is not None and values.get("target") and not means(values["target"], target):
            elsewhere.add(values["target"])
            continue
        name, network = _network(path, number, {k: values[k] for k in keys}, spaces, known)
        if target is not None:
            check_point(path, number, values, target)
        if values.get("unit", unit).casefold() not in (unit, ""):
            raise UserError(
                f"{path}: line {number}: unit is {values['unit']!r}, but the column {latency!r} is in {unit}; "
                "name the column by its unit, such as latency_us"
            )
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
        if values.get("peak_memory_bytes"):
            _positive(path, number, "peak_memory_bytes", values["peak_memory_bytes"], or_zero=True)  # of 0: unknown
        row = MeasuredRow(
            network=name,
            family=network.family,
            latency_ms=ms,
            energy_mj=mj,
            throttled=_flag(path, number, "throttled", values.get("throttled", "")),
        )
        same = _identity(network), "" if target is not None else values.get("target", "")
        if same in rows:
            first, before = rows.pop(same)
            if not values.get("measured") and _figures(before) != _figures(row):
                raise UserError(
                    f"{path}: line {number}: {name} again, with {_figures(row)} instead of {_figures(before)} in line "
                    f"{first}; keep one row, such as the median"
                )
        rows[same] = number, row
    if not rows:
        other = f"; it has {', '.join(sorted(elsewhere))}" if elsewhere else ""
        raise UserError(f"{path}: no measurements{f' of {target.name}' if target else ''}{other}")
    return [row for _, row in rows.values()]


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


def _network(
    path: Path,
    number: int,
    named: Mapping[str, str],
    spaces: Mapping[str, SearchSpace],
    known: dict[str, SearchSpace],
) -> tuple[str, NamedNetwork]:
    """The network of a row by the columns that name it, of which one is enough, and what it is called there."""
    found: dict[str, tuple[str, NamedNetwork]] = {}
    for key, text in named.items():
        note = key == "arch" and found and not spaces  # such as `arm64`
        if text and not note:
            name = _name(path, number, key, text, spaces)
            try:
                found[key] = name, network_of(name, known)
            except UserError as error:
                raise UserError(f"{path}: line {number}: {error}") from error
    if not found:
        raise UserError(f"{path}: line {number}: {next(iter(named))} is empty")
    first, *others = found
    for key in others:
        one, other = found[first][1], found[key][1]
        comparable = (one.file is None) == (other.file is None)  # a file does not say which network it is
        if comparable and _identity(one) != _identity(other):
            raise UserError(
                f"{path}: line {number}: {first} is {named[first]!r}, but {key} is {named[key]!r}, which is another "
                "network; keep one of the two columns"
            )
    return found[first]


def _name(path: Path, number: int, key: str, text: str, spaces: Mapping[str, SearchSpace]) -> str:
    """The name of a network from the column `key`."""
    if key == "network":
        return text
    if key == "onnx":
        return str(path.parent / text)
    if len(spaces) != 1:
        raise UserError(
            f"{path}: the column 'arch' needs one space, whose architectures these are (--space); rename a note"
        )
    ((name, space),) = spaces.items()
    try:
        if text.startswith("{"):
            text = ".".join(map(str, space.encode(json.loads(text))))
        return space_network(space, text if text in space.references else text.replace("_", "."), name).name
    except (UserError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: line {number}: arch: {error}") from error


def _identity(network: NamedNetwork) -> object:
    """Equal for equal networks, whatever they are called."""
    if network.file is not None:
        return network.file.resolve()
    if network.space is not None:
        arch = np.array([network.arch], dtype=network.space.dtype)
        return network.space.name, network.space.canonical(arch).tobytes()
    assert network.design is not None
    return network.name.partition("@")[0], network.design.input_shape  # with the resolution that is not said


def _figures(row: MeasuredRow) -> str:
    """What was measured, in words."""
    return f"{row.latency_ms:.6g} ms" + ("" if row.energy_mj is None else f" and {row.energy_mj:.6g} mJ")


def _check_spelling(path: Path, header: Sequence[str], energy: str | None) -> None:
    """Raises UserError where a column is much like one that would be read, and is not there under its own name."""
    optional = {"target", "throttled", "peak_memory_bytes", "unit", *POINT} - {"runtime"}  # like `runtime_s`
    energies = ["energy_mj", *_UNITS["energy_mj"]]
    if energy is None:
        optional |= {*energies}
    absent = sorted(optional - set(header))
    letters = {_letters(c): c for c in absent}
    for column in (c for c in header if c not in COLUMNS and c not in optional):
        same = letters.get(_letters(column))
        if near := [same] if same else difflib.get_close_matches(column.casefold(), absent, 1, _ALIKE):
            meant = " or ".join(map(repr, energies if near[0] in energies else near))
            raise UserError(
                f"{path}: unknown column {column!r}. Did you mean {meant}? Rename it; a note, to something less alike"
            )


def _letters(column: str) -> str:
    """Letters and digits of a column's name in any case, those between the first and the last in any order."""
    letters = "".join(filter(str.isalnum, column.casefold()))
    return letters[:1] + "".join(sorted(letters)) + letters[-1:]  # `presicion`; `hardest` is not `threads`


def _column(path: Path, header: Sequence[str], name: str) -> tuple[str | None, float]:
    """The column of a quantity and the factor to our unit."""
    found = [(c, 1.0 if c == name else _UNITS[name][c]) for c in header if c == name or c in _UNITS[name]]
    if len(found) > 1:
        raise UserError(f"{path}: the columns {found[0][0]!r} and {found[1][0]!r} say the same in two units; keep one")
    return found[0] if found else (None, 1.0)


def _positive(path: Path, number: int, column: str, text: str, or_zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{path}: line {number}: {column} is {text!r}, a number without unit was expected") from None
    if not (math.isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise UserError(f"{path}: line {number}: {column} is {text}, it must be positive and finite")
    return value


def _flag(path: Path, number: int, column: str, text: str) -> bool:
    word = text.casefold().removesuffix(".0")
    if word not in ("true", "false", "1", "0", ""):
        raise UserError(f"{path}: line {number}: {column} is {text!r}, 'true' or 'false' was expected")
    return word in ("true", "1")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {in_words(error)}") from error
