"""An imported table, and the record beside it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hardware_profiles.paths import atomic, write_text


@dataclass(frozen=True)
class Imported:
    """A table as read from someone's files.

    Args:
        header: names of the columns.
        rows: cells; None for an empty one.
        source: whose values these are.
        sha256: of what was read.
        units: of the columns that have one.
    """

    header: list[str]
    rows: list[list[Any]]
    source: str
    sha256: str
    units: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path, origin: Path) -> Path:
        """Write the CSV, then `NAME.json` beside it: source, hash, columns. Returns the path of the record."""
        with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.header)
            writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        record = {
            "source": self.source,
            "file": origin.name,
            "sha256": self.sha256,
            "rows": len(self.rows),
            "columns": {name: self.units.get(name, "") for name in self.header},
        }
        write_text(path.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
        return path.with_suffix(".json")
