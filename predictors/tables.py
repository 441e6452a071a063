"""Tables of measured networks: architectures of a space, or networks as files, with latencies on named devices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardware_profiles import Target
from hardware_profiles.paths import atomic, read_csv
from predictors.base import Array, BoundPredictor, Estimate, Predictor
from search_spaces import SearchSpace, UserError, Workload, nearest
from search_spaces.base import Archs, Knob, no_choice
from search_spaces.errors import in_words
from search_spaces.nasbench201 import KNOBS as NASBENCH201_KNOBS

MS_PER_UNIT = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
LEAST_ROWS = 2
POINT = ("precision", "threads", "batch", "runtime")  # columns that say on which operating point a row was measured

_UNIT = re.compile(r"_(s|ms|us|ns|MS)$")  # of other capitals, most are no unit: `price_US`
_FORMAT = "nasbench measured table 2"
_FBNET_OPS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
_HELP_KEYS = frozenset({"op_code", "op_idx"})
_HELP_INPUT = (3, 32, 32)  # both of HELP's tables that are read here
# Columns of HELP's files that are not devices.
_HELP_OTHER = frozenset({"arch_idx", "arch_str", "op_code", "op_idx", "ops", "macs_cifar10", "params_cifar10"})


def nasbench201_knobs() -> tuple[Knob, ...]:
    """The six edges of NAS-Bench-201's cell (Dong and Yang, ICLR 2020) in the order of its architecture strings."""
    return NASBENCH201_KNOBS


def fbnet_knobs() -> tuple[Knob, ...]:
    """The 22 layers of FBNet (Wu et al., CVPR 2019)."""
    return tuple(Knob(f"layer{i}", _FBNET_OPS) for i in range(22))


