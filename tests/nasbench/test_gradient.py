"""Gradient search: every method on a toy mixture whose best architecture is known, and on small spaces of blocks."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from torch import nn

from hardware_profiles import load_target
from nasbench.objectives import make_objective
from nasbench.strategies.darts import DARTS
from nasbench.strategies.gumbel import GDAS, GumbelSearch, gumbel_softmax
from nasbench.strategies.proxylessnas import ProxylessNAS
from nasbench.tasks.base import Split, Task
from predictors import MeasuredTable, TableLookup
from predictors.counts import Count
from predictors.roofline import Roofline
from search_spaces import ChainSpace, NASBench201Space, UserError, load_space
from search_spaces.supernet import MixtureSupernet


class Bright(Task):
    """Is the image bright? 64 images of 3x4x4."""

    @property
    def input_shape(self):
        return (3, 4, 4)

    @property
    def class_names(self):
        return ("dark", "bright")

    def split(self, name):
        assert name == "train"  # validation and test stay unseen
        labels = torch.arange(64) % 2
        return Split((labels * 255).to(torch.uint8)[:, None, None, None].expand(64, 3, 4, 4).clone(), labels)

    def prepare(self, images):
        return images.float() / 127.5 - 1.0


class Toy(MixtureSupernet):
    """Every larger choice sharpens the output, so that the largest architecture has the least loss."""

    def __init__(self, space):
        super().__init__()
        self.linear = nn.Linear(1, 2)
        nn.init.constant_(self.linear.weight, 0.01)
        self.knobs = len(space.knobs)

    def forward(self, x, weights, run=None):
        share = sum((w * torch.linspace(0.0, 1.0, len(w))).sum() for w in weights if len(w) > 1) / self.knobs
        return self.linear(x.mean((1, 2, 3))[:, None]) * (0.05 + share)


ACCURACY = make_objective("accuracy")
OPTIONS = {"epochs": 12, "warmup_epochs": 1, "batch_size": 8, "path_lr": 0.2}


METHODS = [DARTS, GDAS, GumbelSearch, ProxylessNAS]


@pytest.fixture(params=METHODS, ids=lambda m: m.__name__)
def method(request):
    return request.param


def find(method, space, objectives, seed=0, **options):
    torch.manual_seed(seed)
    strategy = method(space, seed, **(OPTIONS | options))
    costs = {o.name: Count(o.metric).bind(space) for o in objectives}
    return strategy, strategy.run(Toy(space), Bright(), costs, [ACCURACY, *objectives])


def test_without_costs_the_best_network_is_found(method, space):
    strategy, proposals = find(method, space, [])
    assert (proposals.archs[0] == space.cardinalities - 1).mean() > 0.9
    assert strategy.history[-1]["entropy"] < strategy.history[0]["entropy"] == pytest.approx(1.0)
    np.testing.assert_array_equal(proposals.archs, space.canonical(space.check(proposals.archs)))
    assert len(np.unique(proposals.archs, axis=0)) == len(proposals)
    np.testing.assert_array_equal(proposals.ids, np.arange(len(proposals)))


def test_a_limit_is_kept_by_the_most_wanted(method, space):
    macs = Count("macs").bind(space)
    limit = float(np.quantile(macs.predict(space.everything()).mean, 0.3))
    strategy, proposals = find(method, space, [make_objective("macs", limit=limit)])
    found = macs.predict(proposals.archs).mean
    assert found[0] <= limit
    assert found[found <= limit].max() > 0.5 * limit  # and used, since larger is better here
    assert strategy.history[-1]["macs"] < strategy.history[0]["macs"]


def test_costs_without_a_limit_weigh_in(method, space):
    macs = Count("macs").bind(space)
    heavy, light = (
        macs.predict(find(method, space, [make_objective("macs")], cost_weight=weight)[1].archs[:1]).mean[0]
        for weight in (0.0, 20.0)
    )
    assert light < heavy


def test_the_seed_decides_everything(method, space):
    first, again = (find(method, space, [make_objective("macs")], seed=3)[1].archs for _ in range(2))
    np.testing.assert_array_equal(first, again)


class Killed(Exception):
    """Ends a search at a step."""


class Dropped(Toy):
    """Draws from torch's own generator too, and has weights that only some paths train."""

    def __init__(self, space):
        super().__init__(space)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])

    def forward(self, x, weights, run=None):
        widest = next(w for w in weights if len(w) > 1)
        scales = [s for s, w in zip(self.scales, widest, strict=False) if w != 0]
        return torch.dropout(super().forward(x, weights, run), 0.2, True) * sum(scales, torch.ones(2))


