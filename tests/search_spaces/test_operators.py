"""The kinds that operators may have, held against the readers that write them."""

import re

import pytest
import torch
from torch import Tensor, nn

from search_spaces import onnx_reader, tracing
from search_spaces.operators import ELEMENTWISE, FOLDED, KINDS, unknown_kind


def test_every_kind_that_readers_write_is_known() -> None:
    read = {*tracing._KINDS.values(), *onnx_reader._KINDS.values(), *ELEMENTWISE, *FOLDED}
    assert read <= KINDS
    # Names that are read as another kind are none.
    translated = {*tracing._KINDS, *tracing._READERS, *onnx_reader._KINDS, *onnx_reader._READERS, *onnx_reader._VIEWS}
    kept = {"avg_pool2d", "mean", "clamp", "hardtanh"}
    assert translated & KINDS == kept & KINDS
    assert all(map(unknown_kind, translated - kept))


def test_operators_of_pytorch_that_are_traced_under_their_names_are_known() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.cumsum(x.roll(1, -1).flip(-1), -1).sin().clamp(0, 1)
            x = torch.where(x > 0.5, x, x.reciprocal())
            return torch.topk(nn.functional.grid_sample(x, torch.zeros(1, 4, 4, 2), align_corners=False), 2)[0].sum(-1)

    kinds = {op.kind for op in tracing.trace(Plain(), (3, 8, 8)).operators}
    assert {"cumsum", "flip", "where", "topk", "clamp"} <= kinds <= KINDS


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hardswish", "Did you mean 'hard_swish'"),
        ("HardSwish", "Of ONNX files it is read as 'hard_swish'"),
        ("Conv", "no network has operators of kind 'Conv'"),
        ("Conv2D", "Did you mean 'conv2d'"),
        ("ReLU", "Did you mean 'relu'"),
        ("conv", "Did you mean 'conv2d'"),
        ("fully_connected", r"Kinds: search_spaces\.operators\.KINDS"),
        ("", "kind ''"),
    ],
)
def test_a_kind_that_no_network_has_is_told(word: str, message: str) -> None:
    assert re.search(message, unknown_kind(word))


@pytest.mark.parametrize(
    "word", ["hard_swish", "cumsum", "slice", "GridSample", "Det", "MyOwnOperator", "glu", "im2col"]
)
def test_a_kind_that_a_network_may_have_is_taken(word: str) -> None:
    assert unknown_kind(word) == ""
