"""What every search space promises; a new space is tested by adding one line to `SPACES`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

from nasbench.joint import JointSpace
from search_spaces import (
    AutoFormerSpace,
    ElasticSpace,
    MnasNetSpace,
    MobileHybridSpace,
    MobileNetV3Space,
    Operator,
    ResNetSpace,
    SearchSpace,
    UserError,
    Workload,
    load_space,
    reference_network,
    trace,
)
from search_spaces.operators import KINDS

TINY: list[dict[str, Any]] = [
    {"width": 8, "expansions": [1]},
    {"width": 16, "stride": 2, "depths": [1, 3], "kernels": [3, 5], "expansions": [2, 4], "se": True},
    {"width": 24, "depths": [1, 2], "kernels": [3, 5], "hidden": [40, 72], "activation": "hard_swish"},
]


def tiny(**options: Any) -> MobileNetV3Space:
    """A space small enough to be enumerated, with every kind of stage and knob."""
    table = {"stages": TINY, "resolutions": [8, 13], "widths": [0.5, 1.0], "final_width": 32, "feature_width": 24}
    return MobileNetV3Space(1, 4, **{**table, **options}, name="tiny")


def depths_only() -> MobileNetV3Space:
    """Depths without other knobs in their blocks: nothing else tells them."""
    return tiny(stages=[{"width": 8, "depths": [1, 2, 4], "expansions": [2]}, {"width": 16, "expansions": [2, 3]}])


def tiny_mnasnet() -> MnasNetSpace:
    """Small enough to be enumerated; every kind of layer and skip, odd maps."""
    return MnasNetSpace(
        1, 4, stages=[{"width": 16, "depths": [1, 3]}, {"width": 16, "stride": 2}], resolutions=[9], filters=[0.5, 1],
        kernels=[3], final_width=16, last_width=16, stem_stride=1, name="tiny_mnasnet",
    )  # fmt: skip


def tiny_resnet(**options: Any) -> ResNetSpace:
    """Small enough to be enumerated; odd maps, every kind of stem."""
    stages = [{"width": 32, "depths": [1, 3], "stride": 2}, {"width": 48}]
    table = {
        "stages": stages,
        "resolutions": [9, 16],
        "widths": [0.5, 1.0],
        "expansions": [0.25, 0.5],
        "stem_width": 16,
    }
    return ResNetSpace(1, 4, **{**table, **options}, name="tiny_resnet")


def tiny_vit() -> AutoFormerSpace:
    """A vision transformer space small enough to be enumerated, whose relative positions are clipped."""
    options: dict[str, Any] = {"resolution": 16, "patch": 4, "head_width": 8, "max_relative_position": 2}
    return AutoFormerSpace(
        1, 4, widths=[16, 24], depths=[1, 3], heads=[1, 2], ratios=[1.5, 2], **options, name="tiny_vit"
    )


HYBRID: list[dict[str, Any]] = [
    {"widths": [8, 16], "expansions": [2, 3]},
    {"widths": [16], "stride": 2, "depths": [1, 3], "kernels": [3, 5]},
    {"widths": [16, 24], "stride": 2, "token_widths": [8, 16], "layers": [1, 2], "ratios": [1.5, 2]},
]


def tiny_hybrid(**options: Any) -> MobileHybridSpace:
    """Convolutions and attention; at 24 pixels the attention's map has three, which patches of two do not divide."""
    table: dict[str, Any] = {"stages": HYBRID, "resolutions": [24, 32], "final_widths": [16, 24], "stem_width": 8}
    return MobileHybridSpace(1, 4, **{**table, **options}, heads=2, name="tiny_hybrid")


def elastic_reference(name: str) -> SearchSpace:
    """A published network made elastic."""
    reference = reference_network(name, resolution=32, num_classes=4)
    return ElasticSpace(reference.build(), reference.input_shape)


