"""A reference network, the same network as a user's own module, and its ONNX file are one workload."""

import io
import warnings
from collections import Counter

import onnx
import pytest
import torch
from torch import nn

from search_spaces import Workload, read_onnx, reference_network, trace
from search_spaces.reference.transformers import mobilevit

# Name and resolution: attention, concatenation, resizing, transposed convolutions, channel shuffle, split channels.
NETWORKS = {
    "deit_tiny": 32,
    "densenet121": 64,
    "mobilevit_s": 64,
    "shufflenet_v2_0.5": 64,
    "ssd_mobilenet_v2": 96,
    "unet_mobilenet_v2": 64,
    "yolo11n": 64,
}


class Mine(nn.Module):
    """What a user has: a network of their own inside a module of their own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> object:
        return self.network(x)


def distinct(network: nn.Module) -> nn.Module:
    """The network in eval mode with different weights everywhere: exporters keep equal ones once."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.dim() == 1 and value.is_floating_point():
                value.add_(torch.rand_like(value))
    return network.eval()


def exported(network: nn.Module, resolution: int, dynamo: bool) -> onnx.ModelProto:
    image = torch.randn(1, 3, resolution, resolution)
    if dynamo:
        program = torch.onnx.export(network, (image,), dynamo=True, verbose=False)
        assert program is not None
        return program.model_proto
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is old, but most of the files that people have come from it
        torch.onnx.export(network, (image,), buffer, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


def norms(workload: Workload) -> int:
    return sum(op.params for op in workload.operators if op.kind == "batch_norm")


def kinds(workload: Workload) -> Counter[str]:
    return Counter(op.kind for op in workload.operators if op.kind != "batch_norm")


def assert_the_same(read: Workload, workload: Workload) -> None:
    assert read.macs == workload.macs
    assert kinds(read) == kinds(workload)
    # Where an exporter folds a normalisation into a convolution, its shifts become biases and its scales vanish.
    assert read.params == workload.params - (norms(workload) - norms(read)) // 2
    assert [op.macs for op in read.operators if op.macs] == [op.macs for op in workload.operators if op.macs]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_same_however_it_comes_in(name: str) -> None:
    workload = reference_network(name, resolution=NETWORKS[name]).workload()
    mine = distinct(Mine(reference_network(name, resolution=NETWORKS[name]).build()))
    assert trace(mine, (3, NETWORKS[name], NETWORKS[name])) == workload
    assert_the_same(read_onnx(exported(mine, NETWORKS[name], dynamo=False)), workload)


def test_so_it_is_from_the_newer_exporter() -> None:
    small = mobilevit(
        (3, 64, 64), 10, channels=(8, 8, 16, 16, 24, 24), widths=(32, 32, 48), depths=(1, 1, 1), final=32
    )  # fmt: skip
    mine = distinct(Mine(small))
    assert_the_same(read_onnx(exported(mine, 64, dynamo=True)), trace(mine, (3, 64, 64)))
