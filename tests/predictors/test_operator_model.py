import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from hardware_profiles import load_target
from hardware_profiles.onnx_runtime import OnnxConverter
from predictors import OperatorModel, calibration_suite
from predictors.operator_features import (
    COORDINATES,
    GROUPS,
    QUANTITIES,
    describe,
    group_of,
    kernels,
    network_kernels,
    strained,
    streamed,
)
from predictors.operator_model import Fit
from predictors.suite_blocks import network
from search_spaces import (
    Operator,
    SearchSpace,
    Tensor,
    UserError,
    Workload,
    WorkloadBuilder,
    load_space,
    reference_network,
    trace,
)

# ms per kernel and per million of macs, values and params; about those of a desktop CPU core.
RATES = {
    "pointwise": (1e-3, 0.015, 0.03, 0.06),
    "dense": (1e-3, 0.02, 0.03, 0.06),
    "depthwise": (1e-3, 0.09, 0.02, 0.06),
    "vector": (1e-3, 0.07, 0.1, 0.06),
    "trailing_hard_swish": (1e-3, 0.0, 0.1, 0.0),
    "hard_swish": (1e-3, 0.0, 0.1, 0.0),
}
OTHER_RATES = (2e-3, 0.05, 0.3, 0.06)


def truth(workloads: Sequence[Workload], offset: float = 0.02) -> np.ndarray:
    """A cost that is linear in the groups' quantities."""
    found = [kernels(w) for w in workloads]
    distinct = list({op: None for counts in found for op in counts})
    groups, quantities, _ = describe(distinct)
    rates = np.array([RATES.get(GROUPS[g], OTHER_RATES) for g in groups])
    cost = dict(zip(distinct, (rates * quantities[:, : len(OTHER_RATES)]).sum(1), strict=True))
    return np.array([offset + sum(count * cost[op] for op, count in counts.items()) for counts in found])


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("mobile96")


@pytest.fixture(scope="module")
def workloads(space: SearchSpace) -> list[Workload]:
    return [space.workload(a) for a in space.sample(200, np.random.default_rng(0))]


@pytest.fixture(scope="module")
def suite() -> list[Workload]:
    return [network.workload() for network in calibration_suite(60)]


def within(model: OperatorModel, workloads: Sequence[Workload], measured: np.ndarray, share: float) -> float:
    return float(np.mean(np.abs(model.predict(workloads).mean / measured - 1) <= share))


def test_what_follows_one_convolution_alone_is_a_kind_of_its_own() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((8, 6, 6)))
    conv = net.add("conv2d", [x], (8, 6, 6), kernel=(1, 1), stride=(1, 1))
    normed = net.add("batch_norm", [conv], (8, 6, 6))
    active = net.add("silu", [normed], (8, 6, 6))
    again = net.add("conv2d", [active], (8, 6, 6), kernel=(1, 1), stride=(1, 1))
    joined = net.add("add", [active, again], (8, 6, 6))
    last = net.add("silu", [joined], (8, 6, 6))
    found = Counter(group_of(op) for op in kernels(net.build([last])).elements())
    assert found == {"pointwise": 2, "trailing_silu": 1, "trailing_add": 1, "silu": 1}


def test_a_convolution_takes_in_the_constant_that_its_result_alone_is_multiplied_by() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((8, 6, 6)))
    conv = net.add("conv2d", [x], (8, 6, 6), kernel=(1, 1), stride=(1, 1))
    scaled = net.add("mul", [conv], (8, 6, 6))
    joined = net.add("add", [x, scaled], (8, 6, 6))
    gated = net.add("mul", [joined, x], (8, 6, 6))
    last = net.add("mul", [gated], (8, 6, 6))
    found = sorted(group_of(op) for op in kernels(net.build([last])).elements())
    assert found == ["mul", "mul", "pointwise", "trailing_add"]


