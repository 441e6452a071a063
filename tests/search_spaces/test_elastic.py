"""A space from a network: what of it is elastic, and that it stays the network that it was."""

import copy
import io
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from search_spaces import ElasticSpace, UserError, calibrate, elastic_space, load_space, reference_network, trace
from search_spaces.reference.blocks import ConvBnAct


class Small(nn.Module):
    """A stem, two residual blocks and a classifier."""

    def __init__(self, in_channels: int = 3, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = ConvBnAct(in_channels, 8, 3)
        self.first = Residual(8, 16)
        self.second = Residual(8, 12)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBnAct(width, hidden, 3), nn.Conv2d(hidden, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    network = Small()
    with torch.no_grad():
        for _ in range(3):  # statistics that are not those of a fresh network
            network(torch.randn(16, 3, 8, 8))
    return network.eval()


def space_of(network: nn.Module, **options: object) -> ElasticSpace:
    return ElasticSpace(network, (3, 8, 8), **{"multiple": 2, **options})  # type: ignore[arg-type]


def images(n: int, *shape: int) -> Tensor:
    """In the memory format that supernets compute in: another rounds in other places."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn((n, *(shape or (3, 8, 8))), generator=generator).contiguous(memory_format=torch.channels_last)


def test_groups_are_layers_whose_channels_go_together() -> None:
    space = space_of(small(), ratios=(0.5, 1))
    assert {k.name: k.choices for k in space.knobs} == {
        "stem.0.channels": (4, 8),  # with the last convolution of both blocks
        "first.body.0.0.channels": (8, 16),
        "second.body.0.0.channels": (6, 12),
        "first.keep": (0, 1),
        "second.keep": (0, 1),
    }
    assert space.fixed == {"head": "is the output"}
    assert space.size == 2 * (1 + 2) ** 2
    assert {k.name for k in space_of(small(), ratios=(0.5, 1), blocks=False).knobs} == {
        "stem.0.channels", "first.body.0.0.channels", "second.body.0.0.channels"
    }  # fmt: skip


def test_the_largest_architecture_is_the_network_bit_by_bit() -> None:
    network = small()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    space = space_of(network)
    largest, supernet = space.references["largest"], space.supernet()
    x = images(4)
    with torch.no_grad():
        assert torch.equal(supernet(x, largest, space.statistics(largest)), network(x))
        extracted = supernet.extract(largest, space.statistics(largest))
        assert torch.equal(extracted(x), network(x))
    assert type(extracted) is Small
    assert set(extracted.state_dict()) == set(before)
    counters = {k for k in before if k.endswith("num_batches_tracked")}
    assert all(torch.equal(v, extracted.state_dict()[k]) for k, v in before.items() if k not in counters)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not network.training


def test_the_most_important_channels_are_kept_in_their_order() -> None:
    network = small()
    important = [1, 4, 6, 7]
    with torch.no_grad():
        network.first.body[0][0].weight[[i for i in range(16) if i not in important]] *= 0.01
    space = space_of(network, ratios=(0.25, 1))
    arch = space.encode({**space.decode(space.references["largest"]), "first.body.0.0.channels": 4})
    supernet = space.supernet()
    extracted = supernet.extract(arch, space.statistics(arch))
    assert torch.equal(extracted.first.body[0][0].weight, network.first.body[0][0].weight[important])
    assert torch.equal(extracted.first.body[0][1].running_var, network.first.body[0][1].running_var[important])
    assert torch.equal(extracted.first.body[1].weight, network.first.body[1].weight[:, important])
    assert torch.equal(extracted.second.body[1].weight, network.second.body[1].weight)
    # The other channels hardly weigh: what is left does what the network did, but for their shifts.
    assert extracted.first.body[0][0].out_channels == extracted.first.body[1].in_channels == 4


def test_gradients_are_those_of_the_extracted_network() -> None:
    space = space_of(small())
    supernet = space.supernet().double().eval()  # without dropout; the batch still normalises
    x, labels = images(8).double(), torch.arange(8) % 4
    for arch in space.sample(4, np.random.default_rng(0)):
        network = supernet.extract(arch, calibrate(supernet, arch, x)).double().train()
        network.drop.eval()
        F.cross_entropy(network(x), labels).backward()
        supernet.zero_grad(set_to_none=True)
        F.cross_entropy(supernet(x, arch), labels).backward()
        cuts = space.cuts(arch)
        own = dict(network.named_parameters())
        for name, parameter in supernet.largest.named_parameters():
            if name not in own:
                assert parameter.grad is None
                continue
            columns, rows = cuts.get(name.rpartition(".")[0], (None, None))
            expected = torch.zeros_like(parameter)
            places = expected[rows if rows is not None else slice(None)].clone()
            if columns is not None and parameter.dim() > 1:
                places[:, columns] = own[name].grad
            else:
                places = own[name].grad
            expected[rows if rows is not None else slice(None)] = places
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-8, atol=1e-10)


def test_widths_are_nested() -> None:
    space = space_of(small(), ratios=(0.25, 0.5, 0.75, 1))
    for kept in space._ranked.values():
        for fewer, more in pairwise(kept):
            assert set(fewer) < set(more)


def test_a_block_that_goes_leaves_its_input() -> None:
    space = space_of(small())
    largest = space.decode(space.references["largest"])
    arch = space.encode({k: 0 if k == "first.keep" else v for k, v in largest.items() if "first.body" not in k})
    supernet = space.supernet()
    network = supernet.extract(arch, space.statistics(arch))
    assert isinstance(network.first, nn.Identity)
    x = images(2)
    with torch.no_grad():
        assert torch.equal(network(x), supernet(x, arch, space.statistics(arch)))
    by_name = {k.name: i for i, k in enumerate(space.knobs)}
    assert not space.active(arch[None])[0, by_name["first.body.0.0.channels"]]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "shufflenet_v2"])
def test_published_networks_keep_every_promise(name: str) -> None:
    torch.manual_seed(0)
    reference = reference_network(name, resolution=32, num_classes=10)
    network = reference.build()
    x = images(16, *reference.input_shape)
    with torch.no_grad():
        network(x)
    network.eval()
    space = ElasticSpace(network, reference.input_shape, name=name)
    supernet = space.supernet()
    largest = space.references["largest"]
    with torch.no_grad():
        assert torch.equal(supernet(x, largest, space.statistics(largest)), network(x))
        for arch in [space.references["smallest"], *space.sample(2, np.random.default_rng(0))]:
            stats = calibrate(supernet, arch, x)
            extracted = supernet.extract(arch, stats)
            expected = supernet(x, arch, stats)
            assert (extracted(x) - expected).abs().max() <= 1e-3 * expected.abs().max()
            assert space.workload(arch) == trace(extracted, space.input_shape)


def test_many_layers_behind_one_concatenation_share_a_knob() -> None:
    """Else a dense block of DenseNet-121 alone had 4^24 distinct blocks."""
    reference = reference_network("densenet121", resolution=32, num_classes=10)
    space = ElasticSpace(reference.build(), reference.input_shape)
    assert len(space.catalog) <= 20_000
    arch = space.sample(1, np.random.default_rng(0))[0]
    assert space.workload(arch) == trace(space.build(arch), space.input_shape)


class Shuffled(nn.Module):
    """What channels are computed with is left alone, and everything around it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x)))
        first, second = x.chunk(2, 1)
        x = self.d(F.relu(self.c(torch.cat([second, first], 1))))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def test_layers_whose_weights_are_computed_are_fixed() -> None:
    network = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 16, 1)), nn.Conv2d(16, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    space = space_of(network)
    assert [k.name for k in space.knobs] == ["1.channels", "3.channels"]
    arch, supernet, x = space.references["smallest"], space.supernet(), images(2)
    with torch.no_grad():
        stats = space.statistics(arch)
        torch.testing.assert_close(supernet.extract(arch, stats)(x), supernet(x, arch, stats))


def test_what_channels_are_computed_with_is_fixed_and_says_why() -> None:
    space = space_of(Shuffled())
    assert [k.name for k in space.knobs] == ["a.channels", "c.channels", "d.channels"]
    assert space.fixed["b"] == "goes through chunk"


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image.relu() for image in x])


