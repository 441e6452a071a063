"""Fast dominance, sorting, hypervolume and knee against their definitions by brute force."""

import itertools

import numpy as np
import pytest

from nasbench.pareto import (
    ParetoArchive,
    constrained_ranks,
    crowding_distance,
    dominated_by,
    hypervolume,
    knee,
    non_dominated_mask,
    non_dominated_sort,
)


def dominates(a, b):
    return bool(np.all(a <= b) and np.any(a < b))


def brute_mask(values):
    return np.array([not any(dominates(q, p) for q in values) for p in values], dtype=bool)


def brute_ranks(values):
    ranks, left, rank = np.full(len(values), -1), list(range(len(values))), 0
    while left:
        front = [i for i in left if not any(dominates(values[j], values[i]) for j in left)]
        ranks[front] = rank
        left = [i for i in left if i not in front]
        rank += 1
    return ranks


def clouds():
    """Ties and duplicates (small integers), continuous values, and values with infinities; one to four objectives."""
    for seed, objectives in itertools.product(range(6), (1, 2, 3, 4)):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 60))
        yield rng.integers(0, 6, (n, objectives)).astype(float)
        yield rng.random((n, objectives))
        infinite = rng.integers(0, 5, (n, objectives)).astype(float)
        infinite[infinite == 4] = np.inf
        infinite[infinite == 0] = -np.inf
        yield infinite


def test_mask_and_ranks_equal_brute_force():
    for values in clouds():
        np.testing.assert_array_equal(non_dominated_mask(values), brute_mask(values))
        np.testing.assert_array_equal(non_dominated_sort(values), brute_ranks(values))


def test_dominated_by_equals_brute_force():
    for values in clouds():
        by = values[: len(values) // 2]
        expected = [any(dominates(q, p) for q in by) for p in values]
        np.testing.assert_array_equal(dominated_by(values, by), expected)


def test_blocks_do_not_change_the_result():
    values = np.random.default_rng(0).integers(0, 12, (1500, 3)).astype(float)
    ranks = non_dominated_sort(values)
    np.testing.assert_array_equal(ranks == 0, brute_mask(values))
    for rank in range(1, ranks.max() + 1):
        before, here = values[ranks == rank - 1], values[ranks == rank]
        assert dominated_by(here, before).all()
        assert non_dominated_mask(here).all()


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_nan_rows_come_last_and_empty_stays_empty(objectives):
    values = np.random.default_rng(1).random((20, objectives))
    values[[3, 7], 0] = np.nan
    ranks = non_dominated_sort(values)
    clean = ~np.isnan(values).any(axis=1)
    np.testing.assert_array_equal(ranks[clean], brute_ranks(values[clean]))
    assert (ranks[~clean] == ranks[clean].max() + 1).all()
    assert not non_dominated_mask(values)[~clean].any()
    empty = np.empty((0, objectives))
    assert non_dominated_mask(empty).shape == non_dominated_sort(empty).shape == crowding_distance(empty).shape == (0,)
    assert hypervolume(empty, np.ones(objectives)) == 0.0


def test_feasible_rows_come_first_then_the_least_violation_then_failures():
    values = np.array([[5.0, 5.0], [1.0, 1.0], [6.0, 6.0], [0.0, 0.0], [0.0, 0.0], [np.nan, 1.0]])
    violations = np.array([[0, 0], [0.25, 0.25], [0, 0], [0.125, 0], [0, 0.5], [0, 0]])
    np.testing.assert_array_equal(constrained_ranks(values, violations), [0, 3, 1, 2, 3, 4])


def test_crowding_equals_the_definition_front_by_front():
    rng = np.random.default_rng(2)
    values = rng.random((80, 3))
    values[:, 2] = 1.0  # a range of zero adds nothing
    ranks = non_dominated_sort(values)
    expected = np.zeros(len(values))
    for rank in range(ranks.max() + 1):
        rows = np.flatnonzero(ranks == rank)
        for column in range(3):
            ordered = rows[np.argsort(values[rows, column], kind="stable")]
            span = np.ptp(values[rows, column])
            expected[ordered[[0, -1]]] = np.inf
            for before, row, after in zip(ordered[:-2], ordered[1:-1], ordered[2:], strict=True):
                expected[row] += (values[after, column] - values[before, column]) / span if span else 0.0
    np.testing.assert_allclose(crowding_distance(values, ranks), expected)
    assert not np.isnan(crowding_distance(np.array([[0.0, np.inf], [1.0, 3.0], [2.0, -np.inf], [3.0, 1.0]]))).any()


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_equals_counted_cells(objectives):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 7, (12, objectives)).astype(float)
        reference = np.full(objectives, 6.0)  # some rows lie on or beyond it
        cells = np.array(list(itertools.product(range(6), repeat=objectives)))
        covered = (values[None] <= cells[:, None]).all(axis=2).any(axis=1).sum()
        assert hypervolume(values, reference) == pytest.approx(covered)


