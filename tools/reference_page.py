"""Write docs/reference_networks.md: every reference network with its size, source and deviations.

    python tools/reference_page.py

A test fails where the page is not what this program writes.
"""

from pathlib import Path

from search_spaces.reference import ReferenceNetwork, reference_network
from search_spaces.reference.registry import designs

PAGE = Path(__file__).parent.parent / "docs" / "reference_networks.md"

HEAD = """# Reference networks

Published networks by name, to be measured, profiled, trained and plotted beside searched ones:

```python
from search_spaces import reference_network, reference_networks

network = reference_network("mobilenet_v2_0.5", resolution=192)
network.workload().macs  # traced without allocating a weight
module = network.build()  # a fresh torch module
```

A number after the last underscore is a width multiplier; any positive one builds where the design has widths.
`resolution`, `in_channels` and `num_classes` replace the defaults. Any other network comes in as a torch module
(`search_spaces.trace`) or an ONNX file (`search_spaces.read_onnx`).

Columns: *params* are the learned values of the network as it is built here (normalisation scales and shifts included,
running statistics not). *published* says what they were checked against: `exact` is the very count of the source, a
figure is the source's own rounding, of parameters, of multiply-accumulates (GMAC) or of operations (two per
multiply-accumulate). *MMAC* are millions of multiply-accumulates of convolutions, linear layers and matrix products for
one input.

For all of them: weights are initialised here, none are downloaded. TensorFlow's SAME padding, one-sided at stride 2, is
centred: shapes, parameters and multiply-accumulates are the same, trained weights would be a pixel off. Dropout is
kept, stochastic depth and auxiliary training heads are not. Detectors and segmenters give raw maps: anchors, decoding
and suppression are not part of the network.

"""
COLUMNS = ("network", "family", "input", "params", "published", "MMAC", "source", "deviations")


def published(network: ReferenceNetwork) -> str:
    """What the network's size was checked against."""
    figures = ["exact" if network.params is not None else network.rounded_params]
    if network.operations:
        work = network.operations.replace("G multiply-accumulates", " GMAC")
        figures.append(work if work != network.operations else f"{work} operations")
    return ", ".join(filter(None, figures)) or "–"


def row(network: ReferenceNetwork, first: bool) -> str:
    """One line of the table; source and deviations stand at the first width of a design only."""
    workload = network.workload()
    cells = (
        f"`{network.name}`",
        network.family,
        "x".join(map(str, network.input_shape)),
        f"{workload.params:,}",
        published(network),
        f"{workload.macs / 1e6:,.1f}",
        network.source if first else "″",
        network.deviations if first else "″" if network.deviations else "",
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The page's text."""
    parts = [HEAD]
    for task in dict.fromkeys(design.task for design in designs().values()):
        parts.append(f"## {task.capitalize()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
        for design in designs().values():
            if design.task == task:
                parts += [row(reference_network(n), n == design.name) + "\n" for n in design.names]
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
