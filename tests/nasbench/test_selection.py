"""Which networks are picked along a front, and along the costs of a sample."""

from __future__ import annotations

import time

import numpy as np
import pytest

from nasbench.objectives import make_objective
from nasbench.searches import spread_sample
from nasbench.selection import nearest_each, select
from search_spaces import load_space


@pytest.mark.parametrize("levels", [5, 10**6])  # few: many ties
def test_each_position_gets_the_first_of_the_nearest_that_are_free(levels):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        places, positions = np.sort(rng.integers(0, levels, 50)) / levels, rng.random(20)
        taken = rng.random(50) < 0.3
        expected = []
        for position in positions:
            free = [i for i in range(50) if not taken[i] and i not in expected]
            expected.append(min(free, key=lambda i: abs(places[i] - position)))
        assert nearest_each(places, positions, taken).tolist() == expected


def test_a_large_front_is_spread_over_fast():
    values = np.random.default_rng(0).random((2000, 3))
    objectives = tuple(make_objective(name) for name in ("accuracy", "params", "macs"))
    start = time.perf_counter()
    rows = select(values, objectives, "spread", 1000)
    assert time.perf_counter() - start < 2
    assert len(set(rows)) == 1000


def test_a_large_sample_is_spread_over_costs_fast():
    space = load_space("quickstart")
    start = time.perf_counter()
    archs = spread_sample(space, 2000, 0, {})
    assert time.perf_counter() - start < 10
    assert len(np.unique(archs, axis=0)) == 2000
