"""`nasbench tables`: other people's tables of networks as CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search_spaces.errors import UserError, nearest

app = typer.Typer(no_args_is_help=True, help="Tables of finished networks, for the evaluator `table`.")
LAYOUTS = ("nats-bench", "help")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file or directory as its authors publish it.")],
    output: Annotated[Path, typer.Argument(help="The CSV file to write; a record of its origin goes beside it.")],
    layout: Annotated[str, typer.Option(help="nats-bench or help; by default told from the name.")] = "",
) -> None:
    """Convert NATS-Bench's official files or a table in HELP's layout, once, to CSV. Nothing in them is executed."""
    from nasbench.importers.help import read_help
    from nasbench.importers.nats_bench import read_nats_bench

    if not source.exists():
        raise UserError(f"{source}: no such file or directory")
    layout = layout or ("help" if source.name.endswith((".csv", ".csv.gz")) else "nats-bench")
    if layout not in LAYOUTS:
        raise UserError(f"--layout {layout!r}: {nearest(layout, LAYOUTS)}")
    if output.suffix != ".csv":
        raise UserError(f"{output}: a table is written as .csv")
    imported = read_help(source) if layout == "help" else read_nats_bench(source)
    record = imported.write(output, source)
    print(f"{output}: {len(imported.rows):,} networks, {', '.join(imported.header[1:])}; origin in {record}")