class Noisy(Bright):
    def augment(self, images, seed):
        noise = torch.randint(0, 64, images.shape, generator=torch.Generator().manual_seed(seed))
        return images ^ noise.to(torch.uint8)


def trained(method, space, checkpoint=None, kill_at=None, save_every_s=0.0, **options):
    """A search of 7 epochs of 4 steps on the weights, and 4 on the logits after the first; and the steps that ran."""
    steps = []

    def progress(update):
        steps.append(update.step)
        if update.step == kill_at:
            raise Killed

    torch.manual_seed(0)
    strategy = method(space, 0, **(OPTIONS | {"epochs": 7} | options))
    macs, mixture = make_objective("macs"), Dropped(space)
    torch.manual_seed(kill_at or 0)  # of no consequence: steps draw from their own numbers
    found = strategy.run(
        mixture, Noisy(), {"macs": Count("macs").bind(space)}, [ACCURACY, macs],
        checkpoint=checkpoint, progress=progress, save_every_s=save_every_s,
    )  # fmt: skip
    return strategy, found, mixture, steps


@pytest.mark.parametrize("save_every_s", [0.0, 1e9], ids=["every step", "every epoch"])
def test_a_resumed_search_ends_with_the_same_bits(method, space, tmp_path, save_every_s):
    file = tmp_path / "mixture.safetensors"
    for at in (2, 11, 19, 40):  # in the warm-up, in a part of either kind
        with pytest.raises(Killed):
            trained(method, space, file, at, save_every_s)
    strategy, found, mixture, steps = trained(method, space, file, None, save_every_s)
    straight, expected, reference, all_steps = trained(method, space)
    assert all_steps == list(range(1, 7 * 4 + 6 * 4 + 1))
    assert steps == list(range(40 if save_every_s == 0 else 37, 53))
    np.testing.assert_equal(strategy.history, straight.history)
    for ours, theirs in zip(strategy.probabilities, straight.probabilities, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(mixture.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    np.testing.assert_array_equal(found.archs, expected.archs)
    again, same, _, none = trained(method, space, file)  # of what has finished nothing is left to do
    assert not none
    np.testing.assert_array_equal(same.archs, found.archs)
    np.testing.assert_equal(again.history, straight.history)


def test_a_first_interrupt_saves_the_running_step(space, tmp_path):
    file = tmp_path / "mixture.safetensors"

    def interrupt(update):
        if update.step == 11:
            signal.raise_signal(signal.SIGINT)

    torch.manual_seed(0)
    strategy = GumbelSearch(space, 0, **(OPTIONS | {"epochs": 7}))
    costs, objectives = {"macs": Count("macs").bind(space)}, [ACCURACY, make_objective("macs")]
    with pytest.raises(KeyboardInterrupt):
        strategy.run(Dropped(space), Noisy(), costs, objectives, checkpoint=file, progress=interrupt)
    resumed, _, _, steps = trained(GumbelSearch, space, file)
    assert steps[0] == 12
    np.testing.assert_equal(resumed.history, trained(GumbelSearch, space)[0].history)


@pytest.mark.parametrize(
    ("key", "value"), [("path_lr", 0.1), ("epochs", 8), ("batch_size", 4), ("temperature", (2.0, 1.0))]
)
def test_a_checkpoint_of_other_settings_is_refused(space, tmp_path, key, value):
    file = tmp_path / "mixture.safetensors"
    with pytest.raises(Killed):
        trained(GumbelSearch, space, file, 3)
    before = file.read_bytes()
    with pytest.raises(UserError, match=rf"mixture\.safetensors: this training was begun with {key} = "):
        trained(GumbelSearch, space, file, **{key: value})
    with pytest.raises(UserError, match="begun with method = 'GumbelSearch', now it is 'DARTS'"):
        trained(DARTS, space, file, temperature=GumbelSearch.default_temperature)
    assert file.read_bytes() == before


def test_few_architectures_give_few_proposals(make_space):
    small = make_space(max_depths=(1,), kernels=(3,))
    _, proposals = find(GumbelSearch, small, [], proposals=10)
    assert 1 <= len(proposals) <= 4


def test_samples_are_distributions_that_sharpen():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0])
    cold = torch.stack([gumbel_softmax(logits, 0.05, generator) for _ in range(2000)])
    torch.testing.assert_close(cold.sum(1), torch.ones(2000))
    share = torch.nn.functional.one_hot(cold.argmax(1), 3).float().mean(0)
    torch.testing.assert_close(share, logits.softmax(0), atol=0.03, rtol=0)
    assert cold.max(1).values.median() > 0.99
    assert gumbel_softmax(logits, 100.0, generator).max() < 0.4


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"epochs": 2}, "epochs"),
        ({"temperature": (5.0, 0.0)}, "temperature"),
        ({"temperature": (float("nan"), 1.0)}, "temperature"),
        ({"proposals": 0}, "proposals"),
        ({"lr": -1.0}, "lr"),
        ({"device": "tpu"}, "device"),
        ({"path_lr": float("nan")}, "path_lr"),
        ({"cost_weight": float("inf")}, "cost_weight"),
    ],
)
def test_bad_settings_name_their_key(space, options, key):
    with pytest.raises(UserError, match=f"strategy.{key}"):
        GumbelSearch(space, 0, **({"warmup_epochs": 2} | options))


