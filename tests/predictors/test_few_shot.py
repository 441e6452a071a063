"""Few-shot transfer: better than without sources, honest intervals, and nothing that depends on unseen measurements."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from predictors import FewShot, MeasuredTable
from predictors.few_shot import device_family
from predictors.table_features import table_features, workload_totals
from predictors.tables import nasbench201_knobs
from search_spaces import MobileNetV3Space, UserError, load_space
from search_spaces.nasbench201 import EDGES

Made = tuple[MeasuredTable, np.ndarray, np.ndarray]
DEVICES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def space() -> MobileNetV3Space:
    found = load_space("quickstart", 1, 10)
    assert isinstance(found, MobileNetV3Space)
    return found


@pytest.fixture(scope="module")
def made(space: MobileNetV3Space) -> Made:
    """Four made-up devices with speeds of their own per kind of operator, a fifth one's latencies, and totals."""
    rng = np.random.default_rng(0)
    archs = np.unique(space.sample(300, rng), axis=0)
    totals = workload_totals([space.workload(arch) for arch in archs])
    speeds = np.exp(rng.normal(0, 0.7, (5, totals.shape[1])))
    scale = np.where(totals.mean(0) > 0, totals.mean(0), 1.0)
    latency = 1 + (totals / scale) @ speeds.T
    latency *= np.exp(rng.normal(0, 0.02, latency.shape))
    return MeasuredTable(space.name, space.knobs, archs, DEVICES, latency[:, :4], "made up"), latency[:, 4], totals


@pytest.fixture(scope="module")
def learned(made: Made) -> FewShot:
    return FewShot.learn(made[0])


def test_few_measurements_rank_the_rest(made: Made, learned: FewShot, space: MobileNetV3Space) -> None:
    table, truth, _ = made
    rows = learned.suggest(12)
    assert len(set(rows.tolist())) == 12
    estimate = learned.adapt(table.archs[rows], truth[rows]).bind(space).predict(table.archs)
    rest = np.setdiff1d(np.arange(len(table)), rows)
    assert spearmanr(estimate.mean[rest], truth[rest]).statistic > 0.9
    inside = (truth >= estimate.quantile(0.05)) & (truth <= estimate.quantile(0.95))
    assert 0.75 < inside[rest].mean() <= 1.0
    assert estimate.lognormal
    assert not estimate.warning


def test_suggested_networks_are_spread_over_all_speeds(made: Made, learned: FewShot) -> None:
    table = made[0]
    logs = np.log(table.latency_ms)
    for n, seed in ((3, 0), (10, 1), (20, 2)):
        rows = learned.suggest(n, seed)
        rank = np.argsort(np.argsort(((logs - np.median(logs, axis=0)) / logs.std(0)).mean(1)))[rows] / len(table)
        assert np.all(np.abs(np.sort(rank) - (np.arange(n) + 0.5) / n) < 0.5 / n + 0.1)
        assert np.array_equal(rows, learned.suggest(n, seed))


def test_units_do_not_matter(made: Made, learned: FewShot) -> None:
    table, truth, _ = made
    rows = np.arange(10)
    one = learned.adapt(table.archs[rows], truth[rows]).of(table.archs)
    thousand = learned.adapt(table.archs[rows], 1000 * truth[rows]).of(table.archs)
    assert np.allclose(thousand.mean, 1000 * one.mean)
    assert np.allclose(thousand.std, 1000 * one.std)


def test_measuring_more_narrows_the_intervals_in_any_order(made: Made, learned: FewShot) -> None:
    table, truth, _ = made
    few = learned.adapt(table.archs[:6], truth[:6])
    more = few.adapt(table.archs[6:20], truth[6:20])
    at_once = learned.adapt(table.archs[:20][::-1], truth[:20][::-1])
    assert np.allclose(more.of(table.archs).mean, at_once.of(table.archs).mean)
    relative = [float(np.median(f.of(table.archs).std / f.of(table.archs).mean)) for f in (few, more)]
    assert relative[1] < relative[0]
    # What comes next was not measured before, and is asked for in batches.
    assert not set(more.suggest(8).tolist()) & set(range(20))


def test_networks_outside_the_table_get_wider_intervals_and_a_warning(
    made: Made, learned: FewShot, space: MobileNetV3Space
) -> None:
    table, truth, _ = made
    part = table.select(DEVICES)
    cut = replace(part, archs=part.archs[:250], latency_ms=part.latency_ms[:250])
    fitted = FewShot(cut, learned.prior).adapt(table.archs[:15], truth[:15])
    outside = fitted.of(table.archs[250:])
    assert "not in the table" in outside.warning
    assert spearmanr(outside.mean, truth[250:]).statistic > 0.8
    inside = fitted.of(table.archs[:250])
    assert np.median(outside.std / outside.mean) > np.median(inside.std / inside.mean)


def test_a_table_of_workloads_serves_any_workload(made: Made, space: MobileNetV3Space) -> None:
    table, truth, totals = made
    free = MeasuredTable(
        "networks", (), np.zeros((len(table), 0), dtype=np.uint8), DEVICES, table.latency_ms, "x", totals
    )
    workloads = [space.workload(arch) for arch in table.archs]
    fitted = FewShot.learn(free).adapt(workloads[:12], truth[:12])
    assert spearmanr(fitted.predict(workloads[12:]).mean, truth[12:]).statistic > 0.85
    other = fitted.predict(
        [load_space("mobile96").workload(load_space("mobile96").sample(1, np.random.default_rng(0))[0])]
    )
    assert "not in the table" in other.warning