def test_hypervolume_ignores_nan_and_duplicates_and_checks_the_reference():
    front = np.array([[0.2, 0.6], [0.5, 0.3]])
    expected = hypervolume(front, np.ones(2))
    assert hypervolume(np.vstack([front, front, [[np.nan, 0.0]], [[0.9, 0.9]]]), np.ones(2)) == pytest.approx(expected)
    with pytest.raises(ValueError, match="reference"):
        hypervolume(front, np.ones(3))


def test_knee_is_the_bulge_of_the_front_whatever_the_units():
    front = np.array([[0.0, 10.0], [1.0, 2.0], [5.0, 1.5], [10.0, 0.0], [9.0, 9.0]])
    assert knee(front) == 1
    assert knee(front * [1000.0, 0.001] + 5.0) == 1
    assert knee(front[::-1]) == 3
    assert knee(np.array([[0.0, 1.0], [np.nan, 0.0], [1.0, 0.0]])) == 0  # a tie goes to the least first objective
    assert knee(np.array([[3.0, 1.0, 7.0]])) == 0
    assert knee(np.array([[0, 9, 9], [9, 0, 9], [9, 9, 0], [2, 2, 2], [3, 1, 9]], dtype=float)) == 3
    with pytest.raises(ValueError, match="finite"):
        knee(np.full((2, 2), np.nan))


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_archive_equals_the_front_of_everything_feasible(space, objectives):
    rng = np.random.default_rng(3)
    archive = ParetoArchive(space, objectives)
    archs = space.sample(600, rng)
    table = {row.tobytes(): rng.integers(0, 30, objectives).astype(float) for row in np.unique(archs, axis=0)}
    values = np.array([table[row.tobytes()] for row in archs])
    values[rng.random(600) < 0.05] = np.nan
    feasible = rng.random(600) < 0.7
    violation = np.where(feasible, 0.0, 0.1 + rng.random(600))
    for start in range(0, 600, 50):
        rows = slice(start, start + 50)
        archive.update(archs[rows], values[rows], violation[rows])
    good = feasible & ~np.isnan(values).any(axis=1)
    on_front = brute_mask(values[good])
    expected = {row.tobytes() for row in archs[good][on_front]}
    assert {row.tobytes() for row in archive.archs} == expected
    assert len(archive) == len(expected)
    for arch, value in zip(archive.archs, archive.values, strict=True):
        np.testing.assert_array_equal(table[arch.tobytes()], value)
    assert (archive.evaluated, archive.feasible) == (600, good.sum())
    assert archive.failed == np.isnan(values).any(axis=1).sum()

    restored = ParetoArchive(space, objectives)
    restored.load_state_dict(
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in archive.state_dict().items()}
    )
    np.testing.assert_array_equal(restored.archs, archive.archs)
    np.testing.assert_array_equal(restored.values, archive.values)
    assert restored.archs.dtype == archive.archs.dtype
    assert restored.evaluated == 600


def test_an_archive_of_nothing_feasible_remembers_the_nearest(space):
    archive = ParetoArchive(space, 2)
    archs = space.sample(4, np.random.default_rng(0))
    values = np.array([[1.0, 5.0], [np.nan, 0.0], [2.0, 3.0], [0.0, 9.0]])
    archive.update(archs, values, np.array([0.5, 0.0, 0.2, 0.9]))
    archive.update(archs[:1], values[:1], np.array([0.3]))
    assert len(archive) == 0
    assert archive.nearest.tolist() == [2.0, 3.0]
    assert archive.violation == 0.2
