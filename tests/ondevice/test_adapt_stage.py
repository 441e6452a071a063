"""Learning on the device as a stage of an experiment."""

from __future__ import annotations

import json

import pytest
import torch

from nasbench.stages.adapt import Adapt
from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.tasks.smartwatch import SmartwatchExercises
from nasbench.training.evaluation import evaluate_network
from nasbench.training.network import train_network
from search_spaces import UserError, load_space


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
