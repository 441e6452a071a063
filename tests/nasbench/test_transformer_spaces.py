"""Transformer spaces meet devices: what cannot run is named, and predictors agree with themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hardware_profiles import Target, load_target
from hardware_profiles.profile import parse_profile
from nasbench.support import supported_space
from predictors import Count, Roofline
from search_spaces import SearchSpace, UserError, load_space

SPACES: dict[str, Callable[[], SearchSpace]] = {
    "autoformer": lambda: load_space("autoformer_tiny", 3, 10, resolution=64, depths=[2, 3]),
    "hybrid": lambda: load_space("mobile_hybrid", 3, 10, resolutions=[64], final_widths=[320]),
}


def picky(**constraints: object) -> Target:
    point = {"precision": "int8", "runtime": "x", "peak_gmacs": 1, "bandwidth_gbs": 1, "source": "test"}
    return parse_profile(
        {
            "name": "picky",
            "title": "picky",
            "kind": "NPU",
            "default": "int8",
            "operating_points": {"int8": point},
            "roofline": {"efficiency": {"other": 0.5}, "launch_us": 1, "source": "test"},
            "constraints": {"source": "its maker's handbook", **constraints},
        },
        "picky",
    ).target()


@pytest.mark.parametrize("kind", ["softmax", "layer_norm", "matmul"])
@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_attention_is_named_where_it_cannot_run(make: Callable[[], SearchSpace], kind: str) -> None:
    with pytest.raises(UserError, match=f"picky:int8 runs no architecture.*{kind}.*attention"):
        supported_space(make(), [picky(unsupported_operators=[kind])])


def test_the_edge_tpu_leaves_attention_to_its_host() -> None:
    space, target = SPACES["autoformer"](), load_target("edge_tpu")
    with pytest.raises(UserError, match="layer_norm"):
        supported_space(space, [target], "refuse")
    (note,) = supported_space(space, [target], "allow").notes
    assert "leaves to its host's CPU" in note


def test_only_attention_that_fits_is_proposed() -> None:
    space = SPACES["autoformer"]()
    # 17 tokens: maps of weights have 867 values with three heads, 1156 with four.
    limit = {"softmax": {"source": "its maker's handbook", "max_elements": 1000}}
    found = supported_space(space, [picky(limits=limit)]).space
    heads = [i for i, knob in enumerate(space.knobs) if knob.name.endswith(".heads")]
    assert all(list(found.menu.choices(i)) == [0] for i in heads)
    drawn = found.sample(2000, np.random.default_rng(0))
    assert not drawn[:, heads].any()
    assert len(np.unique(drawn, axis=0)) == 3 * (2**2 + 2**3)


@pytest.mark.parametrize("make", SPACES.values(), ids=SPACES)
def test_bound_predictions_are_those_of_the_networks(make: Callable[[], SearchSpace]) -> None:
    space = make()
    archs = space.sample(5, np.random.default_rng(0))
    workloads = [space.workload(arch) for arch in archs]
    for predictor in (Roofline(load_target("raspberry_pi_4")), Count("macs"), Count("peak_memory_bytes")):
        given = predictor.predict(workloads)
        bound = predictor.bind(space).predict(archs)
        np.testing.assert_allclose(bound.mean, given.mean, rtol=1e-5)
        np.testing.assert_allclose(bound.std, given.std, rtol=1e-5)
