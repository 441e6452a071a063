"""Gradient search on a toy mixture whose best architecture is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nasbench.objectives import make_objective
from nasbench.strategies.gumbel import GumbelSearch, gumbel_softmax
from nasbench.tasks.base import Split, Task
from predictors.counts import Count
from search_spaces import UserError
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

    def forward(self, x, weights):
        share = sum((w * torch.linspace(0.0, 1.0, len(w))).sum() for w in weights if len(w) > 1) / self.knobs
        return self.linear(x.mean((1, 2, 3))[:, None]) * (0.05 + share)


ACCURACY = make_objective("accuracy")
OPTIONS = {"epochs": 12, "warmup_epochs": 1, "batch_size": 8, "path_lr": 0.2}


def find(space, objectives, seed=0, **options):
    torch.manual_seed(seed)
    strategy = GumbelSearch(space, seed, **(OPTIONS | options))
    costs = {o.name: Count(o.metric).bind(space) for o in objectives}
    return strategy, strategy.run(Toy(space), Bright(), costs, [ACCURACY, *objectives])


def test_without_costs_the_best_network_is_found(space):
    strategy, proposals = find(space, [])
    assert (proposals.archs[0] == space.cardinalities - 1).mean() > 0.9
    assert strategy.history[-1]["entropy"] < strategy.history[0]["entropy"] == pytest.approx(1.0)
    np.testing.assert_array_equal(proposals.archs, space.canonical(space.check(proposals.archs)))
    assert len(np.unique(proposals.archs, axis=0)) == len(proposals)
    np.testing.assert_array_equal(proposals.ids, np.arange(len(proposals)))


def test_a_limit_is_kept_by_the_most_wanted(space):
    macs = Count("macs").bind(space)
    limit = float(np.quantile(macs.predict(space.everything()).mean, 0.3))
    strategy, proposals = find(space, [make_objective("macs", limit=limit)])
    found = macs.predict(proposals.archs).mean
    assert found[0] <= limit
    assert found[found <= limit].max() > 0.5 * limit  # and used, since larger is better here
    assert strategy.history[-1]["macs"] < strategy.history[0]["macs"]


def test_costs_without_a_limit_weigh_in(space):
    macs = Count("macs").bind(space)
    heavy, light = (
        macs.predict(find(space, [make_objective("macs")], cost_weight=weight)[1].archs[:1]).mean[0]
        for weight in (0.0, 20.0)
    )
    assert light < heavy


def test_the_seed_decides_everything(space):
    first, again = (find(space, [make_objective("macs")], seed=3)[1].archs for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_few_architectures_give_few_proposals(make_space):
    small = make_space(max_depths=(1,), kernels=(3,))
    _, proposals = find(small, [], proposals=10)
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
    [({"epochs": 2}, "epochs"), ({"temperature": (5.0, 0.0)}, "temperature"), ({"proposals": 0}, "proposals")],
)
def test_bad_settings_name_their_key(space, options, key):
    with pytest.raises(UserError, match=f"strategy.{key}"):
        GumbelSearch(space, 0, **({"warmup_epochs": 2} | options))


def test_what_a_space_does_not_permit_has_no_chance(space):
    large = [any(op.output.size > 5000 for op in block.workload.operators) for block in space.catalog]
    wide = [any(op.kernel == (5, 5) for op in block.workload.operators) for block in space.catalog]
    restricted = space.without_blocks(np.array(large) | np.array(wide))
    strategy, found = find(restricted, [make_objective("macs")])
    assert len(found) > 1
    assert restricted.permits(found.archs).all()
    for index, knob in enumerate(space.knobs):
        assert np.isfinite(strategy.probabilities[index]).all()
        if knob.name.startswith("kernel"):
            np.testing.assert_array_equal(strategy.probabilities[index], [1.0, 0.0])