def test_a_search_that_breaks_down_says_so(space):
    with pytest.raises(UserError, match=r"broke down in epoch 1 of 12.*strategy\.lr, now 1e\+38"):
        find(GumbelSearch, space, [], lr=1e38)


def test_what_a_space_does_not_permit_has_no_chance(method, space):
    large = [any(op.output.size > 5000 for op in block.workload.operators) for block in space.catalog]
    wide = [any(op.kernel == (5, 5) for op in block.workload.operators) for block in space.catalog]
    restricted = space.without_blocks(np.array(large) | np.array(wide))
    strategy, found = find(method, restricted, [make_objective("macs")])
    assert len(found) > 1
    assert restricted.permits(found.archs).all()
    for index, knob in enumerate(space.knobs):
        assert np.isfinite(strategy.probabilities[index]).all()
        if knob.name.startswith("kernel"):
            np.testing.assert_array_equal(strategy.probabilities[index], [1.0, 0.0])


class Waves(Task):
    """Which of four waves? 96 images of 1x8x8, in some noise."""

    @property
    def input_shape(self):
        return (1, 8, 8)

    @property
    def class_names(self):
        return ("rows", "columns", "down", "up")

    def split(self, name):
        assert name == "train"
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(96) % 4
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        waves = torch.stack([(rows * 1.5).sin(), (columns * 1.5).sin(), (rows + columns).sin(), (rows - columns).sin()])
        noise = torch.randn(96, 8, 8, generator=generator) * 15
        return Split((128 + 60 * waves[labels] + noise).clamp(0, 255).byte()[:, None], labels)

    def prepare(self, images):
        return images.float() / 64 - 2


BLOCKS = {
    "small": {"type": "separable", "kernel": 3},
    "large": {"type": "inverted_residual", "kernel": 5, "expansion": 4},
    "shuffle": {"type": "shuffle"},
    "skip": {"type": "skip"},
}
SPACES = {
    "chain": lambda: ChainSpace(
        1, 4, blocks=BLOCKS, stages=[{"width": 8, "layers": 2}, {"width": 16, "layers": 2, "stride": 2}], resolution=8,
        stem_width=8, stem_stride=1, final_width=16, name="chain",
    ),
    "elastic": lambda: ChainSpace(
        1, 4, blocks=BLOCKS, stages=[{"width": [8, 16], "layers": [1, 2]}], resolution=8, stem_width=8, stem_stride=1,
        final_width=16, name="elastic",
    ),
    "nasbench201": lambda: NASBench201Space(1, 4, resolution=8, channels=4, cells=1),
}  # fmt: skip


class Recorded(MixtureSupernet):
    """Counts the choices that run per knob, pass by pass."""

    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture
        self.passes = []

    def forward(self, x, weights, run=None):
        asked = [torch.zeros_like(w, dtype=torch.bool) for w in weights] if run is None else run
        self.passes.append([int(((w != 0) | a).sum()) for w, a in zip(weights, asked, strict=True)])
        return self.mixture(x, weights, run)


