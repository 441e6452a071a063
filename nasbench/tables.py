"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows below a header; floats with four digits."""
    # In a file or a pipe nothing need be folded.
    console(10_000).print(grid(columns, rows))


def grid(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, header: bool = True) -> Table:
    """Rows below a header, to be printed; floats with four digits, and no bracket in a cell means a style."""
    from rich.table import Table

    shown = Table(*columns, box=None, pad_edge=False, header_style="bold", show_header=header)
    for row in rows:
        shown.add_row(*(plain(f"{c:.4g}" if isinstance(c, float) else str(c)) for c in row))
    return shown


def console(width: int) -> Console:
    """The terminal; where there is none, lines of `width` characters."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=width)


def plain(text: str) -> str:
    """Text in which no bracket means a style."""
    from rich.markup import escape

    return escape(text)