@dataclass(frozen=True, eq=False)
class MeasuredTable:
    """Latencies of measured networks on one device or several.

    A row is an architecture of a space, given by its knobs, or any network, given by its operators. Every device has a
    value in every row; rows are distinct.

    Args:
        space: name of the space, or of the collection of networks.
        knobs: what an architecture's columns mean; empty where rows are networks of no space.
        archs: `(n, K)` choice indices; `(n, 0)` without knobs.
        devices: names of the D columns: a device, operating point or batch size.
        latency_ms: `(n, D)` milliseconds per inference, positive.
        source: where the figures come from.
        totals: `(n, F)` operator totals of each network (`predictors.table_features.workload_totals`), where they are
            known; without knobs they must be.
        input_shape: (channels, height, width) that the networks were measured with; empty where that is not known.

    Raises:
        UserError: a latency that is not a positive number, a choice that a knob does not have, too few rows, or a
            network twice.
    """

    space: str
    knobs: tuple[Knob, ...]
    archs: Archs
    devices: tuple[str, ...]
    latency_ms: Array
    source: str = ""
    totals: Array | None = None
    _where: Sequence[str] = field(default=(), repr=False)  # how errors call each row
    input_shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        where = self.source or self.space
        n = len(self.archs)
        if self.latency_ms.shape != (n, len(self.devices)) or self.archs.shape != (n, len(self.knobs)):
            raise UserError(
                f"{where}: {n} rows of {len(self.knobs)} knobs and {len(self.devices)} devices, but arrays of shapes "
                f"{self.archs.shape} and {self.latency_ms.shape}"
            )
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise UserError(f"{where}: columns must be distinct devices, at least one; got {', '.join(self.devices)}")
        bad = np.argwhere(~(np.isfinite(self.latency_ms) & (self.latency_ms > 0)))
        if len(bad):
            row, column = bad[0]
            raise UserError(
                f"{where}: {self._name(row)}, column {self.devices[column]!r}: a latency is a positive number, got "
                f"{self.latency_ms[row, column]:g}; leave out networks that could not be measured"
            )
        if n < LEAST_ROWS:
            raise UserError(f"{where}: {n} measured networks; a table needs at least {LEAST_ROWS}")
        bad = np.argwhere(no_choice(self.archs, np.array([len(k.choices) for k in self.knobs], dtype=np.int64)))
        if len(bad):
            row, column = bad[0]
            knob = self.knobs[column]
            raise UserError(
                f"{where}: {self._name(row)}, knob {knob.name!r}: choice {self.archs[row, column]} is none of "
                f"0..{len(knob.choices) - 1} ({', '.join(map(str, knob.choices))})"
            )
        if not self.knobs and self.totals is None:
            raise UserError(f"{where}: networks of no space need their operator totals")
        order = self._hashes.argsort(kind="stable")
        same = np.flatnonzero(np.diff(self._hashes[order]) == 0)
        if len(same):
            first, second = sorted(order[same[0] : same[0] + 2])
            raise UserError(f"{where}: {self._name(first)} and {self._name(second)} are the same network")

    def _name(self, row: int) -> str:
        return self._where[row] if self._where else f"row {row}"

    def __len__(self) -> int:
        return len(self.archs)

    @property
    def keys(self) -> NDArray[Any]:
        """What tells rows apart: architectures `(n, K)`, or operator totals `(n, F)` where there are no knobs."""
        if self.knobs:
            return self.archs
        assert self.totals is not None
        return self.totals

    @cached_property
    def _hashes(self) -> NDArray[np.uint64]:
        return _hash(self.keys)

    @cached_property
    def _order(self) -> NDArray[np.intp]:
        return self._hashes.argsort()

    def rows(self, keys: NDArray[Any]) -> NDArray[np.intp]:
        """`(m,)` row of each of `(m, K)` architectures (or `(m, F)` totals where there are no knobs); -1 if absent."""
        keys = np.atleast_2d(keys)
        if keys.shape[1] != self.keys.shape[1]:
            raise UserError(f"{self.space}: a row has {self.keys.shape[1]} columns, got shape {keys.shape}")
        at = np.searchsorted(self._hashes, _hash(keys), sorter=self._order)
        found = self._order[np.minimum(at, len(self) - 1)]
        return np.where((self.keys[found] == keys).all(1), found, -1)

    def column(self, device: str) -> Array:
        """`(n,)` latencies of one device. Raises UserError where the table has none of that name."""
        if device not in self.devices:
            raise UserError(f"{self.source or self.space}: no device {device!r}. {nearest(device, self.devices)}")
        return self.latency_ms[:, self.devices.index(device)]

    def select(self, devices: Sequence[str]) -> MeasuredTable:
        """The same networks on some of the devices, in the order given."""
        return replace(self, devices=tuple(devices), latency_ms=np.column_stack([self.column(d) for d in devices]))

    def belongs_to(self, space: SearchSpace) -> bool:
        """Whether architectures of `space` mean what this table's rows mean: same knobs and choices, same input."""
        same_input = not self.input_shape or space.input_shape == self.input_shape
        return bool(self.knobs) and space.knobs == self.knobs and same_input

    @classmethod
    def read(cls, path: Path, space: SearchSpace | None = None) -> MeasuredTable:
        """A table from a file of any kind: `.npz` that `save` wrote, else a CSV in HELP's layout or for `from_csv`.

        Args:
            space: of the architectures in a column `arch`.

        Raises:
            UserError: as `load`, `from_help` and `from_csv`; it names this file, wherever its figures come from.
        """
        if path.suffix == ".npz":
            return replace(cls.load(path), source=str(path))
        return cls.from_help(path) if _HELP_KEYS & set(read_csv(path)[0]) else cls.from_csv(path, space)

    @classmethod
    def from_help(cls, path: Path, devices: Sequence[str] | None = None) -> MeasuredTable:
        """Import a table in the layout of HELP (Lee et al., NeurIPS 2021): NAS-Bench-201 or FBNet, CSV or `.csv.gz`.

        `op_code` (six digits, NAS-Bench-201) or `op_idx` (22 digits joined by `_`, FBNet), one column of milliseconds
        per device, `arch_idx` and descriptions beside them.

        Args:
            path: the file.
            devices: columns to take, by default all.

        Raises:
            UserError: file, row and column of what is not as it should be.
        """
        header, lines = read_csv(Path(path))
        layouts = {"op_code": ("nasbench201", nasbench201_knobs()), "op_idx": ("fbnet", fbnet_knobs())}
        key = next((c for c in layouts if c in header), None)
        if key is None:
            raise UserError(f"{path}: HELP's layout has a column op_code or op_idx; got {', '.join(header)}")
        space, knobs = layouts[key]
        columns = [c for c in header if c not in _HELP_OTHER]
        for device in devices or ():
            if device not in columns:
                raise UserError(f"{path}: no device {device!r}. {nearest(device, columns)}")
        at, where = header.index(key), str(path)
        archs = [_indices(row[at], knobs, f"{where}: line {line}, column {key!r}") for line, row in lines]
        found = {d: (d, "ms") for d in devices or columns}
        return _assemble(path, space, knobs, archs, header, lines, found, input_shape=_HELP_INPUT)

    @classmethod
    def from_csv(
        cls,
        path: Path,
        space: SearchSpace | None = None,
        *,
        columns: Mapping[str, str] | None = None,
        unit: str | None = None,
    ) -> MeasuredTable:
        """Import a CSV with a column that names networks and one of latencies per device.

        Networks stand in a column `arch` (knob -> choice as JSON, or choice indices joined by `_`), or in a column
        `onnx` (paths, relative to the CSV). Latencies need a unit: at the end of the column's name
        (`my_phone_ms`, `latency_us`), or by `unit`, or in a column `unit`, which must then be the same in every row.

        Args:
            path: the file, CSV or `.csv.gz`.
            space: of the architectures; needed for `arch`.
            columns: device -> column; by default every column whose name ends in a unit, less that ending.
            unit: `s`, `ms`, `us` or `ns`, for columns whose names have none; of `columns` it goes before their names'.

        Raises:
            UserError: file, line and column of what is not as it should be: no or mixed units, rows of several
                targets in a column `target`, an architecture that the space does not have, an ONNX file that cannot be
                read, a latency that is not a positive number, or a network with two different latencies. Equal
                repetitions count once.
        """
        path = Path(path)
        header, lines = read_csv(path)
        given = unit is not None
        unit = unit if given else _common(path, header, lines, "unit")
        if unit is not None and unit not in MS_PER_UNIT:
            raise UserError(f"{path}: unknown unit {unit!r} of a latency. {nearest(unit, MS_PER_UNIT)}")
        _common(path, header, lines, "target")  # devices are columns
        found: dict[str, tuple[str, str]] = {}
        for device, column in columns.items() if columns else [(device_of(c), c) for c in header if _is_latency(c)]:
            if device in found:
                raise UserError(f"{path}: columns {found[device][0]!r} and {column!r} are of one device; keep one")
            if column not in header:
                raise UserError(f"{path}: no column {column!r}. {nearest(column, header)}")
            its_unit = unit if columns and given else _suffix(column) or unit
            if its_unit is None:
                raise UserError(f"{path}: column {column!r} has no unit; name it {column}_ms, or give unit='ms'")
            if unit and its_unit != unit:
                raise UserError(f"{path}: column {column!r} is in {its_unit} by its name, but the unit given is {unit}")
            found[device] = (column, its_unit)
        if not found:
            layout = "; a table in HELP's layout is read by from_help" if _HELP_KEYS & set(header) else ""
            raise UserError(f"{path}: no column of latencies; their names end in _ms, _us or _s, got {header}{layout}")
        if "arch" in header and space is not None:
            texts = [row[header.index("arch")] for _, row in lines]
            archs = parse_archs(texts, space, lambda i: f"{path}: line {lines[i][0]}, column 'arch'")
            return _assemble(path, space.name, space.knobs, archs, header, lines, found, input_shape=space.input_shape)
        if "arch" in header:
            raise UserError(f"{path}: column 'arch' needs the space whose architectures these are")
        if "onnx" not in header:
            raise UserError(f"{path}: no column that names networks: 'arch' or 'onnx'; got {', '.join(header)}")
        from predictors.table_features import workload_totals
        from search_spaces import read_onnx

        workloads = []
        for n, row in lines:
            try:
                workloads.append(read_onnx(path.parent / row[header.index("onnx")]))
            except UserError as error:
                raise UserError(f"{path}: line {n}, column 'onnx': {error}") from error
        return _assemble(path, path.name, (), [[]] * len(workloads), header, lines, found, workload_totals(workloads))

    def save(self, path: Path) -> None:
        """Write as `.npz` without objects, atomically."""
        with atomic(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **self.arrays())

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The table as plain arrays; `from_arrays` is the inverse."""
        about = {
            "format": _FORMAT,
            "space": self.space,
            "knobs": [[k.name, list(k.choices)] for k in self.knobs],
            "devices": list(self.devices),
            "source": self.source,
            "input_shape": list(self.input_shape),
        }
        arrays: dict[str, NDArray[Any]] = {"about": np.array(json.dumps(about)), "archs": self.archs}
        arrays["latency_ms"] = self.latency_ms
        if self.totals is not None:
            arrays["totals"] = self.totals
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> MeasuredTable:
        """The inverse of `arrays`. Raises ValueError or KeyError for anything else."""
        about = json.loads(str(arrays["about"]))
        if about.get("format") != _FORMAT:
            raise ValueError("is no measured table of this version")
        knobs = tuple(Knob(name, tuple(choices)) for name, choices in about["knobs"])
        return cls(
            about["space"], knobs, arrays["archs"], tuple(about["devices"]), arrays["latency_ms"], about["source"],
            arrays.get("totals"), input_shape=tuple(about.get("input_shape", ())),
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> MeasuredTable:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or one of another kind.
        """
        arrays = load_arrays(path, "a measured table")
        try:
            return cls.from_arrays(arrays)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as a measured table: {error}") from error


