"""The up-front check of limits against brute force on spaces that can be enumerated."""

from __future__ import annotations

import numpy as np
import pytest

from nasbench.factors import Gibbs, least
from nasbench.feasibility import check_limits, minimiser, shares
from nasbench.objectives import make_objective
from predictors.base import AdditivePredictor, BoundPredictor, Estimate
from predictors.counts import Count
from search_spaces import MobileNetV3Space, UserError, load_space


class Cost(AdditivePredictor):
    """A seeded random cost per block, of either sign; two features under a linear head."""

    def __init__(self, seed, spread=0.1, linear=True):
        self.seed, self.spread, self.linear = seed, spread, linear

    def block_features(self, workload):
        return np.random.default_rng([self.seed, workload.macs]).normal(size=2)

    def head(self, totals):
        mean = totals[:, 0] * 2.0 - totals[:, 1] + 30.0
        return mean if self.linear else mean + 0.01 * mean**2

    def around(self, mean):
        return Estimate(mean, self.spread * mean, lognormal=True)

    @property
    def coefficients(self):
        return (np.array([2.0, -1.0]), 30.0) if self.linear else None


class Opaque(BoundPredictor):
    """Another bound predictor without its table."""

    def __init__(self, inner):
        self.inner = inner

    def predict(self, archs):
        return self.inner.predict(archs)

    def expected(self, probabilities):
        raise NotImplementedError


@pytest.fixture
def small_mobilenet():
    """Shared knobs (resolution, width), depths that leave blocks out, and a fixed stage: 9,720 raw rows."""
    return MobileNetV3Space(
        resolutions=(32, 48), widths=(0.5, 0.75, 1.0),
        stages=[
            {"width": 16, "expansions": [1]},
            {"width": 24, "stride": 2, "depths": [1, 2], "kernels": [3, 5], "expansions": [2, 3, 4]},
            {"width": 40, "stride": 2, "depths": [1, 2], "kernels": [3], "expansions": [2, 3], "se": True},
        ],
    )  # fmt: skip


