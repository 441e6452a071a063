"""Records kept as JSON files: strict models that are written whole, and read back with errors for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from hardware_profiles.paths import write_text
from search_spaces.errors import UserError, explain, in_words


class Record(BaseModel):
    """Values that are checked when they are made and never change; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KeptRecord(Record):
    """A record with a file of its own.

    A subclass gives `kind`, what errors call it, `otherwise`, what to do where its file cannot be used, and a default
    for `format`, the version of its layout.
    """

    kind: ClassVar[str]
    otherwise: ClassVar[str]

    format: int

    def save(self, path: Path) -> None:
        """Write as JSON, atomically. Raises UserError where that fails."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: no such file, or one that is damaged or of another version.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot read this {cls.kind}: {in_words(error)}") from error
        found, known = _format(text), cls.model_fields["format"].default
        if found is not None and found != known:
            raise UserError(f"{path}: {cls.kind} format {found}, this version reads {known}; {cls.otherwise}")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            reason = explain(error, str(path), cls.model_fields)[:300]
            raise UserError(f"{reason} (this {cls.kind} is damaged: {cls.otherwise})") from error


def _format(text: str) -> int | None:
    """The version that a file states, which says more than the first key that another version has; None for none."""
    try:
        found = json.loads(text)["format"]
    except (ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, int) else None
