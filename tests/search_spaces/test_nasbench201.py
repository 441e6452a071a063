"""NAS-Bench-201 agrees with the benchmark: strings, indices, costs, and what cells compute."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from predictors import Count
from search_spaces import NASBench201Space, UserError, load_space, trace
from search_spaces.nasbench201 import EDGES, OPERATIONS
from search_spaces.nasbench201_network import Cell, operation


@pytest.fixture(scope="module")
def space() -> NASBench201Space:
    return NASBench201Space()


@pytest.fixture(scope="module")
def rows(data_dir: Path) -> list[dict[str, str]]:
    with gzip.open(data_dir / "nb201_latency_help.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


def everything(space: NASBench201Space) -> np.ndarray:
    return space.from_official_index(np.arange(space.size))


def test_there_are_15625_distinct_cells(space: NASBench201Space) -> None:
    assert space.size == 15_625 == len(np.unique(everything(space), axis=0))


def test_strings_and_official_indices_are_the_benchmarks_both_ways(
    space: NASBench201Space, rows: list[dict[str, str]]
) -> None:
    archs, strings = everything(space), [row["arch_str"] for row in rows]
    assert [row["op_code"] for row in rows] == ["".join(map(str, arch)) for arch in archs.tolist()]
    assert space.to_string(archs) == strings
    assert (space.from_string(strings) == archs).all()
    assert space.official_index(archs).tolist() == [int(row["arch_idx"]) for row in rows]


def test_macs_and_parameters_are_the_benchmarks_for_every_cell(
    space: NASBench201Space, rows: list[dict[str, str]]
) -> None:
    archs = everything(space)
    for metric, column in (("macs", "macs_cifar10"), ("params", "params_cifar10")):
        expected = [int(row[column]) for row in rows]
        assert Count(metric).bind(space).predict(archs).mean.tolist() == expected


def test_peak_memory_of_blocks_is_that_of_networks(space: NASBench201Space) -> None:
    archs = space.sample(200, np.random.default_rng(3))
    exact = [space.workload(arch).peak_memory_bytes for arch in archs]
    assert Count("peak_memory_bytes").bind(space).predict(archs).mean.tolist() == exact


def test_every_pattern_of_identity_and_nothing_equals_its_trace() -> None:
    # Cells of these two operations are all about which tensor is which, and how long it lives.
    space = NASBench201Space(resolution=12, channels=2, cells=1)
    for number in range(64):
        arch = np.array([number >> e & 1 for e in range(6)], dtype=space.dtype)
        network = space.build(arch)
        assert space.workload(arch) == trace(network, network.input_shape)


def test_a_cell_sums_its_edges() -> None:
    torch.manual_seed(0)
    names = ["avg_pool_3x3", "skip_connect", "nor_conv_1x1", "none", "nor_conv_3x3", "skip_connect"]
    cell = Cell([operation(name, 4) for name in names]).eval()
    x = torch.randn(2, 4, 8, 8)
    pooled = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    second = x + cell.edges["1->2"](pooled)
    assert torch.allclose(cell(x), cell.edges["1->3"](pooled) + second)
    assert not Cell([None] * 6)(x).any()


def test_references_are_named_cells(space: NASBench201Space) -> None:
    assert space.official_index(space.references["all_conv_3x3"][None]).tolist() == [1462]
    for name, published in NASBench201Space(num_classes=3).published.items():
        workload = NASBench201Space(**published.options).workload(space.references[name])
        assert (workload.macs, workload.params) == (published.macs, published.params)


def test_what_is_no_cell_is_refused(space: NASBench201Space) -> None:
    good = space.to_string(everything(space)[:1])[0]
    with pytest.raises(UserError, match="unknown operation 'skip'. Did you mean 'skip_connect'"):
        space.from_string(good.replace("skip_connect", "skip"))
    for bad in (good[:-1], good.replace("~0", "~1"), "", good + "+" + good):
        with pytest.raises(UserError, match="an architecture's string is"):
            space.from_string(bad)
    with pytest.raises(UserError, match=r"official indices are 0\.\.15624, got 15625"):
        space.from_official_index([15_625])
    with pytest.raises(UserError, match="resolution: must be a multiple of 4, at least 8, got 30"):
        load_space("nasbench201", resolution=30)
    with pytest.raises(UserError, match="cells: must be a whole number, at least 1, got 0"):
        load_space("nasbench201", cells=0)


def test_descriptors_see_only_what_the_output_depends_on() -> None:
    space = NASBench201Space()
    archs = space.sample(200, np.random.default_rng(0))
    # Node 2 leads nowhere: what ends in it is of no account.
    archs[:, EDGES.index((2, 3))] = OPERATIONS.index("none")
    changed = archs.copy()
    changed[:, [EDGES.index((0, 2)), EDGES.index((1, 2))]] = space.sample(200, np.random.default_rng(1))[:, :2]
    for group, same in zip(space.descriptors(archs), space.descriptors(changed), strict=True):
        assert (group == same).all()
    # Nodes 1 and 2 change places where no edge joins them: the same network.
    archs = space.sample(200, np.random.default_rng(2))
    archs[:, EDGES.index((1, 2))] = OPERATIONS.index("none")
    mirrored = archs[:, [EDGES.index(e) for e in ((0, 2), (0, 1), (1, 2), (0, 3), (2, 3), (1, 3))]]
    for group, same in zip(space.descriptors(archs), space.descriptors(mirrored), strict=True):
        assert (group == same).all()


def test_descriptors_of_the_residual_cell_are_its_paths() -> None:
    space = NASBench201Space()
    counts, form, sequences = space.descriptors(space.references["resnet"][None])
    np.testing.assert_allclose(counts[0], 0.7 * np.array([2, 0, 2, 0]), rtol=1e-6)
    # Two 3x3 convolutions, one after the other, beside the identity.
    assert form[0].tolist() == [2, 2, 0, 2, 1, 2]
    assert sorted(sequences[0].tolist(), reverse=True)[:3] == [1, 1, 0]
