"""Gradient search: every method on a toy mixture whose best architecture is known, and on small spaces of blocks."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch
from torch import nn

from hardware_profiles import load_target
from nasbench.objectives import make_objective
from nasbench.registry import options
from nasbench.strategies.darts import DARTS
from nasbench.strategies.gumbel import GDAS, FBNet, GumbelSearch, gumbel_softmax
from nasbench.strategies.lightnas import LightNAS
from nasbench.strategies.proxylessnas import ProxylessNAS
from nasbench.tasks.base import Split, Task
from predictors import FewShot, LookupTable, MeasuredTable, OperatorModel, TableLookup
from predictors.base import BoundPredictor
from predictors.counts import Count
from predictors.lookup import block_signatures
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


FREE = [DARTS, FBNet, GDAS, GumbelSearch, ProxylessNAS]  # need no cost to land on
METHODS = [*FREE, LightNAS]


@pytest.fixture(params=METHODS, ids=lambda m: m.__name__)
def method(request):
    return request.param


@pytest.fixture(params=FREE, ids=lambda m: m.__name__)
def free(request):
    return request.param


def needed(method, space, objectives):
    """What a method needs beside the usual options: a cost to land on, where no limit tells one."""
    if method is not LightNAS or any(o.limit is not None for o in objectives):
        return {}
    return {"target": {"macs": float(np.median(Count("macs").bind(space).predict(archs_of(space)).mean))}}


def archs_of(space):
    return space.sample(500, np.random.default_rng(0))


def find(method, space, objectives, seed=0, **options):
    torch.manual_seed(seed)
    strategy = method(space, seed, **(OPTIONS | needed(method, space, objectives) | options))
    costs = {o.name: Count(o.metric).bind(space) for o in objectives}
    return strategy, strategy.run(Toy(space), Bright(), costs, [ACCURACY, *objectives])


def test_without_costs_the_best_network_is_found(free, space):
    strategy, proposals = find(free, space, [])
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


# FBNet multiplies by a power of what is driven down: any limit pales beside one that drives at all.
@pytest.mark.parametrize(
    ("method", "driven"), [(m, d) for m in FREE for d in ("up", "down") if (m, d) != (FBNet, "down")]
)
def test_both_sides_of_a_limit_steer(method, driven, space):
    """The expected cost ends between the sides, whichever of them the rest of the loss drives it against."""
    macs = Count("macs").bind(space)
    low, high = np.quantile(macs.predict(space.everything()).mean, [0.45, 0.6])
    between = make_objective("macs", at_least=float(low), at_most=float(high))
    weight = 0.0 if driven == "up" else 20.0  # of parameters, against the accuracy that wants more
    objectives = [between, make_objective("params")]
    strategy, proposals = find(method, space, objectives, cost_weight=weight, limit_weight=50.0)
    assert 0.95 * low <= strategy.history[-1]["macs"] <= 1.05 * high
    assert low <= macs.predict(proposals.archs[:1]).mean[0] <= high


def test_costs_without_a_limit_weigh_in(free, space):
    macs = Count("macs").bind(space)
    heavy, light = (
        macs.predict(find(free, space, [make_objective("macs")], cost_weight=weight)[1].archs[:1]).mean[0]
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
    options = needed(method, space, [ACCURACY]) | {"epochs": 7} | options
    strategy = method(space, 0, **(OPTIONS | options))
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
    assert strategy.trajectory == straight.trajectory
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
    with pytest.raises(UserError, match="begun with method = 'GumbelSearch', now it is 'GDAS'"):
        trained(GDAS, space, file, temperature=GumbelSearch.default_temperature)
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


@pytest.mark.parametrize(
    ("method", "name"),
    # FBNet and LightNAS differ from GumbelSearch and GDAS in the loss alone.
    [(m, name) for m in METHODS for name in (("elastic",) if m in (FBNet, LightNAS) else SPACES)],
)
def test_a_small_space_is_searched_within_a_limit(method, name):
    space = SPACES[name]()
    torch.manual_seed(1)
    macs = Count("macs").bind(space)
    limit = float(np.quantile(macs.predict(space.sample(500, np.random.default_rng(0))).mean, 0.3))
    objective = make_objective("macs", limit=limit)
    single = method in (GDAS, LightNAS, ProxylessNAS)
    epochs = 12 if single else 6  # where one path at a time learns, each learns less
    strategy = method(space, 0, epochs=epochs, warmup_epochs=3, batch_size=8, path_lr=0.1, proposals=4)
    mixture = Recorded(space.mixture_supernet())
    found = strategy.run(mixture, Waves(), {"macs": macs}, [ACCURACY, objective])
    losses = [row["loss"] for row in strategy.history]
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    assert macs.predict(found.archs[:1]).mean[0] <= limit
    assert strategy.history[-1]["macs"] < strategy.history[0]["macs"]
    choices = space.cardinalities.tolist()
    steps = 6  # per epoch, of either kind; the first epoch that trains paths follows the warm-up
    first = mixture.passes[3 * steps : 5 * steps]
    weights, paths = (first[:steps], first[steps:]) if method.alternate == "epoch" else (first[1::2], first[::2])
    one, two = [1] * len(choices), [2] * len(choices)
    expected = {GDAS: (one, one), LightNAS: (one, one), ProxylessNAS: (one, two)}.get(method, (choices, choices))
    assert mixture.passes[: 3 * steps] == [expected[0]] * 3 * steps
    assert weights == [expected[0]] * steps
    assert paths == [expected[1]] * steps


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


class Brightness(MixtureSupernet):
    """Of any space: a choice further down the list sharpens the output."""

    def __init__(self, space):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x, weights, run=None):
        share = torch.stack([(w * torch.linspace(0.0, 1.0, len(w))).sum() for w in weights]).mean()
        return self.linear(x.mean((1, 2, 3))[:, None]) * (0.05 + share)


NB201_COSTS = {
    "roofline": lambda space, data: Roofline(load_target("raspberry_pi_4")).bind(space),
    "energy": lambda space, data: Roofline(load_target("jetson_nano"), "energy_mj").bind(space),
    "operator model": lambda space, data: operator_model(space).bind(space),
    "block table": lambda space, data: LookupTable({s: 0.01 * len(s) for s in block_signatures(space)}).bind(space),
    "measured table": lambda space, data: TableLookup(measured(data, ["pixel3"])).bind(space),
    "few-shot": lambda space, data: few_shot(data).bind(space),
    "peak memory": lambda space, data: Count("peak_memory_bytes").bind(space),
}


def measured(data, devices):
    return MeasuredTable.from_help(data / "nb201_latency_help.csv.gz", devices)


def operator_model(space):
    workloads = [space.workload(arch) for arch in space.sample(32, np.random.default_rng(0))]
    return OperatorModel.fit(workloads, np.array([0.1 + w.macs / 1e8 + w.params / 1e7 for w in workloads]))


def few_shot(data):
    table = measured(data, ["1080ti_1", "silver_4114", "samsung_a50", "raspi4"])
    rows = np.random.default_rng(0).choice(len(table), 20, replace=False)
    learned = FewShot.learn(table, ["1080ti_1", "silver_4114", "samsung_a50"])
    return learned.adapt(table.keys[rows], table.latency_ms[rows, table.devices.index("raspi4")])


@pytest.mark.parametrize("kind", NB201_COSTS)
def test_the_predictor_of_any_device_is_a_cost_and_a_limit(kind, request):
    space = load_space("nasbench201")
    data = request.getfixturevalue("data_dir") if kind in ("measured table", "few-shot") else None
    cost = NB201_COSTS[kind](space, data)
    metric = {"energy": "energy_mj", "peak memory": "peak_memory_bytes"}.get(kind, "latency_ms")
    every = cost.predict(space.sample(2000, np.random.default_rng(0))).mean
    limit = float(np.quantile(every, 0.3))
    objectives = [ACCURACY, make_objective(metric, target="raspberry_pi_4", limit=limit)]
    strategy = LightNAS(space, 0, **(OPTIONS | {"epochs": 6}))
    found = strategy.run(Brightness(space), Bright(), {metric: cost}, objectives)
    assert 0.9 * limit < cost.predict(found.archs[:1]).mean[0] <= limit
    assert strategy.history[-1][metric] < strategy.history[0][metric]


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_lightnas_lands_on_its_target(space, quantile):
    macs = Count("macs").bind(space)
    target = float(np.quantile(macs.predict(space.everything()).mean, quantile))
    for given, objective in (({}, make_objective("macs", limit=target)),
                             ({"target": {"macs": target}}, make_objective("macs"))):  # fmt: skip
        strategy, found = find(LightNAS, space, [objective], **given)
        reached = macs.predict(found.archs[:1]).mean[0]
        assert reached == pytest.approx(target, rel=0.01)
        assert objective.limit is None or reached <= target
        # What is handed over is not far from what the logits themselves came to.
        assert strategy.history[-1]["macs"] == pytest.approx(target, rel=0.2)


def test_lightnas_keeps_other_limits_as_limits(space):
    macs, params = Count("macs").bind(space), Count("params").bind(space)
    everything = space.everything()
    tight = float(np.quantile(params.predict(everything).mean, 0.3))
    kept = macs.predict(everything[params.predict(everything).mean <= tight]).mean
    target = float(np.quantile(kept, 0.6))
    objectives = [make_objective("params", limit=tight), make_objective("macs")]
    _, found = find(LightNAS, space, objectives, target={"macs": target})
    assert params.predict(found.archs[:1]).mean[0] <= tight
    assert macs.predict(found.archs[:1]).mean[0] == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize(
    ("target", "objectives", "message"),
    [
        (None, [], "objective beside accuracy.*darts, gdas"),
        (None, [make_objective("macs")], "such as for macs"),
        ({"mac": 1e6}, [make_objective("macs")], "'mac' is no objective with a cost.*macs"),
        ({"macs": 2e6}, [make_objective("macs", limit=1e6)], "breaks limit = "),
        ({"macs": -1.0}, [make_objective("macs")], "above 0"),
    ],
)
def test_lightnas_asks_for_what_it_needs(space, target, objectives, message):
    with pytest.raises(UserError, match=f"strategy.*{message}"):
        find(LightNAS, space, objectives, target=target)


def test_lightnas_lands_on_no_cost_that_nothing_predicts(space):
    own = make_objective("noise", direction="minimise", limit=1.0)
    with pytest.raises(UserError, match=r"none gives noise: name one of macs"):
        LightNAS(space, 0).make_costs({"macs": Count("macs").bind(space)}, [ACCURACY, own, make_objective("macs")])


def test_fbnet_multiplies_by_a_power_of_the_logarithm_of_the_latency(space):
    macs, objective = Count("macs").bind(space), make_objective("macs")
    loss = FBNet(space, 0, cost_weight=0.6).make_costs({"macs": macs}, [ACCURACY, objective])
    value = torch.tensor(1e6, requires_grad=True)
    total = loss(torch.tensor(2.0), {"macs": value})
    assert float(total.detach()) == pytest.approx(2.0 * 0.2 * np.log(1e6) ** 0.6, rel=1e-5)
    total.backward()
    assert float(value.grad) > 0


def test_darts_leaves_paths_out_but_never_all():
    space = SPACES["chain"]()
    strategy, generator = DARTS(space, 0, drop_path=0.5), torch.Generator().manual_seed(0)
    logits = [torch.tensor([0.0, 1.0, 2.0, -torch.inf])]
    weights = torch.stack([strategy.sample(logits, 1.0, generator).weights[0] for _ in range(500)])
    torch.testing.assert_close(weights.sum(1), torch.ones(500))
    assert (weights[:, 3] == 0).all()
    left_out = (weights[:, :3] == 0).float().mean(0)
    assert ((left_out > 0.35) & (left_out < 0.55)).all()
    with pytest.raises(UserError, match="strategy.drop_path"):
        DARTS(space, 0, drop_path=1.0)


def test_the_temperature_goes_from_end_to_end(method, space):
    strategy = method(space, 0, epochs=9, temperature=(8.0, 0.5), **needed(method, space, []))
    temperatures = [strategy.temperature_at(epoch) for epoch in range(9)]
    assert temperatures[0] == 8.0
    assert temperatures[-1] == pytest.approx(0.5)
    assert temperatures[4] == pytest.approx(4.25 if method is GDAS else 2.0)


def test_a_method_passes_on_the_keys_of_all():
    given = options(LightNAS, {"target": {"macs": 1e6}, "epochs": 7}, "strategy")
    assert given["epochs"] == 7
    assert given["target"] == {"macs": 1e6}
    assert given["proposals"] == 32
    with pytest.raises(UserError, match=r"unknown key 'epoch'.*epochs"):
        options(DARTS, {"epoch": 7}, "strategy")


@pytest.mark.parametrize("name", ["quickstart", "nasbench201"])
def test_many_distributions_at_once_are_each_on_its_own(name):
    space = load_space(name)
    generator = torch.Generator().manual_seed(0)
    many = [
        torch.randn(2, 3, int(c), generator=generator, dtype=torch.float64).softmax(-1) for c in space.cardinalities
    ]
    for bound in (Roofline(load_target("raspberry_pi_4")).bind(space), Count("peak_memory_bytes").bind(space)):
        found = bound.expected(many)
        each = [bound.expected([p[i, j] for p in many]) for i in range(2) for j in range(3)]
        torch.testing.assert_close(found, torch.stack(each).reshape(2, 3))


class Opaque(BoundPredictor):
    """Predictions, and nothing else: a user's own."""

    def __init__(self, bound):
        self.space, self._bound = bound.space, bound

    def predict(self, archs):
        return self._bound.predict(archs)


@pytest.mark.parametrize("name", ["nasbench201", "quickstart"])
def test_a_predictor_that_only_predicts_has_gradients_too(name):
    space = load_space(name)
    bound = Count("macs").bind(space)
    generator = torch.Generator().manual_seed(0)
    chances = [
        torch.randn(2, int(c), generator=generator, dtype=torch.float64).softmax(-1).requires_grad_()
        for c in space.cardinalities
    ]
    exact, ours = bound.expected(chances), Opaque(bound).expected(chances)
    torch.testing.assert_close(ours, exact, rtol=1e-9 if name == "nasbench201" else 0.05, atol=0)
    # Of derivatives only differences between the choices of one knob mean something.
    right, found = (
        torch.cat([(g - g.mean(-1, keepdim=True)).flatten() for g in torch.autograd.grad(v.sum(), chances)])
        for v in (exact, ours)
    )
    assert torch.cosine_similarity(right, found, dim=0) > 0.99
