"""Evaluation by look-up in tables of finished networks: tabular benchmarks, any CSV or Parquet file of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hardware_profiles.extras import load
from hardware_profiles.paths import read_csv
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.objectives import Objective, given_as, violations
from predictors.tables import MS_PER_UNIT, parse_archs
from search_spaces import SearchSpace, UserError, nearest
from search_spaces.base import Archs
from search_spaces.rows import RowIndex

# Columns that name architectures, in this order of preference where a file has several.
ARCH_COLUMNS = ("arch", "architecture", "op_code", "op_idx", "arch_str")
# Numbers that are no metric.
_COUNTERS = frozenset({"arch_idx", "index", "id", "row"})

# Tables that ship with the package.
SHIPPED = {"tiny_images": Path(__file__).parents[1] / "comparison" / "data" / "tiny_images.csv"}

Missing = Literal["refuse", "failed"]


@dataclass(frozen=True, eq=False)
class ArchitectureTable:
    """Values of architectures of one space.

    Args:
        space: that the architectures belong to.
        archs: `(n, K)` canonical, distinct.
        metrics: names of the M columns.
        values: `(n, M)`; NaN where the table says nothing.
        source: the files, for messages.
    """

    space: SearchSpace
    archs: Archs
    metrics: tuple[str, ...]
    values: NDArray[np.float64]
    source: str = "table"

    def __len__(self) -> int:
        return len(self.archs)

    @cached_property
    def index(self) -> RowIndex:
        """Finds architectures among the rows."""
        return RowIndex(self.archs)

    @property
    def complete(self) -> bool:
        """Whether every architecture of the space has all values, so that the true front is known."""
        return len(self) == self.space.size and not np.isnan(self.values).any()

    def column(self, metric: str) -> NDArray[np.float64]:
        """The values `(n,)` of one metric. Raises UserError where the table has none of that name."""
        if metric not in self.metrics:
            raise UserError(f"{self.source}: no metric {metric!r}. {nearest(metric, self.metrics)}")
        return self.values[:, self.metrics.index(metric)]

    @classmethod
    def read(
        cls,
        path: Path | str | Sequence[Path | str],
        space: SearchSpace,
        *,
        arch_column: str = "",
        columns: Mapping[str, str] | None = None,
        scale: Mapping[str, float] | None = None,
        missing: Missing = "refuse",
    ) -> ArchitectureTable:
        """Read CSV, `.csv.gz` or Parquet files, joined by architecture. For the keys see `TableEvaluator`.

        Raises:
            UserError: file, row, column and value of what is not as it should be.
        """
        paths = list(_named(path).values())
        if not paths:
            raise UserError("evaluator.path: names no file")
        files = [_File.read(p) for p in paths]
        wanted = dict(columns) if columns else _numeric(files, arch_column)
        scale = dict(scale or {})
        for metric in scale:
            if metric not in wanted:
                raise UserError(f"evaluator.scale: no metric {metric!r} in this table. {nearest(metric, wanted)}")
        holders = {metric: _holder(files, column) for metric, column in wanted.items()}
        parts = []
        for file in files:
            own = [metric for metric, holder in holders.items() if holder is file]
            archs = file.archs(arch_column, space)
            values = np.column_stack(
                [file.numbers(wanted[m], missing) for m in own] or [np.empty((len(archs), 0))]
            )  # fmt: skip
            parts.append((own, *_distinct(file, archs, values, [wanted[m] for m in own])))
        archs, values = _joined(parts, list(wanted), files, missing)
        for column, metric in enumerate(wanted):
            values[:, column] *= scale.get(metric, 1.0)
            _check_unit(metric, wanted[metric], values[:, column], holders[metric].path, metric in scale)
        return cls(space, archs, tuple(wanted), values, ", ".join(map(str, paths)))


class TableEvaluator(Evaluator):
    """Values from tables of finished networks: one search in a sorted index for a whole batch, and no training.

    An architecture that no file has is `UNSUPPORTED`, one with an empty cell `FAILED`; neither stops a run.

    Args:
        space: that the architectures belong to. They stand in one column, as choice indices (joined by `_`, blanks or,
            where each is one digit, by nothing), as JSON of knob -> choice, or as NAS-Bench-201's strings.
        path: a file (CSV, `.csv.gz`, or Parquet with the extra `parquet`), or several, joined by architecture; or
            `tiny_images`, the table that ships (see docs/compare.md).
        arch_column: the column of architectures; by default the first there is of `arch`, `architecture`, `op_code`,
            `op_idx`, `arch_str`.
        columns: metric -> column, as `{accuracy = "cifar100", "latency_ms@raspi4" = "raspi4"}`. What stands behind the
            @ need not be a device that this project knows. By default every column of numbers under its own name.
        scale: metric -> factor on its column, as `{accuracy = 0.01}` for percent. An accuracy above 1, and a latency
            whose column's name ends in another unit, are refused without.
        missing: `refuse` a table with an empty cell or NaN, or take such rows as `failed` evaluations.
        rows_only: search among the table's rows alone, where it has but a part of the space.
        seconds: column of what an evaluation really cost, for curves against time and the ledger; empty for none.

    Raises:
        UserError: file, row, column and value of what is not as it should be.
    """

    reads_task = False
    preferred_batch = 4096
    shipped = SHIPPED

    def __init__(
        self,
        space: SearchSpace,
        *,
        path: str | list[str],
        arch_column: str = "",
        columns: dict[str, str] | None = None,
        scale: dict[str, float] | None = None,
        missing: Missing = "refuse",
        rows_only: bool = False,
        seconds: str = "",
    ) -> None:
        if seconds and columns:
            columns = columns | {_SECONDS: seconds}
        table = ArchitectureTable.read(
            path, space, arch_column=arch_column, columns=columns, scale=scale, missing=missing
        )
        self._use(table, rows_only, _SECONDS if seconds and columns else seconds)

    @classmethod
    def files(cls, options: Mapping[str, Any]) -> dict[str, Path]:
        return _named(options["path"])

    @classmethod
    def of(cls, table: ArchitectureTable, *, rows_only: bool = False, seconds: str = "") -> TableEvaluator:
        """From a table in memory; `seconds` names one of its metrics."""
        evaluator = cls.__new__(cls)
        evaluator._use(table, rows_only, seconds)
        return evaluator

    def _use(self, table: ArchitectureTable, rows_only: bool, seconds: str) -> None:
        self.table = table
        self.space = table.space.only(table.archs) if rows_only else table.space
        self._seconds = table.column(seconds) if seconds else None
        self._columns = [i for i, m in enumerate(table.metrics) if m != seconds]
        self.metrics = tuple(table.metrics[i] for i in self._columns)
        self._values = table.values[:, self._columns]

    def evaluate(self, proposals: Proposals) -> Evaluation:
        rows = self.table.index.find(self.table.space.canonical(proposals.archs))
        absent = rows < 0
        values = self._values[rows]
        empty = np.isnan(values).any(axis=1) & ~absent
        status = np.where(absent, Status.UNSUPPORTED, np.where(empty, Status.FAILED, Status.OK)).astype(np.uint8)
        values[absent | empty] = np.nan
        messages = dict.fromkeys(np.flatnonzero(absent).tolist(), f"not in {self.table.source}")
        for row in np.flatnonzero(empty).tolist():
            column = int(np.flatnonzero(np.isnan(self._values[rows[row]]))[0])
            messages[row] = f"{self.table.source} has no {self.metrics[column]!r} of it"
        seconds = None if self._seconds is None else np.where(absent, 0.0, self._seconds[rows])
        return Evaluation(values, status, seconds=seconds, messages=messages)

    @property
    def priced(self) -> bool:
        """Whether the table says what an evaluation costs."""
        return self._seconds is not None

    def values_of(self, objectives: Sequence[Objective]) -> NDArray[np.float64] | None:
        """Values `(n, M)` of all rows that can be proposed, in the objectives' units; None where not all are here.

        Rows that have failed, or are no part of the space that is searched, are left out.
        """
        names = [given_as(o, self.metrics) for o in objectives]
        if None in names:
            return None
        rows = self.space.permits(self.table.archs) & ~np.isnan(self._values).any(axis=1)
        return self._values[rows][:, [self.metrics.index(str(n)) for n in names]]

    def check_limits(self, objectives: Sequence[Objective]) -> None:
        sides = [(key, side) for o in objectives if given_as(o, self.metrics) for key, side in o.sides]
        limited = tuple(side for _, side in sides)
        values = self.values_of(limited)
        if not limited or values is None or not len(values):
            return
        broken = violations(values, limited)
        least = int(broken.sum(axis=1).argmin())
        if broken[least].sum() == 0:
            return
        for column, (key, side) in enumerate(sides):
            best = values[:, column].max() if side.maximise else values[:, column].min()
            if broken[:, column].min() > 0:
                raise UserError(
                    f"objectives.{side.name}.{key} = {side.limit:g}: no architecture of {self.table.source} "
                    f"keeps it; the best has {best:.4g}"
                )
        told = zip(sides, values[least], strict=True)
        raise UserError(
            f"objectives: no architecture of {self.table.source} keeps all limits at once; the nearest has "
            + ", ".join(f"{side.name} {value:.4g} ({key} {side.limit:g})" for (key, side), value in told)
        )


_SECONDS = "seconds of an evaluation"  # no metric of a configuration has blanks in its name


def _named(path: Path | str | Sequence[Path | str]) -> dict[str, Path]:
    """The files of a key `path`, by what it calls them."""
    given = [path] if isinstance(path, str | Path) else path
    return {str(name): SHIPPED.get(str(name), Path(name)) for name in given}


class _File:
    """Columns of one file, as texts or numbers."""

    def __init__(self, path: Path, columns: dict[str, Any], where: Callable[[int], str]) -> None:
        self.path = path
        self.columns = columns
        self.where = where

    @classmethod
    def read(cls, path: Path) -> _File:
        if path.suffix in (".parquet", ".pq"):
            return cls(path, _parquet(path), lambda i: f"{path}: row {i}")
        header, lines = read_csv(path)
        if not lines:
            raise UserError(f"{path}: has no rows")
        columns = dict(zip(header, map(list, zip(*(row for _, row in lines), strict=True)), strict=True))
        return cls(path, columns, lambda i: f"{path}: line {lines[i][0]}")

    def archs(self, column: str, space: SearchSpace) -> Archs:
        """`(n, K)` canonical."""
        name = column or next((c for c in ARCH_COLUMNS if c in self.columns), "")
        if name not in self.columns:
            hint = nearest(column, self.columns) if column else f"It has {', '.join(self.columns)}."
            wanted = repr(column) if column else f"of architectures, one of {', '.join(ARCH_COLUMNS)}"
            raise UserError(f"{self.path}: no column {wanted}; evaluator.arch_column names it. {hint}")
        texts = self.columns[name]
        if not all(isinstance(t, str) for t in texts):
            wrong = next(i for i, t in enumerate(texts) if not isinstance(t, str))
            raise UserError(
                f"{self.where(wrong)}, column {name!r}: an architecture is text, got {texts[wrong]!r}: a number loses "
                "its leading zeros; store the column as strings"
            )
        return parse_archs(texts, space, lambda i: f"{self.where(i)}, column {name!r}")

    def numbers(self, column: str, missing: Missing) -> NDArray[np.float64]:
        """`(n,)`; what is empty is NaN, if it may be missing."""
        cells = self.columns[column]
        values = _floats(cells)
        if values is None:
            wrong = next(i for i, c in enumerate(cells) if _floats([c]) is None)
            raise UserError(f"{self.where(wrong)}, column {column!r}: expected a number, got {cells[wrong]!r}")
        bad = np.flatnonzero(np.isinf(values) | (np.isnan(values) if missing == "refuse" else False))
        if len(bad):
            cell = cells[bad[0]]
            shown = "nothing" if cell is None or cell == "" else repr(cell)
            more = f" ({len(bad)} such cells)" if len(bad) > 1 else ""
            raise UserError(
                f"{self.where(int(bad[0]))}, column {column!r}: expected a finite number, got {shown}{more}; leave "
                'such rows out, or give evaluator.missing = "failed" where the evaluation failed'
            )
        return values


def _parquet(path: Path) -> dict[str, Any]:
    parquet = load("parquet", "pyarrow.parquet")
    try:
        table = parquet.read_table(path)
    except Exception as error:  # pyarrow has a dozen kinds
        raise UserError(f"{path}: cannot be read as a Parquet file: {str(error).splitlines()[0]}") from error
    if not table.num_rows:
        raise UserError(f"{path}: has no rows")
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _floats(cells: Sequence[Any]) -> NDArray[np.float64] | None:
    """Numbers with NaN for empty cells; None where a cell is neither."""
    try:
        return np.array(["nan" if c is None or c == "" else c for c in cells], dtype=np.float64)
    except (TypeError, ValueError):
        return None


def _numeric(files: Sequence[_File], arch_column: str) -> dict[str, str]:
    """Every column of numbers under its own name."""
    found: dict[str, str] = {}
    for file in files:
        for name, cells in file.columns.items():
            if name in (*ARCH_COLUMNS, arch_column) or name in _COUNTERS or _floats(cells) is None:
                continue
            found[name] = name
    if not found:
        raise UserError(f"{files[0].path}: no column of numbers beside the architectures")
    return found


def _holder(files: Sequence[_File], column: str) -> _File:
    """The one file that has a column."""
    having = [f for f in files if column in f.columns]
    if not having:
        names = dict.fromkeys(c for f in files for c in f.columns)
        raise UserError(f"{', '.join(str(f.path) for f in files)}: no column {column!r}. {nearest(column, names)}")
    if len(having) > 1:
        raise UserError(
            f"column {column!r} stands in {having[0].path} and in {having[1].path}; name the columns to take in "
            "evaluator.columns, and rename one of these"
        )
    return having[0]


def _distinct(
    file: _File, archs: Archs, values: NDArray[np.float64], columns: Sequence[str]
) -> tuple[Archs, NDArray[np.float64]]:
    """Each architecture once. Equal repetitions count once, contradicting ones are refused."""
    first = RowIndex(archs).find(archs)
    again = np.flatnonzero(first != np.arange(len(archs)))
    differs = ~((values[again] == values[first[again]]) | (np.isnan(values[again]) & np.isnan(values[first[again]])))
    if differs.any():
        at, column = np.argwhere(differs)[0]
        row, before = int(again[at]), int(first[again[at]])
        raise UserError(
            f"{file.where(row)}, column {columns[column]!r}: {values[row, column]:g} for the architecture that has "
            f"{values[before, column]:g} in {file.where(before).rpartition(': ')[2]}; keep one row of each, such as "
            "their mean"
        )
    keep = np.unique(first)
    return archs[keep], values[keep]


def _joined(
    parts: Sequence[tuple[list[str], Archs, NDArray[np.float64]]],
    metrics: Sequence[str],
    files: Sequence[_File],
    missing: Missing,
) -> tuple[Archs, NDArray[np.float64]]:
    """All architectures with the metrics in the order asked; NaN where a file has no such row."""
    every = np.concatenate([archs for _, archs, _ in parts])
    archs = every[np.unique(RowIndex(every).find(every))]
    values = np.full((len(archs), len(metrics)), np.nan)
    for (own, its, its_values), file in zip(parts, files, strict=True):
        rows = RowIndex(its).find(archs)
        if own and missing == "refuse" and (rows < 0).any():
            raise UserError(
                f"{file.path}: has no row for {int((rows < 0).sum())} architectures that another file has, the first "
                f'{" ".join(map(str, archs[rows < 0][0]))}; give evaluator.missing = "failed" to count them as failed'
            )
        for i, metric in enumerate(own):
            values[:, metrics.index(metric)] = np.where(rows < 0, np.nan, its_values[rows, i])
    return archs, values


def _check_unit(metric: str, column: str, values: NDArray[np.float64], path: Path, scaled: bool) -> None:
    """Refuse percent and other units that nobody converted."""
    kind = metric.partition("@")[0]
    if kind == "accuracy" and len(bad := np.flatnonzero((values < 0) | (values > 1))):
        percent = "" if scaled else f": for percent give evaluator.scale = {{ {_key(metric)} = 0.01 }}"
        raise UserError(f"{path}: column {column!r}: an accuracy is within 0..1, got {values[bad[0]]:g}{percent}")
    if kind == "latency_ms" and not scaled:
        unit = column.rpartition("_")[2] if "_" in column else ""
        if unit != "ms" and unit in MS_PER_UNIT:
            raise UserError(
                f"{path}: column {column!r} is in {unit} by its name, and {metric!r} is in milliseconds: give "
                f"evaluator.scale = {{ {_key(metric)} = {MS_PER_UNIT[unit]:g} }}"
            )


def _key(metric: str) -> str:
    """A metric as a key of a TOML file."""
    return f'"{metric}"' if "@" in metric else metric
