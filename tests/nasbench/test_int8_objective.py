"""Accuracy after int8 quantisation, as an objective."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nasbench.config import parse_config
from nasbench.evaluators.base import Proposals, Status
from nasbench.evaluators.supernet_int8 import QuantisedSupernetEvaluator
from nasbench.plan import make_plan
from nasbench.tasks.fashion_mnist import FashionMNIST
from search_spaces import UserError, load_space


def test_both_accuracies_of_the_same_network(tiny_space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    space = load_space(str(tiny_space), 1, 10)
    evaluator = QuantisedSupernetEvaluator(
        space, FashionMNIST(), space.supernet(), calibration_images=100, validation_images=200
    )
    archs = space.sample(2, np.random.default_rng(0))
    found = evaluator.evaluate(Proposals(np.arange(2), archs))
    assert evaluator.metrics == ("accuracy", "accuracy_int8")
    assert (found.status == Status.OK).all()
    assert (np.abs(found.values[:, 0] - found.values[:, 1]) < 0.2).all()

    def broken(*_: object) -> None:
        raise UserError("cannot be quantised")

    monkeypatch.setattr(evaluator.stage, "run", broken)
    failed = evaluator.evaluate(Proposals(np.arange(2), archs))
    assert (failed.status == Status.FAILED).all()
    assert np.isnan(failed.values).all()
    assert "cannot be quantised" in failed.messages[0]


def test_it_needs_the_evaluator_that_gives_it(tiny_space: Path) -> None:
    given = {"space": {"name": str(tiny_space)}, "objectives": {"accuracy_int8": {}, "macs": {}}}
    with pytest.raises(UserError, match="nothing gives the metric 'accuracy_int8'"):
        make_plan(parse_config(given))
    plan = make_plan(parse_config(given | {"evaluator": {"name": "supernet_int8"}}))
    assert [o.name for o in plan.predicted] == ["macs"]