@pytest.mark.parametrize("name", SPACES)
def test_a_small_space_is_searched_within_a_limit(method, name):
    space = SPACES[name]()
    torch.manual_seed(1)
    macs = Count("macs").bind(space)
    limit = float(np.quantile(macs.predict(space.sample(500, np.random.default_rng(0))).mean, 0.3))
    objective = make_objective("macs", limit=limit)
    epochs = 16 if method in (GDAS, ProxylessNAS) else 6  # where one path at a time learns, each learns less
    strategy = method(space, 0, epochs=epochs, warmup_epochs=3, batch_size=8, path_lr=0.1, proposals=4)
    mixture = Recorded(space.mixture_supernet())
    found = strategy.run(mixture, Waves(), {"macs": macs}, [ACCURACY, objective])
    losses = [row["loss"] for row in strategy.history]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert macs.predict(found.archs[:1]).mean[0] <= limit
    assert strategy.history[-1]["macs"] < strategy.history[0]["macs"]
    choices = space.cardinalities.tolist()
    steps = 6  # per epoch, of either kind; the first epoch that trains paths follows the warm-up
    weights, paths = mixture.passes[: 4 * steps], mixture.passes[4 * steps : 5 * steps]
    per_knob = {DARTS: (choices, choices), GumbelSearch: (choices, choices)}
    single, two = [1] * len(choices), [2] * len(choices)
    expected = {GDAS: (single, single), ProxylessNAS: (single, two), **per_knob}[method]
    assert weights == [expected[0]] * len(weights)
    assert paths == [expected[1]] * len(paths)


def test_gates_have_the_papers_gradient():
    strategy = ProxylessNAS(SPACES["chain"](), 0, epochs=4)
    logits = [torch.tensor([0.3, -0.2, 0.9, 0.1], requires_grad=True)]
    outputs = torch.tensor([2.0, -1.0, 0.5, 3.0])  # the loss's gradient by each gate
    sample = strategy.sample(logits, 1.0, torch.Generator().manual_seed(4))
    (sample.weights[0] * outputs).sum().backward()
    pair = sample.run[0]
    assert pair.sum() == 2
    assert sorted(sample.weights[0].tolist()) == [0.0, 0.0, 0.0, 1.0]
    assert sample.weights[0][pair].sum() == 1
    share = logits[0].detach()[pair].softmax(0)
    expected = torch.zeros(4)
    expected[pair] = share * (outputs[pair] - (share * outputs[pair]).sum())
    torch.testing.assert_close(logits[0].grad, expected)


def test_a_step_leaves_the_chances_of_paths_not_drawn():
    strategy = ProxylessNAS(SPACES["chain"](), 0, epochs=4)
    before = [torch.tensor([0.3, -0.2, 0.9, 0.1])]
    sample = strategy.sample(before, 1.0, torch.Generator().manual_seed(4))
    pair = sample.run[0]
    after = [before[0] + torch.tensor([0.5, 0.2, -0.1, 0.3]) * pair]
    moved = after[0][pair].diff()
    strategy.stepped(after, before, sample)
    torch.testing.assert_close(after[0].softmax(0)[~pair], before[0].softmax(0)[~pair])
    torch.testing.assert_close(after[0][pair].diff(), moved)


def test_gates_are_drawn_by_their_probability():
    strategy = ProxylessNAS(SPACES["chain"](), 0, epochs=4)
    logits, generator = [torch.tensor([0.0, 1.0, 2.0, -torch.inf])], torch.Generator().manual_seed(0)
    drawn = torch.stack([strategy.sample_for_weights(logits, 1.0, generator).weights[0] for _ in range(2000)])
    torch.testing.assert_close(drawn.mean(0), logits[0].softmax(0), atol=0.03, rtol=0)
    only = [torch.tensor([-torch.inf, 0.0])]
    assert strategy.sample(only, 1.0, generator).weights[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", ["fbnet", "nasbench201"])
def test_expected_costs_are_those_of_independent_choices(name):
    space = load_space(name)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(int(c), generator=generator, dtype=torch.float64) for c in space.cardinalities]
    chances = [v.softmax(0).requires_grad_() for v in logits]
    rng = np.random.default_rng(0)
    columns = [rng.choice(len(p), 4000, p=p.detach().numpy()) for p in chances]
    archs = np.stack(columns, axis=1).astype(space.dtype)
    for predictor in (Count("macs"), Roofline(load_target("raspberry_pi_4"))):
        bound = predictor.bind(space)
        expected = bound.expected(chances)
        assert float(expected.detach()) == pytest.approx(bound.predict(archs).mean.mean(), rel=0.03)
        gradients = torch.autograd.grad(expected, chances)
        assert all(torch.isfinite(g).all() and g.any() for g in gradients)


def test_a_table_of_whole_networks_is_no_differentiable_cost(data_dir):
    table = MeasuredTable.from_help(data_dir / "nb201_latency_help.csv.gz", ["pixel3"])
    bound = TableLookup(table).bind(load_space("nasbench201"))
    with pytest.raises(UserError, match="gradient search needs a predictor that is a sum over blocks"):
        bound.expected([torch.full((5,), 0.2) for _ in range(6)])