SPACES: dict[str, Callable[[], SearchSpace]] = {
    "tiny": tiny,
    "depths_only": depths_only,
    "tiny_vit": tiny_vit,
    "tiny_hybrid": tiny_hybrid,
    "autoformer_tiny": lambda: load_space("autoformer_tiny"),
    "vit28": lambda: load_space("vit28", 1, 10),
    "autoformer_base": lambda: load_space("autoformer_base", 1, 10, resolution=128),
    "quickstart": lambda: load_space("quickstart", 1, 10),
    "mobile96": lambda: load_space("mobile96"),
    "ofa_mobilenet_v3": lambda: load_space("ofa_mobilenet_v3"),
    "mobilenet_v3_large": lambda: load_space("mobilenet_v3_large"),
    "mobilenet_v3_small": lambda: load_space("mobilenet_v3_small"),
    "fbnet": lambda: load_space("fbnet"),
    "fbnet_32": lambda: load_space("fbnet_32", 3, 100),
    "proxylessnas": lambda: load_space("proxylessnas"),
    "elastic_concatenations": lambda: elastic_reference("squeezenet1_1"),
    "elastic_residuals": lambda: elastic_reference("mobilenet_v3_small"),
    "tiny_resnet": tiny_resnet,
    "tiny_mnasnet": tiny_mnasnet,
    "mnasnet": lambda: load_space("mnasnet"),
    "ofa_resnet50": lambda: load_space("ofa_resnet50"),
    "resnet28": lambda: load_space("resnet28", 1, 10),
    "joint": lambda: JointSpace(1, 10, of="resnet28", parts=2),
    "nasbench201": lambda: load_space("nasbench201"),
    "sensor_1d": lambda: load_space("sensor_1d", 6, 7),
    "tiny_images": lambda: load_space("tiny_images", 1, 10),
    "nasbench201_tiny": lambda: load_space("nasbench201", 1, 4, resolution=8, channels=4, cells=1),
}


EXAMPLES = ("every_block", "elastic_chain", "signals", "words", "elastic_network")  # see conftest.py


# Building a network of the joint space prunes one.
PARAMS = [pytest.param(n, marks=pytest.mark.extra("prune")) if n == "joint" else n for n in (*SPACES, *EXAMPLES)]


@pytest.fixture(params=PARAMS, scope="module")
def space(request: pytest.FixtureRequest, examples: dict[str, Callable[[], SearchSpace]]) -> SearchSpace:
    return {**SPACES, **examples}[request.param]()


def sample(space: SearchSpace, n: int, seed: int = 0) -> np.ndarray:
    return space.sample(n, np.random.default_rng(seed))


def test_samples_are_canonical_rows_of_the_space(space: SearchSpace) -> None:
    archs = sample(space, 500)
    assert archs.shape == (500, len(space.knobs))
    assert archs.dtype == space.dtype
    assert archs.flags.c_contiguous
    assert (space.check(archs) == archs).all()
    assert (space.canonical(archs) == archs).all()
    assert not archs[~space.active(archs)].any()


def test_sampling_is_uniform_per_active_knob(space: SearchSpace) -> None:
    archs = sample(space, 20_000)
    active = space.active(archs)
    for column, knob in enumerate(space.knobs):
        drawn = archs[active[:, column], column]
        expected = len(drawn) / len(knob.choices)
        counts = np.bincount(drawn, minlength=len(knob.choices))
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected) + 1e-9, knob.name


def test_canonical_rows_of_one_network_are_one(space: SearchSpace) -> None:
    archs = sample(space, 200)
    noise = sample(space, 200, seed=1)
    changed = np.where(space.active(archs), archs, noise)
    assert (space.canonical(changed) == archs).all()
    assert (space.blocks(changed) == space.blocks(archs)).all()
    assert (space.features(changed) == space.features(archs)).all()


def test_decode_and_encode_are_inverse(space: SearchSpace) -> None:
    for arch in sample(space, 20):
        choices = space.decode(arch)
        assert list(choices) == [k.name for k, on in zip(space.knobs, space.active(arch[None])[0], strict=True) if on]
        assert (space.encode(choices) == arch).all()


