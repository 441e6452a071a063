"""What every supernet and mixture supernet promises; a new one is tested by adding one line to `SPACES`."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from search_spaces import (
    AutoFormerSpace,
    ChainSpace,
    MnasNetSpace,
    MobileHybridSpace,
    MobileNetV3Space,
    ResNetSpace,
    SearchSpace,
    UserError,
    calibrate,
    load_space,
)
from search_spaces.shared_layers import WeightSharingSupernet
from search_spaces.supernet import MixtureSupernet, fit

STAGES = [
    {"width": 8, "expansions": [1], "se": True},
    {"width": 16, "stride": 2, "depths": [1, 2, 3], "kernels": [3, 5, 7], "expansions": [2, 4], "se": True},
    {"width": 24, "depths": [1, 2], "kernels": [3], "hidden": [40, 72], "activation": "hard_swish"},
]
RESNET: dict[str, Any] = {
    "stages": [{"width": 32, "depths": [1, 3]}, {"width": 64, "stride": 2, "depths": [1, 2]}],
    "widths": [0.5, 1.0],
    "expansions": [0.25, 0.5],
    "stem_width": 32,
}
BLOCKS: dict[str, Any] = {
    "stages": [{"width": 16, "stride": 2, "depths": [1, 2]}, {"width": 24, "stride": 2}],
    "ops": ["conv", "mbconv3"],
    "filters": [0.5, 1.0],
    "stem_width": 16,
    "final_width": 32,
    "last_width": 16,
}
HYBRID: dict[str, Any] = {
    "stages": [
        {"widths": [8, 16], "depths": [1, 2], "kernels": [3, 5], "expansions": [2, 3]},
        {"widths": [16, 24], "stride": 2, "token_widths": [8, 16], "layers": [1, 2], "ratios": [1.5, 2]},
    ],
    "stem_width": 8,
    "final_widths": [16, 24],
    "heads": 2,
    "dropout": 0.0,
}
SPACES: dict[str, Callable[[], SearchSpace]] = {
    "tiny": lambda: MobileNetV3Space(2, 5, stages=STAGES, resolutions=[9, 16], widths=[0.5, 1.0], final_width=32),
    "vit": lambda: AutoFormerSpace(
        2, 5, widths=[16, 24], depths=[1, 2, 3], heads=[1, 2], ratios=[1.5, 2], resolution=16, patch=4, head_width=8
    ),
    "autoformer_tiny": lambda: load_space("autoformer_tiny", 3, 10, resolution=32, drop_path=0.0),
    "quickstart": lambda: load_space("quickstart", 1, 10),
    "mobile96": lambda: load_space("mobile96", 3, 10, resolutions=[32, 40]),
    "ofa_mobilenet_v3": lambda: load_space("ofa_mobilenet_v3", 3, 10, resolutions=[32]),
    "mnasnet": lambda: MnasNetSpace(2, 5, **BLOCKS, resolutions=[12, 19]),
    "resnet": lambda: ResNetSpace(2, 5, **RESNET, resolutions=[20, 28], name="resnet"),
    "fbnet_32": lambda: load_space("fbnet_32", 3, 10, resolution=16, widths=[8, 8, 8, 16, 16, 16, 24], final_width=32),
    "hybrid": lambda: MobileHybridSpace(2, 5, **HYBRID, resolutions=[12, 16]),
    "sensor_1d": lambda: load_space("sensor_1d", 6, 7, resolution=40, dropout=0.0),
    "tiny_images": lambda: load_space("tiny_images", 1, 10),
    "nasbench201": lambda: load_space("nasbench201", 3, 10, resolution=16, channels=8, cells=2),
}


EXAMPLES = ("every_block", "elastic_chain", "signals", "words", "elastic_network")  # see conftest.py
# Those that mixture supernets exist for.
MIXTURES = tuple(name for name in (*SPACES, *EXAMPLES) if name != "elastic_network")


@pytest.fixture(params=[*SPACES, *EXAMPLES], scope="module")
def space(request: pytest.FixtureRequest, examples: dict[str, Callable[[], SearchSpace]]) -> SearchSpace:
    return {**SPACES, **examples}[request.param]()


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> WeightSharingSupernet:
    torch.manual_seed(0)
    supernet = space.supernet()
    with torch.no_grad():
        for parameter in supernet.parameters():
            if parameter.dim() == 1:  # scales, shifts and biases away from where they are initialised
                parameter.add_(0.3 * torch.randn_like(parameter))
    return supernet


def sample(space: SearchSpace, n: int, seed: int = 0) -> list[np.ndarray]:
    ends = space.canonical(np.stack([0 * space.cardinalities, space.cardinalities - 1]))
    return [*ends, *space.sample(n, np.random.default_rng(seed))]


def images(space: SearchSpace, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *space.input_shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def test_extracted_network_equals_the_subnet(space: SearchSpace, supernet: WeightSharingSupernet) -> None:
    for arch in sample(space, 3):
        stats = calibrate(supernet, arch, [images(space, 6), images(space, 3, seed=1)])
        network = supernet.extract(arch, stats)
        x = images(space, 4, seed=2)
        with torch.no_grad():
            assert close(network(fit(x, network.input_shape)), supernet(x, arch, stats))
        assert not network.training
        assert [p.shape for p in network.parameters()] == [p.shape for p in space.build(arch).parameters()]


def test_nothing_of_a_call_remains(space: SearchSpace, supernet: WeightSharingSupernet) -> None:
    archs = sample(space, 2)
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    x = images(space, 4)
    random_state = torch.get_rng_state()
    with torch.no_grad():
        stats = [calibrate(supernet, arch, x) for arch in archs]
        first = [(supernet(x, arch), supernet(x, arch, s)) for arch, s in zip(archs, stats, strict=True)]
        for arch, s in zip(reversed(archs), reversed(stats), strict=True):
            batch, fixed = first.pop()
            supernet.extract(arch, s)
            assert torch.equal(supernet(x, arch), batch)
            assert torch.equal(supernet(x, arch, s), fixed)
            again = calibrate(supernet, arch, x)
            assert all(torch.equal(again.mean[k], s.mean[k]) and torch.equal(again.var[k], s.var[k]) for k in s.mean)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = supernet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert after.keys() == dict(supernet.named_parameters()).keys()


def test_statistics_of_one_batch_give_the_result_of_training(
    space: SearchSpace, supernet: WeightSharingSupernet
) -> None:
    x = images(space, 12)
    for arch in sample(space, 1):
        with torch.no_grad():
            # Statistics are rounded on the way, and dividing by small variances makes that visible.
            assert close(supernet(x, arch, calibrate(supernet, arch, x)), supernet(x, arch), 1e-3)


# An elastic network keeps the most important channels, not the leading ones: test_elastic.py tests its gradients.
@pytest.mark.parametrize("space", MIXTURES, indirect=True, scope="module")
def test_gradients_are_those_of_the_extracted_network(space: SearchSpace, supernet: WeightSharingSupernet) -> None:
    # In double precision: 22 layers of activations that cut off multiply what is rounded differently.
    supernet = copy.deepcopy(supernet).double()
    x, labels = images(space, 8).double(), torch.arange(8) % 4
    for arch in sample(space, 2):
        network = supernet.extract(arch, calibrate(supernet, arch, x)).train().double()
        F.cross_entropy(network(fit(x, network.input_shape)), labels).backward()
        supernet.zero_grad(set_to_none=True)
        F.cross_entropy(supernet(x, arch), labels).backward()
        own = {supernet.shared_name(name, arch): p.grad for name, p in network.named_parameters()}
        scale = max(float(g.abs().max()) for g in own.values() if g is not None)
        for name, parameter in supernet.named_parameters():
            expected = own.get(name.removeprefix("largest."))
            if expected is None:
                assert parameter.grad is None, name
                continue
            assert parameter.grad is not None
            inside = tuple(
                slice(0, small) if axis < 2 else slice((full - small) // 2, (full + small) // 2)
                for axis, (full, small) in enumerate(zip(parameter.shape, expected.shape, strict=True))
            )
            assert torch.allclose(parameter.grad[inside], expected, rtol=1e-6, atol=1e-6 * scale), name
            outside = parameter.grad.clone()
            outside[inside] = 0
            assert not outside.any(), name


def test_extracted_network_shares_no_memory(space: SearchSpace, supernet: WeightSharingSupernet) -> None:
    arch = sample(space, 0)[-1]
    x = images(space, 4)
    network = supernet.extract(arch, calibrate(supernet, arch, x))
    before = {k: v.clone() for k, v in supernet.state_dict().items()}
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            tensor.fill_(7)
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())


def test_calibration_pools_unequal_batches_exactly() -> None:
    space = SPACES["tiny"]()
    supernet = space.supernet()
    x = images(space, 11)
    arch = space.references["largest"]
    pooled = calibrate(supernet, arch, [x[:8], x[8:]])
    whole = calibrate(supernet, arch, x)
    # The first layer sees the same values either way; deeper ones depend on the batch that normalised before them.
    assert torch.allclose(pooled.mean["stem.norm"], whole.mean["stem.norm"], atol=1e-6)
    assert torch.allclose(pooled.var["stem.norm"], whole.var["stem.norm"], rtol=1e-5)


def test_calibration_needs_values_to_pool() -> None:
    space = SPACES["ofa_mobilenet_v3"]()
    supernet, arch = space.supernet(), space.references["smallest"]
    with pytest.raises(UserError, match="no images"):
        calibrate(supernet, arch, [])
    with pytest.raises(UserError, match="two images or more"):  # 32 pixels end in maps of one pixel
        calibrate(supernet, arch, images(space, 1))


@pytest.mark.parametrize(
    "space",
    [
        MobileNetV3Space(2, 5, stages=STAGES, resolutions=[16], dropout=0.5),
        load_space("fbnet_32", 2, 5, resolution=16, dropout=0.5),
    ],
    ids=["mobilenet_v3", "chain"],
)
def test_dropout_acts_in_training_alone(space: SearchSpace) -> None:
    supernet, arch, x = space.supernet(), space.references["largest"], images(space, 4)
    assert not torch.equal(supernet.train()(x, arch), supernet(x, arch))
    drawn = [supernet(x, arch, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    stats = calibrate(supernet, arch, x)
    assert torch.equal(supernet(x, arch, stats), supernet(x, arch, stats))
    assert torch.equal(supernet.eval()(x, arch), supernet(x, arch))


def test_choices_of_any_name_have_weights_of_their_own() -> None:
    blocks = {"a.b": {"type": "conv"}, "a%2Eb": {"type": "conv"}, "apb": {"type": "conv"}}
    space = ChainSpace(1, 3, blocks=blocks, stages=[{"width": 8}], resolution=8, final_width=0)
    supernet, x = space.supernet(), images(space, 2)
    with torch.no_grad():
        outputs = [supernet(x, arch) for arch in np.arange(3, dtype=np.uint8)[:, None]]
        assert not any(torch.equal(outputs[a], outputs[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        stats = calibrate(supernet, space.encode({"layer0": "a.b"}), x)
        network = supernet.extract(space.encode({"layer0": "a.b"}), stats)
        assert close(network(x), supernet(x, space.encode({"layer0": "a.b"}), stats))


def test_convolutions_write_channels_last(examples: dict[str, Callable[[], SearchSpace]]) -> None:
    """The layout in which processors convolve nearly twice as fast; a 1x1 kernel of the other layout would end it."""
    space = examples["every_block"]()
    supernet, x, layouts = space.supernet(), images(space, 4), set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, _, y: (
            layouts.add(y.is_contiguous(memory_format=torch.channels_last))
            if isinstance(module, torch.nn.Conv2d)
            else None
        )
    )
    try:
        for arch in sample(space, 5):
            supernet(x, arch)
    finally:
        hook.remove()
    assert layouts == {True}


def one_hot(space: SearchSpace, arch: np.ndarray) -> list[Tensor]:
    return [F.one_hot(torch.tensor(int(c)), len(k.choices)).float() for c, k in zip(arch, space.knobs, strict=True)]


@pytest.mark.parametrize("space", MIXTURES, indirect=True)
def test_mixture_with_one_hot_weights_is_the_subnet(space: SearchSpace, supernet: WeightSharingSupernet) -> None:
    mixture = space.mixture_supernet()
    mixture.load_state_dict(supernet.state_dict())
    x = images(space, 6)
    for arch in sample(space, 4):
        with torch.no_grad():
            assert close(mixture(x, one_hot(space, arch)), supernet(x, arch))


@pytest.mark.parametrize("space", MIXTURES, indirect=True)
def test_mixture_gives_gradients_to_all_weights(space: SearchSpace) -> None:
    torch.manual_seed(0)
    mixture = space.mixture_supernet()
    weights = [torch.full((len(k.choices),), 1 / len(k.choices), requires_grad=True) for k in space.knobs]
    F.cross_entropy(mixture(images(space, 4), weights), torch.arange(4)).backward()
    for knob, weight in zip(space.knobs, weights, strict=True):
        assert weight.grad is not None
        # Nothing computed, nothing learned: of a path that is no path (but not of a layer that has no skip).
        expected = [choice != "none" or knob.name.endswith(".skip") for choice in knob.choices]
        assert weight.grad.bool().tolist() == expected, knob.name
    assert all(p.grad is not None for p in mixture.parameters())


def count_modules(mixture: MixtureSupernet, weights: list[Tensor], x: Tensor, run: list[Tensor] | None = None) -> int:
    """How many convolutions and linear layers a pass runs."""
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(module) if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) else None
    )
    try:
        mixture(x, weights, run)
    finally:
        hook.remove()
    return len(seen)


BLOCK_SPACES = ["fbnet_32", "nasbench201", "every_block", "elastic_chain", "signals", "words"]


@pytest.mark.parametrize("name", BLOCK_SPACES)
def test_paths_of_weight_zero_are_not_run(name: str, examples: dict[str, Callable[[], SearchSpace]]) -> None:
    space = {**SPACES, **examples}[name]()
    mixture, x = space.mixture_supernet(), images(space, 3)
    for arch in sample(space, 1):
        network = space.build(arch)
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        chosen = one_hot(space, arch)
        assert count_modules(mixture, chosen, x) == len(layers)
        # Nor are they when the weights may learn: what runs is what has a weight.
        assert count_modules(mixture, [w.requires_grad_() for w in chosen], x) == len(layers)


@pytest.mark.parametrize("name", BLOCK_SPACES)
def test_paths_asked_for_run_and_their_weights_learn(name: str, examples: dict[str, Callable[[], SearchSpace]]) -> None:
    """Binary gates: two paths run, one of them at weight zero, and both gates have a gradient."""
    space = {**SPACES, **examples}[name]()
    mixture, x = space.mixture_supernet(), images(space, 3)
    arch = sample(space, 1, seed=2)[-1]
    weights = [w.requires_grad_() for w in one_hot(space, arch)]
    other = space.canonical((arch[None] + 1) % space.cardinalities)[0]
    run = [w.bool() for w in one_hot(space, other)]
    with torch.no_grad():
        alone = mixture(x, weights)
    out = mixture(x, weights, run)
    assert close(out, alone)  # a path of weight zero changes nothing
    out.square().sum().backward()
    for k, (weight, asked) in enumerate(zip(weights, run, strict=True)):
        gradient = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        silent = ~(asked | weight.bool())
        assert not gradient[silent].any(), space.knobs[k].name
    assert sum(int(w.grad.count_nonzero()) for w in weights if w.grad is not None) > len(weights)
    assert count_modules(mixture, weights, x, run) > count_modules(mixture, weights, x)


def saved_bytes(mixture: MixtureSupernet, weights: list[Tensor], x: Tensor, run: list[Tensor] | None = None) -> int:
    """What a pass keeps for the gradient, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in mixture.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = mixture(x, weights, run)
    del result
    return sum(kept.values())


