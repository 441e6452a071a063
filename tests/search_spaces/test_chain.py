"""Chains of chosen blocks: the published spaces, and what a table of one's own must say."""

import csv
import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from predictors import LookupTable, MeasuredTable, TableLookup
from search_spaces import ChainSpace, UserError, load_space

PRESETS = ("fbnet", "fbnet_32", "proxylessnas")
BLOCKS: dict[str, Any] = {"mb": {"type": "inverted_residual", "expansion": 2}, "skip": {"type": "skip"}}


def chain(**options: Any) -> ChainSpace:
    table = {"blocks": BLOCKS, "stages": [{"width": 16, "layers": 2}], "resolution": 8, "stem_stride": 1}
    return ChainSpace(1, 4, **{**table, **options})


def test_sizes_are_the_published_ones() -> None:
    assert load_space("fbnet").size == load_space("fbnet_32").size == 9**22
    # 21 layers; the six that change the shape cannot be skipped.
    assert load_space("proxylessnas").size == 6**6 * 7**15


@pytest.mark.parametrize("name", ["fbnet", "proxylessnas"])
def test_references_have_their_published_costs(name: str) -> None:
    for reference, published in load_space(name).published.items():
        space = load_space(name, **published.options)
        workload = space.workload(space.references[reference])
        for counted, given in ((workload.macs, published.macs), (workload.params, published.params)):
            if isinstance(given, str):
                # Rounded to what the paper prints; the paper of FBNet-A rounds 249.92M down.
                digits = len(given.partition(".")[2].removesuffix("M"))
                assert abs(counted / 1e6 - float(given.removesuffix("M"))) < 10**-digits, reference
            elif given is not None:
                assert counted == given, reference


def test_fbnet_decodes_the_rows_of_a_measured_table(data_dir: Path) -> None:
    table = MeasuredTable.from_help(data_dir / "fbnet_latency_help.csv.gz", ["pixel3"])
    space = load_space("fbnet_32")
    first = list(space.decode(table.archs[0]).values())
    assert "|".join(map(str, first)) == (
        "k5_e6|skip|k3_e1_g2|skip|k5_e1|skip|skip|skip|k5_e6|k5_e1|k3_e1_g2|k5_e1|k5_e6|k3_e6|k3_e3|k5_e6|k3_e6|k3_e3|"
        "k5_e1|k3_e3|k5_e1|k5_e1_g2"
    )
    assert (TableLookup(table).bind(space).predict(table.archs).mean == table.column("pixel3")).all()
    with gzip.open(data_dir / "fbnet_latency_help.csv.gz", "rt") as file:
        rows = [row["ops"] for row in csv.DictReader(file)]
    assert len(rows) == len(table.archs) == 5000
    assert ["|".join(map(str, space.decode(arch).values())) for arch in table.archs] == rows
    names = [knob.name for knob in space.knobs]
    back = np.stack([space.encode(dict(zip(names, row.split("|"), strict=True))) for row in rows])
    assert (back == table.archs).all()
    with pytest.raises(UserError, match="other knobs or another input"):
        TableLookup(table).bind(load_space("fbnet"))


def test_proxylessnas_binds_its_table_of_blocks(data_dir: Path) -> None:
    table = LookupTable.from_proxylessnas(data_dir / "lut_proxylessnas_pixel1.csv")
    space = load_space("proxylessnas")
    bound = table.bind(space)
    archs = np.stack([space.references["mobile"], *space.sample(3, np.random.default_rng(0))])
    single = table.predict([space.workload(arch) for arch in archs])
    assert np.allclose(bound.predict(archs).mean, single.mean)
    # The tightest and the loosest network of the space, block by block.
    least, most = (bound.predict(space.canonical(np.full((1, 21), i))).mean[0] for i in (0, 5))
    assert least < bound.predict(archs[:1]).mean[0] < most


def test_a_skip_is_the_identity_and_only_where_it_can_be() -> None:
    space = chain(stages=[{"width": 16, "layers": 2, "stride": 2}, {"width": 24, "layers": 1}])
    assert [space.offered(layer) for layer in space.layers[1:-1]] == [("mb",), ("mb", "skip"), ("mb",)]
    network = space.build(space.encode({"layer1": "skip"})).eval()
    assert [len(list(layer.parameters())) > 0 for layer in network[1:-1]] == [True, False, True]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 4)


