"""What an interval promises."""

import numpy as np
import pytest

from predictors.base import Estimate


@pytest.mark.parametrize("log_std", [0.05, 0.5, 1.0])
def test_relative_errors_leave_both_tails_of_an_interval_equally_often(log_std):
    rng = np.random.default_rng(0)
    predicted = rng.uniform(1.0, 50.0, 40_000)
    measured = predicted * np.exp(rng.normal(0.0, log_std, len(predicted)))
    estimate = Estimate.relative(predicted, log_std)
    assert np.mean(measured < estimate.quantile(0.05)) == pytest.approx(0.05, abs=0.005)
    assert np.mean(measured > estimate.quantile(0.95)) == pytest.approx(0.05, abs=0.005)
    np.testing.assert_allclose(estimate.quantile(0.5), predicted)


def test_exact_values_have_no_interval():
    exact = Estimate(np.array([2.0, 3.0]), np.zeros(2))
    np.testing.assert_array_equal(exact.quantile(0.05), exact.quantile(0.95))