class TableLookup(Predictor):
    """Measured latencies by exact look-up: one device of a table. A network that was not measured is an error.

    Needs a `MeasuredTable` (see `MeasuredTable.from_csv`). It is tied to its table's space; a table of ONNX files
    answers for workloads with the operators of one of them.

    Args:
        table: the measurements.
        device: which column; may be left out where there is only one.

    Raises:
        UserError: no such device.
    """

    metric = "latency_ms"

    def __init__(self, table: MeasuredTable, device: str | None = None) -> None:
        self.table = table
        self.device = only_device(table) if device is None else device
        self._latency = table.column(self.device)

    @classmethod
    def from_csv(cls, path: Path, space: SearchSpace | None = None, device: str | None = None) -> TableLookup:
        """From a file that `MeasuredTable.from_csv` reads."""
        return cls(MeasuredTable.from_csv(path, space), device)

    @classmethod
    def load(cls, path: Path, device: str | None = None) -> TableLookup:
        """From a file that `MeasuredTable.save` wrote."""
        return cls(MeasuredTable.load(path), device)

    def of(self, keys: NDArray[Any]) -> Estimate:
        """Measured values of `(n, K)` architectures (or `(n, F)` operator totals); the uncertainty is that of nothing.

        Raises:
            UserError: a network that the table does not have.
        """
        rows = self.table.rows(keys)
        if (rows < 0).any():
            which = np.flatnonzero(rows < 0)
            raise UserError(
                f"{self.table.space} on {self.device}: {len(which)} of {len(rows)} networks were never measured, the "
                f"first is {describe(self.table, np.atleast_2d(keys)[which[0]])}; a few-shot predictor estimates them"
            )
        return Estimate(self._latency[rows], np.zeros(len(rows)))

    def predict(self, workloads: Sequence[Workload]) -> Estimate:
        from predictors.table_features import workload_totals

        if self.table.knobs:
            raise tied(self.table)
        return self.of(workload_totals(workloads)) if workloads else Estimate(np.empty(0), np.empty(0))

    def bind(self, space: SearchSpace) -> BoundTable:
        return BoundTable(self, self.table, space)


