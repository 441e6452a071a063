"""Channels, blocks and weights taken out: what remains computes what it should, and can be kept and found again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nasbench.stages.base import Candidate, Form, StageContext
from nasbench.stages.prune import Prune
from nasbench.stages.prune_blocks import PruneBlocks
from nasbench.stages.prune_weights import PruneWeights
from nasbench.stages.structure import Skip, load_network, save_network
from nasbench.stages.training import cubic_share
from nasbench.tasks.base import Split, SplitName
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training import fixed_subset
from search_spaces import UserError, load_space, trace
from search_spaces.reference import reference_network

Shape = tuple[int, ...]
Made = tuple[Callable[[], nn.Module], Shape]
extra = pytest.mark.extra("prune")


class Few(FashionMNIST):
    """Three hundred images a split."""

    def split(self, name: SplitName) -> Split:
        return fixed_subset(super().split(name), 300, 0)


class Branching(nn.Module):
    """A concatenation, a grouped convolution and a shortcut: indices that do not go one to one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.join = nn.Conv2d(20, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.after = nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        x = torch.relu(self.join(x))
        x = x + self.after(torch.relu(self.grouped(x)))
        return self.classifier(x.mean((2, 3)))


def reference(name: str, size: int) -> Made:
    return lambda: reference_network(name, resolution=size, in_channels=1, num_classes=10).build(), (1, size, size)


def of_space(name: str) -> Made:
    space = load_space(name, 1, 10)
    arch = space.references["smallest"]
    return lambda: space.build(arch), space.build(arch).input_shape  # type: ignore[return-value]


NETWORKS: dict[str, Callable[[], Made]] = {
    "resnet18": lambda: reference("resnet18", 28),
    "deit_tiny": lambda: reference("deit_tiny", 32),
    "quickstart": lambda: of_space("quickstart"),
    "resnet28": lambda: of_space("resnet28"),
    "vit28": lambda: of_space("vit28"),
    "branching": lambda: (Branching, (1, 12, 12)),
}


@pytest.fixture
def context(tmp_path: Path) -> Callable[[Made], StageContext]:
    def make(made: Made) -> StageContext:
        return StageContext(
            task=Few(flip=False), space=load_space("quickstart", 1, 10), directory=tmp_path, seed=0,
            input_shape=made[1], fresh=made[0],
        )  # type: ignore[arg-type] # fmt: skip

    return make


def candidate(network: nn.Module) -> Candidate:
    return Candidate("net", None, Form.FLOAT, network=network)


@extra
@pytest.mark.parametrize("name", ["deit_tiny", "quickstart", "vit28", "branching"])
def test_all_groups_pruned_together_compute_what_their_muted_channels_did(name: str) -> None:
    from nasbench.pruning.groups import find_channels, removed

    torch.manual_seed(0)
    fresh, shape = NETWORKS[name]()
    network = fresh().eval()
    channels = find_channels(network, shape)
    rng = np.random.default_rng(0)
    keep = {
        g.name: np.sort(rng.choice(g.channels, max(1, g.channels // 2), replace=False)) for g in channels.groups
    }  # fmt: skip
    muted = fresh().eval()
    muted.load_state_dict(network.state_dict())
    for group in channels.groups:
        lost = np.setdiff1d(np.arange(group.channels), keep[group.name])
        for member in (m for m in group.members if m.side == "in"):
            with torch.no_grad():
                weight = muted.get_submodule(member.module).weight
                weight[:, member.index[lost].ravel()] = 0  # type: ignore[index,operator]
    smaller = removed(network, channels.groups, keep)
    x = torch.randn(3, *shape)
    with torch.no_grad():
        assert torch.allclose(smaller(x), muted(x), atol=1e-4)
    assert trace(smaller, shape).macs < trace(network, shape).macs
    assert channels.fixed  # the output's layer at least


@extra
def test_layers_that_cannot_be_pruned_are_named_and_skipped_or_refused(
    context: Callable[[Made], StageContext],
) -> None:
    made = NETWORKS["branching"]()
    result = Prune(ratio=0.5, multiple=1, epochs=0).run(candidate(made[0]()), context(made))
    assert result.network is not None
    assert result.network.left.out_channels == 4  # type: ignore[union-attr]
    assert result.network.grouped.out_channels == 16  # type: ignore[union-attr]
    assert "grouped" in result.notes[0]
    refusing = Prune(ratio=0.5, unprunable="refuse", epochs=0)
    with pytest.raises(UserError, match=r"layer '(join|grouped)' cannot be pruned: .*4 groups.*ignore"):
        refusing.run(candidate(made[0]()), context(made))
    ignoring = Prune(ratio=0.5, multiple=1, ignore=["left"], epochs=0).run(candidate(made[0]()), context(made))
    assert ignoring.network.left.out_channels == 8  # type: ignore[union-attr]
    assert ignoring.network.right.out_channels == 6  # type: ignore[union-attr]
    with pytest.raises(UserError, match="no layer 'lefd'.*left"):
        Prune(ratio=0.5, ignore=["lefd"], epochs=0).run(candidate(made[0]()), context(made))
    with pytest.raises(UserError, match="cannot be ranked by bn_scale: no batch normalisation"):
        _rank_without_norms(context)


def _rank_without_norms(context: Callable[[Made], StageContext]) -> None:
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(512, 10))

    stage = Prune(ratio=0.5, importance="bn_scale", epochs=0, multiple=1)
    stage.run(candidate(fresh()), context((fresh, (1, 12, 12))))


@extra
@pytest.mark.parametrize(
    ("importance", "name"), [("l1", "quickstart"), ("taylor", "resnet28"), ("bn_scale", "resnet28")]
)
def test_channels_that_do_nothing_are_the_first_to_go(
    importance: str, name: str, context: Callable[[Made], StageContext]
) -> None:
    torch.manual_seed(1)
    made = NETWORKS[name]()
    network = made[0]().eval()
    from nasbench.pruning.groups import find_channels

    groups = [g for g in find_channels(network, made[1]).groups if len(g.members) <= 8 and g.channels >= 16]
    idle = {}
    for group in groups:
        idle[group.name] = np.arange(0, group.channels, 2)
        for member in group.members:
            layer = network.get_submodule(member.module)
            with torch.no_grad():
                rows = member.index[idle[group.name]].ravel()
                if member.side == "in":
                    layer.weight[:, rows] = 0  # type: ignore[index,operator]
                else:
                    layer.weight[rows] = 0  # type: ignore[index,operator]
                    if layer.bias is not None:
                        layer.bias[rows] = 0  # type: ignore[index,operator]
    from nasbench.pruning.importance import channel_scores

    task = Few(flip=False)
    few = fixed_subset(task.split("train"), 64, 0)
    scores, without = channel_scores(network, groups, importance, task, few, made[1])  # type: ignore[arg-type]
    assert not without or importance == "bn_scale"  # squeeze layers have no normalisation
    for name, rows in idle.items():
        if name in without:
            continue
        others = np.setdiff1d(np.arange(len(scores[name])), rows)
        assert scores[name][rows].max() <= scores[name][others].min()
        assert scores[name][others].sum() > 0


@extra
def test_a_budget_is_kept_by_the_pruned_network_itself(
    context: Callable[[Made], StageContext],
) -> None:
    torch.manual_seed(0)
    made = NETWORKS["vit28"]()
    network, given = made[0]().eval(), context(made)
    predictor = given.predictor("raspberry_pi_4", "energy_mj")
    before = float(predictor.predict([trace(network, made[1])]).mean[0])
    for allocation in ("uniform", "sensitivity"):
        stage = Prune(
            budget=0.9, metric="energy_mj", target="raspberry_pi_4", allocation=allocation, images=64, epochs=0
        )  # type: ignore[arg-type]
        smaller = stage.run(candidate(network), given).network
        assert smaller is not None
        after = float(predictor.predict([trace(smaller, made[1])]).mean[0])
        assert 0.6 * before < after <= 0.9 * before
    with pytest.raises(UserError, match="the least that pruning its channels reaches is"):
        Prune(budget=0.01, metric="energy_mj", target="raspberry_pi_4", epochs=0).run(candidate(network), given)
    with pytest.raises(UserError, match="predicted cost is .* already"):
        Prune(limit=10 * before, metric="energy_mj", target="raspberry_pi_4", epochs=0).run(candidate(network), given)


def test_counts_are_multiples_that_the_device_likes() -> None:
    from hardware_profiles import load_target
    from nasbench.pruning.allocation import rounded
    from nasbench.pruning.groups import ChannelGroup

    assert load_target("host").channel_multiple in (8, 16)
    assert load_target("ethos_u55").channel_multiple == 16
    assert load_target("jetson_orin_nano:fp16-15w").channel_multiple == 8
    group, heads = ChannelGroup("a", 64, ()), ChannelGroup("b", 6, (), "heads")
    for wanted in np.linspace(0.1, 64, 50):
        count = rounded(group, float(wanted), 16)
        assert count % 16 == 0
        assert 16 <= count <= 64
    assert rounded(heads, 2.6, 16) == 3
    assert rounded(ChannelGroup("c", 12, ()), 4, 16) == 12  # fewer would be padded to as many


@extra
def test_gradual_pruning_ends_where_one_step_does_and_follows_the_cubic_schedule(
    context: Callable[[Made], StageContext],
) -> None:
    assert [round(cubic_share(s, 4), 4) for s in range(5)] == [0.0, 0.5781, 0.875, 0.9844, 1.0]
    made = NETWORKS["resnet28"]()
    network = made[0]()
    ends = [
        Prune(ratio=0.5, multiple=4, steps=steps, images=64, epochs=0).run(candidate(network), context(made)).network
        for steps in (1, 2)
    ]
    first, second = (trace(n, made[1]) for n in ends if n is not None)
    assert first.macs == second.macs
    assert first.params == second.params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of ratio, budget and limit; got none"),
        ({"ratio": 0.5, "budget": 0.5}, "got ratio and budget"),
        ({"ratio": 1.0}, "ratio = 1: expected above 0 and below 1"),
        ({"ratio": 0}, "ratio = 0"),
        ({"budget": -1}, "budget = -1"),
        ({"limit": float("nan")}, "limit = nan"),
        ({"ratio": 0.5, "allocation": "sensitivity"}, "not a ratio"),
        ({"ratio": 0.5, "steps": 0}, "steps = 0"),
        ({"ratio": 0.5, "target": "raspbery_pi_4"}, "raspberry_pi_4"),
        ({"ratio": 0.5, "epochs": -1}, "epochs = -1"),
    ],
)
@extra
def test_impossible_amounts_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Prune(**options)  # type: ignore[arg-type]


def test_blocks_are_the_residual_ones_and_leave_the_identity() -> None:
    from nasbench.pruning.blocks import find_blocks, without

    for name, expected in (("resnet18", 5), ("vit28", 6)):
        fresh, shape = NETWORKS[name]()
        network = fresh().eval()
        blocks = find_blocks(network, shape)
        assert len(blocks) == expected
        smaller = without(network, blocks)
        assert smaller(torch.randn(2, *shape)).shape == (2, 10)
        assert trace(smaller, shape).macs < trace(network, shape).macs


def test_blocks_go_by_what_the_loss_misses(context: Callable[[Made], StageContext]) -> None:
    torch.manual_seed(0)
    made = NETWORKS["vit28"]()
    network = made[0]().eval()
    with torch.no_grad():
        network.get_submodule("layers.1.mlp.project").weight.zero_()  # type: ignore[operator,union-attr]
    result = PruneBlocks(count=1, images=128, epochs=0).run(candidate(network), context(made))
    assert result.network is not None
    assert sum(isinstance(m, Skip) for m in result.network.modules()) == 1
    with pytest.raises(UserError, match="count = 7: the network has 6 residual blocks"):
        PruneBlocks(count=7, epochs=0).run(candidate(network), context(made))
    with pytest.raises(UserError, match="no residual block 'layers.9'"):
        PruneBlocks(count=1, ignore=["layers.9"], epochs=0).run(candidate(network), context(made))
    with pytest.raises(UserError, match="without all of its 6 residual blocks"):
        PruneBlocks(budget=0.01, metric="macs", images=16, epochs=0).run(candidate(network), context(made))


def test_zeros_are_where_they_should_be_and_stay_through_training(context: Callable[[Made], StageContext]) -> None:
    from nasbench.pruning.sparsity import n_of_m_masks, prunable_weights, sparsity_of

    made = NETWORKS["vit28"]()
    network, given = made[0](), context(made)
    result = PruneWeights(sparsity=0.6, steps=3, epochs=0).run(candidate(network), given)
    assert result.network is not None
    assert sparsity_of(result.network) == pytest.approx(0.6, abs=1e-3)
    assert sparsity_of(network) < 0.01
    pattern = PruneWeights(pattern="2:4", epochs=0).run(candidate(network), given)
    assert pattern.network is not None
    checked = 0
    for weight in prunable_weights(pattern.network).values():
        if weight.shape[1] % 4 == 0:
            assert ((weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1) <= 2).all()
            checked += 1
    assert checked
    masks, without = n_of_m_masks({"a": torch.randn(3, 8), "b": torch.randn(4, 6)}, 1, 4)
    assert masks["a"].sum() == 3 * 2
    assert "no multiple of 4" in without["b"]
    trained = PruneWeights(sparsity=0.9, epochs=1, lr=0.01, distillation_weight=0.0).run(candidate(network), given)
    assert trained.network is not None
    assert sparsity_of(trained.network) == pytest.approx(0.9, abs=1e-3)
    assert set(trained.network.state_dict()) == set(network.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of sparsity and pattern"),
        ({"sparsity": 1.0}, "sparsity = 1"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"pattern": "two"}, "expected N:M"),
        ({"pattern": "2:4", "steps": 2}, "steps = 2"),
        ({"sparsity": 0.5, "scope": "globl"}, "global"),
    ],
)
def test_impossible_sparsities_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PruneWeights(**options)  # type: ignore[arg-type]


@extra
def test_a_changed_structure_is_kept_without_pickles_and_found_again(
    context: Callable[[Made], StageContext], tmp_path: Path
) -> None:
    for name in ("vit28", "quickstart"):
        made = NETWORKS[name]()
        given = context(made)
        pruned = Prune(ratio=0.5, multiple=1, images=32, epochs=0).run(candidate(made[0]()), given)
        shorter = PruneBlocks(count=2, images=32, epochs=0).run(pruned, given).network
        assert shorter is not None
        file = tmp_path / f"{name}.safetensors"
        save_network(file, shorter, made[0]())
        again = load_network(file, made[0]()).eval()
        x = torch.randn(2, *made[1])
        with torch.no_grad():
            assert torch.allclose(again(x), shorter.eval()(x), atol=1e-5)
        assert trace(again, made[1]) == trace(shorter, made[1])
        with pytest.raises(UserError, match="of another network"):
            load_network(file, Branching())
    with pytest.raises(UserError, match="its module '' is a Sequential"):
        save_network(tmp_path / "x.safetensors", nn.Sequential(nn.Linear(2, 2)), Branching())
