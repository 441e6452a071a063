"""The one exception for mistakes that a person can mend.

It stands in the lowest package so that all four share it; `nasbench.cli` prints its message without a traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The message says what is wrong, where, and what would be right."""


def nearest(word: str, known: Iterable[object]) -> str:
    """A sentence that names the nearest of `known` to a misspelt `word`, and what else there is.

    >>> nearest("latnecy_ms", ["latency_ms", "params"])
    "Did you mean 'latency_ms'? Known: latency_ms, params."
    """
    names = sorted(str(k) for k in known)
    match = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"Did you mean {match[0]!r}? " if match else ""
    return f"{hint}Known: {', '.join(names)}."
