"""How many channels each group keeps: the same share everywhere, or by sensitivity under a budget of a device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from nasbench.pruning.groups import ChannelGroup, removed
from nasbench.pruning.importance import Scores, strongest
from search_spaces.errors import UserError

# Shares of its channels at which a group's cost and sensitivity are looked at.
LEVELS = (1.0, 0.75, 0.5, 0.25, 0.125)
_ROUNDS = 40

Counts = dict[str, int]
Cost = Callable[[nn.Module], float]


def without_weights(network: nn.Module) -> nn.Module:
    """A copy on the meta device: it has shapes alone, which is all that a cost depends on."""
    memo = {id(t): t.to("meta") for t in network.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, memo)


def rounded(group: ChannelGroup, wanted: float, multiple: int) -> int:
    """The number of channels nearest to `wanted` that a device likes: a multiple, at least one, no more than there are.

    Of a group that is not made of whole multiples, or of heads, any number is as good.
    """
    step = multiple if group.kind == "channels" and group.channels > multiple else 1
    if step == 1 and group.kind == "channels" and group.channels <= multiple:
        return group.channels  # fewer would be padded up to what it has
    return int(np.clip(step * round(wanted / step), step, group.channels))


def uniform_counts(groups: Sequence[ChannelGroup], share: float, multiple: int) -> Counts:
    """Every group keeps the same share of its channels, up to rounding."""
    return {group.name: rounded(group, share * group.channels, multiple) for group in groups}


def uniform_within(
    network: nn.Module, groups: Sequence[ChannelGroup], scores: Scores, multiple: int, cost: Cost, limit: float
) -> Counts:
    """The largest uniform share whose network costs no more than `limit`.

    Raises:
        UserError: even the smallest costs more.
    """
    return _searched(lambda share: uniform_counts(groups, share, multiple), network, groups, scores, cost, limit)


@dataclass(frozen=True)
class Curve:
    """What a group costs and loses at each of its possible numbers of channels, all others whole.

    Args:
        counts: descending, the first is all.
        cost: of the whole network.
        loss: of the whole network on training images.
    """

    counts: tuple[int, ...]
    cost: np.ndarray[tuple[int], np.dtype[np.float64]]
    loss: np.ndarray[tuple[int], np.dtype[np.float64]]


def sensitivity(
    network: nn.Module, groups: Sequence[ChannelGroup], scores: Scores, multiple: int, cost: Cost, loss: Cost
) -> dict[str, Curve]:
    """Per group, the cost and the loss of the network with that group alone pruned (Li et al., ICLR 2017, section 3.2).

    Args:
        cost, loss: of a network; both are called once per group and level.
    """
    base, shapes = (cost(network), loss(network)), without_weights(network)
    curves = {}
    for group in groups:
        counts = sorted({rounded(group, level * group.channels, multiple) for level in LEVELS}, reverse=True)
        if counts[0] != group.channels:
            counts.insert(0, group.channels)
        costs, losses = [base[0]], [base[1]]
        for count in counts[1:]:
            keep = strongest(scores, {group.name: count})
            costs.append(cost(removed(shapes, groups, keep)))
            losses.append(loss(removed(network, groups, keep)))
        # Keeping more is never worth less: noise of few images is not to be followed.
        curves[group.name] = Curve(tuple(counts), np.array(costs), np.maximum.accumulate(losses))
    return curves


def sensitive_within(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    curves: Mapping[str, Curve],
    cost: Cost,
    limit: float,
) -> Counts:
    """Numbers of channels that lose least at a predicted cost of no more than `limit`.

    Each group takes the level that minimises its loss plus a price times its cost, as if the groups did not know of
    each other; the price is raised until the network as a whole, predicted as it would stand, keeps the limit.

    Raises:
        UserError: the network with the least of all groups costs more.
    """

    def counts(position: float) -> Counts:
        # position 1 is a price of nothing, 0 one so high that only the cost counts.
        price = np.inf if position <= 0 else (1 - position) / position
        chosen = {}
        for name, curve in curves.items():
            lost = (curve.loss - curve.loss[0]) / scale_loss
            saved = curve.cost / curve.cost[0]
            level = int(np.argmin(saved if np.isinf(price) else lost + price * saved))
            chosen[name] = curve.counts[level]
        return chosen

    finite = [c.loss[np.isfinite(c.loss)].max() - c.loss[0] for c in curves.values()]
    scale_loss = max([*finite, 1e-12])
    return _searched(counts, network, groups, scores, cost, limit)


def _searched(
    counts: Callable[[float], Counts],
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    cost: Cost,
    limit: float,
) -> Counts:
    """The counts at the largest position 0..1 whose network keeps the limit, by bisection."""
    seen: dict[tuple[int, ...], float] = {}
    network = without_weights(network)

    def price(chosen: Counts) -> float:
        key = tuple(chosen.values())
        if key not in seen:
            seen[key] = cost(removed(network, groups, strongest(scores, chosen)))
        return seen[key]

    low, high = 0.0, 1.0
    least = counts(low)
    if price(least) > limit:
        raise UserError(
            f"the budget allows a predicted cost of {limit:.4g}; the least that pruning its channels reaches is "
            f"{price(least):.4g}, of {cost(network):.4g} now"
        )
    if price(counts(high)) <= limit:
        return counts(high)
    best = least
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        chosen = counts(middle)
        if price(chosen) <= limit:
            low, best = middle, chosen
        else:
            high = middle
    return best
