"""A target calibrated from whatever was measured on it: one network, a handful, or many."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hardware_profiles import Target, load_profile, load_target
from predictors import Roofline
from predictors.base import Array
from predictors.calibration import Calibration, MeasuredRow, fit_target
from predictors.calibration_methods import Sample, _chosen_errors, fit_metric, interval_factor
from predictors.choice import choose_predictor
from predictors.roofline_fitting import sample
from search_spaces import UserError, Workload, load_space
from search_spaces.reference import reference_network

NAMES = (
    "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnet34", "squeezenet1_1", "shufflenet_v2",
    "mnasnet", "efficientnet_lite0", "densenet121", "vgg11", "inception_v1", "ghostnet_v1", "alexnet",
)  # fmt: skip


@pytest.fixture(scope="module")
def workloads() -> list[Workload]:
    return [reference_network(n).workload() for n in NAMES]


def bare(name: str = "jetson_nano") -> Target:
    """A target of which nothing is known but its datasheet."""
    target = load_target(name)
    return Target(target.profile.model_copy(update={"fits": {}, "references": ()}), target.operating_point)


def truth(target: Target, workloads: list[Workload]) -> Array:
    """What a device would measure that is 1.7 times slower, much more so at depthwise convolutions, with 2 % noise."""
    roof = target.profile.roofline
    slow = {k: v / (4 if "depthwise" in k else 1.7) for k, v in roof.efficiency.items()}
    profile = target.profile.model_copy(update={"roofline": roof.model_copy(update={"efficiency": slow})})
    mean = Roofline(Target(profile, target.operating_point)).predict(workloads).mean
    return mean * np.random.default_rng(0).lognormal(0, 0.02, len(mean))


def rows(values: Array, energy: bool = False) -> list[MeasuredRow]:
    return [
        MeasuredRow(
            network=n,
            family=reference_network(n).family,
            latency_ms=float(v),
            energy_mj=6 * float(v) if energy else None,
        )
        for n, v in zip(NAMES, values, strict=False)
    ]


@pytest.mark.parametrize(("n", "bar"), [(1, 0.7), (4, 0.35), (8, 0.25), (14, 0.12)])
def test_more_measurements_give_better_predictions(n: int, bar: float, workloads: list[Workload]) -> None:
    target = bare()
    measured = truth(target, workloads)
    calibration = fit_target(target, rows(measured[:n]), workloads[:n])
    estimate = calibration.predictor(target).predict(workloads)
    assert np.median(np.abs(estimate.mean / measured - 1)) < bar
    inside = (estimate.quantile(0.05) <= measured) & (measured <= estimate.quantile(0.95))
    assert inside.mean() >= 0.7
    if n == 1:
        assert calibration.models["latency_ms"].method == "scale"
        assert estimate.mean[0] == pytest.approx(measured[0])


@pytest.mark.parametrize("method", ["scale", "roofline", "operator_model"])
def test_a_saved_calibration_predicts_the_same(method: str, workloads: list[Workload], tmp_path: Path) -> None:
    target = bare()
    calibration = fit_target(target, rows(truth(target, workloads), energy=True), workloads, method=method)  # type: ignore[arg-type]
    assert calibration.models["latency_ms"].method == method
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == calibration
    space = load_space("quickstart")
    archs = space.sample(50, np.random.default_rng(0))
    for metric in ("latency_ms", "energy_mj"):
        first, second = (c.predictor(target, metric) for c in (calibration, loaded))
        assert first.metric == metric
        np.testing.assert_array_equal(first.predict(workloads).mean, second.predict(workloads).mean)
        bound = first.bind(space).predict(archs)
        one = first.predict([space.workload(a) for a in archs])
        np.testing.assert_allclose(bound.mean, one.mean, rtol=1e-6)
        assert (bound.std > 0).all()


def test_energy_follows_from_measured_energy_where_nobody_states_the_power(workloads: list[Workload]) -> None:
    target = load_target("host")
    measured = np.linspace(1, 5, len(workloads))
    calibration = fit_target(target, rows(measured, energy=True), workloads)
    energy = calibration.predictor(target, "energy_mj").predict(workloads).mean
    assert (energy > 0).all()
    with pytest.raises(UserError, match="holds no measurements of energy_mj"):
        fit_target(target, rows(measured), workloads).predictor(target, "energy_mj")


@pytest.mark.parametrize("method", ["scale", "roofline", "operator_model"])
def test_energy_that_nobody_measured_is_calibrated_latency_times_stated_power(
    method: str, workloads: list[Workload]
) -> None:
    target = bare()
    assert target.point.power_w is not None
    calibration = fit_target(target, rows(truth(target, workloads)), workloads, method=method)  # type: ignore[arg-type]
    latency, energy = (choose_predictor(target, m, calibration) for m in ("latency_ms", "energy_mj"))
    assert energy.predictor.metric == "energy_mj"
    assert energy.basis == f"{target.point.power_w:g} W times latency: {latency.basis}"
    time, found = latency.predictor.predict(workloads), energy.predictor.predict(workloads)
    np.testing.assert_allclose(found.mean, target.point.power_w * time.mean)
    assert (found.std / found.mean > time.std / time.mean).all()  # nor is the power certain
    assert "energy is latency times stated power" in found.warning
    space = load_space("quickstart")
    archs = space.sample(20, np.random.default_rng(0))
    bound, one = (
        energy.predictor.bind(space).predict(archs),
        energy.predictor.predict([space.workload(a) for a in archs]),
    )
    np.testing.assert_allclose(bound.mean, one.mean, rtol=1e-6)
    np.testing.assert_allclose(bound.std, one.std, rtol=1e-6)
    expected = energy.predictor.bind(space).expected([torch.eye(int(n), dtype=float)[0] for n in space.cardinalities])
    assert float(expected) == pytest.approx(energy.predictor.predict([space.workload(archs[0] * 0)]).mean[0], rel=1e-6)
    # Measured energy comes first, and a roofline that is asked for is the profile's where none was fitted.
    measured = fit_target(target, rows(truth(target, workloads), energy=True), workloads, method=method)  # type: ignore[arg-type]
    assert "W times" not in choose_predictor(target, "energy_mj", measured).basis
    roofline = choose_predictor(target, "energy_mj", calibration, "roofline")
    assert roofline.basis == (energy.basis if method == "roofline" else "roofline from datasheet figures")


def test_what_cannot_be_fitted_says_so(workloads: list[Workload]) -> None:
    target = bare()
    good = rows(truth(target, workloads))
    with pytest.raises(UserError, match="no measurements to fit"):
        fit_target(target, [], [])
    with pytest.raises(UserError, match="'mobilenet_v1' was measured more than once"):
        fit_target(target, [good[0], good[0]], workloads[:1] * 2)
    with pytest.raises(UserError, match="operator_model needs at least 8 networks, 3 were measured"):
        fit_target(target, good[:3], workloads[:3], method="operator_model")
    with pytest.raises(UserError, match="the calibration is of jetson_nano:fp16-maxn, not of host:fp32"):
        fit_target(target, good[:2], workloads[:2]).predictor(load_target("host"))
    with pytest.raises(ValueError, match="greater than 0"):
        MeasuredRow(network="x", latency_ms=-1.0)


def test_far_outside_what_was_measured_the_interval_widens_and_says_so(workloads: list[Workload]) -> None:
    target = bare()
    calibration = fit_target(target, rows(truth(target, workloads))[:3], workloads[:3])
    near, far = (
        calibration.predictor(target).predict([w]) for w in (workloads[0], reference_network("vgg16").workload())
    )
    assert near.warning == ""
    assert "outside the measured" in far.warning
    assert far.std[0] / far.mean[0] > near.std[0] / near.mean[0]


def test_methods_are_compared_by_errors_of_the_same_networks_left_out(workloads: list[Workload]) -> None:
    """The operator model leaves out single networks where there are only two families, so the others must too."""
    target = bare()
    measured = truth(target, workloads)[:8]
    two = [r.model_copy(update={"family": "ab"[i % 2]}) for i, r in enumerate(rows(measured))]
    off = np.log(measured / Roofline(target).predict(workloads[:8]).mean)
    alone = [off[i] - np.median(np.delete(off, i)) for i in range(8)]
    quality = fit_target(target, two, workloads[:8], method="scale").models["latency_ms"].quality
    assert quality["median_error"] == pytest.approx(np.median(np.abs(np.expm1(-np.array(alone)))))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 7, "rows": []}', "calibration format 7, this version reads 3; delete it and calibrate again"),
        ('{"target": "jetson_nano:fp32"}', "key 'created' is missing .*is damaged: delete it and calibrate again"),
        ("[1]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_a_file_of_another_version_is_told_from_a_damaged_one(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"c.json: .*{message}"):
        Calibration.load(path)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 20])
def test_the_interval_of_a_handful_holds_nine_in_ten_new_networks(n: int) -> None:
    rng = np.random.default_rng(n)
    for errors, new in (
        (rng.standard_normal((4000, n)), rng.standard_normal(4000)),
        (rng.standard_t(4, (4000, n)), rng.standard_t(4, 4000)),
    ):
        factors = np.array([interval_factor(np.abs(row), n) for row in errors])
        assert np.mean(np.abs(new) <= 1.645 * factors) >= 0.885


def test_choosing_among_methods_by_luck_does_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    best, honest = [], []
    for _ in range(300):
        logs = list(rng.standard_normal((3, 6)))
        best.append(min(np.mean(np.abs(errors)) for errors in logs))
        honest.append(np.mean(np.abs(_chosen_errors(logs))))
    expected = np.sqrt(2 / np.pi)  # of the absolute value of a standard normal
    assert np.mean(best) < 0.9 * expected
    assert np.mean(honest) > 0.98 * expected


def test_errors_of_a_family_do_not_set_the_interval_that_it_is_counted_with() -> None:
    target, space = bare(), load_space("quickstart")
    workloads = [space.workload(a) for a in space.sample(7, np.random.default_rng(0))]
    families = ("a", "a", "a", "b", "b", "b", "odd")
    off = np.exp([0.0, 0, 0, 0, 0, 0, 1.5])
    measured = Roofline(target).predict(workloads).mean * off
    data = Sample(target, "latency_ms", tuple("1234567"), families, workloads, measured)
    assert fit_metric(data, "scale").quality["interval_90_coverage"] == pytest.approx(6 / 7)


def test_eight_published_networks_give_intervals_that_hold_the_others() -> None:
    target = bare("jetson_agx_xavier")
    data = sample(load_profile("jetson_agx_xavier").target())
    square = [i for i, name in enumerate(data.names) if name.partition("@")[2].isdigit()]
    published = [
        MeasuredRow(network=data.names[i], family=data.families[i], latency_ms=float(data.latency_ms[i]))
        for i in square
    ]
    heads = [row.network.partition("@") for row in published]
    works = [reference_network(name, resolution=int(size)).workload() for name, _, size in heads]
    measured = np.array([row.latency_ms for row in published])
    inside = []
    for draw in range(4):
        order = np.random.default_rng(draw).permutation(len(works))
        some, rest = order[:8], order[8:]
        calibration = fit_target(target, [published[i] for i in some], [works[i] for i in some])
        estimate = calibration.predictor(target).predict([works[i] for i in rest])
        inside.append((estimate.quantile(0.05) <= measured[rest]) & (measured[rest] <= estimate.quantile(0.95)))
    assert np.concatenate(inside).mean() >= 0.85


def guessed(target: Target, factor: float = 1.0) -> Target:
    """The target with peaks that somebody guessed, `factor` too high."""
    point = target.point
    point = point.model_copy(
        update={
            "estimated": True,
            "peak_gmacs": factor * point.peak_gmacs,
            "bandwidth_gbs": factor * point.bandwidth_gbs,
        }
    )
    return Target(
        target.profile.model_copy(update={"operating_points": {target.operating_point: point}}), target.operating_point
    )


@pytest.mark.parametrize("factor", [1000.0, 0.001])
@pytest.mark.parametrize("n", [2, 3, 5, 14])
def test_one_value_in_another_unit_is_named(n: int, factor: float, workloads: list[Workload]) -> None:
    target = guessed(bare())
    for wrong in range(n):
        measured = truth(target, workloads)[:n]
        measured[wrong] *= factor
        which = NAMES[wrong] if n > 2 else "mobilenet_v[12]"
        with pytest.raises(UserError, match=rf"latency_ms of {which} is .* times (more|less) than .*another unit"):
            fit_target(target, rows(measured), workloads[:n])


@pytest.mark.parametrize("n", [1, 3, 14])
def test_values_that_are_all_in_another_unit_are_refused_where_the_profile_knows(
    n: int, workloads: list[Workload]
) -> None:
    target = bare()
    measured = truth(target, workloads)[:n]
    with pytest.raises(UserError, match=r"latency_ms is \d+ times what the profile's figures .* in another unit\?"):
        fit_target(target, rows(1000 * measured), workloads[:n])
    with pytest.raises(UserError, match=r"latency_ms is \d+ times less than arithmetic alone takes"):
        fit_target(target, rows(measured / 1000), workloads[:n])
    assert fit_target(target, rows(measured), workloads[:n]).warning == ""
    # Guesses are believed to be far off, but not a million times.
    for method in ("auto", "scale"):
        with pytest.raises(UserError, match="it is in another unit"):
            fit_target(guessed(target), rows(1e6 * measured), workloads[:n], method=method)  # type: ignore[arg-type]


def test_what_a_device_leaves_to_a_host_is_no_other_unit(workloads: list[Workload]) -> None:
    target = load_target("edge_tpu")
    refused = reference_network("deit_tiny").workload()
    chosen = [workloads[i] for i in (0, 1, 3, 5)]
    measured = [*Roofline(target).predict(chosen).mean, 700.0]
    names = [*(NAMES[i] for i in (0, 1, 3, 5)), "deit_tiny"]
    table = [MeasuredRow(network=n, latency_ms=v) for n, v in zip(names, measured, strict=True)]
    assert fit_target(target, table, [*chosen, refused], method="scale").models["latency_ms"].method == "scale"


def test_a_power_that_no_board_draws_is_another_unit_of_energy(workloads: list[Workload]) -> None:
    target = bare()
    measured = rows(truth(target, workloads), energy=True)
    wrong = [measured[0].model_copy(update={"energy_mj": measured[0].energy_mj / 1000}), *measured[1:]]  # type: ignore[operator]
    with pytest.raises(UserError, match=f"energy_mj of {NAMES[0]} is .* less than"):
        fit_target(target, wrong, workloads)


def test_overhead_of_small_networks_is_no_other_unit(workloads: list[Workload]) -> None:
    target = guessed(bare())
    tiny = reference_network("mobilenet_v3_small", resolution=32).workload()
    measured = np.append(truth(target, workloads[:5]), Roofline(target).predict([tiny]).mean) + 200.0
    names = [*NAMES[:5], "mobilenet_v3_small@32"]
    found = fit_target(target, [MeasuredRow(network=n, latency_ms=v) for n, v in zip(names, measured, strict=True)],
                       [*workloads[:5], tiny])  # fmt: skip
    predicted = found.predictor(target).predict([tiny]).mean[0]
    assert predicted == pytest.approx(measured[-1], rel=0.3)


def test_guessed_peaks_that_are_far_off_cost_no_accuracy(workloads: list[Workload]) -> None:
    measured = truth(bare(), workloads) * 50
    target = guessed(bare(), 10.0)
    found = fit_target(target, rows(measured), workloads, method="roofline")
    assert "which were guessed" in found.warning
    assert found.models["latency_ms"].quality["median_error"] < 0.15
    assert np.median(np.abs(found.predictor(target).predict(workloads).mean / measured - 1)) < 0.05


def test_a_poor_fit_says_so(workloads: list[Workload]) -> None:
    measured = truth(bare(), workloads) * np.random.default_rng(0).lognormal(0, 1, len(workloads))
    found = fit_target(bare(), rows(measured), workloads, method="scale")
    assert found.models["latency_ms"].quality["median_error"] > 0.5
    assert "do not rely on this fit" in found.warning
    both = fit_target(guessed(bare()), rows(1000 * measured), workloads, method="scale").warning
    assert "which were guessed" in both
    assert "do not rely on this fit" in both


@pytest.mark.parametrize("method", ["scale", "roofline"])
def test_operators_that_no_measured_network_had_are_named(method: str, workloads: list[Workload]) -> None:
    target = bare()
    convolutional = [i for i, n in enumerate(NAMES) if n in ("resnet18", "resnet34", "vgg11", "alexnet")]
    some = [rows(truth(target, workloads))[i] for i in convolutional]
    fitted = fit_target(target, some, [workloads[i] for i in convolutional], method=method)  # type: ignore[arg-type]
    predictor = fitted.predictor(target)
    assert "no calibration network" not in predictor.predict([reference_network("vgg16").workload()]).warning
    strange = reference_network("deit_tiny").workload()
    for beside in ([], [reference_network("vgg19").workload()] * 20):
        warning = predictor.predict([*beside, strange]).warning
        assert "no calibration network had operators like some of these: matmul" in warning
    bound = predictor.bind(load_space("quickstart")).predict(np.zeros((1, len(load_space("quickstart").knobs)), int))
    assert "depthwise_conv2d" in bound.warning


def test_a_roofline_that_is_asked_for_is_the_calibration_s(workloads: list[Workload]) -> None:
    target = bare()
    for method, basis in (("roofline", "roofline fitted anew"), ("scale", "roofline from datasheet figures")):
        fitted = fit_target(target, rows(truth(target, workloads)), workloads, method=method)  # type: ignore[arg-type]
        assert choose_predictor(target, "latency_ms", fitted, "roofline").basis.startswith(basis)
