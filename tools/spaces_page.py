"""Write the table of docs/spaces.md: every space with its exact size, references and supernets.

    python tools/spaces_page.py

A test fails where the table is not what this program writes. The rest of the page is written by hand.
"""

from pathlib import Path

from search_spaces import SearchSpace, load_space, presets

PAGE = Path(__file__).parent.parent / "docs" / "spaces.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
COLUMNS = ("space", "what it is", "input", "size", "knobs", "references (M MACs, M parameters)", "supernets")


def references(name: str) -> str:
    """The named architectures with their costs, each with the widths that it was published with."""
    space = load_space(name)
    cells = []
    for reference, arch in space.references.items():
        published = space.published.get(reference)
        own = load_space(name, **published.options) if published and published.options else space
        workload = own.workload(own.references.get(reference, arch))
        cells.append(f"`{reference}` {workload.macs / 1e6:,.1f}, {workload.params / 1e6:.2f}")
    return "; ".join(cells)


def supernets(space: SearchSpace) -> str:
    """Which of the two a space has."""
    kinds = {"weight sharing": "supernet", "mixture": "mixture_supernet"}
    return ", ".join(k for k, name in kinds.items() if getattr(type(space), name) is not getattr(SearchSpace, name))


def row(name: str) -> str:
    """One line of the table."""
    space = load_space(name)
    cells = (
        f"`{name}`",
        presets()[name],
        "x".join(map(str, space.input_shape)),
        f"{space.size:,}",
        str(len(space.knobs)),
        references(name),
        supernets(space) or "–",
    )
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    """The table's text."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n" + "".join(map(row, presets()))


def page(text: str) -> str:
    """A page's text with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