@pytest.mark.parametrize("part", [Decides(), Loops()])
def test_paths_that_depend_on_the_data_are_refused_by_name(part: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(part), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=rf"cannot follow {type(part).__name__} in '1\.0'.*TraceError"):
        space_of(network)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.Sequential(nn.Conv2d(5, 8, 1), nn.Flatten()), {}, r"cannot follow Conv2d in '0'.*shape \(3, 8, 8\)"),
        (nn.Conv2d(3, 8, 1), {}, "outputs of shape"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, "nothing of the network is elastic .*is the output"),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8)), {}, "SyncBatchNorm '1' keeps running statistics"),
        (small(), {"ratios": (0.5, 0.75)}, "ratios"),
        (small(), {"ratios": (0, 1)}, "ratios"),
        (small(), {"ratios": 0.5}, "ratios = 0.5: expected a list"),
        (small(), {"ratios": ["a", 1]}, "ratios = .*expected a list"),
        (small(), {"multiple": 0}, "multiple = 0"),
        (small(), {"multiple": 1.5}, "multiple = 1.5: expected a whole number"),
        (small(), {"multiple": 64, "blocks": False}, "nothing of the network is elastic"),
    ],
)
def test_what_cannot_be_is_said(network: nn.Module, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        space_of(network, **options)


def test_dropout_draws_from_the_generator_that_is_given() -> None:
    space = space_of(small())
    supernet, arch, x = space.supernet().train(), space.references["largest"], torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        first, again, other = (supernet(x, arch, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_extracted_networks_are_exported() -> None:
    space = space_of(small())
    supernet = space.supernet()
    arch = space.sample(1, np.random.default_rng(1))[0]
    x = torch.randn(4, 3, 8, 8)
    network = supernet.extract(arch, calibrate(supernet, arch, x))
    buffer = io.BytesIO()
    program = torch.onnx.export(network, (x[:1],), dynamo=True, verbose=False)
    assert program is not None
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    (result,) = session.run(None, {session.get_inputs()[0].name: x[:1].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(result, network(x[:1]).numpy(), atol=1e-5)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module with her network."""
    (tmp_path / "her_networks.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),"
        " nn.Linear(16, num_classes))\n"
        "def forgets():\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "her_networks", raising=False)
    return "her_networks"


def test_a_function_makes_the_network_and_a_file_its_weights(module: str, tmp_path: Path) -> None:
    import her_networks  # type: ignore[import-not-found]

    network = her_networks.make(7)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "hers.toml").write_text(
        f'family = "elastic"\nnetwork = "{module}:make"\nresolution = 12\nweights = "{tmp_path}/weights.safetensors"\n'
    )
    space = load_space(tmp_path / "hers.toml", 3, 7)
    assert isinstance(space, ElasticSpace)
    assert torch.equal(space.supernet().largest[0].weight, network[0].weight)
    with pytest.raises(UserError, match=r"weights: .*does not fit the network.*size mismatch"):
        elastic_space(3, 9, network=f"{module}:make", resolution=12, weights=f"{tmp_path}/weights.safetensors")
    with pytest.raises(UserError, match=r"weights: .*none\.safetensors"):
        elastic_space(3, 7, network=f"{module}:make", resolution=12, weights=f"{tmp_path}/none.safetensors")


@pytest.mark.parametrize("resolution", [0, 2.5, "28", [], [28, 28, 28], True])
def test_sizes_that_are_none_are_named(resolution: object) -> None:
    with pytest.raises(UserError, match="resolution = .*expected a number of pixels"):
        elastic_space(3, 4, network=small, resolution=resolution)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    network = small()
    torch.nn.init.constant_(next(network.parameters()), torch.nan)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="weights.* has values that are not finite"):
        elastic_space(3, 4, network=small, resolution=8, weights=f"{tmp_path}/weights.safetensors")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("her_networks", "expected \"module:function\""),
        (3, "expected \"module:function\""),
        ("her_networks:none", "cannot import 'her_networks:none'"),
        (lambda size: small(), "failed: TypeError: .*'size'"),
        ("her_networks:nn", "a function was expected"),
        ("her_networks:forgets", "gave a NoneType"),
        (lambda: copy.deepcopy(small()), "has 4 outputs, the task has 7 classes"),
    ],
)  # fmt: skip
def test_functions_that_do_not_make_a_network_are_named(module: str, network: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        elastic_space(3, 7, network=network, resolution=12)  # type: ignore[arg-type]


class Optional(nn.Module):
    """One layer called twice, a normalisation without scales, and arguments that are not images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.twice = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16, affine=False), nn.Linear(16, 4)

    def forward(self, x: Tensor, features: bool = False, mask: Tensor | None = None) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = x if mask is None else x * mask
        x = self.twice(F.relu(self.twice(x))) + x
        return x if features else self.head(x.mean(dim=(-1, -2)))


def test_layers_may_run_twice_and_forward_have_options() -> None:
    network = Optional()
    space = space_of(network)
    assert type(space.network) is Optional
    assert [k.name for k in space.knobs] == ["a.channels"]
    supernet, x = space.supernet(), images(4)
    for arch in space.sample(3, np.random.default_rng(0)):
        stats = calibrate(supernet, arch, x)
        extracted = supernet.extract(arch, stats)
        with torch.no_grad():
            torch.testing.assert_close(extracted(x), supernet(x, arch, stats))
            assert extracted(x, features=True).shape == (4, space.decode(arch)["a.channels"], 8, 8)
        assert space.workload(arch) == trace(extracted, space.input_shape)


class Signals(nn.Module):
    """Convolutions along time, of windows (channels, 1, length)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(6, 16, 5, 2, 2), nn.BatchNorm1d(16)
        self.b, self.c = nn.Conv1d(16, 16, 3, padding=1, groups=16), nn.Conv1d(16, 24, 1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x.squeeze(2))))
        return self.head(F.max_pool1d(F.relu(self.c(self.b(x))), 2).mean(-1))


def test_signals_are_windows_of_height_one() -> None:
    space = ElasticSpace(Signals(), (6, 1, 32))
    assert [k.name for k in space.knobs] == ["a.channels", "c.channels"]
    supernet, x = space.supernet(), torch.randn(8, 6, 1, 48)  # resampled to 32
    for arch in space.sample(2, np.random.default_rng(0)):
        stats = calibrate(supernet, arch, x)
        extracted = supernet.extract(arch, stats)
        with torch.no_grad():
            torch.testing.assert_close(extracted(F.interpolate(x, (1, 32), mode="bilinear")), supernet(x, arch, stats))
        assert space.workload(arch) == trace(extracted, space.input_shape)


def test_a_network_that_is_made_anew_keeps_the_same_channels(module: str) -> None:
    first, second = (elastic_space(3, 7, network=f"{module}:make", resolution=12) for _ in range(2))
    for group, kept in first._ranked.items():
        assert all((a == b).all() for a, b in zip(kept, second._ranked[group], strict=True))
