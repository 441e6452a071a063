"""Variation over a space with depths: canonical results, real changes, fresh draws where knobs become active."""

import numpy as np
import pytest

from nasbench.variation import crossover, first_of_each, mutate, neighbours, new_rows, row_keys, sample_distinct


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def assert_canonical(space, archs):
    np.testing.assert_array_equal(archs, space.canonical(space.check(archs)))
    assert archs.dtype == space.dtype


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_mutation_gives_other_canonical_architectures(space, rng, rate):
    archs = space.sample(500, rng)
    before = archs.copy()
    mutants = mutate(space, archs, rng, rate)
    np.testing.assert_array_equal(archs, before)
    assert_canonical(space, mutants)
    assert (mutants != archs).any(axis=1).all()


def test_one_mutation_changes_one_knob_and_what_it_switches(space, rng):
    archs = space.sample(2000, rng)
    mutants = mutate(space, archs, rng, 0.0)
    both = space.active(archs) & space.active(mutants)
    assert (((archs != mutants) & both).sum(axis=1) == 1).all()
    # Every knob gets its turn.
    assert ((archs != mutants) & both).any(axis=0).all()


def test_rate_is_the_share_of_knobs_that_change(space, rng):
    archs = space.sample(4000, rng)
    mutants = mutate(space, archs, rng, 0.25, at_least_one=False)
    both = space.active(archs) & space.active(mutants)
    assert (archs != mutants)[both].mean() == pytest.approx(0.25, abs=0.02)
    np.testing.assert_array_equal(mutate(space, archs, rng, 0.0, at_least_one=False), archs)


def test_knobs_that_become_active_are_drawn_uniformly(space, rng):
    shallow = np.zeros((3000, len(space.knobs)), dtype=space.dtype)
    mutants = mutate(space, shallow, rng, 1.0)
    fresh = space.active(mutants) & ~space.active(shallow)
    for knob in np.flatnonzero(fresh.any(axis=0)):
        drawn = mutants[fresh[:, knob], knob]
        # A zero that stayed a zero, or a forced change away from it, would show here.
        assert 0.4 < (drawn == 0).mean() < 0.6


def test_knobs_without_a_choice_stay(make_space, rng):
    fixed = make_space(max_depths=(1,), resolutions=(8,), kernels=(3,), expansions=(2,))
    archs = fixed.sample(5, rng)
    assert fixed.size == 1
    np.testing.assert_array_equal(mutate(fixed, archs, rng, 0.5), archs)
    assert len(neighbours(fixed, archs[0], rng)) == 0


def test_children_take_every_knob_from_a_parent_that_has_it(space, rng):
    first, second = space.sample(1000, rng), space.sample(1000, rng)
    children = crossover(space, first, second, rng)
    assert_canonical(space, children)
    active = space.active(children)
    in_first, in_second = space.active(first), space.active(second)
    inherited = ((children == first) & in_first) | ((children == second) & in_second) | ~(in_first | in_second)
    assert inherited[active].all()
    differs = (first != second) & in_first & in_second & active
    assert ((children == first)[differs]).mean() == pytest.approx(0.5, abs=0.05)
    np.testing.assert_array_equal(crossover(space, first, first, rng), first)


def test_neighbours_are_all_single_changes(space, rng):
    arch = space.sample(1, rng)[0]
    found = neighbours(space, arch, rng)
    assert_canonical(space, found)
    active = space.active(arch[None])[0]
    assert len(found) == (space.cardinalities[active] - 1).sum()
    assert len(np.unique(found, axis=0)) == len(found)
    assert ((found != arch) & active & space.active(found)).sum(axis=1).tolist() == [1] * len(found)


def test_keys_tell_rows_apart(space):
    everything = space.everything()
    assert len(everything) == space.size
    assert len(np.unique(row_keys(everything))) == space.size


def test_new_rows_are_first_of_their_kind_and_unknown(space, rng):
    archs = sample_distinct(space, 6, rng)
    repeated = archs[[0, 1, 0, 2, 3, 3]]
    np.testing.assert_array_equal(new_rows(repeated, archs[[1]]), [True, False, False, True, True, False])
    np.testing.assert_array_equal(first_of_each(repeated), archs[[0, 1, 2, 3]])


def test_distinct_samples_even_beyond_the_size_of_the_space(make_space, rng):
    small = make_space(max_depths=(1,), kernels=(3,))
    assert small.size == 4
    assert len(np.unique(sample_distinct(small, 3, rng), axis=0)) == 3
    many = sample_distinct(small, 50, rng)
    assert len(many) == 50
    assert len(np.unique(many, axis=0)) == 4
