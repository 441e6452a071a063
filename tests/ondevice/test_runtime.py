"""Learning in ExecuTorch's own runtime agrees with torch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nasbench.ondevice.memory import FULL, Update, layer_updates
from nasbench.ondevice.methods import head
from nasbench.ondevice.runtime import DeviceTrainer, export_trainable
from search_spaces import UserError, load_space


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    space = load_space("sensor_1d", 6, 7)
    return space.build(space.references["smallest"]).eval(), space.input_shape


def _batches(shape, count, batch=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(batch, *shape, generator=generator), torch.randint(7, (batch,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.extra("executorch")
@pytest.mark.parametrize("kind", ["last", "sparse"])
def test_steps_agree_with_torch(network, tmp_path, kind):
    plain, shape = network
    layers = [n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d)]
    updates = {head(plain): FULL}
    if kind == "sparse":
        updates |= {layers[-1]: Update(1.0), layers[-1].rpartition(".")[0]: Update(0.0, True)}
    path = export_trainable(plain, shape, tmp_path / "train.pte", updates, batch=8)
    trainer = DeviceTrainer(path, lr=0.05, momentum=0.9)
    reference = copy.deepcopy(plain)
    for name, module in reference.named_modules():
        (update,) = layer_updates([name], updates)
        for which, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(update.bias if which == "bias" else update.weights == 1)
    trained = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD(trained.values(), 0.05, momentum=0.9)
    for x, labels in _batches(shape, 6):
        loss = F.cross_entropy(reference(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        assert trainer.step(x, labels) == pytest.approx(loss.item(), rel=1e-4)
    found = trainer.parameters()
    assert found.keys() == trained.keys()
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        moved = (parameter.detach() - plain.get_parameter(name)).abs().max()
        assert (found[name] - parameter.detach()).abs().max() < 0.01 * moved


@pytest.mark.extra("executorch")
def test_what_cannot_be_trained_there_is_told(network, tmp_path):
    plain, shape = network
    path = tmp_path / "x.pte"
    for updates, message in (
        ({"nowhere": FULL}, "no module 'nowhere'"),
        ({head(plain): Update(0.5)}, "trains in part"),
        ({head(plain): Update()}, "nothing trains"),
    ):
        with pytest.raises(UserError, match=message):
            export_trainable(plain, shape, path, updates)
    pooled = nn.Sequential(nn.Conv2d(6, 8, 1), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(8 * 64, 7))
    with pytest.raises(UserError, match="cannot be trained by ExecuTorch"):
        export_trainable(pooled, shape, path, {"": FULL})
    assert not path.exists()
    with pytest.raises(UserError, match="cannot be read"):
        DeviceTrainer(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no program of ExecuTorch"):
        DeviceTrainer(path)


@pytest.mark.extra("executorch")
def test_a_loss_that_is_not_finite_teaches_nothing(network, tmp_path):
    plain, shape = network
    trainer = DeviceTrainer(export_trainable(plain, shape, tmp_path / "train.pte"), lr=0.05)
    (x, labels), (other, _) = _batches(shape, 2)
    trainer.step(x, labels)
    before = trainer.parameters()
    with pytest.raises(UserError, match="the loss is nan"):
        trainer.step(torch.full_like(other, float("nan")), labels)
    for name, value in trainer.parameters().items():
        assert torch.equal(value, before[name])
    with pytest.raises(UserError, match="does not fit the program"):
        trainer.step(other[:, :, :, :64], labels)
