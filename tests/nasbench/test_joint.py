"""Architecture, width and bit width together: what operators tell beforehand is what pruning leaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hardware_profiles import load_target
from nasbench.evaluators.base import Proposals, Status
from nasbench.evaluators.joint import JointEvaluator
from nasbench.joint import JointSpace
from nasbench.joint.narrowing import inner_channels, narrowed
from nasbench.tasks.base import Split, SplitName
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training import fixed_subset, load_weights, save_weights
from search_spaces import UserError, load_space, trace

STAGES = [{"width": 32, "depths": [1, 2]}, {"width": 64, "stride": 2, "depths": [1]}]
SMALL = {"stages": STAGES, "stem_width": 32, "resolutions": [20]}


class Few(FashionMNIST):
    """Two hundred images a split."""

    def split(self, name: SplitName) -> Split:
        return fixed_subset(super().split(name), 200, 0)


class Ruler:
    """Says that a network takes a microsecond per kilobyte of its file."""

    def measure(self, artifacts, target):
        from hardware_profiles import Measurement

        blank = dict.fromkeys(Measurement.__dataclass_fields__)
        return [Measurement(**(blank | {"latency_ms": a.file_bytes / 1e6, "error": ""})) for a in artifacts]


@pytest.fixture(scope="module")
def joint() -> JointSpace:
    return JointSpace(1, 10, of="resnet28", options=SMALL, parts=2)


def test_one_network_in_eight_and_in_32_bits_has_the_same_operators(joint: JointSpace) -> None:
    rows = joint.sample(20, np.random.default_rng(0))
    other = rows.copy()
    other[:, -1] = 1 - other[:, -1]
    assert (joint.blocks(rows) == joint.blocks(other)).all()
    assert set(joint.bits_of(rows) + joint.bits_of(other)) == {40}
    assert joint.size == joint.base.size * 3**2 * 2


@pytest.mark.parametrize("of", ["resnet28", "quickstart", "mnasnet"])
def test_narrowing_leaves_what_other_blocks_see(of: str) -> None:
    space = load_space(of, 1, 10)
    ids = space.blocks(space.references["largest"][None])[0]
    seen = 0
    for block in (space.catalog[int(i)].workload for i in ids if i >= 0):
        fewer = narrowed(block, lambda channels: channels // 2)
        assert [fewer.tensors[t] for t in fewer.inputs + fewer.outputs] == [
            block.tensors[t] for t in block.inputs + block.outputs
        ]
        assert narrowed(block, lambda channels: channels) == block
        assert (fewer.params < block.params) == bool(inner_channels(block))
        seen += len(inner_channels(block))
    assert seen


@pytest.mark.extra("prune")
def test_operators_tell_beforehand_what_pruning_leaves(joint: JointSpace) -> None:
    gated = JointSpace(1, 10, of="quickstart", parts=3)
    for space, rows in ((joint, joint.sample(4, np.random.default_rng(1))), (gated, [gated.references["smallest"]])):
        for arch in rows:
            network = space.build(arch)
            found, told = trace(network, network.input_shape), space.workload(arch)
            assert (found.macs, found.params) == (told.macs, told.params)


@pytest.mark.extra("prune")
def test_files_are_judged_at_their_own_bits(joint: JointSpace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    targets = {"host": load_target("host:fp32")}
    evaluator = JointEvaluator(
        joint, Few(flip=False), joint.supernet(), targets, lambda _: Ruler(),  # type: ignore[arg-type,return-value]
        calibration_images=64, quantisation_images=16, validation_images=50,
    )  # fmt: skip
    whole, narrow = joint.references["largest"], joint.references["largest"].copy()
    narrow[-3:-1] = 0
    int8 = whole.copy()
    int8[-1] = 0
    found = evaluator.evaluate(Proposals(np.arange(3), np.stack([whole, narrow, int8])))
    assert (found.status == Status.OK).all(), found.messages
    size = found.values[:, 2]
    assert size[1] < 0.6 * size[0]
    assert size[2] < 0.6 * size[0]
    assert found.values[:, 1] == pytest.approx(size / 1e6)
    # Nothing was learned: what the whole network computes is what its own supernet does.
    assert found.values[0, 0] == pytest.approx(float(evaluator.whole.evaluate(
        Proposals(np.arange(1), whole[None])).values[0, 0]), abs=0.021)  # fmt: skip


def test_weights_are_those_of_the_wrapped_space(joint: JointSpace, tmp_path: Path) -> None:
    ours, theirs = joint.supernet(), joint.base.supernet()
    save_weights(tmp_path / "base.safetensors", theirs)
    load_weights(ours, tmp_path / "base.safetensors")
    arch, x = joint.references["largest"], torch.randn(4, *joint.input_shape)
    with torch.no_grad():
        assert torch.equal(ours(x, arch), theirs(x, joint.inner(arch)))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("widths", [0.5, 1.5], "shares above 0"),
        ("widths", [], "shares above 0"),
        ("widths", [1.0, 0.5], "ascending"),
        ("bits", [4], "8 and 32"),
        ("parts", 0, "expected 1 to"),
        ("parts", 99, "expected 1 to"),
        ("multiple", 0, "1 or more"),
        ("of", "vit28", "no block of 'vit28'"),
        ("of", "resnet29", "resnet28"),
    ],
)
def test_impossible_choices_are_refused(key: str, value: object, told: str) -> None:
    with pytest.raises(UserError, match=told):
        JointSpace(1, 10, **{"of": "resnet28", key: value})  # type: ignore[arg-type]


def test_the_evaluator_wants_a_joint_space(tmp_path: Path) -> None:
    space = load_space("resnet28", 1, 10)
    with pytest.raises(UserError, match="space.name = 'joint'"):
        JointEvaluator(space, Few(), space.supernet(), {"host": load_target("host:fp32")}, lambda _: Ruler())  # type: ignore[arg-type,return-value]
