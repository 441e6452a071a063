"""The commands `nasbench spaces ...`: list search spaces, show one, write one of your own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nasbench.tables import table
from search_spaces.errors import UserError

app = typer.Typer(help="Search spaces: list, show, new. docs/spaces.md says how to write one.")


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """List, where no command is given."""
    if context.invoked_subcommand is None:
        list_()


@app.command("list")
def list_() -> None:
    """List search spaces."""
    from search_spaces import presets

    table(("space", "what it is"), presets().items())


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A space, or a TOML file.")],
    toml: Annotated[bool, typer.Option("--toml", help="As a TOML file, to copy and change.")] = False,
) -> None:
    """Show a space: its size, knobs, references and their published figures."""
    from search_spaces import load_space
    from search_spaces.loading import preset_text

    if toml:
        print(preset_text(name), end="")
        return
    space = load_space(name)
    print(f"{space.name}: {space.size:,} architectures, {len(space.knobs)} knobs, input {space.input_shape}")
    table(("knob", "choices"), [(k.name, ", ".join(map(str, k.choices))) for k in space.knobs])
    rows = []
    for reference, arch in space.references.items():
        workload = space.workload(arch)
        rows.append((reference, f"{workload.macs / 1e6:.2f}", f"{workload.params / 1e6:.3f}"))
    table(("reference", "M MACs", "M parameters"), rows)
    for reference, published in space.published.items():
        figures = [f"{value} {what}" for value, what in ((published.macs, "MACs"), (published.params, "parameters"))
                   if value is not None]  # fmt: skip
        options = f", with {', '.join(f'{k} = {v}' for k, v in published.options.items())}" if published.options else ""
        if figures:
            print(f"published of {reference}{options}: {', '.join(figures)} ({published.source})")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the file NAME.toml; letters, digits, - and _.")],
    like: Annotated[str | None, typer.Option(help="Begin with a copy of this space.")] = None,
    directory: Annotated[Path, typer.Option("--in", help="Where to write it.")] = Path(),
) -> None:
    """Write a commented space file, which can be searched as it stands; nothing is overwritten."""
    path = new_space(name, like, directory)
    print(path)
    print(f"next: nasbench spaces show {path}", file=sys.stderr)


def new_space(name: str, like: str | None = None, directory: Path = Path()) -> Path:
    """Write `NAME.toml`, a template or a copy of a shipped space, and return its path.

    Raises:
        UserError: an impossible name, a file that is there already, or no space to copy.
    """
    from hardware_profiles.paths import atomic
    from search_spaces.loading import preset_text, template

    name = name.removesuffix(".toml")
    if not name.replace("-", "_").isidentifier() or not name.isascii():
        raise UserError(f"space name {name!r}: letters, digits, - and _ are possible, a letter first")
    path = directory / f"{name}.toml"
    if path.exists():
        raise UserError(f"{path} is there already; nothing was written")
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    text = preset_text(like) if like else template(name)
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
