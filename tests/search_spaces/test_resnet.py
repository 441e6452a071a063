"""The once-for-all ResNet50 space against its definition and ResNet-50-D's published figures."""

from typing import Any

import numpy as np
import pytest
import torch

from search_spaces import ResNetSpace, UserError, load_space

STAGES = [{"width": 32, "depths": [1, 2]}, {"width": 64, "stride": 2}]


def small(**options: Any) -> ResNetSpace:
    return ResNetSpace(3, 5, **{"stages": STAGES, "resolutions": [32], "stem_width": 16, **options}, name="small")


def test_size_is_that_of_the_definition() -> None:
    """Two stems, six width multipliers of three, and 0 to 2 blocks more than 2, 2, 4, 2, each of three expansions."""
    space = load_space("ofa_resnet50")
    blocks = [sum(3 ** (base + extra) for extra in range(3)) for base in (2, 2, 4, 2)]
    assert space.size == 2 * 3**6 * np.prod(blocks) == 2_458_914_796_962
    assert load_space("ofa_resnet50", resolutions=[128, 160, 192, 224]).size == 4 * space.size
    assert len(space.knobs) == 1 + 6 + 4 + 18


def test_resnet50d_is_in_the_space() -> None:
    space = load_space("ofa_resnet50")
    published = space.published["resnet50d"]
    workload = space.workload(space.references["resnet50d"])
    assert workload.params == published.params
    assert f"{workload.macs / 1e9:.1f}B" == published.macs


def test_widths_of_stages_and_stem_are_their_own() -> None:
    space = load_space("ofa_resnet50")
    assert isinstance(space, ResNetSpace)
    choices = space.decode(space.references["resnet50d"])
    choices |= {"stem.inner_width": 0.65, "stem.width": 0.8, "stage1.width": 0.65, "stage2.block1.expansion": 0.35}
    spec = space.spec(space.encode(choices))
    # once-for-all: 64 and half of it, 512 and 1024, at their multipliers and rounded to multiples of 8.
    assert (spec.stem.inner, spec.stem.cout) == (24, 48)
    assert [(b.cin, b.hidden, b.cout) for b in spec.stages[1][:2]] == [(256, 88, 336), (336, 88, 336)]
    assert [(b.cin, b.hidden, b.cout) for b in spec.stages[2][:2]] == [(336, 256, 1024), (1024, 360, 1024)]


def test_the_largest_network_is_run_at_every_size_of_map() -> None:
    space = small(resolutions=[20], stem_stride=1, stem_pool=False, dropout=0.5)
    network = space.build(space.references["largest"]).eval()
    assert network(torch.zeros(2, 3, 20, 20)).shape == (2, 5)
    assert network.stages(network.stem(torch.zeros(1, 3, 20, 20))).shape == (1, 64, 10, 10)


def test_dropout_acts_in_training_alone() -> None:
    space = small(dropout=0.5)
    supernet, arch, x = space.supernet(), space.references["largest"], torch.randn(4, 3, 32, 32)
    assert not torch.equal(supernet.train()(x, arch), supernet(x, arch))
    assert torch.equal(supernet.eval()(x, arch), supernet(x, arch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, "stages"),
        ({"stages": [{"width": 32, "depth": [1]}]}, r"unknown key 'stages\.0\.depth'. Did you mean 'depths'"),
        ({"stages": [{"width": 32, "depths": [2, 1]}]}, r"stages\.0\.depths: choices must be .* ascending"),
        ({"stem_depths": [1, 2]}, r"stem_depths\.0: .*2 or 3, got 1"),
        ({"expansions": [0]}, r"expansions\.0: .*greater than 0, got 0"),
        ({"references": {"mine": {"stem_depth": 3, "depths": [1], "width": 1, "expansion": 0.25}}},
         r"references\.mine\.depths: needs one per stage, 2"),
        ({"references": {"mine": {"stem_depth": 3, "depths": [3, 2], "width": 1, "expansion": 0.25}}},
         r"references\.mine\.depths: the space offers \(1, 2\), got 3"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**options)
