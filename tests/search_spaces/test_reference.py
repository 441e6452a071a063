"""What every reference network promises. A new design is tested by being a row of a table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hardware_profiles import OnnxConverter, load_target
from search_spaces import UserError, Workload, reference_network, reference_networks
from search_spaces.reference.registry import designs

NAMES = reference_networks()
# The first design of each family of classifiers (tables begin with the smallest): enough to see that it learns.
CLASSIFIERS = {d.family: d.name for d in reversed(designs().values()) if d.task == "classification"}


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def rounds_to(workload: Workload, text: str) -> bool:
    """Whether the parameters rounded as `text` is (`"4.2M"`: to a tenth of a million) equal it."""
    figure, _, how = text.partition(" ")
    number, unit = figure[:-1], {"M": 1e6, "k": 1e3}[figure[-1]]
    step = 10.0 ** -len(number.partition(".")[2])
    norms = sum(op.params for op in workload.operators if op.kind == "batch_norm")
    uncounted = norms if "without normalisation" in how else norms // 2 if "folded normalisation" in how else 0
    value = (workload.params - uncounted) / unit
    return 0 <= value - float(number) < step if "truncated" in how else abs(value - float(number)) <= step / 2 + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(name: str) -> None:
    network = reference_network(name)
    workload = network.workload()
    counted = network.params is not None or network.rounded_params or "no published count" in network.deviations
    assert counted, "a design says how many parameters it has, or that nobody does"
    if network.params is not None:
        assert workload.params == network.params
    if network.rounded_params:
        assert rounds_to(workload, network.rounded_params), workload.params
    with torch.device("meta"):
        assert parameters(network.build()) == workload.params


@pytest.mark.parametrize("name", [design.name for design in designs().values()])
def test_another_input_changes_the_work_and_not_the_kind_of_result(name: str) -> None:
    network = reference_network(name)
    height, width = network.input_shape[1:]
    larger = reference_network(name, resolution=(height + 32, width + 32))
    assert larger.params is None
    if larger.name == name and network.task == "classification":
        assert network.workload().tensors[network.workload().outputs[0]].shape == (network.num_classes,)
        assert larger.workload().tensors[larger.workload().outputs[0]].shape == (network.num_classes,)
    assert larger.workload().macs > network.workload().macs > 0
    grey = reference_network(name, in_channels=1)
    assert grey.input_shape == (1, height, width)
    assert grey.workload().params < network.workload().params
    # Every weight is used at least once, and a convolution at most once per pixel of its input.
    assert network.workload().macs <= network.workload().params * height * width


@pytest.mark.parametrize("name", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_one_design_of_each_family_learns(name: str) -> None:
    published = reference_network(name)
    network = reference_network(name, resolution=min(96, *published.input_shape[1:]), num_classes=4)
    torch.manual_seed(0)
    module = network.build()
    images, labels = torch.randn(4, *network.input_shape), torch.arange(4)
    logits = module(images)
    assert logits.shape == (4, 4)
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    assert loss.isfinite()
    reached = [p.grad is not None and bool(p.grad.isfinite().all() and p.grad.any()) for p in module.parameters()]
    assert sum(reached) > 0.9 * len(reached)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_networks_are_written_as_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    if name not in NAMES:
        pytest.skip(f"no {name}")
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
