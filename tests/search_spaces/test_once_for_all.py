"""The once-for-all MobileNetV3 space against its authors' figures and HELP's table, and its learned kernels."""

import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from predictors.tables import MeasuredTable, TableLookup
from search_spaces import MobileNetV3Space, UserError, calibrate, load_space
from search_spaces.mobilenet_v3_supernet import KernelTransforms, SuperMobileNetV3

STAGES = [
    {"width": 8, "expansions": [1]},
    {"width": 16, "stride": 2, "depths": [1, 2], "kernels": [3, 5, 7], "expansions": [2, 4], "se": True},
    {"width": 24, "kernels": [3, 7], "expansions": [2]},
]


def small(**options: Any) -> MobileNetV3Space:
    return MobileNetV3Space(2, 5, **{"stages": STAGES, "resolutions": [16], "final_width": 32, **options})


def supernet(space: MobileNetV3Space, spread: float = 0.0) -> SuperMobileNetV3:
    torch.manual_seed(0)
    made = space.supernet()
    with torch.no_grad():
        for parameter in made.transforms.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return made


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 2, 16, 16, generator=torch.Generator().manual_seed(0))


def test_specialised_networks_have_their_published_figures() -> None:
    space = load_space("ofa_mobilenet_v3")
    assert {"note8_22ms", "note8_31ms"} <= set(space.published)
    for name, published in space.published.items():
        there = load_space("ofa_mobilenet_v3", **published.options)
        workload = there.workload(there.references[name])
        assert f"{workload.macs / 1e6:.0f}M" == published.macs
        assert f"{workload.params / 1e6:.1f}M" == published.params