def test_encode_names_what_is_wrong(space: SearchSpace) -> None:
    choices = space.decode(sample(space, 1)[0])
    name = next(iter(choices))
    with pytest.raises(UserError, match=f"Did you mean '{name}'"):
        space.encode({**choices, name + "x": 1})
    with pytest.raises(UserError, match=f"{name}.*no choice 'huge'"):
        space.encode({**choices, name: "huge"})
    with pytest.raises(UserError, match=f"no choice given for .*{name}"):
        space.encode({k: v for k, v in choices.items() if k != name})


def test_check_refuses_foreign_rows(space: SearchSpace) -> None:
    archs = sample(space, 3).astype(np.int64)
    archs[1, -1] = space.cardinalities[-1]
    with pytest.raises(UserError, match=f"row 1, knob '{space.knobs[-1].name}': index {archs[1, -1]}"):
        space.check(archs)
    with pytest.raises(UserError, match="knobs, got shape"):
        space.check(archs[:, 1:])
    with pytest.raises(UserError, match="index -1"):
        space.check(np.full((1, len(space.knobs)), -1))
    for broken in (0.5, np.nan, np.inf):
        archs = sample(space, 2).astype(float)
        archs[1, 0] = broken
        with pytest.raises(UserError, match=f"row 1, knob '{space.knobs[0].name}': index {broken} is none of"):
            space.check(archs)
    np.testing.assert_array_equal(space.check(sample(space, 2).astype(float)), sample(space, 2))


def test_features_are_one_hot_and_tell_architectures_apart(space: SearchSpace) -> None:
    archs = np.unique(sample(space, 1000), axis=0)
    features = space.features(archs)
    shown = list(space.feature_knobs)
    assert features.dtype == np.float32
    assert features.shape == (len(archs), space.cardinalities[shown].sum())
    start = 0
    for knob in shown:
        stop = start + space.cardinalities[knob]
        part = features[:, start:stop]
        assert (part.sum(1) == space.active(archs)[:, knob]).all()
        assert (part.argmax(1) == archs[:, knob]).all()
        start = stop
    if shown:
        assert len(np.unique(features, axis=0)) == len(archs)


def test_descriptors_are_finite_columns_row_by_row(space: SearchSpace) -> None:
    archs = space.sample(7, np.random.default_rng(2))
    groups = space.descriptors(archs)
    single = [space.descriptors(archs[i : i + 1]) for i in range(len(archs))]
    empty = space.descriptors(archs[:0])
    for place, group in enumerate(groups):
        assert group.dtype == np.float32
        assert np.isfinite(group).all()
        assert (np.concatenate([one[place] for one in single]) == group).all()
        assert empty[place].shape == (0, group.shape[1])


def test_blocks_depend_on_their_knobs_alone(space: SearchSpace) -> None:
    archs, others = sample(space, 300), sample(space, 300, seed=1)
    blocks = space.blocks(archs)
    assert blocks.dtype == np.int32
    assert blocks.shape == (300, len(space.block_knobs))
    assert blocks.min() >= -1
    assert blocks.max() < len(space.catalog)
    for position, knobs in enumerate(space.block_knobs):
        mixed = others.copy()
        mixed[:, list(knobs)] = archs[:, list(knobs)]
        assert (space.blocks(mixed)[:, position] == blocks[:, position]).all()


def test_operators_equal_a_trace_of_the_built_network(space: SearchSpace) -> None:
    for arch in sample(space, 2):
        network = space.build(arch)
        workload = space.workload(arch)
        assert parted(workload) == parted(trace(network, network.input_shape))
        assert workload.params == sum(p.numel() for p in network.parameters())


def parted(workload: Workload) -> tuple[Workload, Counter[Operator]]:
    """A workload without its moves, and these: which of two neighbours names one depends on where blocks end."""
    still = replace(workload, operators=tuple(replace(op, moved=()) for op in workload.operators))
    return still, Counter(move for op in workload.operators for move in op.moved)