def test_maps_that_a_network_returns_are_kernels_of_it_but_of_no_block() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((8, 6, 6)))
    maps = [net.add("conv2d", [x], (n, 6, 6), kernel=(1, 1), stride=(1, 1)) for n in (4, 4, 2)]
    pooled = net.add("global_avg_pool", [maps[0]], (4, 1, 1))
    whole = net.build([*maps, pooled])
    more = network_kernels(whole) - kernels(whole)
    more = Counter({op: n for op, n in more.items() if "conv2d" not in op.kind})
    assert {(op.kind, op.output.shape): n for op, n in more.items()} == {
        ("result", (4, 6, 6)): 2, ("result", (2, 6, 6)): 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((21, 64, 64), "crowded_result"),
        ((8, 64, 64), "result"),
        ((21, 63, 64), "result"),
        ((21, 32, 32), "crowded_result"),
    ],
)
def test_returned_maps_whose_channels_share_cache_lines_are_a_group_of_their_own(
    shape: tuple[int, int, int], group: str
) -> None:
    net = WorkloadBuilder()
    conv = net.add("conv2d", [net.input(Tensor((4, *shape[1:])))], shape, kernel=(1, 1), stride=(1, 1))
    assert {group_of(op) for op in network_kernels(net.build([conv]))} == {"pointwise", group}


def test_normalisation_by_statistics_is_no_scaling_of_channels() -> None:
    net = WorkloadBuilder()
    scaled = net.add("batch_norm", [net.input(Tensor((10, 16)))], (10, 16))
    last = net.add("layer_norm", [scaled], (10, 16))
    assert [group_of(op) for op in kernels(net.build([last]))] == ["norm", "layer_norm"]


def test_a_linear_truth_of_one_space_is_found_from_32_networks(workloads: list[Workload]) -> None:
    y = truth(workloads)
    model = OperatorModel.fit(workloads[:32], y[:32])
    assert within(model, workloads[32:], y[32:], 0.03) >= 0.97


def test_a_truth_with_curves_is_found_on_spaces_that_no_network_was_of(
    suite: list[Workload], workloads: list[Workload]
) -> None:
    rng = np.random.default_rng(0)
    trends = rng.normal(0, 0.03, (len(GROUPS), len(COORDINATES)))
    rates = np.full((len(GROUPS), len(QUANTITIES)), np.log(1e-9))
    rates[:, : len(OTHER_RATES)] = np.log(np.array([RATES.get(g, OTHER_RATES) for g in GROUPS]) + 1e-9)
    curved = OperatorModel(
        Fit(
            rates=tuple(map(tuple, rates.tolist())), trends=tuple(map(tuple, trends.tolist())),
            centre=(5.0, 5.0, 8.0, 2.0, 0.5, 1.0, 1.0, 0.0, 0.5), inducing_groups=(), inducing=(), rest=(), length=1.0,
            offset=0.02, doubts=(0.1,) * len(GROUPS), noise=0.02, stretch=1.0, lowest=0.01, highest=1e3,
        )
    )  # fmt: skip
    y = curved.predict(suite).mean * np.exp(rng.normal(0, 0.01, len(suite)))
    model = OperatorModel.fit(suite, y, families=[n.family for n in calibration_suite(60)])
    new = curved.predict(workloads).mean
    assert within(model, workloads, new, 0.1) > 0.9
    estimate = model.predict(workloads)
    assert np.mean((new >= estimate.quantile(0.05)) & (new <= estimate.quantile(0.95))) >= 0.9


def test_the_90_percent_interval_covers_90_percent_of_unseen_networks(workloads: list[Workload]) -> None:
    y = truth(workloads)
    covered, widths = [], []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        measured = y * np.exp(rng.normal(0, 0.05, len(y)))
        order = rng.permutation(len(y))
        seen, unseen = order[:32], order[32:]
        model = OperatorModel.fit([workloads[i] for i in seen], measured[seen])
        estimate = model.predict([workloads[i] for i in unseen])
        low, high = estimate.quantile(0.05), estimate.quantile(0.95)
        covered.append(np.mean((measured[unseen] >= low) & (measured[unseen] <= high)))
        widths.append(np.median(estimate.std / estimate.mean))
    assert 0.88 <= np.mean(covered) <= 0.995
    assert np.median(widths) < 0.12  # covers without being vacuous


def test_a_quarter_of_disturbed_measurements_does_no_harm(workloads: list[Workload]) -> None:
    y = truth(workloads)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(y))
        measured = y[order[:32]] * np.where(rng.random(32) < 0.25, rng.uniform(1.2, 1.6, 32), 1.0)
        model = OperatorModel.fit([workloads[i] for i in order[:32]], measured)
        assert within(model, [workloads[i] for i in order[32:]], y[order[32:]], 0.1) > 0.95


