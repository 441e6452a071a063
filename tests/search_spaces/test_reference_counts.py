"""The size of every reference network is the published one, and the page that lists them is up to date."""

import runpy
from math import prod
from pathlib import Path

import pytest
import torch
from torch import nn

from search_spaces import Workload, reference_network, reference_networks
from search_spaces.operators import KINDS

ROOT = Path(__file__).parent.parent.parent


def rounds_to(value: float, figure: str, truncated: bool = False) -> bool:
    """Whether `value` rounded (or cut off) as `figure` is equals it: `"4.2M"` goes to a tenth of a million."""
    number, unit = figure[:-1], {"G": 1e9, "M": 1e6, "k": 1e3}[figure[-1]]
    step = 10.0 ** -len(number.partition(".")[2])
    off = value / unit - float(number)
    return 0 <= off < step if truncated else abs(off) <= step / 2 + 1e-9


def counts_as(workload: Workload, text: str) -> bool:
    """Whether the parameters are those of a rounded figure that says how it was counted."""
    figure, _, how = text.partition(" ")
    norms = sum(op.params for op in workload.operators if op.kind == "batch_norm")
    uncounted = norms if "without normalisation" in how else norms // 2 if "folded normalisation" in how else 0
    return rounds_to(workload.params - uncounted, figure, "truncated" in how)


@pytest.mark.parametrize("name", reference_networks())
def test_parameters_are_the_published_ones(name: str) -> None:
    network = reference_network(name)
    workload = network.workload()
    counted = network.params is not None or network.rounded_params or "no published count" in network.deviations
    assert counted, "a design says how many parameters it has, or that nobody does"
    if network.params is not None:
        assert workload.params == network.params
    if network.rounded_params:
        assert counts_as(workload, network.rounded_params), workload.params
    if network.operations:
        figure, _, unit = network.operations.partition(" ")
        assert rounds_to((1 if unit == "multiply-accumulates" else 2) * workload.macs, figure), workload.macs
    # Every weight is used, and none more than once per pixel of the input.
    assert 0 < workload.macs <= workload.params * prod(network.input_shape[1:])
    assert {op.kind for op in workload.operators} <= KINDS


def test_inception_v2_has_the_variables_that_its_reference_counts() -> None:
    # TF-slim's own test counts 10,173,112 without the classifier: its normalisations have shift, mean and variance.
    with torch.device("meta"):
        modules = list(reference_network("inception_v2").build().modules())
    convolutions = sum(p.numel() for m in modules if isinstance(m, nn.Conv2d) for p in m.parameters())
    assert convolutions + sum(3 * m.num_features for m in modules if isinstance(m, nn.BatchNorm2d)) == 10_173_112


def test_the_page_is_what_its_program_writes() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "reference_page.py"))
    written = tool["PAGE"].read_text(encoding="utf-8")
    assert written == tool["page"](), "run: python tools/reference_page.py"
