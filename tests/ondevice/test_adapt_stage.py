"""Learning on the device as a stage of an experiment."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from hardware_profiles import converter_for, load_target
from nasbench.config import parse_config
from nasbench.experiment import run_experiment
from nasbench.ondevice.methods import LiteResidual
from nasbench.stages.adapt import Adapt
from nasbench.stages.artifacts import run_artifact
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.stages.structure import load_network, save_network
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.tasks.smartwatch import SmartwatchExercises
from nasbench.training.evaluation import batches, evaluate_network
from nasbench.training.network import train_network
from search_spaces import UserError, load_space, read_onnx, trace


@pytest.fixture(scope="module")
def trained():
    task = SmartwatchExercises()
    space = load_space("sensor_1d", 6, 7)
    torch.manual_seed(0)
    network = space.build(space.references["smallest"])
    train_network(network, task, space.input_shape, epochs=2, batch_size=64, lr=0.1)
    return task, space, network


@pytest.mark.parametrize("method", ["bias", "sparse"])
def test_a_network_learns_a_person_within_its_budget(trained, tmp_path, method):
    task, space, network = trained
    person = task.persons["val"][0]
    context = StageContext(task, space, tmp_path, seed=0, input_shape=space.input_shape)
    stage = Adapt(method=method, person=person, epochs=1 if method == "sparse" else 3, budget_kb=64, lr=0.03)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    adapted = stage.run(Candidate("net", None, Form.FLOAT, network), context).network
    own = task.of_person(person)
    if method == "bias":
        right = [evaluate_network(n, own, "val", space.input_shape) for n in (network, adapted)]
        assert right[1] > right[0]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert adapted.state_dict().keys() == before.keys()
    said = json.loads((tmp_path / "net-adapt.json").read_text())
    assert 0 < said["training_memory_bytes"] <= 64 * 1024
    assert len(said["history"]) == stage.epochs
    changed = {n for n, value in adapted.state_dict().items() if not torch.equal(value, before[n])}
    assert changed
    if method == "sparse":  # no more than was chosen
        assert all(any(name.startswith(chosen) for chosen in said["updates"]) for name in changed)


def test_lite_residuals_are_part_of_the_network_that_is_kept_and_exported(trained, tmp_path):
    task, space, network = trained
    person = task.persons["val"][0]
    context = StageContext(task, space, tmp_path, seed=0, input_shape=space.input_shape)
    stage = Adapt(method="lite_residual", person=person, epochs=2, lr=0.03)
    first = stage.run(Candidate("net", None, Form.FLOAT, network), context)
    branches = [name for name, module in first.network.named_modules() if isinstance(module, LiteResidual)]
    assert branches
    assert first.notes[0].startswith(f"adapt added {len(branches)} lite residuals with ")
    assert all(bool(first.network.get_submodule(f"{name}.lite.4").weight.any()) for name in branches), "all learned"
    again = stage.run(first, context)
    assert again.notes == (), "a network that has them trains those"
    images = task.of_person(person).split("val").images[:4]
    x = next(batches(task, images, 4, space.input_shape))

    fresh = space.build(space.references["smallest"])
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    save_network(tmp_path / "net.safetensors", again.network, fresh)
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items()), "only looked at"
    restored = load_network(tmp_path / "net.safetensors", fresh).eval()
    torch.testing.assert_close(restored(x), again.network(x), rtol=0, atol=0)
    with pytest.raises(UserError, match="of another network: this one has no module"):
        load_network(tmp_path / "net.safetensors", nn.Sequential(nn.Linear(2, 2)))

    host = load_target("host")
    file = converter_for(host).convert(restored, host, space.input_shape, tmp_path / "net.onnx")
    np.testing.assert_allclose(run_artifact(file, task, images), restored(x).detach().numpy(), atol=1e-4)
    wider, plain = trace(restored, space.input_shape), trace(network, space.input_shape)
    assert read_onnx(file.path).macs == wider.macs > plain.macs


def test_a_run_adapts_with_lite_residuals_and_finds_them_again(tmp_path):
    experiment = {
        "task": {"name": "smartwatch"},
        "networks": {"net": {"source": "sensor_1d:smallest"}},
        "stages": [
            {"name": "adapt", "method": "lite_residual", "epochs": 1, "batch_size": 64},
            {"name": "quantize", "images": 32},
        ],
    }
    view = run_experiment(parse_config(experiment), tmp_path / "run")
    rows = view.stages()
    assert rows["stage"].tolist() == ["given", "adapt", "quantize"]
    assert rows["macs"][1] > rows["macs"][0]
    assert rows["latency_ms@host:fp32"].notna().all()
    assert "lite residuals" in rows["note"][1]
    again = run_experiment(parse_config(experiment), tmp_path / "run", resume=True).stages()
    pd.testing.assert_frame_equal(again, rows)
    space = load_space("sensor_1d", 6, 7)
    weights = tmp_path / "run" / "stages" / "net" / "1-adapt.safetensors"
    made = load_network(weights, space.build(space.references["smallest"]))
    assert trace(made, space.input_shape).macs == rows["macs"][1]


def test_what_a_device_has_no_memory_for_is_refused(trained, tmp_path):
    task, space, network = trained
    context = StageContext(task, space, tmp_path, seed=0, input_shape=space.input_shape)
    candidate = Candidate("net", None, Form.FLOAT, network)
    with pytest.raises(UserError, match=r"budget_kb = 4: training 'net' by method 'full' takes \d+ KB at batch 8"):
        Adapt(method="full", budget_kb=4).run(candidate, context)
    with pytest.raises(UserError, match="budget_kb is missing"):
        Adapt(method="sparse")
    with pytest.raises(UserError, match="budget_kb = 0"):
        Adapt(budget_kb=0)
    images = StageContext(FashionMNIST(), space, tmp_path, seed=0, input_shape=space.input_shape)
    with pytest.raises(UserError, match="task 'fashion_mnist' has no people's recordings"):
        Adapt(person=3).run(candidate, images)
    assert not list(tmp_path.iterdir())
