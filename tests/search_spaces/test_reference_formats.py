"""A reference network, the same network as a user's own module, and its ONNX file are one workload."""

import io
import warnings
from collections import Counter

import onnx
import pytest
import torch
from torch import nn

from search_spaces import Workload, read_onnx, reference_network, trace

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


def module(name: str) -> nn.Module:
    """The network with distinct weights everywhere: exporters keep equal ones once."""
    torch.manual_seed(0)
    network = reference_network(name, resolution=NETWORKS[name]).build().eval()
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.dim() == 1 and value.is_floating_point():
                value.add_(torch.rand_like(value))
    return Mine(network).eval()


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


@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in NETWORKS), ("mobilevit_s", True)])
def test_a_network_is_the_same_however_it_comes_in(name: str, dynamo: bool) -> None:
    workload = reference_network(name, resolution=NETWORKS[name]).workload()
    mine = module(name)
    assert trace(mine, (3, NETWORKS[name], NETWORKS[name])) == workload
    read = read_onnx(exported(mine, NETWORKS[name], dynamo))
    assert read.macs == workload.macs
    assert kinds(read) == kinds(workload)
    # Where an exporter folds a normalisation into a convolution, its shifts become biases and its scales vanish.
    assert read.params == workload.params - (norms(workload) - norms(read)) // 2
    assert [op.macs for op in read.operators if op.macs] == [op.macs for op in workload.operators if op.macs]