def test_a_saved_model_predicts_to_the_same_bits(space: SearchSpace, workloads: list[Workload]) -> None:
    measured = truth(workloads[:32]) * np.exp(np.random.default_rng(0).normal(0, 0.03, 32))
    model = OperatorModel.fit(workloads[:32], measured)
    again = OperatorModel.from_dict(json.loads(json.dumps(model.to_dict())))
    archs = space.sample(50, np.random.default_rng(5))
    a, b = model.bind(space).predict(archs), again.bind(space).predict(archs)
    assert (a.mean == b.mean).all()
    assert (a.std == b.std).all()


def test_beyond_what_was_measured_the_spread_grows_and_a_warning_says_so(space: SearchSpace) -> None:
    archs = space.sample(100, np.random.default_rng(6))
    workloads = [space.workload(a) for a in archs]
    y = truth(workloads)
    order = np.argsort(y)
    model = OperatorModel.fit([workloads[i] for i in order[:40]], y[order[:40]])
    inside, outside = model.bind(space).predict(archs[order[:10]]), model.bind(space).predict(archs[order[-10:]])
    assert "lie outside" not in inside.warning
    assert "10 of 10 networks lie outside the measured" in outside.warning
    assert (outside.std / outside.mean).min() > np.median(inside.std / inside.mean)


def test_operators_unlike_all_measured_ones_are_named_and_widen_the_interval(
    space: SearchSpace, published: dict
) -> None:
    plain = [published["MobileNetV2 1.0"](r) for r in range(32, 225, 16)]
    model = OperatorModel.fit(plain, truth(plain))
    seen = model.predict(plain[3:5])
    assert not seen.warning
    assert "hard_swish" in model.bind(space).predict(space.sample(3, np.random.default_rng(0))).warning
    strange = model.predict([published["ResNet-50"](96)])
    assert "dense" in strange.warning
    assert (strange.std / strange.mean)[0] > 2 * (seen.std / seen.mean).max()


def test_unknown_operators_are_named_and_cost_what_they_move(workloads: list[Workload]) -> None:
    model = OperatorModel.fit(workloads[:32], truth(workloads[:32]))
    net = WorkloadBuilder()
    x = net.input(Tensor((16, 32, 32)))
    x = net.add("conv2d", [x], (16, 32, 32), kernel=(3, 3), stride=(1, 1), params=2304)
    plain, odd = net.build([x]), net.build([net.add("erfinv", [x], (16, 32, 32))])
    estimate = model.predict([odd])
    assert "unknown operators, taken as ones that only move data: erfinv" in estimate.warning
    assert estimate.mean[0] > model.predict([plain]).mean[0]
    assert "unknown" not in model.predict([plain]).warning


def test_runtimes_take_normalisation_and_clamps_into_the_kernel_before() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((8, 4, 4)))
    x = net.add("batch_norm", [x], (8, 4, 4), params=16)  # nothing before it
    x = first = net.add("conv2d", [x], (8, 4, 4), kernel=(1, 1), stride=(1, 1), params=64)
    x = net.add("batch_norm", [x], (8, 4, 4), params=16)
    x = net.add("relu6", [x], (8, 4, 4))  # into the normalisation, which stays
    x = net.add("conv2d", [x], (8, 4, 4), kernel=(3, 3), stride=(1, 1), params=576)
    x = net.add("add", [x, first], (8, 4, 4))  # so that two operators read the first convolution
    x = net.add("relu", [x], (8, 4, 4))
    x = net.add("max_pool2d", [x], (8, 2, 2), kernel=(2, 2), stride=(2, 2))
    x = net.add("relu", [x], (8, 2, 2))  # after a pool: a kernel of its own
    found = sorted(group_of(op) for op, n in kernels(net.build([x])).items() for _ in range(n))
    assert found == ["clamp", "dense", "norm", "norm", "pointwise", "pool", "trailing_add"]