class BoundTable(BoundPredictor):
    """A table-based predictor with its own space; binding to any other is refused.

    Args:
        predictor: has `of(archs)`.
        table: whose architectures it knows.
        space: must have the table's knobs.
    """

    def __init__(self, predictor: Any, table: MeasuredTable, space: SearchSpace) -> None:
        if not table.belongs_to(space):
            raise tied(table, space.name)
        self.predictor = predictor
        self.space = space

    def predict(self, archs: Archs) -> Estimate:
        estimate: Estimate = self.predictor.of(self.space.check(archs))
        return estimate


def tied(table: MeasuredTable, other: str = "") -> UserError:
    """The error for asking a table of one space about anything else."""
    what = (
        f"space {other!r} has other knobs or another input" if other else "it predicts architectures of that space only"
    )
    return UserError(
        f"this predictor is tied to the networks of {table.space!r} that were measured ({table.source}): {what}"
    )


def only_device(table: MeasuredTable) -> str:
    """The one device of a table. Raises UserError where there are several."""
    if len(table.devices) != 1:
        raise UserError(f"{table.source or table.space}: which device? It has {', '.join(table.devices)}")
    return table.devices[0]


def describe(table: MeasuredTable, key: NDArray[Any]) -> str:
    """A network by its choice indices, as files name it, and in words."""
    if not table.knobs:
        return "a network of other operators"
    words = ", ".join(f"{k.name}={k.choices[int(c)]}" for k, c in zip(table.knobs, key, strict=True))
    return f"{'.'.join(str(int(c)) for c in key)} ({words})"