def everything(space):
    rows = np.indices(space.cardinalities).reshape(len(space.knobs), -1).T
    return np.unique(space.canonical(rows.astype(space.dtype)), axis=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("which", ["tiny", "mobilenet"])
def test_sums_are_minimised_exactly(request, which, seed, maximise):
    space = request.getfixturevalue("space" if which == "tiny" else "small_mobilenet")
    bound = Cost(seed).bind(space)
    every = bound.predict(everything(space)).mean
    arch = minimiser(space, bound, maximise=maximise)
    np.testing.assert_array_equal(arch, space.canonical(arch[None])[0])
    assert bound.predict(arch[None]).mean[0] == pytest.approx(every.max() if maximise else every.min())


@pytest.mark.parametrize("which", ["tiny", "mobilenet"])
def test_maxima_are_minimised_exactly(request, which):
    space = request.getfixturevalue("space" if which == "tiny" else "small_mobilenet")
    bound = Count("peak_memory_bytes").bind(space)
    arch = minimiser(space, bound)
    assert bound.predict(arch[None]).mean[0] == bound.predict(everything(space)).mean.min()


def test_elimination_equals_enumeration_on_random_graphs():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cardinalities = rng.integers(1, 4, size=6)
        factors = []
        for _ in range(7):
            knobs = tuple(rng.choice(6, size=rng.integers(0, 4), replace=False).tolist())
            factors.append((knobs, rng.normal(size=tuple(cardinalities[list(knobs)]))))
        rows = np.indices(cardinalities).reshape(6, -1).T
        for combine in (np.add, np.maximum):
            parts = [table[tuple(rows[:, list(knobs)].T)] + np.zeros(len(rows)) for knobs, table in factors]
            values = combine.reduce(parts)
            found = least(list(factors), cardinalities, combine)
            at = np.flatnonzero((rows == found).all(axis=1))[0]
            assert values[at] == pytest.approx(values.min())


def test_huge_spaces_take_no_time():
    space = load_space("ofa_mobilenet_v3")
    bound = Count("macs").bind(space)
    arch = minimiser(space, bound)
    np.testing.assert_array_equal(arch, np.zeros(len(space.knobs)))
    assert minimiser(space, Opaque(bound)) is None


def test_feasible_limits_are_reported_with_what_reaches_them(space):
    bound = {"macs": Count("macs").bind(space), "memory": Count("peak_memory_bytes").bind(space)}
    objectives = (
        make_objective("accuracy", limit=2.0),  # judged at the end
        make_objective("macs", limit=1e5),
        make_objective("memory", metric="peak_memory_bytes", limit=1e4),
        make_objective("params"),
    )
    report = check_limits(space, objectives, bound)
    assert [r.objective.name for r in report.reaches] == ["macs", "memory"]
    assert all(r.exact for r in report.reaches)
    assert report.arch is not None
    for reach in report.reaches:
        assert reach.tightest == bound[reach.objective.name].predict(everything(space)).mean.min()
        assert bound[reach.objective.name].predict(report.arch[None]).mean[0] <= reach.objective.limit
    assert check_limits(space, objectives[:1], bound).arch is None


def test_the_tightest_limit_that_is_told_can_be_kept(space):
    bound = {"cost": Cost(3).bind(space)}
    least = bound["cost"].predict(everything(space)).mean.min()
    with pytest.raises(
        UserError, match=r"objectives\.cost\.limit: no architecture.*exact over the whole space"
    ) as told:
        check_limits(space, [make_objective("cost", direction="minimise", limit=0.9 * least)], bound)
    limit = float(str(told.value).split("limit is ")[1].split(",")[0])
    assert least <= limit <= 1.001 * least
    check_limits(space, [make_objective("cost", direction="minimise", limit=limit)], bound)
    with pytest.raises(UserError, match="at least"):
        check_limits(space, [make_objective("cost", direction="maximise", limit=1e6)], bound)


def test_quantiles_are_what_limits_apply_to(space):
    bound = {"cost": Cost(1).bind(space)}
    every = bound["cost"].predict(everything(space))
    objective = make_objective("cost", direction="minimise", limit=1e6, quantile=0.95)
    report = check_limits(space, [objective], bound)
    assert report.reaches[0].exact
    assert report.reaches[0].tightest == pytest.approx(every.quantile(0.95).min())
    between = make_objective(
        "cost", direction="minimise", limit=(every.mean.min() + every.quantile(0.95).min()) / 2, quantile=0.95
    )
    with pytest.raises(UserError, match="quantile 0.95"):
        check_limits(space, [between], bound)


def test_other_costs_are_searched_in_a_budget_and_called_so(space):
    for predictor in (Cost(2, linear=False).bind(space), Opaque(Cost(2).bind(space))):
        least = predictor.predict(everything(space)).mean.min()
        objective = make_objective("cost", direction="minimise", limit=float(least) + 5.0)
        reach = check_limits(space, [objective], {"cost": predictor}, budget=3000).reaches[0]
        assert not reach.exact
        assert least <= reach.tightest <= least * 1.05
    with pytest.raises(UserError, match="best of 600 architectures tried"):
        check_limits(space, [make_objective("cost", direction="minimise", limit=0.1)], {"cost": predictor}, budget=600)


def test_limits_that_exclude_each_other_are_named_without_the_innocent(space):
    many = Count("macs").bind(space)
    bound = {"macs": many, "speed": Count("macs").bind(space), "params": Count("params").bind(space)}
    middle = float(np.median(many.predict(everything(space)).mean))
    objectives = (
        make_objective("macs", limit=middle * 0.9),
        make_objective("params", limit=1e9),
        make_objective("speed", direction="maximise", limit=middle * 1.1),
    )
    with pytest.raises(UserError, match=r"objectives\.macs\.limit and objectives\.speed\.limit: each") as told:
        check_limits(space, objectives, bound, budget=2000)
    assert "params" not in str(told.value)


def test_limits_that_meet_narrowly_are_kept_together(space):
    bound = {"a": Cost(1).bind(space), "b": Cost(5).bind(space)}
    every = everything(space)
    a, b = (bound[name].predict(every).mean for name in "ab")
    both = int(((a - a.min()) / np.ptp(a) + (b - b.min()) / np.ptp(b)).argmin())
    objectives = [
        make_objective(name, direction="minimise", limit=float(values[both]) + 1e-9)
        for name, values in zip("ab", (a, b), strict=True)
    ]
    arch = check_limits(space, objectives, bound).arch
    assert bound["a"].predict(arch[None]).mean[0] <= objectives[0].limit
    assert bound["b"].predict(arch[None]).mean[0] <= objectives[1].limit


def test_draws_have_the_weights_of_their_factors():
    rng = np.random.default_rng(0)
    cardinalities = np.array([2, 3, 2, 3])
    factors = [((0, 1), rng.normal(size=(2, 3))), ((2, 1), rng.normal(size=(2, 3))), ((), np.array(0.5))]
    factors[0][1][1, 2] = -np.inf
    rows = np.indices(cardinalities).reshape(4, -1).T
    logs = sum(table[tuple(rows[:, list(knobs)].T)] + np.zeros(len(rows)) for knobs, table in factors)
    gibbs = Gibbs(factors, cardinalities)
    assert gibbs.log_total == pytest.approx(np.log(np.exp(logs).sum()))
    places = np.ravel_multi_index(tuple(gibbs.draw(50_000, rng).T), tuple(cardinalities))
    found = np.bincount(places, minlength=len(rows)) / 50_000
    np.testing.assert_allclose(found, np.exp(logs - gibbs.log_total), atol=0.01)


def test_what_makes_a_limit_tight_is_named_with_its_share(space):
    macs = Count("macs").bind(space)
    smallest = np.zeros(len(space.knobs), dtype=space.dtype)
    parts = shares(space, macs, smallest)
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    total, block = macs.predict(smallest[None]).mean[0], space.catalog[int(space.blocks(smallest[None])[0, 1])]
    named = dict(parts)[f"block {block.name} (resolution=8, depth0=1, kernel0.0=3, expansion0.0=2)"]
    assert named == pytest.approx(block.workload.macs / total)
    overhead = dict(shares(space, Cost(1).bind(space), smallest))["fixed overhead"]
    assert overhead > 0
    assert shares(space, Opaque(macs), smallest) == ()
    with pytest.raises(UserError, match=r"Of that: \d+% block .*; 21% block stem@8"):
        check_limits(space, [make_objective("macs", limit=10)], {"macs": macs})
    with pytest.raises(UserError, match="Of that: 100% block"):
        memory = Count("peak_memory_bytes").bind(space)
        check_limits(space, [make_objective("peak_memory_bytes", limit=10)], {"peak_memory_bytes": memory})


@pytest.mark.parametrize(
    "objectives",
    [
        [make_objective("macs", at_least=2e5, at_most=1e5)],
        [
            make_objective("macs", limit=1e5),
            make_objective("floor", metric="macs", direction="maximise", limit=2e5),
        ],
    ],
)
def test_limits_that_contradict_each_other_are_told_at_once(space, objectives):
    with pytest.raises(
        UserError, match=r"objectives\.\w+\.\w+ = 200000 and .* = 100000 contradict each other: no macs"
    ):
        check_limits(space, objectives, {o.name: Count("macs").bind(space) for o in objectives})


def test_a_limit_from_either_side(space):
    bound = {"macs": Count("macs").bind(space)}
    every = bound["macs"].predict(everything(space)).mean
    low, high = np.quantile(every, [0.4, 0.6])
    report = check_limits(space, [make_objective("macs", at_least=low, at_most=high)], bound)
    assert [r.key for r in report.reaches] == ["at_most", "at_least"]
    assert low <= bound["macs"].predict(report.arch[None]).mean[0] <= high
    with pytest.raises(UserError, match=r"objectives\.macs\.at_least: no architecture .* at least"):
        check_limits(space, [make_objective("macs", at_least=2 * every.max())], bound)
    with pytest.raises(UserError, match=r"limit = 1 and at_most = 2 say the same"):
        make_objective("macs", limit=1, at_most=2)


def test_costs_that_are_no_numbers_keep_no_limit(space):
    bound = Count("macs").bind(space)
    arch = minimiser(space, bound)
    bound.table[space.blocks(arch[None])[0, 1]] = np.nan  # the cheapest first block
    bound._column[:] = bound.table[:, 0]
    bound.__dict__.pop("positions", None)
    other = minimiser(space, bound)
    assert np.isfinite(bound.predict(other[None]).mean[0])
    bound.table[:] = np.nan
    bound._column[:] = np.nan
    bound.__dict__.pop("positions", None)
    with pytest.raises(UserError, match="no number for any architecture"):
        check_limits(space, [make_objective("macs", limit=1e9)], {"macs": bound}, budget=400)