def test_what_needs_no_parameters_is_computed_once() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((8, 4, 4)))
    ends = []
    for _ in range(3):  # branches of a cell, each with an activation of its own in front
        active = net.add("relu", [x], (8, 4, 4))
        pooled = net.add("max_pool2d", [active], (8, 4, 4), kernel=(3, 3), stride=(1, 1))
        ends += [net.add("conv2d", [active], (8, 4, 4), kernel=(1, 1), stride=(1, 1), params=64), pooled]
    last = net.add("concat", ends, (48, 4, 4))
    found = {group_of(op): count for op, count in kernels(net.build([last])).items()}
    assert found == {"clamp": 1, "pool": 1, "pointwise": 3, "concat": 1}


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "groups", "group", "computed"),
    [
        ("conv2d", 16, 48, 1, "dense", 48),
        ("conv2d", 16, 50, 1, "dense", 64),  # of which 14 channels are the end of a vector
        ("depthwise_conv2d", 48, 48, 48, "depthwise", 48),
        ("depthwise_conv2d", 40, 40, 40, "depthwise_8", 48),
        ("depthwise_conv2d", 20, 20, 20, "depthwise_4", 32),
        ("depthwise_conv2d", 10, 10, 10, "ragged", 10),
        ("conv2d", 64, 64, 4, "grouped", 64),
        ("conv2d", 64, 64, 8, "narrow", 64),
    ],
)
def test_convolutions_cost_whole_vectors_of_channels(
    kind: str, inputs: int, outputs: int, groups: int, group: str, computed: int
) -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((inputs, 6, 6)))
    y = net.add(kind, [x], (outputs, 6, 6), kernel=(3, 3), stride=(1, 1), groups=groups)
    (op,) = net.build([y]).operators
    found, quantities, _ = describe([op])
    assert GROUPS[found[0]] == group
    macs, idle = quantities[0, QUANTITIES.index("macs")], quantities[0, QUANTITIES.index("idle_outputs")]
    assert (macs + idle) * 1e6 == pytest.approx(computed * 36 * 9 * inputs / groups)


def test_depthwise_convolutions_of_several_outputs_per_channel_are_a_group_of_their_own() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((16, 6, 6)))
    once, twice = (
        net.add("depthwise_conv2d", [x], (n, 6, 6), kernel=(3, 3), stride=(1, 1), groups=16) for n in (16, 32)
    )
    assert [group_of(op) for op in net.build([once, twice]).operators] == ["depthwise", "multiplied"]


def test_resizing_by_a_whole_factor_is_a_kernel_of_its_own() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((8, 9, 9)))
    whole, broken = net.add("resize", [x], (8, 18, 18)), net.add("resize", [x], (8, 20, 20))
    assert [group_of(op) for op in net.build([whole, broken]).operators] == ["resize", "resample"]


