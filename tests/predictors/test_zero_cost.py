"""Zero-cost proxies: their formulas by hand, what they leave alone, and networks that carry no signal."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from predictors.zero_cost import (
    PROXIES,
    grad_norm,
    jacobian_covariance,
    naswot,
    score_architecture,
    score_network,
    snip,
    synflow,
    zen,
)
from search_spaces import NASBench201Space, SearchSpace, UserError, load_space, reference_network

BATCH = 12


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((BATCH, 3, 8, 8), generator=generator), torch.randint(5, (BATCH,), generator=generator)


class Plain(nn.Module):
    """A convolution, an activation and a classifier, with as much around them as a test wants."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(6, 5)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.activation(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture
def plain() -> Plain:
    torch.manual_seed(1)
    return Plain()


def test_synflow_is_the_flow_of_absolute_weights(plain: Plain, batch: tuple[Tensor, Tensor]) -> None:
    w, b, v, c = (p.detach().double().abs() for p in plain.parameters())
    # A pixel sees the taps of its kernel that are inside the image: all of ones.
    ones = torch.ones(1, 3, 8, 8, dtype=torch.double)
    through_weights = F.conv2d(ones, w, padding=1).mean((2, 3)) @ v.T
    through_biases = b @ v.T
    # Weight times gradient adds up, layer by layer, to the output that passes through its weights.
    flow = through_weights.sum() + (through_weights.sum() + through_biases.sum())
    assert synflow(plain, *batch) == pytest.approx(float(flow.log()), rel=1e-12)
    assert c.numel() == 5