def test_costs_add_up_over_blocks(space: SearchSpace) -> None:
    for arch in sample(space, 5):
        blocks = [space.catalog[i].workload for i in space.blocks(arch[None])[0] if i >= 0]
        workload = space.workload(arch)
        assert workload.macs == sum(b.macs for b in blocks)
        assert workload.params == sum(b.params for b in blocks)
        assert workload.bytes_moved == sum(b.bytes_moved for b in blocks)
        # Blocks meet at one tensor, so that the whole network's peak is that of its worst block.
        assert workload.peak_memory_bytes == max(b.peak_memory_bytes for b in blocks)


def test_every_block_is_of_known_kinds_of_operators(space: SearchSpace) -> None:
    used = {op.kind for i in range(len(space.catalog)) for op in space.catalog[i].workload.operators}
    assert used <= KINDS | {"new_empty"}  # circular padding is traced as the memory that it fills


def test_published_figures_are_of_references(space: SearchSpace) -> None:
    assert set(space.published) <= set(space.references)
    assert all(p.source for p in space.published.values())


def test_references_are_canonical_and_named(space: SearchSpace) -> None:
    for name, arch in space.references.items():
        assert name
        assert (space.canonical(space.check(arch)) == arch).all()


@pytest.mark.parametrize(
    "name", ["tiny", "depths_only", "tiny_resnet", "tiny_vit", "tiny_hybrid", "words", "elastic_chain"]
)
def test_size_counts_distinct_canonical_rows(name: str, examples: dict[str, Callable[[], SearchSpace]]) -> None:
    space = {**SPACES, **examples}[name]()
    rows = np.array(list(product(*(range(c) for c in space.cardinalities))), dtype=space.dtype)
    assert space.size == len(np.unique(space.canonical(rows), axis=0))


def test_catalog_is_lazy_and_reaches_every_id() -> None:
    space = tiny()
    rows = np.array(list(product(*(range(c) for c in space.cardinalities))), dtype=space.dtype)
    used = np.unique(space.blocks(space.canonical(rows)))
    assert set(used) - {-1} == set(range(len(space.catalog)))
    assert space.catalog[-1] is space.catalog[len(space.catalog) - 1]
    assert [b.name for b in space.catalog[:2]] == ["stem", "stem"]
    with pytest.raises(IndexError):
        space.catalog[len(space.catalog)]


def test_a_space_without_some_blocks_keeps_to_the_others(space: SearchSpace) -> None:
    whole = sample(space, 2000)
    np.testing.assert_array_equal(space.menu.counts, space.cardinalities)
    assert not space.restricted
    assert space.permits(whole).all()
    # What takes most multiply-accumulates at each position goes, as long as the position has another block.
    blocked = np.zeros(len(space.catalog), dtype=bool)
    for position in range(len(space.block_knobs)):
        ids = np.unique(space.block_grid(position)[2])
        ids = ids[ids >= 0]
        if len(ids) > 1:
            blocked[max(ids, key=lambda i: space.catalog[int(i)].workload.macs)] = True
    restricted = space.without_blocks(blocked)
    permitted = restricted.permits(whole)
    for arch, good in zip(whole[:200], permitted[:200], strict=True):
        ids = space.blocks(arch[None])[0]
        assert good == (not blocked[ids[ids >= 0]].any())
    if not permitted.any():
        return
    drawn = sample(restricted, 500, seed=1)
    assert restricted.permits(drawn).all()
    np.testing.assert_array_equal(drawn, space.canonical(space.check(drawn)))
    # No choice that a permitted architecture makes is missing from the menu, and taking out more leaves less.
    active = space.active(whole)
    for knob in range(len(space.knobs)):
        made = np.unique(whole[permitted & active[:, knob], knob])
        assert set(made) <= set(restricted.menu.choices(knob))
    everything = restricted.without_blocks(np.ones(len(space.catalog), dtype=bool))
    assert not everything.permits(drawn).any()
    assert restricted.permits(drawn).all()
