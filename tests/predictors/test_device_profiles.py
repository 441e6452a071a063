"""Every shipped profile as predictions see it: sourced, sane in its units, and plausible for networks that all know."""

from __future__ import annotations

import numpy as np
import pytest

from hardware_profiles import check_workload, list_profiles, load_profile, load_target
from predictors import Roofline
from search_spaces import reference_network

PROFILES = list_profiles()
POINTS = [f"{name}:{point}" for name in PROFILES for point in load_profile(name).operating_points]

# What nobody would believe of a device of these classes: (least, most).
PLAUSIBLE = {
    "cores": (1, 10_000), "MAC/cycle": (1, 10_000), "MHz": (10, 5_000), "GHz": (0.01, 6), "GFLOP/s": (1, 1e5),
    "TOP/s": (0.1, 300), "GB/s": (0.05, 500), "Gbit/s": (0.1, 100), "kB": (1, 1e5), "MB": (0.1, 1e4),
    "GB": (0.1, 1000), "W": (0.05, 100), "nm": (2, 100),
}  # fmt: skip


@pytest.mark.parametrize("name", PROFILES)
def test_figures_are_sourced_and_of_a_size_that_their_units_allow(name: str) -> None:
    profile = load_profile(name)
    assert profile.datasheet
    for figure in profile.datasheet:
        least, most = PLAUSIBLE[figure.unit]
        assert least <= figure.value <= most, figure
        assert len(figure.source) > 7, figure
    for point in profile.operating_points.values():
        assert 1 <= point.peak_gmacs <= 50_000
        assert 1 <= point.bandwidth_gbs <= 500
        assert point.power_w is None or 0.5 <= point.power_w <= 60
        assert point.host_link_gbs is None or 0.03 <= point.host_link_gbs <= 10
        reckoned = any(word in point.source for word in ("guess", "estimate", "upper bound"))
        assert point.estimated or not reckoned or "peak: " in point.source, "a figure that is estimated says so"


@pytest.mark.parametrize("name", PROFILES)
def test_operating_points_can_be_told_apart(name: str) -> None:
    """No two are the same way of running a network under two names."""
    points = load_profile(name).operating_points
    ways = {
        (p.precision, p.runtime, p.threads, p.batch, p.power_mode, p.host_link, str(sorted(p.options.items())))
        for p in points.values()
    }
    assert len(ways) == len(points)


@pytest.mark.parametrize("point", POINTS)
def test_every_operating_point_predicts_plausible_latencies_and_energies(point: str) -> None:
    target = load_target(point)
    small, middle, large = (reference_network(n).workload() for n in ("squeezenet1_1", "mobilenet_v2", "vgg16"))
    latencies = Roofline(target).predict([small, middle, large])
    assert (latencies.mean > 0).all()
    assert latencies.quantile(0.05)[1] < latencies.mean[1] < latencies.quantile(0.95)[1]
    # MobileNetV2 at 224 pixels: from a large GPU to one core of 2016 or a microNPU of 32 multipliers.
    assert 0.2 < latencies.mean[1] < 400
    assert latencies.mean[2] > 2 * max(latencies.mean[:2])  # 15 G multiply-accumulates
    if target.point.power_w is None:
        return
    energies = Roofline(target, "energy_mj").predict([small, middle, large]).mean
    fit = target.profile.fits.get(target.operating_point)
    power_w = fit.power_w if fit and fit.power_w else target.point.power_w  # measured with energies, else stated
    np.testing.assert_allclose(energies, latencies.mean * power_w)


@pytest.mark.parametrize(
    ("network", "device", "lacking"),
    [
        ("mobilenet_v2", "edge_tpu", set()),
        ("resnet50", "edge_tpu", set()),
        ("inception_v4", "edge_tpu", set()),
        ("densenet121", "edge_tpu_dev_board", set()),
        ("ssd_mobilenet_v2", "edge_tpu", set()),
        ("mobilenet_v3_large", "edge_tpu", {"hard_swish"}),
        ("mobilenet_v3_large", "edge_tpu_dev_board:int8-cpu", set()),
        ("mobilenet_v3_large", "ethos_u55", set()),
        ("mobilenet_v3_large", "ncs2", set()),
        ("deit_tiny", "edge_tpu", {"linear", "layer_norm", "matmul", "softmax", "gelu"}),
        ("deit_tiny", "ethos_u65", set()),
        ("deit_tiny", "jetson_nano", set()),
        ("efficientnet_b0", "oak_rvc2", set()),
    ],
)
def test_known_networks_run_where_they_are_known_to_run(network: str, device: str, lacking: set[str]) -> None:
    findings = check_workload(reference_network(network).workload(), load_target(device))
    assert {f.operator.kind for f in findings} == lacking
    for finding in findings:
        assert finding.source
        assert "left to the host's CPU" in str(finding)
        assert finding.operator == reference_network(network).workload().operators[finding.index]
