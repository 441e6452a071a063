"""What every predictor of additive features must do, on every space."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from hardware_profiles import load_target
from predictors import Count, OperatorModel, Roofline, predictor_for
from predictors.base import AdditivePredictor
from predictors.operator_features import COORDINATES, GROUPS, QUANTITIES
from predictors.operator_model import Fit
from search_spaces import MobileNetV3Space, SearchSpace, UserError, load_space, reference_network


def fixed_model() -> OperatorModel:
    """Rates of a CPU core, and a smooth rest around two operators."""
    rng = np.random.default_rng(0)
    shape = (len(GROUPS), len(COORDINATES))
    return OperatorModel(
        Fit(
            rates=tuple(map(tuple, np.log(rng.uniform(0.01, 0.5, (len(GROUPS), len(QUANTITIES)))).tolist())),
            trends=tuple(map(tuple, rng.normal(0, 0.05, shape).tolist())), centre=(4.0,) * len(COORDINATES),
            inducing_groups=(0, 3), inducing=tuple(map(tuple, rng.uniform(0, 6, (2, len(COORDINATES))).tolist())),
            rest=(0.2, -0.1), length=2.0, offset=0.01, doubts=(0.1,) * len(GROUPS), noise=0.02, stretch=0.5,
            lowest=1e-3, highest=1e3,
        )
    )  # fmt: skip


PREDICTORS = {
    **{f"{device}-{metric}": Roofline(load_target(device), metric)
       for device in ("raspberry_pi_4", "edge_tpu", "jetson_nano") for metric in ("latency_ms", "energy_mj")},
    "macs": Count("macs"),
    "params": Count("params"),
    "peak_memory": Count("peak_memory_bytes", itemsize=1),
    "operator_model": fixed_model(),
}  # fmt: skip


@pytest.fixture(scope="module", params=["small", "quickstart", "ofa_mobilenet_v3"])
def space(request: pytest.FixtureRequest, small_space: MobileNetV3Space) -> SearchSpace:
    return small_space if request.param == "small" else load_space(request.param)


@pytest.fixture(params=list(PREDICTORS))
def predictor(request: pytest.FixtureRequest) -> AdditivePredictor:
    return PREDICTORS[request.param]


def one_hot(arch: np.ndarray, space: SearchSpace) -> list[torch.Tensor]:
    return [
        torch.nn.functional.one_hot(torch.tensor(int(choice)), int(count)).double()
        for choice, count in zip(arch, space.cardinalities, strict=True)
    ]


def test_a_bound_population_and_single_workloads_agree(predictor: AdditivePredictor, space: SearchSpace) -> None:
    archs = space.sample(30, np.random.default_rng(0))
    bound = predictor.bind(space)
    workloads = [space.workload(a) for a in archs]
    got, single = bound.predict(archs), predictor.predict(workloads)
    np.testing.assert_allclose(got.mean, single.mean, rtol=1e-9)
    np.testing.assert_allclose(got.std, single.std, rtol=1e-9)
    assert got.lognormal == single.lognormal
    np.testing.assert_allclose(bound.totals(archs), [predictor.block_features(w) for w in workloads], rtol=1e-9)
    assert (got.mean > 0).all()
    assert (got.quantile(0.95) >= got.quantile(0.5)).all()


def test_expected_cost_of_certain_choices_is_the_prediction(predictor: AdditivePredictor, space: SearchSpace) -> None:
    archs = space.sample(5, np.random.default_rng(1))
    bound = predictor.bind(space)
    expected = [bound.expected(one_hot(a, space)).item() for a in archs]
    np.testing.assert_allclose(expected, bound.predict(archs).mean, rtol=1e-6)


def test_coefficients_are_the_head(predictor: AdditivePredictor, space: SearchSpace) -> None:
    bound = predictor.bind(space)
    archs = space.sample(10, np.random.default_rng(2))
    if predictor.coefficients is None:
        assert predictor.reduce == "max" or predictor.target.name.startswith("edge_tpu")  # type: ignore[attr-defined]
        return
    weights, offset = predictor.coefficients
    np.testing.assert_allclose(bound.totals(archs) @ weights + offset, bound.predict(archs).mean, rtol=1e-9)


def test_the_expectation_of_a_linear_predictor_is_exact_and_differentiable(small_space: MobileNetV3Space) -> None:
    counts = [int(c) for c in small_space.cardinalities]
    rows = np.array(list(itertools.product(*(range(c) for c in counts))), dtype=small_space.dtype)
    rng = np.random.default_rng(3)
    logits = [torch.tensor(rng.normal(size=c), requires_grad=True) for c in counts]
    probabilities = [torch.softmax(x, 0) for x in logits]
    chance = np.prod([p.detach().numpy()[rows[:, k]] for k, p in enumerate(probabilities)], axis=0)
    for predictor in (Count("macs"), Roofline(load_target("raspberry_pi_4")), fixed_model()):
        bound = predictor.bind(small_space)
        expected = bound.expected(probabilities)
        assert expected.item() == pytest.approx(chance @ bound.predict(small_space.canonical(rows)).mean, rel=1e-9)
        gradients: Sequence[torch.Tensor] = torch.autograd.grad(expected, logits, retain_graph=True)
        assert all(g.abs().sum() > 0 for g in gradients)


def test_counts_are_those_of_the_operators(space: SearchSpace) -> None:
    archs = space.sample(10, np.random.default_rng(4))
    workloads = [space.workload(a) for a in archs]
    np.testing.assert_array_equal(Count("macs").bind(space).predict(archs).mean, [w.macs for w in workloads])
    np.testing.assert_array_equal(Count("params").bind(space).predict(archs).mean, [w.params for w in workloads])
    for itemsize in (1, 4):
        peak = Count("peak_memory_bytes", itemsize).bind(space).predict(archs)
        np.testing.assert_array_equal(peak.mean, [w.at(itemsize).peak_memory_bytes for w in workloads])
        assert (peak.std == 0).all()
        np.testing.assert_array_equal(peak.quantile(0.9), peak.mean)


def test_the_right_predictor_for_each_metric() -> None:
    assert isinstance(predictor_for("edge_tpu", "latency_ms"), Roofline)
    assert isinstance(predictor_for("", "macs"), Count)
    memory = predictor_for("edge_tpu", "peak_memory_bytes")
    assert isinstance(memory, Count)
    assert memory.itemsize == 1
    with pytest.raises(UserError, match=r"'latency'.*'latency_ms'"):
        predictor_for("host", "latency")
    with pytest.raises(UserError, match="nasbench devices calibrate"):
        predictor_for("host", "latency_ms")
    with pytest.raises(UserError, match="needs a target"):
        predictor_for("", "latency_ms")
    with pytest.raises(UserError, match=r"host:fp32: energy needs power_w"):
        predictor_for("host", "energy_mj")
    with pytest.raises(UserError, match="unknown device"):
        predictor_for("pi", "macs")


def test_empty_populations_are_no_special_case(small_space: MobileNetV3Space) -> None:
    none = small_space.sample(0, np.random.default_rng(0))
    for predictor in PREDICTORS.values():
        assert predictor.bind(small_space).predict(none).mean.shape == (0,)
        assert predictor.predict([]).mean.shape == (0,)


def test_the_roofline_says_what_a_device_cannot_run_and_charges_what_does_not_fit() -> None:
    tpu = Roofline(load_target("edge_tpu"))
    assert "hard_swish" in tpu.predict([reference_network("mobilenet_v3_large").workload()]).warning
    assert "hard_swish" not in tpu.predict([reference_network("mobilenet_v2").workload()]).warning

    resnet = reference_network("resnet50").workload()
    roof = tpu.target.profile.roofline
    roomy = tpu.target.profile.model_copy(update={"roofline": roof.model_copy(update={"on_chip_bytes": 10**9})})
    link_gbs = tpu.target.profile.fits["int8"].parameters.host_link_gbs
    assert roof.on_chip_bytes is not None
    assert link_gbs is not None
    saved = tpu.predict([resnet]).mean[0] - Roofline(roomy.target()).predict([resnet]).mean[0]
    spilt = saved * link_gbs * 1e6
    # Beside the feature maps of the largest operator; several as large weigh a little more.
    largest = max(sum(t.size for t in op.inputs) + op.output.size for op in resnet.operators if op.kind == "conv2d")
    assert largest <= spilt - (resnet.params - roof.on_chip_bytes) <= 1.3 * largest


def test_blocks_of_a_huge_space_are_computed_on_demand(
    small_space: MobileNetV3Space, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    archs = small_space.sample(50, np.random.default_rng(0))
    for predictor in PREDICTORS.values():
        eager = predictor.bind(small_space)
        with monkeypatch.context() as patch:
            patch.setattr("predictors.base.EAGER_BLOCKS", 3)
            lazy = predictor.bind(small_space)
        assert not lazy.table.any()
        for part in (archs[:1], archs):
            np.testing.assert_array_equal(lazy.predict(part).mean, eager.predict(part).mean)
        np.testing.assert_array_equal(lazy.totals(archs), eager.totals(archs))
        half = [torch.full((int(c),), 1 / int(c)) for c in small_space.cardinalities]
        torch.testing.assert_close(lazy.expected(half), eager.expected(half))
    assert "computed on demand" in caplog.text
