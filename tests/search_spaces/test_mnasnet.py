"""MnasNet's space against the paper's count and the published figures of the networks found in it."""

from typing import Any

import numpy as np
import pytest
import torch

from search_spaces import MnasNetSpace, UserError, load_space
from search_spaces.mnasnet_spec import LayerSpec

STAGES = [{"width": 16, "stride": 2, "depths": [1, 2]}, {"width": 24}]


def small(**options: Any) -> MnasNetSpace:
    return MnasNetSpace(2, 5, **{"stages": STAGES, "resolutions": [16], **options}, name="small")


def layers(space: MnasNetSpace, arch: np.ndarray) -> list[list[LayerSpec]]:
    """The layers of every searched block of an architecture."""
    found: list[list[LayerSpec]] = [[] for _ in space.table.stages]
    for block in space.blocks(arch[None])[0]:
        if block >= 0:
            layer, choices = space.place_of(int(block))
            spec = space.spec(layer, choices)
            if isinstance(spec, LayerSpec):
                found[int(layer.name[5])].append(spec)
    return found


def test_size_is_the_papers() -> None:
    """Tan et al., section 4.2: S = 432 choices a block, B = 5 blocks of N = 3 layers on average, about 10^13."""
    space = load_space("mnasnet")
    assert isinstance(space, MnasNetSpace)
    assert space.size == 432**5 == 15_045_919_506_432
    depths = [stage.depths for stage in space.table.stages]
    assert np.mean([d[1] for d in depths]) == 3
    assert all(d == (d[1] - 1, d[1], d[1] + 1) for d in depths)


def test_networks_found_have_their_published_figures() -> None:
    space = load_space("mnasnet")
    assert set(space.published) == {"a1", "b1", "small"}
    for name, published in space.published.items():
        there = load_space("mnasnet", **published.options)
        workload = there.workload(there.references[name])
        for counted, given in ((workload.macs, published.macs), (workload.params, published.params)):
            if isinstance(given, str):
                digits = len(given.partition(".")[2].rstrip("MB"))
                given, counted = given[:-1], f"{counted / {'M': 1e6, 'B': 1e9}[given[-1]]:.{digits}f}"  # type: ignore[assignment]
            assert counted == given, name


def test_all_layers_of_a_block_are_equal_but_for_the_first() -> None:
    space = load_space("mnasnet")
    assert isinstance(space, MnasNetSpace)
    found = layers(space, space.references["a1"])
    assert [len(block) for block in found] == [2, 3, 4, 2, 3]
    for block in found:
        assert len({(x.kind, x.hidden // x.cin, x.kernel, x.cout) for x in block}) == 1
        assert len(set(block[1:])) <= 1
        assert {x.skip for x in block[1:]} <= {"identity"}
        assert block[0].skip == "none"  # another number of channels


def test_skips_are_where_shapes_allow_them() -> None:
    space = small(stages=[{"width": 16, "stride": 2}, {"width": 16}], filters=[1.0], skips=["none", "pool", "identity"])
    for skip, expected in (("none", ["none"] * 2), ("pool", ["pool"] * 2), ("identity", ["none", "identity"])):
        rest = {"op": "conv", "kernel": 3, "squeeze": 0, "skip": skip}
        arch = space.encode({f"stage{s}.{what}": choice for s in (0, 1) for what, choice in rest.items()})
        assert [block[0].skip for block in layers(space, arch)] == expected
        assert space.build(arch).eval()(torch.zeros(1, 2, 16, 16)).shape == (1, 5)


def test_widths_are_told_apart_by_every_filter_ratio() -> None:
    space = load_space("mnasnet")
    assert isinstance(space, MnasNetSpace)
    archs = np.tile(space.references["largest"], (3, 1))
    for s in range(5):
        archs[:, [k.name for k in space.knobs].index(f"stage{s}.filters")] = range(3)
    widths = [[block[0].cout for block in layers(space, arch)] for arch in archs]
    assert widths == [[16, 24, 48, 72, 120], [24, 32, 64, 96, 160], [32, 40, 80, 120, 200]]


def test_kinds_of_operations_have_weights_of_their_own() -> None:
    names = [name.split(".") for name, _ in small().supernet().named_parameters()]
    assert {name[3] for name in names if name[1] == "stage0_layer0"} == {"conv", "separable", "mbconv"}
    weight = small().supernet().get_parameter("largest.stage0_layer1.shared.mbconv.depthwise.conv.weight")
    assert weight.shape == (6 * 24, 1, 5, 5)  # 16 * 1.25 rounded, of expansion 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ["mbconv"]}, r"ops: .* mbconv with its expansion \(mbconv6\), got 'mbconv'"),
        ({"kernels": [3, 4]}, r"kernels: kernels must be odd, got \(3, 4\)"),
        ({"skips": ["residual"]}, r"skips\.0: .*'none', 'identity' or 'pool', got 'residual'"),
        ({"stages": [{"width": 16, "layers": [1]}]}, r"unknown key 'stages\.0\.layers'"),
        ({"widths": [16]}, r"widths: needs one per stage, 2, got \[16\]"),
        ({"references": {"mine": {"ops": ["conv"], "kernels": [3], "squeezes": [0], "depths": [1]}}},
         r"references\.mine: op: needs one per stage, 2, got 1"),
        ({"references": {"mine": {"ops": ["conv"] * 2, "kernels": [3, 7], "squeezes": [0, 0], "depths": [1, 1]}}},
         r"references\.mine: kernel: stage 1 offers \(3, 5\), got 7"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**options)