def test_channels_are_shuffled_between_grouped_convolutions() -> None:
    block = {"type": "inverted_residual", "expansion": 1, "widen": True, "groups": 2, "kernel": 1}
    space = chain(blocks={"g": block}, stages=[{"width": 16}])
    layer = space.build(space.references["largest"]).layer0.eval()
    for parameter in layer.parameters():
        torch.nn.init.constant_(parameter, 0.5)  # no activation cuts anything off
    x = torch.ones(1, 16, 4, 4)
    changed = x.clone()
    changed[:, 8:] += 1.0  # the second group of the input reaches the first of the output through the shuffle alone
    assert not torch.allclose(layer(x)[:, :8], layer(changed)[:, :8])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": {"mb": {"type": "inverted_residuals"}}}, ["blocks.mb", "inverted_residual"]),
        ({"blocks": {"mb": {"type": "conv", "kernal": 3}}}, ["unknown key", "kernal", "Did you mean 'kernel'"]),
        ({"blocks": {"mb": {"type": "conv", "kernel": 4}}}, ["blocks.mb", "kernel: must be odd, got 4"]),
        ({"blocks": {"mb": {"type": "conv", "groups": 3}}}, ["blocks.mb.groups", "3 does not divide 16"]),
        ({"stages": [{"width": 16, "choices": ["mbb"]}]}, ["stages.0.choices", "Did you mean 'mb'"]),
        ({"stages": [{"width": 24, "choices": ["skip"]}]}, ["none of the blocks fits", "project = true"]),
        ({"stages": []}, ["stages", "at least 1"]),
        ({"stages": [{"width": 0}]}, ["stages.0.width", "greater than or equal to 1"]),
        ({"stages": [{"width": [24, 16]}]}, ["stages.0.width", "choices that rise"]),
        ({"stages": [{"width": 16, "stride": 3}]}, ["stages.0.stride", "1 or 2"]),
        ({"stages": [{"width": 16, "layers": []}]}, ["stages.0.layers", "choices that rise"]),
        ({"blocks": {"mb": {"type": "conv", "kernel": [3, 4]}}}, ["blocks.mb_kernel4", "kernel: must be odd, got 4"]),
        ({"blocks": {"mb": {"type": "conv", "kernel": []}}}, ["blocks", "blocks.mb.kernel", "at least one"]),
        ({"blocks": {"mb": {"type": "conv", "kernel": [3, 3]}}}, ["two blocks are called 'mb_kernel3'"]),
        ({"blocks": {"mb": {"type": "ghost", "expansion": float("inf")}}}, ["blocks.mb", "finite", "got inf"]),
        ({"stages": [{"width": 16, "choices": []}]}, ["stages.0.choices", "at least one"]),
        ({"stages": [{"width": 16, "choices": ["mb", "mb"]}]}, ["stages.0.choices", "distinct"]),
        ({"stages": [{"width": 16, "choices": "mb"}]}, ["stages.0.choices", "should be a list"]),
        ({"resolution": True}, ["resolution", "whole number, got True"]),
        ({"stem_width": "16"}, ["stem_width", "whole number, got '16'"]),
        ({"resolution": [16, 8]}, ["resolution", "choices that rise"]),
        ({"stem_kernel": 2}, ["stem_kernel: must be odd, got 2"]),
        ({"widths": [16, 24]}, ["widths", "one per stage, 1"]),
        ({"references": {"mine": {"choices": ["mb"]}}}, ["references.mine.choices", "2, got 1"]),
        ({"references": {"mine": {"choices": ["mb", "mc"]}}}, ["references.mine.choices", "no choice 'mc'"]),
    ],
)
def test_what_makes_no_sense_is_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        chain(**options)
    for word in words:
        assert re.search(re.escape(word), str(error.value)), str(error.value)


def test_signals_are_convolved_along_their_length_alone() -> None:
    space = load_space("sensor_1d", 6, 7, resolution=100)
    assert space.input_shape == (6, 1, 100)
    for arch in (space.references["smallest"], space.references["largest"], *space.sample(3, np.random.default_rng(0))):
        for operator in space.workload(arch).operators:
            assert all(shape.shape[1] == 1 for shape in operator.inputs if len(shape.shape) == 3)
            if operator.kind in ("conv2d", "depthwise_conv2d"):
                assert operator.kernel[0] == operator.stride[0] == 1
        network = space.build(arch).eval()
        assert network(torch.zeros(2, 6, 1, 100)).shape == (2, 7)


def test_lists_are_knobs_and_the_ends_are_the_ends() -> None:
    space = chain(
        stages=[{"width": [8, 16], "layers": [1, 3], "stride": [1, 2]}, {"width": 24, "stride": 2}], resolution=[8, 12]
    )
    assert [knob.name for knob in space.knobs] == [
        "resolution", "stage0.stride", "stage0.width", "stage0.depth", "layer1", "layer2"
    ]  # fmt: skip
    archs = np.stack(np.meshgrid(*(np.arange(c) for c in space.cardinalities), indexing="ij"), axis=-1).reshape(-1, 6)
    macs = [space.workload(arch).macs for arch in space.canonical(archs)]
    ends = [space.workload(space.references[name]).macs for name in ("smallest", "largest")]
    assert ends == [min(macs), max(macs)]


def test_a_block_with_lists_is_one_block_per_combination() -> None:
    block = {"type": "inverted_residual", "kernel": [3, 5], "expansion": [2, 4]}
    apart = {
        f"mb_kernel{kernel}_expansion{expansion}": {
            "type": "inverted_residual",
            "kernel": kernel,
            "expansion": expansion,
        }
        for kernel in (3, 5)
        for expansion in (2, 4)
    }
    together, written = chain(blocks={"mb": block}), chain(blocks=apart)
    assert together.knobs == written.knobs
    arch = together.references["largest"]
    assert together.workload(arch) == written.workload(arch)


def test_attention_lets_every_pixel_see_every_other() -> None:
    block = {"type": "attention", "head_width": 4, "expansion": 0}
    space = chain(blocks={"a": block}, stages=[{"width": 16}])
    layer = space.build(space.references["largest"]).layer0.eval()
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[..., 3, 3] += 5.0
    assert not torch.isclose(layer(x)[..., 0, 0], layer(changed)[..., 0, 0]).all()


def test_half_of_the_channels_pass_a_shuffle_unit() -> None:
    space = chain(blocks={"s": {"type": "shuffle"}}, stages=[{"width": 16}])
    layer = space.build(space.references["largest"]).layer0.eval()
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(layer(x)[:, ::2], x[:, :8])


def test_a_file_without_blocks_says_so(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('family = "chain"\n[[stages]]\nwidth = 16\n')
    with pytest.raises(UserError, match=r"mine\.toml: key 'blocks' is missing"):
        load_space(path)
