"""The page on tasks: its example is a task that an experiment can name, and that networks learn."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from nasbench.config import load_config
from nasbench.plan import make_plan
from nasbench.registry import REGISTRY, resolve
from nasbench.training import evaluate_network, train_network, train_supernet
from search_spaces import UserError

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()


def block(language: str) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[0]


def test_the_task_of_the_page_can_be_named_and_learnt(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (tmp_path / "spirals.py").write_text(block("python"))
    (tmp_path / "e.toml").write_text(block("toml"))
    task = make_plan(load_config(tmp_path / "e.toml"), tmp_path).task
    assert (task.name, task.input_shape, task.num_classes) == ("spirals", (1, 16, 16), 2)
    assert not task.augments
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 9, 2),
    )  # fmt: skip
    train_network(network, task, task.input_shape, epochs=6, batch_size=32, lr=0.05)
    assert evaluate_network(network, task, "val", task.input_shape) > 0.8
    (tmp_path / "e.toml").write_text(block("toml").replace("noise", "nose"))
    with pytest.raises(UserError, match=r"unknown key 'nose'. Did you mean 'noise'"):
        make_plan(load_config(tmp_path / "e.toml"), tmp_path)


def test_the_page_lists_every_task_with_its_keys() -> None:
    for name in REGISTRY["task"]:
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        keys = [p.name for p in inspect.signature(resolve("task", name)).parameters.values()]
        assert re.findall(r"`(\w+)`", row.split("|")[3]) == keys


def test_the_page_names_keys_of_training_that_there_are() -> None:
    known = {*inspect.signature(train_supernet).parameters, "tensorboard"}
    section = PAGE[PAGE.index("## How a supernet") :]
    for line in section.splitlines():
        if line.startswith("| `"):
            assert set(re.findall(r"`(\w+)`", line.split("|")[1])) <= known