def test_round_trip_to_the_same_bits_without_pickle(made: Made, learned: FewShot, tmp_path: Path) -> None:
    table, truth, _ = made
    fitted = learned.adapt(table.archs[:9], truth[:9])
    fitted.save(tmp_path / "few.npz")
    again = FewShot.load(tmp_path / "few.npz")
    assert np.array_equal(again.of(table.archs).mean, fitted.of(table.archs).mean)
    assert np.array_equal(again.of(table.archs).std, fitted.of(table.archs).std)
    table.save(tmp_path / "table.npz")
    for path in (tmp_path / "table.npz", tmp_path / "none.npz"):
        with pytest.raises(UserError, match="cannot be read as a few-shot predictor"):
            FewShot.load(path)


def test_bad_input_is_refused(made: Made, learned: FewShot, space: MobileNetV3Space) -> None:
    table, truth, _ = made
    with pytest.raises(UserError, match="at least 3 measured networks, got 2"):
        learned.adapt(table.archs[:2], truth[:2])
    for bad in (np.nan, 0.0, -1.0, np.inf):
        with pytest.raises(UserError, match="measurement 1: a latency is a positive number"):
            learned.adapt(table.archs[:4], [1.0, bad, 2.0, 3.0])
    with pytest.raises(UserError, match=r"network 0: knob .* has choices 0\.\..*, got 99"):
        learned.adapt(np.full_like(table.archs[:4], 99), [1.0, 2.0, 3.0, 4.0])
    name = ".".join(map(str, table.archs[2]))
    with pytest.raises(UserError, match=rf"measurement 2: {name} \(.*\): .* ms is \d+ times more .* in milliseconds"):
        learned.adapt(table.archs[:6], np.where(np.arange(6) == 2, 1000, 1) * truth[:6])
    with pytest.raises(UserError, match="measured twice, 2 and 3 ms"):
        learned.adapt(table.archs[[0, 1, 2, 1]], [1.0, 2.0, 4.0, 3.0])
    with pytest.raises(UserError, match="no measurements of the device yet"):
        learned.of(table.archs)
    with pytest.raises(UserError, match="Did you mean 'a'"):
        FewShot.learn(table, ["aa", "b"])
    with pytest.raises(UserError, match="at least two families"):
        FewShot.learn(table, families=dict.fromkeys(DEVICES, "x"))
    few = replace(table, archs=table.archs[:14], latency_ms=table.latency_ms[:14])
    with pytest.raises(UserError, match="made up: 14 networks measured on the sources; at least 15 are needed"):
        FewShot.learn(few)
    fitted = learned.adapt(table.archs[:5], truth[:5])
    with pytest.raises(UserError, match="tied"):
        fitted.predict([space.workload(table.archs[0])])
    with pytest.raises(UserError, match="tied"):
        fitted.bind(load_space("mobile96"))
    with pytest.raises(UserError, match="cannot suggest"):
        fitted.suggest(len(table))


def test_sources_need_networks_whose_output_depends_on_their_input() -> None:
    archs = np.array([[i // 25, i // 5 % 5, i % 5, 0, 0, 0] for i in range(100)], dtype=np.uint8)
    assert all(not archs[:, edge].any() for edge, (_, end) in enumerate(EDGES) if end == 3)
    latency = np.random.default_rng(0).uniform(1, 2, (100, 2))
    with pytest.raises(UserError, match="cut: 0 networks measured on the sources, without 100 whose output does not"):
        FewShot.learn(MeasuredTable("nasbench201", nasbench201_knobs(), archs, ("a", "b"), latency, "cut"))


def test_families_of_columns() -> None:
    names = {"1080ti_256": "1080ti", "silver_4210r": "silver", "essential_ph_1": "essential_ph", "pixel3": "pixel3"}
    assert {name: device_family(name) for name in names} == names


def test_nasbench201_device_left_out(data_dir: Path) -> None:
    """A source device as the unseen one: ranked from twenty networks and devices of other kinds."""
    table = MeasuredTable.from_help(
        data_dir / "nb201_latency_help.csv.gz", ["1080ti_32", "samsung_a50", "pixel3", "samsung_s7", "silver_4210r"]
    )
    learned = FewShot.learn(table, [d for d in table.devices if d != "silver_4210r"])
    truth = table.column("silver_4210r")
    rows = learned.suggest(20)
    assert not table_features(table, table.archs[rows]).cut.any()
    estimate = learned.adapt(table.archs[rows], truth[rows]).of(table.archs)
    assert spearmanr(estimate.mean, truth).statistic > 0.97
    assert np.mean((truth >= estimate.quantile(0.05)) & (truth <= estimate.quantile(0.95))) > 0.85


def test_networks_that_are_cut_do_not_outrank_all_others(data_dir: Path) -> None:
    """Some were optimised away on this device: their spread is in the intervals, not in the order of predictions."""
    sources = ["1080ti_1", "silver_4114", "samsung_a50", "pixel3", "samsung_s7"]
    table = MeasuredTable.from_help(data_dir / "nb201_latency_help.csv.gz", [*sources, "raspi4"])
    learned = FewShot.learn(table, sources)
    truth = table.column("raspi4")
    rows = np.append(learned.suggest(18), [0, int(np.argmin(truth))])  # with two that are cut, 70 times apart or more
    estimate = learned.adapt(table.archs[rows], truth[rows]).of(table.archs)
    assert estimate.mean.max() < 10 * truth.max()
    middle = spearmanr(estimate.quantile(0.5), truth).statistic
    assert spearmanr(estimate.mean, truth).statistic > max(0.93, middle - 0.01)
    assert "does not depend on their input" in estimate.warning