def load_arrays(path: Path, what: str) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file, without objects. Raises UserError where it cannot be read as `what`."""
    try:
        with np.load(Path(path), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except ValueError as error:  # numpy takes whatever is no such file for pickled objects
        raise UserError(f"{path}: cannot be read as {what}: this is no .npz file of numbers") from error
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        raise UserError(f"{path}: cannot be read as {what}: {in_words(error)}") from error


def _hash(keys: NDArray[Any]) -> NDArray[np.uint64]:
    """`(n,)` a number per row; equal rows have equal numbers."""
    if keys.dtype.kind == "f":
        keys = np.ascontiguousarray(keys + 0.0, dtype=np.float64).view(np.uint64)  # + 0.0: -0 becomes 0
        keys = keys ^ (keys >> np.uint64(32))
    weights = np.random.default_rng(201).integers(1, 2**63, keys.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(
        1
    )
    return (keys.astype(np.uint64) * weights).sum(1, dtype=np.uint64)


def _check_number(text: str, where: str) -> None:
    try:
        float(text)
    except ValueError:
        raise UserError(f"{where}: a latency is a positive number, got {text!r}") from None


def parse_archs(texts: Sequence[str], space: SearchSpace, where: Callable[[int], str]) -> Archs:
    """`(n, K)` canonical, from texts: choice indices, JSON of knob -> choice, or NAS-Bench-201's strings.

    Indices are joined by `_`, blanks, commas, or, where each is one digit, by nothing.

    Args:
        where: how an error calls the i-th text.

    Raises:
        UserError: a text that is no architecture of the space.
    """
    from_string = getattr(space, "from_string", None)
    rows: list[Any] = []
    for i, text in enumerate(texts):
        text = text.strip()
        try:
            if text.startswith("{"):
                rows.append(space.encode(json.loads(text)))
            elif text.startswith("|") and from_string is not None:
                rows.append(from_string(text)[0])
            else:
                rows.append(_indices(text, space.knobs, where(i)))
        except json.JSONDecodeError as error:
            raise UserError(f"{where(i)}: not valid JSON: {error}") from error
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where(i)) else f"{where(i)}: {error}") from error
    return space.canonical(np.array(rows, dtype=space.dtype).reshape(-1, len(space.knobs)))


def _indices(text: str, knobs: Sequence[Knob], where: str) -> list[int]:
    """`K` choice indices from digits, joined by `_`, blanks or commas, or by nothing."""
    parts = re.split(r"[_,\s]+", text) if re.search(r"[_,\s]", text) else list(text)
    if len(parts) != len(knobs) or not all(p.isdecimal() for p in parts):
        raise UserError(f"{where}: an architecture is {len(knobs)} choice indices, got {text!r}")
    for part, knob in zip(parts, knobs, strict=True):
        if int(part) >= len(knob.choices):
            raise UserError(f"{where}: {knob.name!r} has choices 0..{len(knob.choices) - 1}, got {part} in {text!r}")
    return [int(p) for p in parts]


def check_point(path: Path, number: int, values: Mapping[str, str], target: Target) -> None:
    """Raises UserError where a row says that it was measured on another target or, naming none, operating point."""
    if named := values.get("target"):  # as `devices measure` writes: what its meter says of the point is no mistake
        if not means(named, target):
            raise UserError(f"{path}: line {number}: target is {named!r}, not {target.name}")
        return
    for column in POINT:
        text, mine = values.get(column, ""), str(getattr(target, column))
        word = text.casefold().removesuffix(".0")  # of numbers, as pandas writes them where others are missing
        if not text or word == mine.casefold():
            continue
        points = target.profile.operating_points.items()
        others = [f"{target.profile.name}:{n}" for n, p in points if str(getattr(p, column)).casefold() == word]
        if column == "runtime" and not others:
            continue  # what a meter calls itself
        has = f" ({text!r} is that of {', '.join(others)})" if others else ""
        raise UserError(
            f"{path}: line {number}: {column} is {text!r}, but {target.name} has {mine!r}{has}; name the operating "
            "point that was measured, or leave the row out"
        )


def means(name: str, target: Target) -> bool:
    """Whether a name is that of a target; a device's alone means its default operating point."""
    return name == target.name or (name == target.profile.name and target.operating_point == target.profile.default)


