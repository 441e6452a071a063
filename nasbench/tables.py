"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows below a header; floats with four digits."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        shown.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in row))
    console = Console()
    # In a file or a pipe nothing need be folded.
    (console if console.is_terminal else Console(width=10_000)).print(shown)