@pytest.mark.parametrize(
    ("latencies", "message"),
    [([1.0] * 7, "at least 8"), ([1.0] * 9 + [0.0], "got 0.0"), ([1.0] * 9 + [np.nan], "got nan")],
)
def test_measurements_that_are_none_are_refused(
    workloads: list[Workload], latencies: list[float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        OperatorModel.fit(workloads[: len(latencies)], latencies)


def test_a_model_of_another_version_is_refused(workloads: list[Workload]) -> None:
    values = OperatorModel.fit(workloads[:32], truth(workloads[:32])).to_dict()
    with pytest.raises(UserError, match="another version"):
        OperatorModel.from_dict({**values, "groups": ["a"]})
    with pytest.raises(UserError, match=r"unknown key 'ofset'.*'offset'"):
        OperatorModel.from_dict({**values, "ofset": 1})


def test_energy_is_fitted_like_latency_and_says_so(workloads: list[Workload]) -> None:
    model = OperatorModel.fit(workloads[:32], 7 * truth(workloads[:32]), metric="energy_mj")
    assert model.metric == "energy_mj"
    assert within(model, workloads[32:], 7 * truth(workloads[32:]), 0.05) > 0.95


def test_every_made_up_network_of_a_suite_runs_at_its_resolution() -> None:
    networks = calibration_suite(51, seed=3)
    assert len({n.name for n in networks}) == len(networks) == 51
    assert all(n.workload().macs > 0 for n in networks)
    assert networks[:30] == calibration_suite(30, seed=3)  # a larger suite needs the further networks alone
    with pytest.raises(UserError, match="at least as many"):
        calibration_suite(3)


def test_made_up_detectors_give_the_boxes_of_all_maps() -> None:
    layers = (("detector", (("width", 8), ("maps", 3), ("anchors", 3), ("outputs", 7), ("kernel", 3))),)
    found = network((4, 9, 9), layers, 10)(torch.zeros(2, 4, 9, 9))
    assert found.shape == (2, 3 * (9 * 9 + 5 * 5 + 3 * 3), 7)


@pytest.mark.parametrize("side", [3, 4, 7, 11])
def test_a_classifier_of_a_grid_becomes_a_file_at_any_size(side: int, tmp_path: Path) -> None:
    layers = (("flatten", (("pool", 4),)), ("dense", (("out", 6), ("act", "relu"))))
    OnnxConverter().convert(network((2, side, side), layers, 5), load_target("host"), (2, side, side), tmp_path / "n")


def test_sizes_are_values_and_rows_that_a_convolution_starts_for_all_that_it_computes() -> None:
    net = WorkloadBuilder()
    x = net.input(Tensor((16, 6, 5)))
    spatial = net.add("conv2d", [x], (16, 6, 5), kernel=(3, 3), stride=(1, 1))
    pointwise = net.add("conv2d", [spatial], (16, 6, 5), kernel=(1, 1), stride=(1, 1))
    pooled = net.add("max_pool2d", [pointwise], (16, 3, 2), kernel=(2, 2), stride=(2, 2))
    _, quantities, _ = describe(net.build([pooled]).operators)
    values, written = quantities[:, QUANTITIES.index("values")], quantities[:, QUANTITIES.index("written")]
    assert written * 1e6 == pytest.approx([480, 480, 96])
    assert values * 1e6 == pytest.approx([960, 960, 576])
    macs, starts = quantities[:, QUANTITIES.index("macs")], quantities[:, QUANTITIES.index("starts")]
    assert starts == pytest.approx([macs[0] / 5, macs[1] / 30, 0.0])


def test_unused_ends_of_vectors_and_wide_windows_are_sizes_of_their_own() -> None:
    net = WorkloadBuilder()
    image = net.input(Tensor((3, 8, 8)))
    stem = net.add("conv2d", [image], (24, 8, 8), kernel=(3, 3), stride=(1, 1))
    mixed = net.add("conv2d", [stem], (40, 8, 8), kernel=(1, 1), stride=(1, 1))
    five = net.add("depthwise_conv2d", [mixed], (40, 8, 8), kernel=(5, 5), stride=(1, 1), groups=40)
    seven = net.add("depthwise_conv2d", [five], (40, 8, 8), kernel=(7, 7), stride=(1, 1), groups=40)
    full = net.add("conv2d", [seven], (48, 8, 8), kernel=(1, 1), stride=(1, 1))
    _, quantities, _ = describe(net.build([full]).operators)
    macs, *idle, wide = (quantities[:, QUANTITIES.index(q)] for q in ("macs", "idle_outputs", "idle_inputs", "wide"))
    assert idle[0] / macs == pytest.approx([8 / 24, 8 / 40, 8 / 40, 8 / 40, 0.0])
    assert idle[1] / macs == pytest.approx([0.0, 48 / 40 * 8 / 24, 0.0, 0.0, 8 / 40])  # images are read as they are
    assert wide == pytest.approx([0.0, 0.0, 0.0, macs[3], 0.0])


def test_large_networks_of_many_families_pay_for_what_no_cache_holds(suite: list[Workload]) -> None:
    families = [network.family for network in calibration_suite(60)]
    y = truth(suite) * strained(_totals(suite)[0], 3.0) ** 0.2
    model = OperatorModel.fit(suite, y, families=families)
    assert model.numbers.strain > 0.03 > abs(OperatorModel.fit(suite, truth(suite), families=families).numbers.strain)
    assert model.coefficients is None  # no sum any more
    assert OperatorModel.fit(suite, y).numbers.strain == 0.0
    grown = [strained(footprint, 3.0) for footprint in (0.0, 1.0, 100.0)]
    assert grown[0] == 1.0 < grown[1] < grown[2] < 10.0  # beyond the last cache nothing gets worse


@pytest.mark.parametrize("cache", [2.0, 20.0])
def test_what_the_last_cache_holds_is_learned_from_weights_that_come_from_memory(cache: float) -> None:
    networks = calibration_suite(90)
    suite = [network.workload() for network in networks]
    footprint, seldom = _totals(suite)
    y = truth(suite) + 0.4 * seldom * streamed(footprint, cache)
    fit = OperatorModel.fit(suite, y, families=[network.family for network in networks]).numbers
    assert fit.cache == pytest.approx(cache, rel=0.5)
    assert fit.stream == pytest.approx(0.4, rel=0.3)


def _totals(workloads: Sequence[Workload]) -> tuple[np.ndarray, np.ndarray]:
    """Millions of values and parameters touched, and of weights that are seldom used: the same by every model."""
    rows = OperatorModel.fit(workloads[:8], truth(workloads[:8])).network_rows(workloads)
    return rows[:, OperatorModel.FOOTPRINT], rows[:, OperatorModel.SELDOM]


def test_moves_are_kernels_of_their_own_but_for_swapped_sides_of_a_product() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = x.chunk(2, -1)
            return q @ k.transpose(1, 2)

    found = {group_of(op): count for op, count in kernels(trace(Attention(), (10, 16))).items()}
    assert found == {"slice": 2, "matmul": 1}


def test_transpositions_of_what_a_convolution_wrote_are_a_group_of_their_own() -> None:
    class Shuffles(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())

        def shuffle(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.shuffle(self.body(x))  # of a convolution, with what it takes in
            return torch.nn.functional.silu(self.shuffle(torch.cat([y, torch.sigmoid(y)], 1)))

    found = {group_of(op): count for op, count in kernels(trace(Shuffles(), (4, 6, 6))).items()}
    assert found["trailing_transpose"] == found["transpose"] == 1


def test_the_order_in_which_convolutions_write_lasts_until_a_map_is_shuffled() -> None:
    # ONNX Runtime in int8 shuffles the first of ShuffleNetV2's units of a stage in .38 ms, each of the others in .007:
    # their other half comes from a shuffle, so that all of the map already has its channels first.
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for op, count in kernels(reference_network("shufflenet_v2").workload()).items():
        if "transpose" in op.kind:
            found[group_of(op), op.inputs[0].shape] += count
    assert found == {
        ("trailing_transpose", (2, 58, 28, 28)): 1,
        ("transpose", (2, 58, 28, 28)): 3,
        ("trailing_transpose", (2, 116, 14, 14)): 1,
        ("transpose", (2, 116, 14, 14)): 7,
        ("trailing_transpose", (2, 232, 7, 7)): 1,
        ("transpose", (2, 232, 7, 7)): 3,
    }

    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = torch.nn.Conv2d(4, 8, 1), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept, more = torch.nn.functional.silu(self.stem(x)).chunk(2, 1)  # slices keep the order
            y = torch.cat([kept, self.body(more)], 1)
            return torch.nn.functional.silu(y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))

    assert {group_of(op) for op in kernels(trace(Halves(), (4, 6, 6)))} >= {"trailing_transpose", "slice"}
    assert "transpose" not in {group_of(op) for op in kernels(trace(Halves(), (4, 6, 6)))}


def _spoken(workload: Workload, network: bool = False) -> list[str]:
    """Kinds of kernels bar those of returned maps, sorted."""
    found = network_kernels(workload) if network else kernels(workload)
    return sorted(op.kind for op in found.elements() if op.kind != "result")


def test_products_of_what_may_be_negative_are_told_from_others() -> None:
    def chained(*kinds: str) -> Workload:
        net = WorkloadBuilder()
        here = net.input(Tensor((8, 6, 6)))
        for kind in (*kinds, "conv2d"):
            shape = (8, 3, 3) if kind == "max_pool2d" else (8, 6, 6) if net.tensors[here].shape[1] == 6 else (8, 3, 3)
            window = {"kernel": (1, 1), "stride": (1, 1)} if kind == "conv2d" else {}
            here = net.add(kind, [here], shape, **window)
        return net.build([here])

    assert _spoken(chained("conv2d", "relu")) == ["conv2d", "conv2d"]
    assert _spoken(chained("conv2d", "batch_norm", "relu6", "max_pool2d")) == ["conv2d", "conv2d", "max_pool2d"]
    for kinds in (("conv2d",), ("conv2d", "batch_norm"), ("conv2d", "relu", "batch_norm"), ("conv2d", "silu")):
        assert _spoken(chained(*kinds)).count("signed conv2d") == 1, kinds
    assert _spoken(chained("conv2d", "max_pool2d")).count("signed conv2d") == 1
    # What a network reads may be negative, what a block reads counts as written by a ReLU; images count as neither.
    assert _spoken(chained("conv2d", "relu"), network=True) == ["conv2d", "signed conv2d"]
    net = WorkloadBuilder()
    stem = net.add("conv2d", [net.input(Tensor((3, 6, 6)))], (8, 6, 6), kernel=(3, 3), stride=(1, 1))
    assert _spoken(net.build([stem]), network=True) == ["conv2d"]
    plain, signed = (describe([op])[:] for op in kernels(chained("conv2d")))
    for same, other in zip(plain[:2], signed[:2], strict=True):
        np.testing.assert_array_equal(same, other)  # of one group, and as much to do
    assert plain[2][0, -1] == 0.0 < signed[2][0, -1]


def test_whether_signs_matter_is_decided_by_themes_left_out(suite: list[Workload]) -> None:
    families = [network.family for network in calibration_suite(60)]
    rng = np.random.default_rng(0)
    noise = np.exp(rng.normal(0, 0.02, len(suite)))
    plain = truth(suite)
    slower = np.array(
        [
            sum(
                count * 0.03 * describe([op])[1][0, QUANTITIES.index("macs")]
                for op, count in network_kernels(w).items()
                if op.kind.startswith("signed")
            )
            for w in suite
        ]
    )
    assert 0.1 < np.median(slower / plain) < 2
    model = OperatorModel.fit(suite, (plain + slower) * noise, families=families)
    assert model.numbers.signs
    alike = OperatorModel.fit(suite, plain * noise, families=families)
    assert not alike.numbers.signs
    size = Tensor((32, 24, 24))
    convolutions = [Operator(kind, (size,), size, (3, 3), (1, 1), 1, 9248) for kind in ("conv2d", "signed conv2d")]
    unsigned, signed = model._totals([Counter([op]) for op in convolutions])[:, model.COST]
    assert signed > 1.1 * unsigned
    unsigned, signed = alike._totals([Counter([op]) for op in convolutions])[:, alike.COST]
    assert signed == unsigned


def test_a_chain_of_blocks_has_the_kernels_of_its_blocks() -> None:
    def block(last: str) -> Workload:
        net = WorkloadBuilder()
        conv = net.add("conv2d", [net.input(Tensor((8, 6, 6)))], (8, 6, 6), kernel=(3, 3), stride=(1, 1))
        return net.build([net.add(last, [conv], (8, 6, 6))])

    for last in ("silu", "batch_norm", "relu"):
        chain = Workload.chain([block(last), block(last), block(last)])
        assert kernels(chain) == kernels(block(last)) + kernels(block(last)) + kernels(block(last))
        assert _spoken(chain, network=True) == _spoken(chain)


def test_pooling_of_what_transposed_convolutions_wrote_is_a_group_of_its_own() -> None:
    # ONNX Runtime in int8 pools a map that lies position by position in .03 to .2 ns a value and tap, one that lies
    # channel by channel in 2 to 4; transposed convolutions write it so.
    class Pools(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.conv = torch.nn.ConvTranspose2d(4, 8, 2, 2), torch.nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pool = torch.nn.functional.max_pool2d
            y = pool(pool(torch.relu(self.up(x)), 2), 2)
            z = pool(self.conv(y), 3, 1, 1)
            return torch.nn.functional.avg_pool2d(torch.cat([y, z], 1), 3, 1, 1)

    found = Counter(group_of(op) for op in kernels(trace(Pools(), (4, 8, 8))).elements())
    assert found["planar_pool"] == 2
    assert found["pool"] == found["average_pool"] == 1  # after a convolution, and of both together


def test_pooled_channels_behind_the_last_whole_vector_are_counted() -> None:
    net = WorkloadBuilder()
    pools = [
        net.add(kind, [net.input(Tensor((channels, 8, 8)))], (channels, 4, 4), kernel=(3, 3), stride=(2, 2))
        for kind, channels in [("max_pool2d", 96), ("max_pool2d", 72), ("avg_pool2d", 40), ("avg_pool2d", 24)]
    ]
    pools.append(net.add("relu", [pools[1]], (72, 4, 4)))
    _, quantities, _ = describe(net.build(pools).operators)
    assert quantities[:, QUANTITIES.index("ends")] * 1e6 == pytest.approx([0, 16, 16, 0, 0])
