import json

import numpy as np
import pytest

from predictors import OperatorModel
from predictors.operator_model import FEATURES, network_totals
from search_spaces import SearchSpace, UserError, load_space

# ms per unit; about those of a desktop CPU core.
TRUE = np.array([1.5e-8, 2e-8, 9e-8, 8e-8, 7e-8, 5e-8, 7e-8, 3e-8, 2e-8, 3e-7, 1e-7, 6e-8, 1e-3, 4e-3])


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("mobile96")


@pytest.fixture(scope="module")
def totals(space: SearchSpace) -> np.ndarray:
    """Operator totals of 400 networks."""
    return network_totals([space.workload(a) for a in space.sample(400, np.random.default_rng(0))])


def within(model: OperatorModel, totals: np.ndarray, truth: np.ndarray, share: float) -> float:
    return float(np.mean(np.abs(model.head(totals) / truth - 1) <= share))


def test_a_linear_truth_is_found_from_32_networks(totals: np.ndarray) -> None:
    truth = totals @ TRUE + 0.02
    model = OperatorModel.fit_totals(totals[:32], truth[:32])
    assert within(model, totals[32:], truth[32:], 0.02) == 1
    assert min(model.weights) >= 0


def test_coefficients_are_recovered_where_the_features_are_independent() -> None:
    rng = np.random.default_rng(1)
    totals = rng.exponential(1 / TRUE, size=(200, len(FEATURES)))
    model = OperatorModel.fit_totals(totals, totals @ TRUE + 0.5)
    np.testing.assert_allclose(model.weights, TRUE, rtol=0.01)
    assert model.numbers.offset_ms == pytest.approx(0.5, rel=0.05)


def test_the_90_percent_interval_covers_90_percent_of_unseen_networks(totals: np.ndarray) -> None:
    truth = totals @ TRUE + 0.02
    covered, widths = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        measured = truth * np.exp(rng.normal(0, 0.05, len(truth)))
        order = rng.permutation(len(truth))
        seen, unseen = order[:32], order[32:]
        model = OperatorModel.fit_totals(totals[seen], measured[seen])
        estimate = model.around(model.head(totals[unseen]))
        low, high = estimate.quantile(0.05), estimate.quantile(0.95)
        covered.append(np.mean((measured[unseen] >= low) & (measured[unseen] <= high)))
        widths.append(model.numbers.log_std)
    assert 0.88 <= np.mean(covered) <= 0.99
    assert np.median(widths) < 0.1  # covers without being vacuous


def test_a_quarter_of_disturbed_measurements_does_no_harm(totals: np.ndarray) -> None:
    truth = totals @ TRUE + 0.02
    for seed in range(5):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(truth))
        measured = truth[order[:32]] * np.where(rng.random(32) < 0.25, rng.uniform(1.2, 1.6, 32), 1.0)
        model = OperatorModel.fit_totals(totals[order[:32]], measured)
        assert within(model, totals[order[32:]], truth[order[32:]], 0.1) > 0.95


def test_a_saved_model_predicts_to_the_same_bits(space: SearchSpace, totals: np.ndarray) -> None:
    truth = totals @ TRUE * np.exp(np.random.default_rng(0).normal(0, 0.03, len(totals)))
    model = OperatorModel.fit_totals(totals[:32], truth[:32])
    again = OperatorModel.from_dict(json.loads(json.dumps(model.to_dict())))
    archs = space.sample(50, np.random.default_rng(5))
    a, b = model.bind(space).predict(archs), again.bind(space).predict(archs)
    assert (a.mean == b.mean).all()
    assert (a.std == b.std).all()


def test_beyond_what_was_measured_the_spread_grows_and_a_warning_says_so(space: SearchSpace) -> None:
    archs = space.sample(100, np.random.default_rng(6))
    workloads = [space.workload(a) for a in archs]
    y = network_totals(workloads) @ TRUE
    order = np.argsort(y)
    model = OperatorModel.fit([workloads[i] for i in order[:40]], y[order[:40]])
    inside, outside = model.bind(space).predict(archs[order[:10]]), model.bind(space).predict(archs[order[-10:]])
    assert not inside.warning
    assert "10 of 10 networks lie outside the calibrated" in outside.warning
    assert (outside.std / outside.mean).min() > (inside.std / inside.mean).max()
    assert (np.diff(outside.std / outside.mean) > 0).all()


def test_operators_that_no_calibration_network_had_raise_a_warning(space: SearchSpace, published: dict) -> None:
    plain = [published["MobileNetV2 1.0"](r) for r in range(32, 225, 16)]
    model = OperatorModel.fit(plain, network_totals(plain) @ TRUE)
    assert not model.predict(plain[3:5]).warning
    assert "activation_values" in model.bind(space).predict(space.sample(3, np.random.default_rng(0))).warning


@pytest.mark.parametrize(
    ("latencies", "message"),
    [([1.0] * 7, "at least 8"), ([1.0] * 9 + [0.0], "got 0.0 ms"), ([1.0] * 9 + [np.nan], "got nan ms")],
)
def test_measurements_that_are_none_are_refused(totals: np.ndarray, latencies: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OperatorModel.fit_totals(totals[: len(latencies)], latencies)


def test_a_model_of_another_version_is_refused(totals: np.ndarray) -> None:
    values = OperatorModel.fit_totals(totals[:32], totals[:32] @ TRUE).to_dict()
    with pytest.raises(UserError, match="another version"):
        OperatorModel.from_dict({**values, "features": ["a"]})
    with pytest.raises(UserError, match=r"unknown key 'ofset_ms'.*'offset_ms'"):
        OperatorModel.from_dict({**values, "ofset_ms": 1})