def test_every_row_of_helps_table_is_an_architecture(data_dir: Path) -> None:
    with gzip.open(data_dir / "ofa_mbv3_latency_help.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    lists = {key: np.array([[int(v) for v in row[key].split("_")] for row in rows]) for key in ("ks", "e", "d", "r")}
    # HELP's networks come from the once-for-all network of width 1.2, at 25 resolutions.
    space = load_space("ofa_mobilenet_v3", widths=[1.2], resolutions=list(range(128, 225, 4)))
    assert isinstance(space, MobileNetV3Space)
    assert space.size == 25 * 7371**5
    archs = space.from_lists(lists["ks"], lists["e"], lists["d"], lists["r"][:, 0])
    assert len(np.unique(archs, axis=0)) == len(rows) == 5000
    for row in (0, 17, 4999):
        network = space.decode(archs[row])
        assert network["resolution"] == lists["r"][row, 0]
        for stage in range(5):
            depth = network[f"stage{stage + 1}.depth"]
            assert depth == lists["d"][row, stage]
            for block in range(int(depth)):
                name = f"stage{stage + 1}.block{block}"
                assert network[f"{name}.kernel"] == lists["ks"][row, 4 * stage + block]
                assert network[f"{name}.expansion"] == lists["e"][row, 4 * stage + block]
    # A loaded GPU's time follows the arithmetic: the decoding would not survive a mistake in it.
    latency = np.array([float(row["titan_rtx_64"]) for row in rows])
    macs = [space.workload(arch).macs for arch in archs[:300]]
    ranks = np.argsort(np.argsort([macs, latency[:300]]))
    assert np.corrcoef(ranks)[0, 1] > 0.98
    table = MeasuredTable(space.name, space.knobs, archs, ("titan_rtx_64",), latency[:, None], "HELP")
    assert (TableLookup(table).bind(space).predict(archs[::7]).mean == latency[::7]).all()


def test_lists_may_hold_anything_beyond_a_stages_depth() -> None:
    space = small()
    deep = space.from_lists([[3, 7, 3]], [[2, 4, 2]], [[2, 1]])
    shallow = space.from_lists([[3, 0, 3]], [[2, 0, 2]], [[1, 1]])
    assert space.decode(deep[0])["stage1.block1.kernel"] == 7
    assert "stage1.block1.kernel" not in space.decode(shallow[0])
    with pytest.raises(UserError, match=r"row 0, knob 'stage1.block1.kernel': no choice 4"):
        space.from_lists([[3, 4, 3]], [[2, 2, 2]], [[2, 1]])
    with pytest.raises(UserError, match=r"row 0, knob 'stage1.depth': no choice 3"):
        space.from_lists([[3, 3, 3]], [[2, 2, 2]], [[3, 1]])
    with pytest.raises(UserError, match=r"kernels: needs shape \(1, 3\), got \(1, 2\)"):
        space.from_lists([[3, 3]], [[2, 2, 2]], [[2, 1]])


def test_references_of_a_table_are_checked() -> None:
    good = {"kernels": [[3], [3, 7], [7]], "expansions": [[1], [2, 4], [2]]}
    space = small(references={"mine": good})
    assert space.decode(space.references["mine"])["stage1.block1.kernel"] == 7
    for change, words in (
        ({"kernels": [[3], [3, 7]]}, r"references.mine: kernels and expansions need one list per stage \(3\)"),
        ({"kernels": [[3], [3, 9], [7]]}, r"references.mine: stage 1 offers kernel \(3, 5, 7\), got 3, 9"),
        ({"kernel": [[3]]}, "unknown key 'references.mine.kernel'. Did you mean 'kernels'"),
    ):
        with pytest.raises(UserError, match=words):
            small(references={"mine": {**good, **change}})


def test_learned_kernels_begin_as_centres() -> None:
    plain, learned = supernet(small()), supernet(small(kernel_transform=True))
    assert {n for n, _ in learned.named_parameters()} - {n for n, _ in plain.named_parameters()} == {
        *(f"transforms.1_{b}.{step}" for b in (0, 1) for step in ("7to5", "5to3")), "transforms.2_0.7to3",
    }  # fmt: skip
    for arch in plain.space.sample(8, np.random.default_rng(0)):
        with torch.no_grad():
            assert torch.allclose(learned(images(), arch), plain(images(), arch), atol=1e-5)


def test_kernel_transforms_follow_the_paper() -> None:
    """Channel by channel, centre by centre: section 3.2 and figure 4 of Cai et al., ICLR 2020."""
    transforms = KernelTransforms([3, 5, 7])
    with torch.no_grad():
        for parameter in transforms.parameters():
            parameter.copy_(torch.randn_like(parameter))
    weight = torch.randn(6, 1, 7, 7)
    five = torch.stack([(transforms.get_parameter("7to5") @ w[0, 1:6, 1:6].flatten()).view(1, 5, 5) for w in weight])
    three = torch.stack([(transforms.get_parameter("5to3") @ w[0, 1:4, 1:4].flatten()).view(1, 3, 3) for w in five])
    assert torch.equal(transforms(weight, 4, 7), weight[:4])
    assert torch.allclose(transforms(weight, 6, 5), five, atol=1e-5)
    assert torch.allclose(transforms(weight, 4, 3), three[:4], atol=1e-5)


def test_learned_kernels_are_in_the_extracted_network() -> None:
    space = small(kernel_transform=True)
    made, x = supernet(space, 0.3), images(6)
    ends = [space.references["smallest"], space.references["largest"]]
    for arch in [*ends, *space.sample(4, np.random.default_rng(0))]:
        stats = calibrate(made, arch, x)
        network = made.extract(arch, stats)
        with torch.no_grad():
            assert torch.allclose(network(x), made(x, arch, stats), atol=1e-4)
        assert [p.shape for p in network.parameters()] == [p.shape for p in space.build(arch).parameters()]


def test_only_transforms_that_take_part_are_trained() -> None:
    space = small(kernel_transform=True)
    made = supernet(space)
    choices = {"stage1.depth": 1, "stage1.block0.kernel": 5, "stage1.block0.expansion": 4, "stage2.block0.kernel": 7}
    F.cross_entropy(made(images(), space.encode(choices)), torch.arange(4)).backward()
    trained = {name for name, p in made.transforms.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"1_0.7to5"}


def test_mixture_supernets_have_no_learned_kernels() -> None:
    with pytest.raises(UserError, match="kernel_transform"):
        small(kernel_transform=True).mixture_supernet()
