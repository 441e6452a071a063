"""What Bayesian optimisation believes and expects, held against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from nasbench.pareto import hypervolume
from nasbench.strategies.acquisition import ExpectedImprovement
from nasbench.strategies.bayesian import BayesianOptimization, _linked_limits
from nasbench.strategies.random_search import RandomSearch
from nasbench.strategies.surrogate import DescriptorKernel, Encoding, KnobKernel, Process, Surrogate, Warp
from search_spaces import NASBench201Space


def objective(space, archs):
    """A sum over knobs with one interaction."""
    x = space.features(archs).astype(float)
    weights = np.random.default_rng(3).normal(size=x.shape[1])
    return x @ weights + 3 * x[:, 0] * x[:, -1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_expected_improvement_is_the_mean_growth_of_hypervolume(size):
    rng = np.random.default_rng(size)
    front, reference = rng.random((6, size)), np.full(size, 1.1)
    points, weights = rng.random((12, size, 3)) * 0.8, np.array([0.2, 0.3, 0.5])
    found = ExpectedImprovement(front, reference, rng)([points[:, m] for m in range(size)], [weights] * size)
    if size == 1:
        reference = front.min(axis=0)  # without volume: improvement on the best
    before = hypervolume(front, reference) if size > 1 else 0.0
    expected = np.zeros(12)
    for index in np.ndindex(*[3] * size):
        value = np.stack([points[:, m, i] for m, i in enumerate(index)], axis=1)
        grown = [hypervolume(np.vstack([front, row]) if size > 1 else row[None], reference) for row in value]
        expected += np.prod(weights[list(index)]) * (np.array(grown) - before)
    if size < 3:
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    else:  # random directions stand for it: the order counts
        assert np.corrcoef(found, expected)[0, 1] > 0.9


def test_known_values_are_points_of_their_own():
    improvement = ExpectedImprovement(np.array([[0.5, 0.5]]), np.ones(2), np.random.default_rng(0))
    found = improvement(
        [np.array([[0.2], [0.8]]), np.array([[0.4, 0.6], [0.6, 0.7]])], [np.ones(1), np.array([0.5, 0.5])]
    )
    # (0.2, 0.4): 0.8 x 0.6 - 0.25; (0.2, 0.6): 0.3 x 0.4; the second is dominated
    np.testing.assert_allclose(found, [0.5 * (0.48 - 0.25) + 0.5 * 0.12, 0.0], atol=1e-12)


def test_an_improvement_that_was_made_is_not_expected_again():
    improvement = ExpectedImprovement(np.empty((0, 2)), np.ones(2), np.random.default_rng(0))
    points, weights = [np.array([[0.5]]), np.array([[0.5]])], [np.ones(1)] * 2
    assert improvement(points, weights)[0] == pytest.approx(0.25)
    improvement.add(np.array([[0.5, 0.5], [2.0, 0.1]]))
    assert improvement(points, weights)[0] == 0


@pytest.mark.parametrize("kind", [KnobKernel, DescriptorKernel])
def test_the_gradient_of_the_hyper_parameters_is_that_of_the_loss(kind):
    space = NASBench201Space()
    encoding = Encoding(space)
    archs = space.sample(25, np.random.default_rng(0))
    kernel, x = kind(encoding), encoding.columns(archs)
    z = Warp.of(objective(space, archs), bend=True)(objective(space, archs))
    theta = kernel.prior[0] + 0.3
    error = check_grad(lambda t: kernel.loss(t, x, z)[0], lambda t: kernel.loss(t, x, z)[1], theta, epsilon=1e-3)
    assert error < 0.05 * np.linalg.norm(kernel.loss(theta, x, z)[1])


def test_covariances_of_descriptors_are_those_of_their_distances():
    space = NASBench201Space()
    encoding = Encoding(space)
    archs = space.sample(6, np.random.default_rng(0))
    kernel, x = DescriptorKernel(encoding), encoding.columns(archs)
    theta = np.log([0.5, 1.0, 2.0, 3.0, 0.7, 1.5, 0.01])
    expected = np.zeros((6, 6))
    for group, size, length in zip(space.descriptors(archs), (0.5, 2.0, 0.7), (1.0, 3.0, 1.5), strict=True):
        distance = np.linalg.norm(group[:, None] - group, axis=2)
        expected += size * np.exp(-0.5 * (distance / length) ** 2)
    np.testing.assert_allclose(sum(kernel.cross(theta, x, x)), expected, rtol=1e-5)
    assert kernel.variance(theta) == pytest.approx(expected[0, 0])


def test_an_ensemble_finds_what_an_objective_depends_on():
    space, rng = NASBench201Space(), np.random.default_rng(0)
    encoding, archs = Encoding(space), NASBench201Space().sample(120, rng)
    alive = space.descriptors(archs)[1].astype(float)
    for values, wanted in (
        (objective(space, archs), KnobKernel),
        (-np.tanh(alive[:, 0] + alive[:, 3]), DescriptorKernel),
    ):
        surrogate = Surrogate(encoding)
        surrogate.fit(encoding.columns(archs), values, refit=True, rows=np.arange(60))
        assert sum(share for share, process in surrogate.members if isinstance(process.kernel, wanted)) > 0.9


@pytest.mark.parametrize("bend", [False, True])
def test_warps_are_monotone_and_invertible(bend):
    values = np.random.default_rng(0).exponential(size=50) * 7 - 3
    warp = Warp.of(values, bend)
    np.testing.assert_allclose(warp.inverse(warp(values)), values, atol=1e-9)
    assert (np.diff(warp(np.sort(values))) > 0).all()
    step = 1e-6
    slope = (warp(values + step) - warp(values - step)) / (2 * step)
    np.testing.assert_allclose(warp.log_slope(values), np.log(slope), atol=1e-3)
    assert np.isfinite(Warp.of(np.full(5, 2.0), bend)(np.full(5, 2.0))).all()


def test_left_out_densities_are_those_of_processes_fitted_without(space):
    encoding = Encoding(space)
    archs = np.unique(space.sample(12, np.random.default_rng(1)), axis=0)
    kernel, x, values = KnobKernel(encoding), encoding.columns(archs), objective(space, archs)
    warp = Warp.of(values, bend=False)
    theta = kernel.prior[0]
    whole = Process.fit(kernel, theta, warp, x, values)
    total = 0.0
    for i in range(len(values)):
        rest = Process.fit(kernel, theta, warp, np.delete(x, i, 0), np.delete(values, i))
        mean, cross = rest.mean(x[i : i + 1])
        variance = kernel.variance(theta) - float((rest.whitened(cross) ** 2).sum()) + rest.noise
        z = (warp(values[i : i + 1]) - mean)[0]
        total += max(-0.5 * np.log(2 * np.pi * variance) - 0.5 * z**2 / variance, -8) - np.log(warp.scale)
    assert whole.score == pytest.approx(total, rel=1e-3)


def test_surrogates_predict_what_they_have_not_seen(space):
    encoding, rng = Encoding(space), np.random.default_rng(0)
    archs = np.unique(space.sample(200, rng), axis=0)
    rng.shuffle(archs)
    seen, unseen = archs[:80], archs[80:]
    surrogate = Surrogate(encoding)
    values = objective(space, seen)
    surrogate.fit(encoding.columns(seen), values, refit=True, rows=np.arange(80))
    posterior = surrogate.posterior(encoding.columns(unseen))
    mean = posterior.points() @ posterior.weights
    truth = objective(space, unseen)
    assert np.corrcoef(mean, truth)[0, 1] > 0.95
    spread = posterior.points().std(axis=1)
    posterior.choose(3)
    narrower = posterior.points().std(axis=1)
    assert narrower[3] < 0.7 * spread[3]
    assert (narrower <= spread + 1e-6).all()


def test_limits_are_recognised_where_an_objective_shows_them():
    values = np.random.default_rng(0).random((30, 2)) * 5
    tied = np.maximum((values[:, 1:] - 3.0) / 3.0, 0.0)
    other = np.maximum(np.random.default_rng(1).normal(size=(30, 1)), 0.0)
    limits, unlinked = _linked_limits(values, np.hstack([tied, other, np.zeros((30, 1))]))
    assert limits[0] == np.inf
    assert limits[1] == pytest.approx(3.0)
    assert unlinked == [1]


def test_free_objectives_are_looked_up_and_save_evaluations(space):
    def values(archs):
        cost = space.features(archs).astype(float) @ np.random.default_rng(5).random(space.features(archs).shape[1])
        return np.column_stack([objective(space, archs) - 2 * cost, cost])

    everything = space.everything()
    reference = values(everything).max(axis=0)
    asked = []

    def costs(archs):
        asked.append(len(archs))
        known = values(archs)
        known[:, 0] = np.nan
        return known

    def share(strategy):
        seen = []
        for _ in range(4):
            proposals = strategy.ask(8)
            seen.append(values(proposals.archs))
            strategy.tell(proposals, seen[-1], np.zeros((8, 0)), np.zeros(8, dtype=np.uint8))
        return hypervolume(np.concatenate(seen), reference) / hypervolume(values(everything), reference)

    informed = BayesianOptimization(space, 0)
    informed.use_costs(costs)
    assert share(informed) > 0.98 > share(RandomSearch(space, 0))
    assert sum(asked) > 1000
    assert set(informed._models) == {"0"}  # nothing was learned of what is known


def test_from_model_evaluations_on_it_breeds(space):
    strategy = BayesianOptimization(space, 0, model_evaluations=20)
    for n in (20, 500):
        proposals = strategy.ask(n)
        assert len(proposals) == n
        values = np.column_stack([objective(space, proposals.archs), proposals.archs.sum(axis=1)]).astype(float)
        strategy.tell(proposals, values, np.zeros((n, 0)), np.zeros(n, dtype=np.uint8))
    assert not strategy._models
    assert len(strategy.state_dict()["archs"]) == 20
