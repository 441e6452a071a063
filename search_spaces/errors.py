"""The one exception for mistakes that a person can mend.

It stands in the lowest package so that all four share it; `nasbench.cli` prints its message without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what would be right."""


def in_words(error: Exception) -> str:
    """Why a file cannot be read: what the system says of it, or which byte is no UTF-8."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"it is not UTF-8 (byte {byte:#04x} at position {error.start}); save it as UTF-8"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def nearest(word: str, known: Iterable[object]) -> str:
    """A sentence that names the nearest of `known` to a misspelt `word`, and what else there is.

    >>> nearest("latnecy_ms", ["latency_ms", "params"])
    "Did you mean 'latency_ms'? Known: latency_ms, params."
    """
    names = sorted(str(k) for k in known)
    written = {name.lower(): name for name in names}
    match = difflib.get_close_matches(word.lower(), written, n=1, cutoff=0.5)
    hint = f"Did you mean {written[match[0]]!r}? " if match else ""
    return f"{hint}Known: {', '.join(names)}."


def most_telling(error: ValidationError) -> ErrorDetails:
    """The problem to report: an unknown key if there is one, for a misspelt key is missing under its right name too."""
    problems = error.errors()
    return next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])


def explain(error: ValidationError, where: str, known: Iterable[object] = ()) -> str:
    """The most telling problem of a validation error as one sentence: key, value, what was expected.

    Args:
        where: the file or section that the values come from.
        known: keys there are, to name the nearest to an unknown one.
    """
    first = most_telling(error)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{where}: key {key!r} is missing"
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}. {nearest(str(first['loc'][-1]), known)}"
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    return f"{where}: {key}: {message[0].lower()}{message[1:]}, got {first['input']!r}"