def test_synflow_ignores_normalisation_and_data(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    normed = Plain(norm=True)
    torch.manual_seed(1)
    bare = Plain()
    images, labels = batch
    assert synflow(normed, images, labels) == synflow(bare, images, labels) == synflow(bare, 7 * images, 0 * labels)


def test_naswot_counts_where_codes_agree(plain: Plain, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    codes = (plain.conv(images) > 0).flatten(1).double()
    kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T
    assert naswot(plain, images, labels) == pytest.approx(float(torch.linalg.slogdet(kernel)[1]), rel=1e-9)


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(inplace=True), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.PReLU(), F.leaky_relu,
                   lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0, 6)]
)  # fmt: skip
def test_naswot_reads_any_activation_by_its_sign(
    activation: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(1)
    other = Plain(activation)
    torch.manual_seed(1)
    assert naswot(other, *batch) == naswot(Plain(), *batch)


def test_naswot_of_equal_images_is_low_and_finite(plain: Plain, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    twins = torch.cat([images[:-1], images[:1]])
    assert np.isfinite(naswot(plain, twins, labels))
    assert naswot(plain, twins, labels) < naswot(plain, images, labels) - 10
    assert naswot(Plain(lambda x: x), images, labels) == 0.0


def test_jacobian_covariance_is_that_of_numpy(plain: Plain, batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    x = images.clone().requires_grad_(True)
    plain(x).sum().backward()
    values = np.linalg.eigvalsh(np.corrcoef(x.grad.flatten(1).double().numpy())) + 1e-5
    expected = -(np.log(values) + 1 / values).sum()
    assert jacobian_covariance(plain, images, labels) == pytest.approx(expected, rel=1e-4)


def test_gradient_proxies_are_those_of_the_cross_entropy(plain: Plain, batch: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(plain(batch[0]), batch[1]).backward()
    weights = [plain.conv.weight, plain.head.weight]
    assert grad_norm(plain, *batch) == pytest.approx(sum(float(w.grad.norm()) for w in weights), rel=1e-5)
    assert snip(plain, *batch) == pytest.approx(
        sum(float((w * w.grad).detach().abs().sum()) for w in weights), rel=1e-5
    )


def test_zen_does_not_change_with_the_scale_of_what_a_normalisation_divides_by(batch: tuple[Tensor, Tensor]) -> None:
    """The point of its variance terms: a layer in front that multiplies moves the score as if none had divided."""

    class Scaled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            features = self.norm(10.0 * self.conv(x))
            return self.head(features.mean((2, 3)))

    torch.manual_seed(1)
    normed, network = Scaled(norm=True), Scaled()
    # The output moves by |10 w (0.01 e)| without, and so it is said to with normalisation, but for unequal channels.
    assert zen(normed, *batch) == pytest.approx(zen(network, *batch), abs=0.05)
    # Shape apart, images and initial weights do not matter.
    assert zen(Scaled(norm=True), 5 * batch[0] + 3, batch[1]) == zen(normed, *batch)


@pytest.mark.parametrize("name", PROXIES)
def test_proxies_leave_everything_as_it_was(name: str, batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(1)
    network = Plain(norm=True, drop=0.5).requires_grad_(False)
    network.head.train(False)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    images = batch[0].clone()
    state = torch.get_rng_state()
    value = PROXIES[name](network, *batch)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert PROXIES[name](network, *batch) == value
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert modes == [m.training for m in network.modules()]
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert torch.equal(images, batch[0])


@pytest.mark.parametrize("name", ["synflow", "naswot", "jacobian_covariance", "grad_norm", "snip", "zen"])
def test_cells_without_signal_are_below_those_with(name: str) -> None:
    space = NASBench201Space(resolution=16, channels=8, cells=1)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn((16, 3, 16, 16), generator=generator), torch.randint(10, (16,), generator=generator)
    cut = [
        "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|",
        "|none~0|+|none~0|none~1|+|none~0|none~1|nor_conv_3x3~2|",
        "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|none~1|avg_pool_3x3~2|",
    ]
    whole = ["|skip_connect~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|", *space.to_string(
        np.stack([space.references["resnet"], space.references["all_conv_3x3"]])
    )]  # fmt: skip
    values = [score_architecture(space, arch, images, labels, [name])[0] for arch in space.from_string(cut + whole)]
    assert np.isfinite(values).all()
    assert max(values[:3]) < min(values[3:])


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "deit_tiny", "mobilevit_s", "squeezenet1_1"])
def test_any_network_has_scores(name: str) -> None:
    """Hard-swish and squeeze-excite, attention with layer normalisation, both together, and no normalisation at all."""
    reference = reference_network(name, resolution=64)
    network = reference.build()
    images = torch.randn(2, *reference.input_shape)
    scores = score_network(network, images, torch.tensor([0, 1]))
    assert np.isfinite(scores).all()
    assert (scores != 0).all()
    assert abs(scores[0]) < 700, "the synaptic flow overflowed"


def test_naswot_sees_tokens_that_lie_in_one_matrix(batch: tuple[Tensor, Tensor]) -> None:
    class Tokens(Plain):
        def forward(self, x: Tensor) -> Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            rows = F.relu(tokens.reshape(-1, tokens.shape[2]))
            return self.head(rows.reshape(tokens.shape).mean(1))

    torch.manual_seed(1)
    tokens = Tokens()
    torch.manual_seed(1)
    assert naswot(tokens, *batch) == pytest.approx(naswot(Plain(), *batch), rel=1e-12)


def test_several_at_once_are_those_one_by_one(plain: Plain, batch: tuple[Tensor, Tensor]) -> None:
    names = ["snip", "macs", "grad_norm", "zen", "params"]
    together = score_network(plain, *batch, [*names, lambda network, images, labels: 4.25])
    assert together.tolist() == [*(PROXIES[n](plain, *batch) for n in names), 4.25]
    with pytest.raises(UserError, match="unknown zero-cost proxy 'synflw'. Did you mean 'synflow'"):
        score_network(plain, *batch, ["synflw"])


@pytest.mark.parametrize("make", [lambda: load_space("quickstart", 3, 5), lambda: load_space("nasbench201", 3, 5)])
def test_scores_of_a_space_depend_on_architecture_and_seed_alone(
    make: Callable[[], SearchSpace], batch: tuple[Tensor, Tensor]
) -> None:
    space = make()
    first, second = space.sample(2, np.random.default_rng(0))
    names = ["snip", "naswot", "macs", "params"]
    torch.manual_seed(5)
    value = score_architecture(space, first, *batch, names)
    score_architecture(space, second, *batch, names)
    np.testing.assert_array_equal(score_architecture(space, first, *batch, names), value)
    workload = space.workload(first)
    assert value[2:].tolist() == [workload.macs, workload.params]
    other = score_architecture(space, first, *batch, names, seed=1)
    assert (other[:2] != value[:2]).all()
    both = score_architecture(space, first, *batch, names, initialisations=2)
    np.testing.assert_allclose(both, (value + other) / 2)
