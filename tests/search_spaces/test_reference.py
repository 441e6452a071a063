"""What every reference network promises. A new design is tested by being a row of a table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hardware_profiles import OnnxConverter, load_target
from search_spaces import UserError, reference_network, reference_networks
from search_spaces.reference.registry import designs

NAMES = reference_networks()
# One design of each file of networks, the first of its table: enough to see that what is built runs and learns.
FIRST = {d.factory.partition(":")[0].rpartition(".")[2]: d for d in reversed(designs().values())}
LEARNERS = {file: design.name for file, design in FIRST.items() if design.task == "classification"}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", [design.name for design in FIRST.values()], ids=FIRST)
def test_another_input_changes_the_work_and_not_the_kind_of_result(name: str) -> None:
    network = reference_network(name)
    channels, height, width = network.input_shape
    with torch.device("meta"):
        assert parameters(network.build()) == network.workload().params
    larger = reference_network(name, resolution=(height + 32, width + 64))
    assert (larger.input_shape, larger.params) == ((channels, height + 32, width + 64), None)
    assert larger.workload().macs > network.workload().macs > 0
    other = reference_network(name, in_channels=channels + 1, num_classes=7)
    assert (other.input_shape, other.num_classes) == ((channels + 1, height, width), 7)
    assert other.workload().params != network.workload().params
    if network.task == "classification":
        for n in (network, larger, other):
            w = n.workload()
            assert w.tensors[w.outputs[0]].size == n.num_classes


@pytest.mark.parametrize("name", LEARNERS.values(), ids=LEARNERS)
def test_a_network_of_each_kind_learns(name: str) -> None:
    small = min(64, *reference_network(name).input_shape[1:])
    network = reference_network(name, resolution=small, num_classes=4)
    torch.manual_seed(0)
    module = network.build()
    logits = module(torch.randn(4, *network.input_shape))
    assert logits.shape == (4, 4)
    loss = nn.functional.cross_entropy(logits, torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    reached = [p.grad is not None and bool(p.grad.isfinite().all() and p.grad.any()) for p in module.parameters()]
    assert sum(reached) > 0.9 * len(reached)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "ghostnet_v2"])
def test_networks_are_written_as_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    network = reference_network(name, resolution=64, num_classes=10)
    module = network.build().eval()
    artifact = OnnxConverter().convert(module, load_target("host"), network.input_shape, tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    image = torch.randn(1, *network.input_shape)
    with torch.no_grad():
        expected = module(image)
    result = torch.from_numpy(session.run(None, {"input": image.numpy()})[0])
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys; from search_spaces import reference_network, reference_networks\n"
        "reference_network(reference_networks()[0]); print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_rows_are_whole() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for design in designs().values():
        assert design.name == design.name.lower()
        assert design.source
        assert not set(design.params if isinstance(design.params, dict) else ()) - {1.0, *design.widths}, design.name


def test_a_workload_is_traced_once() -> None:
    assert reference_network("resnet18").workload() is reference_network("resnet18").workload()
    assert reference_network("resnet18") == reference_network("resnet18", resolution=224)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet51", {}, "Did you mean 'resnet50'"),
        ("resnet18_0.5", {}, "resnet18 has no width multiplier"),
        ("resnet18", {"resolution": 0}, "resolution: expected a positive whole number, got 0"),
        ("resnet18", {"num_classes": -1}, "num_classes"),
        ("resnet18", {"in_channels": 2.5}, "in_channels"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        reference_network(name, **options)


def test_an_input_that_is_too_small_is_named() -> None:
    with pytest.raises(UserError, match=r"'alexnet'.*\(3, 8, 8\)"):
        reference_network("alexnet", resolution=8).workload()