def check_points(path: Path, target: Target) -> None:
    """As `check_point`, of every row of a table as CSV."""
    header, lines = read_csv(path)
    for number, line in lines:
        check_point(path, number, dict(zip(header, (v.strip() for v in line), strict=True)), target)


def _suffix(column: str) -> str | None:
    match = _UNIT.search(column)
    return match[1].casefold() if match else None


def _is_latency(column: str) -> bool:
    return _suffix(column) is not None or column.casefold() == "latency"


def device_of(column: str) -> str:
    """A column's name without its unit and without the word latency, where anything is left."""
    name = _UNIT.sub("", column)
    return re.sub(r"(?i)_?latency$", "", name) or name


def _common(path: Path, header: list[str], lines: list[tuple[int, list[str]]], column: str) -> str | None:
    """The value of all rows in a column, in small letters; None where there is no such column or no row."""
    if column not in header or not lines:
        return None
    at = header.index(column)
    first = lines[0][1][at].strip()
    for line, row in lines:
        if row[at].strip().casefold() != first.casefold():
            raise UserError(f"{path}: line {line}, column {column!r}: mixed {column}s, {row[at]!r} after {first!r}")
    return first.casefold()


def _assemble(
    path: Path,
    space: str,
    knobs: tuple[Knob, ...],
    archs: Sequence[Sequence[int]] | Archs,
    header: list[str],
    lines: list[tuple[int, list[str]]],
    columns: Mapping[str, tuple[str, str]],
    totals: Array | None = None,
    input_shape: tuple[int, ...] = (),
) -> MeasuredTable:
    """A table of distinct rows; equal repetitions are merged, different ones refused."""
    at = [(header.index(column), MS_PER_UNIT[unit], column) for column, unit in columns.values()]
    values = np.empty((len(lines), len(at)))
    for d, (i, scale, name) in enumerate(at):
        texts = [row[i] for _, row in lines]
        try:
            values[:, d] = np.array(texts, dtype=float) * scale
        except ValueError:
            for (line, _), text in zip(lines, texts, strict=True):
                _check_number(text, f"{path}: line {line}, column {name!r}")
            raise
    keys: Archs = np.array(archs, dtype=np.uint16 if any(len(k.choices) > 255 for k in knobs) else np.uint8)
    keys = keys.reshape(len(lines), len(knobs))
    seen: dict[bytes, int] = {}
    keep = []
    for i, key in enumerate(keys if totals is None else totals):
        first = seen.setdefault(key.tobytes(), i)
        if first == i:
            keep.append(i)
        elif not np.array_equal(values[i], values[first]):
            column = int(np.flatnonzero(values[i] != values[first])[0])
            raise UserError(
                f"{path}: line {lines[i][0]}: the network of line {lines[first][0]} again, with {values[i, column]:g} "
                f"instead of {values[first, column]:g} ms in column {at[column][2]!r}; keep one row, such as the median"
            )
    return MeasuredTable(
        space, knobs, keys[keep], tuple(columns), values[keep], str(path), None if totals is None else totals[keep],
        tuple(f"line {lines[i][0]}" for i in keep), input_shape,
    )  # fmt: skip