def test_memory_is_that_of_the_paths_that_run() -> None:
    blocks = {"mb": {"type": "inverted_residual", "kernel": [3, 5, 7], "expansion": [2, 2.0001, 2.0002]}}  # 9 alike
    stages = [{"width": 16, "layers": 4}]
    space = ChainSpace(1, 3, blocks=blocks, stages=stages, resolution=16, stem_stride=1, final_width=0)
    mixture, x = space.mixture_supernet(), images(space, 8)
    one = one_hot(space, np.zeros(len(space.knobs), dtype=np.uint8))
    two = [F.one_hot(torch.tensor(1), 9).bool() for _ in space.knobs]
    even = [torch.full((9,), 1 / 9) for _ in space.knobs]
    single = saved_bytes(mixture, one, x)
    path = saved_bytes(mixture, one, x, two) - single  # one path more in every layer
    assert path > 0.5 * single
    assert saved_bytes(mixture, even, x) == pytest.approx(single + 8 * path, rel=0.05)


def test_carried_choices_see_shapes_of_their_own(examples: dict[str, Callable[[], SearchSpace]]) -> None:
    """A mixture of two architectures that differ in one width is linear in the last layer that knows the width."""
    space = examples["words"]()
    mixture, x = space.mixture_supernet(), images(space, 4)
    first = space.encode({"resolution": 8, "width": 4, "kernel": 3, "activation": "relu", "depth": 1})
    second = space.encode({"resolution": 8, "width": 8, "kernel": 3, "activation": "relu", "depth": 1})
    weights = [0.3 * a + 0.7 * b for a, b in zip(one_hot(space, first), one_hot(space, second), strict=True)]
    with torch.no_grad():
        apart = 0.3 * mixture(x, one_hot(space, first)) + 0.7 * mixture(x, one_hot(space, second))
        assert close(mixture(x, weights), apart)


def test_mixture_gives_gradients_to_paths_not_taken() -> None:
    """Straight-through estimators need the gradient of every choice while the forward pass takes one."""
    space = SPACES["quickstart"]()
    mixture = space.mixture_supernet()
    weights = [w.requires_grad_() for w in one_hot(space, space.references["smallest"])]
    mixture(images(space, 4), weights).square().sum().backward()
    depth = next(i for i, k in enumerate(space.knobs) if k.name.endswith("depth"))
    assert weights[depth].grad.all()  # type: ignore[union-attr]


def test_mixture_refuses_weights_of_another_space() -> None:
    space = SPACES["tiny"]()
    mixture, x = space.mixture_supernet(), images(space, 2)
    weights = one_hot(space, space.references["smallest"])
    with pytest.raises(UserError, match="one weight vector per knob"):
        mixture(x, weights[:-1])
    with pytest.raises(UserError, match="all resolutions have weight zero"):
        mixture(x, [torch.zeros(2), *weights[1:]])
