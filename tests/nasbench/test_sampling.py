"""Draws within hard limits: correct by enumeration on small spaces, fast where hardly anything is within."""

from __future__ import annotations

import numpy as np
import pytest

from nasbench.feasibility import check_limits
from nasbench.objectives import make_objective, violations
from nasbench.sampling import FeasibleSampler, limited_space, sample_feasible
from nasbench.strategies.nsga2 import NSGA2
from nasbench.strategies.random_search import RandomSearch
from predictors import predictor_for
from predictors.base import BoundPredictor, Estimate
from predictors.counts import Count
from search_spaces import UserError, load_space


class Product(BoundPredictor):
    """A cost that is no sum over blocks: how often choices differ from a hidden row, and by chance of others."""

    def __init__(self, space, scale=1.0):
        self.space, self.scale = space, scale

    def predict(self, archs):
        x = archs / np.maximum(self.space.cardinalities - 1, 1)
        return Estimate(self.scale * np.exp(x.sum(1) / 4) * (1 + x[:, 0] * x[:, -1]), np.full(len(archs), 0.1), True)

    def expected(self, probabilities):
        raise NotImplementedError


class NaNs(Product):
    """Which is no number for every other architecture."""

    def predict(self, archs):
        estimate = super().predict(archs)
        return Estimate(np.where(archs[:, 1] > 0, np.nan, estimate.mean), estimate.std, True)


def costs(space, *metrics):
    return {m: Count(m).bind(space) for m in metrics}


def test_without_spread_draws_are_the_spaces_own_within_the_limits(space):
    bound = costs(space, "macs", "params", "peak_memory_bytes")
    every = space.everything()
    limits = [
        make_objective(m, at_most=float(np.quantile(bound[m].predict(every).mean, q)))
        for m, q in (("macs", 0.2), ("params", 0.3), ("peak_memory_bytes", 0.5))
    ]
    sampler = FeasibleSampler(space, limits, bound)
    drawn = sampler.draw(40_000, np.random.default_rng(1), spread=False)
    plain = space.sample(200_000, np.random.default_rng(2))
    values = np.column_stack([bound[o.name].predict(plain).mean for o in limits])
    kept = plain[violations(values, limits).sum(1) == 0]
    assert sampler.share == pytest.approx(len(kept) / len(plain), rel=0.1)
    # The same frequencies of every choice of every knob.
    for k in range(len(space.knobs)):
        count = space.cardinalities[k]
        found, expected = (np.bincount(a[:, k], minlength=count) / len(a) for a in (drawn, kept))
        np.testing.assert_allclose(found, expected, atol=0.03)


def test_one_in_a_million_and_spread_over_the_costs():
    space = load_space("ofa_mobilenet_v3")
    bound = {"latency_ms": predictor_for("raspberry_pi_4", "latency_ms").bind(space)}
    limit = make_objective("latency_ms", target="raspberry_pi_4", limit=32.0)
    sampler = FeasibleSampler(space, [limit], bound)
    assert 1e-9 < sampler.share < 1e-5
    drawn = sampler.draw(2000, np.random.default_rng(0))
    latency = bound["latency_ms"].predict(drawn).mean
    tightest = check_limits(space, [limit], bound).reaches[0].tightest
    assert (latency <= 32.0).all()
    assert len(np.unique(drawn, axis=0)) > 1500
    room = (latency - tightest) / (32.0 - tightest)  # not all at either end
    assert (np.histogram(room, bins=4, range=(0, 1))[0] > 50).all()


@pytest.mark.parametrize("quantile", [None, 0.9])
def test_costs_that_do_not_add_up(space, quantile):
    bound = {"cost": Product(space)}
    every = bound["cost"].predict(space.everything())
    values = every.mean if quantile is None else every.quantile(quantile)
    limit = make_objective("cost", direction="minimise", limit=float(np.quantile(values, 0.01)), quantile=quantile)
    drawn = sample_feasible(space, 500, np.random.default_rng(0), [limit], bound)
    estimate = bound["cost"].predict(drawn)
    assert len(drawn) == 500
    assert ((estimate.mean if quantile is None else estimate.quantile(quantile)) <= limit.limit).all()
    assert len(np.unique(drawn, axis=0)) > 0.5 * (values <= limit.limit).sum()


def test_numbers_that_are_none_are_never_drawn(space):
    drawn = sample_feasible(
        space, 200, np.random.default_rng(0), [make_objective("cost", direction="minimise", limit=1.6)],
        {"cost": NaNs(space)},
    )  # fmt: skip
    assert (drawn[:, 1] == 0).all()


def test_blocks_taken_out_stay_out(space):
    bound = costs(space, "macs")
    blocked = np.array(["5x" in space.catalog[i].name for i in range(len(space.catalog))])
    restricted = space.without_blocks(blocked)
    limit = make_objective("macs", limit=float(np.median(bound["macs"].predict(space.everything()).mean)))
    for spread in (True, False):
        drawn = FeasibleSampler(restricted, [limit], bound).draw(500, np.random.default_rng(0), spread=spread)
        assert restricted.permits(drawn).all()
        assert (bound["macs"].predict(drawn).mean <= limit.limit).all()


def test_of_a_list_what_is_within_is_drawn(space):
    bound = costs(space, "macs")
    listed = space.only(space.everything()[::7])
    values = bound["macs"].predict(listed.listed.rows).mean
    limit = make_objective("macs", limit=float(np.quantile(values, 0.1)))
    report = check_limits(listed, [limit], bound)
    assert report.reaches[0].tightest == values.min()
    drawn = limited_space(listed, [limit], bound).sample(300, np.random.default_rng(0))
    assert listed.permits(drawn).all()
    assert (bound["macs"].predict(drawn).mean <= limit.limit).all()


def test_what_nothing_keeps_ends_with_an_error_and_not_in_a_loop(space):
    with pytest.raises(UserError, match="none of 2,000 architectures tried keeps the limits on cost"):
        FeasibleSampler(
            space, [make_objective("cost", direction="minimise", limit=1e-6)], {"cost": Product(space)}, budget=2000
        )


def test_a_single_architecture_is_found_and_repeated(space):
    bound = costs(space, "macs", "params")
    least = check_limits(space, [make_objective("macs", limit=1e12)], bound).reaches[0].tightest
    drawn = sample_feasible(space, 50, np.random.default_rng(0), [make_objective("macs", limit=least)], bound)
    assert (bound["macs"].predict(drawn).mean == least).all()


@pytest.mark.parametrize("kind", [RandomSearch, NSGA2])
def test_strategies_start_within_the_limits(kind):
    space = load_space("ofa_mobilenet_v3")
    bound = {"latency_ms": predictor_for("jetson_nano", "latency_ms").bind(space)}
    limit = make_objective("latency_ms", target="jetson_nano", limit=4.2)
    assert limited_space(space, [make_objective("latency_ms", target="jetson_nano")], bound) is space
    proposals = kind(limited_space(space, [limit], bound), 0).ask(100)
    assert (bound["latency_ms"].predict(proposals.archs).mean <= 4.2).all()
    again = kind(limited_space(space, [limit], bound), 0).ask(100)
    np.testing.assert_array_equal(proposals.archs, again.archs)
    assert len(np.unique(proposals.archs, axis=0)) == 100
