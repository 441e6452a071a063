"""The accuracy predictor on a synthetic supernet: ranks, coverage, and what must not break it."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import kendalltau

from predictors.accuracy import AccuracyPredictor
from predictors.counts import Count
from search_spaces import UserError, load_space


@pytest.fixture(scope="module")
def quickstart():
    return load_space("quickstart", in_channels=1, num_classes=10)


def accuracy_of(space, archs, noise=0.002, seed=0):
    """Saturating in log MACs, with a share of every knob, a few interactions and noise: in the manner of a supernet."""
    rng = np.random.default_rng(11)
    x = space.features(archs).astype(float)
    macs = np.log(Count("macs").bind(space).predict(archs).mean)
    pairs = rng.integers(x.shape[1], size=(30, 2))
    value = 0.9 - 0.08 * np.exp(-1.2 * (macs - 14.0)) + x @ rng.normal(size=x.shape[1]) * 0.002
    value += (x[:, pairs[:, 0]] * x[:, pairs[:, 1]]) @ rng.normal(size=30) * 0.002
    return value + np.random.default_rng(seed).normal(size=len(archs)) * noise


@pytest.fixture(scope="module")
def fitted(quickstart):
    archs = quickstart.sample(100, np.random.default_rng(0))
    return AccuracyPredictor(quickstart).fit(archs, accuracy_of(quickstart, archs))


def test_ranks_unseen_architectures_and_knows_how_well(quickstart, fitted):
    archs = quickstart.sample(1000, np.random.default_rng(1))
    truth = accuracy_of(quickstart, archs, seed=1)
    estimate = fitted.predict(archs)
    tau = kendalltau(estimate.mean, truth).statistic
    assert tau > 0.6
    assert fitted.report["samples"] == 100
    assert fitted.report["kendall_tau"] == pytest.approx(tau, abs=0.12)
    assert fitted.report["mae"] == pytest.approx(np.abs(estimate.mean - truth).mean(), rel=0.4)
    inside = (estimate.quantile(0.05) <= truth) & (truth <= estimate.quantile(0.95))
    assert 0.8 <= inside.mean() <= 0.98
    assert 0.8 <= fitted.report["coverage_90"] <= 0.98
    json.dumps(fitted.report)


def test_residuals_of_a_fold_do_not_set_the_interval_that_it_is_counted_with(quickstart):
    archs = quickstart.sample(20, np.random.default_rng(0))
    rows = np.random.default_rng(0).permutation(20)
    values = np.zeros(20)
    # A fold without any spread expects the other to have none either, and is far off.
    values[rows[1::2]] = np.random.default_rng(1).normal(size=10)
    report = AccuracyPredictor(quickstart, folds=2).fit(archs, values).report
    assert report["coverage_90"] == 0.5


def test_more_samples_rank_better(quickstart, fitted):
    archs = quickstart.sample(600, np.random.default_rng(2))
    more = AccuracyPredictor(quickstart).fit(archs, accuracy_of(quickstart, archs))
    assert more.report["kendall_tau"] > fitted.report["kendall_tau"]
    assert more.report["mae"] < fitted.report["mae"]


def test_fits_are_deterministic_and_do_not_touch_the_global_seed(quickstart, fitted):
    archs = quickstart.sample(100, np.random.default_rng(0))
    state = torch.get_rng_state()
    again = AccuracyPredictor(quickstart).fit(archs, accuracy_of(quickstart, archs))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.report == fitted.report
    np.testing.assert_array_equal(again.predict(archs).mean, fitted.predict(archs).mean)
    np.testing.assert_array_equal(again.predict(archs).std, fitted.predict(archs).std)


def test_predictions_do_not_depend_on_company(quickstart, fitted):
    archs = quickstart.sample(64, np.random.default_rng(3))
    alone = np.concatenate([fitted.predict(a[None]).mean for a in archs])
    np.testing.assert_allclose(fitted.predict(archs).mean, alone, atol=1e-6)
    assert len(fitted.predict(archs[:0]).mean) == 0


def test_populations_are_fast(quickstart, fitted):
    archs = quickstart.sample(1000, np.random.default_rng(3))
    fitted.predict(archs)
    times = []
    for _ in range(5):
        start = time.process_time()
        fitted.predict(archs)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


def test_saved_models_predict_alike(quickstart, fitted, tmp_path):
    archs = quickstart.sample(50, np.random.default_rng(4))
    file = tmp_path / "accuracy.safetensors"
    fitted.save(file)
    assert [p.name for p in tmp_path.iterdir()] == ["accuracy.safetensors"]
    loaded = AccuracyPredictor.load(file, quickstart)
    assert loaded.report == fitted.report
    np.testing.assert_array_equal(loaded.predict(archs).mean, fitted.predict(archs).mean)
    np.testing.assert_array_equal(loaded.predict(archs).std, fitted.predict(archs).std)
    with pytest.raises(UserError, match="another space"):
        AccuracyPredictor.load(file, load_space("mobile96"))


def test_files_that_are_no_predictor_are_named(quickstart, tmp_path):
    missing, garbage, other = (tmp_path / name for name in ("missing", "garbage", "other"))
    garbage.write_bytes(b"not a tensor in sight")
    save_file({"a": torch.zeros(2)}, other)
    for file, message in ((missing, "cannot be read"), (garbage, "cannot be read"), (other, "no accuracy predictor")):
        with pytest.raises(UserError, match=f"{file.name}: .*{message}"):
            AccuracyPredictor.load(file, quickstart)


@pytest.mark.parametrize("value", [0.7, 0.0])
def test_constant_targets_are_predicted_as_they_are(space, value):
    archs = space.sample(30, np.random.default_rng(0))
    predictor = AccuracyPredictor(space).fit(archs, np.full(30, value))
    estimate = predictor.predict(archs)
    np.testing.assert_allclose(estimate.mean, value, atol=1e-6)
    assert np.isfinite(estimate.std).all()
    assert predictor.report["kendall_tau"] == 0.0


def test_any_unit_will_do(space):
    archs = np.unique(space.sample(80, np.random.default_rng(0)), axis=0)
    small = AccuracyPredictor(space).fit(archs, accuracy_of(space, archs)).predict(archs)
    large = AccuracyPredictor(space).fit(archs, 1e6 * accuracy_of(space, archs)).predict(archs)
    np.testing.assert_allclose(large.mean, 1e6 * small.mean, rtol=1e-5)
    np.testing.assert_allclose(large.std, 1e6 * small.std, rtol=1e-3)


def test_expected_equals_predict_for_certain_choices_and_has_gradients(quickstart, fitted):
    for arch in quickstart.sample(5, np.random.default_rng(5)):
        certain = [
            torch.nn.functional.one_hot(torch.tensor(int(c)), len(k.choices)).double()
            for c, k in zip(arch, quickstart.knobs, strict=True)
        ]
        assert float(fitted.expected(certain)) == pytest.approx(fitted.predict(arch[None]).mean[0], abs=1e-5)
    logits = [torch.zeros(len(k.choices), requires_grad=True) for k in quickstart.knobs]
    fitted.expected([v.softmax(0) for v in logits]).backward()
    assert all(v.grad is not None and v.grad.abs().sum() > 0 for v in logits)


def test_bad_samples_are_refused(space):
    archs = space.sample(20, np.random.default_rng(0))
    values = np.linspace(0.5, 0.9, 20)
    predictor = AccuracyPredictor(space)
    with pytest.raises(UserError, match="at least 10 samples, got 5"):
        predictor.fit(archs[:5], values[:5])
    with pytest.raises(UserError, match="not finite"):
        predictor.fit(archs, np.where(values > 0.8, np.nan, values))
    with pytest.raises(UserError, match="20 architectures"):
        predictor.fit(archs, values[:-1])
    with pytest.raises(UserError, match="not fitted"):
        predictor.predict(archs)
    with pytest.raises(UserError, match="folds must be at least 2"):
        AccuracyPredictor(space, folds=1)
