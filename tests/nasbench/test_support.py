"""What targets do not run is found before a search, told, and never proposed."""

from __future__ import annotations

import numpy as np
import pytest

from hardware_profiles import Profile, Target, load_target
from hardware_profiles.profile import parse_profile
from nasbench.config import parse_config
from nasbench.feasibility import minimiser
from nasbench.plan import make_plan
from nasbench.support import supported_space, unsupported_blocks
from nasbench.variation import crossover, mutate, neighbours
from predictors.counts import Count
from search_spaces import UserError, load_space


def device(name: str = "picky", **constraints) -> Target:
    """A target with the given constraints and nothing else of interest."""
    profile: Profile = parse_profile(
        {
            "name": name,
            "title": name,
            "kind": "NPU",
            "default": "int8",
            "operating_points": {
                "int8": {"precision": "int8", "runtime": "x", "peak_gmacs": 1, "bandwidth_gbs": 1, "source": "test"}
            },
            "roofline": {"efficiency": {"other": 0.5}, "launch_us": 1, "source": "test"},
            "constraints": {"source": "its maker's handbook", **constraints},
        },
        name,
    )
    return profile.target()


def limit(kind: str, **keys) -> dict:
    return {kind: {"source": "its maker's handbook", **keys}}


SMALL_KERNELS = device(limits=limit("depthwise_conv2d", max_kernel=3))
# 16x16 maps of 32 channels are too large, while either alone is well.
NOT_BOTH = device("small_memory", limits=limit("depthwise_conv2d", max_elements=5000))
NOTHING = device("stubborn", unsupported_operators=["depthwise_conv2d"])


def kernels(space) -> list[int]:
    return [i for i, knob in enumerate(space.knobs) if knob.name.startswith("kernel")]


def test_a_choice_that_always_leads_to_what_is_unsupported_leaves_the_menu(space):
    found = supported_space(space, [SMALL_KERNELS])
    for index, knob in enumerate(space.knobs):
        expected = [0] if index in kernels(space) else range(len(knob.choices))
        np.testing.assert_array_equal(found.space.menu.choices(index), expected)
    (note,) = found.notes
    for word in ("picky:int8", "kernel 5 is above 3", "kernel0.0 = 5", "0:5x16@8"):
        assert word in note


def test_blocks_are_unsupported_where_one_of_their_operators_is(space):
    mask = unsupported_blocks(space, SMALL_KERNELS)
    assert mask.any()
    for block, bad in zip(space.catalog, mask, strict=True):
        assert bad == any(op.kernel == (5, 5) for op in block.workload.operators)
    assert not unsupported_blocks(space, load_target("jetson_nano")).any()


@pytest.mark.parametrize("target", [SMALL_KERNELS, NOT_BOTH])
def test_everything_that_is_permitted_is_found_and_nothing_else(make_space, target):
    space = make_space((1, 2))
    restricted = supported_space(space, [target]).space
    everything = space.everything()
    permitted = everything[restricted.permits(everything)]
    rng = np.random.default_rng(0)
    sampled = np.unique(restricted.sample(30_000, rng), axis=0)
    np.testing.assert_array_equal(sampled, permitted)
    assert 0 < len(permitted) < len(everything)
    # The menu offers exactly what some permitted architecture has.
    active = restricted.active(permitted)
    for knob in range(len(space.knobs)):
        has = np.unique(permitted[active[:, knob], knob])
        np.testing.assert_array_equal(restricted.menu.choices(knob), has)


@pytest.mark.parametrize("target", [SMALL_KERNELS, NOT_BOTH])
def test_variation_stays_among_what_is_permitted(space, target):
    restricted = supported_space(space, [target]).space
    rng = np.random.default_rng(1)
    archs = restricted.sample(400, rng)
    for made in (
        mutate(restricted, archs, rng, 0.0),
        mutate(restricted, archs, rng, 0.5),
        crossover(restricted, archs[::2], archs[1::2], rng),
        neighbours(restricted, archs[0], rng),
    ):
        assert len(made)
        assert restricted.permits(made).all()
        np.testing.assert_array_equal(made, space.canonical(space.check(made)))
    assert (mutate(restricted, archs, rng, 0.0) != archs).any(axis=1).mean() > 0.99


