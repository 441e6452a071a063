"""The supernet as an evaluator: deterministic, order-free, and never stopped by one bad row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nasbench.evaluators.base import Proposals, Status
from nasbench.evaluators.supernet import SupernetEvaluator
from nasbench.training import evaluate_network, sandwich_ends
from search_spaces import UserError


def proposals(archs, **fidelity):
    return Proposals(np.arange(len(archs)), archs, {k: np.array(v) for k, v in fidelity.items()})


@pytest.fixture
def evaluator(space, task, trained):
    return SupernetEvaluator(space, task, trained, calibration_images=200, validation_images=200)


def test_values_do_not_depend_on_order_or_company(evaluator, space, task, trained):
    archs = space.sample(5, np.random.default_rng(0))
    together = evaluator.evaluate(proposals(archs))
    assert (together.status == Status.OK).all()
    assert (together.seconds > 0).all()
    for rows in ([4, 3, 2, 1, 0], [2]):
        other = SupernetEvaluator(space, task, trained, calibration_images=200, validation_images=200)
        np.testing.assert_array_equal(other.evaluate(proposals(archs[rows])).values, together.values[rows])


def test_what_is_known_is_not_judged_again_until_the_weights_change(space, task, trained, monkeypatch):
    judged = []

    def judge(supernet, arch, *others):
        judged.append(arch)
        return 0.1 * len(judged)

    monkeypatch.setattr("nasbench.evaluators.supernet.subnet_accuracy", judge)
    evaluator = SupernetEvaluator(space, task, trained, calibration_images=200, validation_images=200)
    archs = np.unique(space.sample(20, np.random.default_rng(0)), axis=0)[:3]
    first = evaluator.evaluate(proposals(archs)).values
    np.testing.assert_array_equal(evaluator.evaluate(proposals(archs)).values, first)
    assert len(judged) == 3
    evaluator.evaluate(proposals(archs[:1], images=[50]))
    assert len(judged) == 4
    with torch.no_grad():
        next(trained.parameters()).mul_(1.0)
    evaluator.evaluate(proposals(archs[:2]))
    assert len(judged) == 6


def test_the_value_is_that_of_the_extracted_network(space, task, trained):
    evaluator = SupernetEvaluator(space, task, trained)
    for arch in space.sample(3, np.random.default_rng(1)):
        network = evaluator.extract(arch)
        value = evaluator.evaluate(proposals(arch[None])).values[0, 0]
        assert evaluate_network(network, task, "val", network.input_shape) == pytest.approx(value, abs=0.0051)


def test_the_fidelity_images_takes_fewer_validation_images(evaluator, space):
    _, largest = sandwich_ends(space)
    result = evaluator.evaluate(proposals(np.stack([largest] * 2), images=[50, 200]))
    counts = result.values[:, 0] * [50, 200]
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-9)
    assert result.values[1, 0] == evaluator.evaluate(proposals(largest[None])).values[0, 0]


def test_a_bad_row_gets_a_status_and_the_others_their_values(space, task, trained):
    class Moody(type(trained)):
        def calibrate(self, arch, batches):
            if arch[1] == 0:
                raise RuntimeError("no kernel of one today")
            return super().calibrate(arch, batches)

    moody = Moody()
    moody.load_state_dict(trained.state_dict())
    with torch.no_grad():
        moody.depthwise[1].fill_(float("nan"))  # every architecture of depth 2
    archs = np.array([[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=space.dtype)
    result = SupernetEvaluator(space, task, moody, validation_images=100).evaluate(proposals(archs))
    assert result.status.tolist() == [Status.OK, Status.FAILED, Status.FAILED]
    assert np.isnan(result.values[:, 0]).tolist() == [False, True, True]
    assert "no kernel of one today" in result.messages[1]
    assert "not finite" in result.messages[2]


@pytest.mark.parametrize("key", ["calibration_images", "validation_images", "batch_size"])
def test_values_out_of_range_are_named(space, task, trained, key):
    with pytest.raises(UserError, match=f"evaluator.{key} = -1"):
        SupernetEvaluator(space, task, trained, **{key: -1})