@pytest.mark.parametrize(
    ("metric", "maximise"), [("macs", False), ("macs", True), ("params", True), ("peak_memory_bytes", False)]
)
def test_exact_extremes_are_those_of_what_is_permitted(space, metric, maximise):
    restricted = supported_space(space, [NOT_BOTH]).space
    bound = Count(metric).bind(restricted)
    arch = minimiser(restricted, bound, maximise=maximise)
    everything = space.everything()
    values = bound.predict(everything[restricted.permits(everything)]).mean
    best = values.max() if maximise else values.min()
    assert restricted.permits(arch[None])[0]
    assert bound.predict(arch[None]).mean[0] == best
    if metric == "macs" and maximise:
        assert best < bound.predict(everything).mean.max()


def test_an_unavoidable_operator_refuses_the_search_by_name(space):
    with pytest.raises(UserError) as error:
        supported_space(space, [NOTHING])
    for word in ("stubborn:int8", "'tiny'", "depthwise_conv2d is not supported", "0:3x16@8", "its maker's handbook"):
        assert word in str(error.value)


def test_targets_that_exclude_each_other_are_both_named(space):
    large = device("large_only", limits=limit("conv2d", max_elements=10**9))
    assert supported_space(space, [SMALL_KERNELS, large]).space.restricted
    only_small = device("first", limits=limit("depthwise_conv2d", max_elements=16 * 8 * 8))
    wide = device("second", limits=limit("depthwise_conv2d", max_elements=1))
    with pytest.raises(UserError, match=r"second:int8 runs no architecture .* that first:int8 runs"):
        supported_space(space, [only_small, wide])


def test_what_only_falls_back_to_a_cpu_is_for_the_user_to_decide(space):
    avoidable = device("slow", otherwise="host_cpu", limits=limit("depthwise_conv2d", max_kernel=3))
    assert supported_space(space, [avoidable], "avoid").space.restricted
    allowed = supported_space(space, [avoidable], "allow")
    assert allowed.space is space
    assert "leaves to its host's CPU" in allowed.notes[0]

    always = device("slower", otherwise="host_cpu", unsupported_operators=["depthwise_conv2d"])
    unavoidable = supported_space(space, [always], "avoid")
    assert unavoidable.space is space
    assert "every architecture leaves operators to the CPU of slower:int8's host" in unavoidable.notes[0]
    with pytest.raises(UserError, match=r'slower:int8 .*targets.fallback = "refuse"'):
        supported_space(space, [always], "refuse")
    # What may fall back gives way to what may not, whatever their order.
    found = supported_space(space, [always, SMALL_KERNELS], "avoid")
    assert [SMALL_KERNELS.name in note for note in found.notes].count(True) == 1
    np.testing.assert_array_equal(
        found.space.permits(space.everything()),
        supported_space(space, [SMALL_KERNELS]).space.permits(space.everything()),
    )


def test_a_space_without_what_the_edge_tpu_lacks_passes(space):
    assert supported_space(space, [load_target("edge_tpu"), load_target("ncs2")], "refuse").notes == ()
    quickstart = load_space("quickstart", 1, 10)
    (note,) = supported_space(quickstart, [load_target("edge_tpu")]).notes
    assert "hard_swish is not among the supported operators" in note
    assert "hard_sigmoid" not in note
    with pytest.raises(UserError, match="hard_swish"):
        supported_space(quickstart, [load_target("edge_tpu")], "refuse")
    assert supported_space(quickstart, [load_target("ethos_u55"), load_target("pixel_3")], "refuse").notes == ()


def test_a_plan_checks_the_targets_of_its_objectives(space, tmp_path):
    data = {
        "targets": {"devices": ["host", "edge_tpu"]},
        "objectives": {"accuracy": {}, "latency_ms": {"target": "edge_tpu"}},
    }
    plan = make_plan(parse_config(data))
    assert "edge_tpu:int8" in plan.notes[0]
    assert set(plan.references) == set(plan.space.references)
    data["targets"]["fallback"] = "refuse"
    with pytest.raises(UserError, match=r"edge_tpu:int8 runs no architecture of space 'quickstart'"):
        make_plan(parse_config(data))
    # A target that no objective uses decides nothing.
    data["objectives"]["latency_ms"]["target"] = "host"
    assert make_plan(parse_config(data)).notes == ()
    data["targets"]["fallback"] = "ignore"
    with pytest.raises(UserError, match=r"targets.fallback = 'ignore'"):
        parse_config(data)


def test_a_restricted_space_that_permits_next_to_nothing_says_so(make_space):
    space = make_space((1,))
    blocked = np.ones(len(space.catalog), dtype=bool)
    with pytest.raises(UserError, match=r"tiny: only 0 of at least 100,000 random architectures"):
        space.without_blocks(blocked).sample(3, np.random.default_rng(0))
