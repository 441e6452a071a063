"""Structured pruning of channels: fewer of them, in a network that any runtime runs faster."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

import numpy as np

from hardware_profiles import load_target
from hardware_profiles.extras import require
from hardware_profiles.paths import write_text
from nasbench.stages.base import Candidate, StageContext
from nasbench.stages.structure import load_network, save_network
from nasbench.stages.training import TuningOptions, TuningStage, clear, cubic_share
from search_spaces.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import nn

    from nasbench.pruning.groups import ChannelGroup, Channels

# Of a network with one group pruned the loss is taken on that many of the images; there are dozens of such networks.
SENSITIVITY_IMAGES = 256
METRICS = ("latency_ms", "energy_mj", "macs", "params")


class Prune(TuningStage):
    """Takes out the channels (of attention: heads) that are worth least, and trains what remains.

    Say how much with one of `ratio`, `budget` and `limit`. With a budget or a limit the cost is what the target's
    predictor says of the pruned network, traced as it would stand: fewer multiply-accumulates are not the aim. What was
    pruned, and what could not be, is left in `NAME-prune.json`. A run that was killed continues from the last step.

    Args:
        ratio: share of its channels that each group loses, above 0 and below 1.
        budget: share of the present predicted cost that may remain.
        limit: predicted cost that may remain, in the metric's unit.
        metric: what a budget or limit is about: `latency_ms`, `energy_mj`, `macs` or `params`.
        target: the device whose predictor and favourite numbers of channels count.
        allocation: `uniform`, the same share everywhere; `sensitivity`, less where the loss on training images rises
            more for the cost that is saved (with a budget or limit).
        importance: what channels are ranked by: `l1` (of their weights), `taylor` (gradient times weight on training
            images), `bn_scale` (of their batch normalisation).
        multiple: numbers of channels are multiples of it; 0 takes the target's.
        ignore: layers whose output channels stay.
        unprunable: layers that cannot be pruned are left alone and named (`skip`), or end the stage (`refuse`).
        steps: 1 for all at once, or as many as there are, each smaller than the one before it.
        images: training images that scores and sensitivities are taken from.
        epochs: of training after each step; 0 takes batch statistics anew and trains nothing.
        lr, batch_size, optimizer, weight_decay, label_smoothing: of that training, as in `finetune`.
        distillation_weight: in its loss, 0..1, of what the network said before the stage.
    """

    def __init__(
        self,
        *,
        ratio: float | None = None,
        budget: float | None = None,
        limit: float | None = None,
        metric: Literal["latency_ms", "energy_mj", "macs", "params"] = "latency_ms",
        target: str = "host",
        allocation: Literal["uniform", "sensitivity"] = "uniform",
        importance: Literal["l1", "taylor", "bn_scale"] = "l1",
        multiple: int = 0,
        ignore: Sequence[str] = (),
        unprunable: Literal["skip", "refuse"] = "skip",
        steps: int = 1,
        images: int = 512,
        **tuning: Unpack[TuningOptions],
    ) -> None:
        super().__init__(**tuning)
        require("prune")
        self.amount = Amount(ratio, budget, limit)
        if allocation == "sensitivity" and ratio is not None:
            raise UserError("allocation = 'sensitivity' shares out a budget or a limit, not a ratio; give one of those")
        if metric not in METRICS:
            raise UserError(f"metric = {metric!r}. {nearest(metric, METRICS)}")
        for name, value, least in (("steps", steps, 1), ("images", images, 1), ("multiple", multiple, 0)):
            if value < least:
                raise UserError(f"{name} = {value}: expected {least} or more")
        self.metric = metric
        self.target = load_target(target)
        self.allocation = allocation
        self.importance = importance
        self.multiple = multiple or self.target.channel_multiple
        self.ignore = tuple(ignore)
        self.unprunable = unprunable
        self.steps = steps
        self.images = images

    @property
    def predicts(self) -> tuple[str, str] | None:
        """Target and metric that a predictor must answer for; None where only shares of channels are asked."""
        return None if self.amount.ratio is not None else (self.target.name, self.metric)

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with a smaller network.

        Raises:
            UserError: no channels that can be pruned, layers that are not there or must be refused, a budget that no
                pruning reaches, or training that breaks down.
        """
        assert candidate.network is not None
        network = candidate.network.eval()
        cost = self._cost(context)
        first_cost, teacher = cost(network) if cost else 0.0, self.former(network, context)
        before = {g.name: g.channels for g in self._channels(network, context).groups}
        files = [context.directory / f"{candidate.name}-prune-{step}.safetensors" for step in range(1, self.steps + 1)]
        training = [file.with_suffix(".tuning.safetensors") for file in files]
        done = max((step for step, file in enumerate(files, 1) if file.is_file()), default=0)
        if done and context.fresh is not None:
            network = load_network(files[done - 1], context.fresh())
        for step in range(done + 1, self.steps + 1):
            wanted = self.amount.after(cubic_share(step, self.steps), first_cost)
            network = self._step(network, context, before, wanted, cost)
            self.tune(network, teacher, context, training[step - 1], context.seed + step)
            if context.fresh is not None and step < self.steps:
                save_network(files[step - 1], network, context.fresh())
        channels = self._channels(network, context)
        _report(context.directory / f"{candidate.name}-prune.json", before, channels, self, first_cost, cost, network)
        clear([*files, *training])
        fixed = {name: reason for name, reason in channels.fixed.items() if "network's output" not in reason}
        notes = (f"prune left alone {_listed(list(fixed))}",) if fixed else ()
        return replace(candidate, network=network, metrics={}, notes=notes)

    def _channels(self, network: nn.Module, context: StageContext) -> Channels:
        """Groups to prune, without what is to be ignored."""
        from nasbench.pruning.groups import find_channels

        channels = find_channels(network, context.input_shape)
        names = [name for name, _ in network.named_modules() if name]
        for name in self.ignore:
            if name not in names:
                raise UserError(f"ignore: no layer {name!r} in the network. {nearest(name, names)[:400]}")
        ignored = set(self.ignore)
        fixed = {n: r for n, r in channels.fixed.items() if n not in ignored and "network's output" not in r}
        if fixed and self.unprunable == "refuse":
            name, reason = next(iter(fixed.items()))
            raise UserError(f"layer {name!r} cannot be pruned: {reason}; add it to ignore, or set unprunable = 'skip'")
        groups = tuple(g for g in channels.groups if not ignored & {m.module for m in g.members if m.side == "out"})
        if not groups:
            reasons = "; ".join(f"{n}: {r}" for n, r in list(channels.fixed.items())[:3])
            raise UserError(f"the network has no channels that can be pruned ({reasons or 'all are in ignore'})")
        return replace(channels, groups=groups)

    def _cost(self, context: StageContext) -> Callable[[nn.Module], float] | None:
        if self.amount.ratio is not None:
            return None
        from search_spaces import trace

        predictor = context.predictor(self.target.name, self.metric)
        return lambda network: float(predictor.predict([trace(network, context.input_shape)]).mean[0])

    def _step(
        self,
        network: nn.Module,
        context: StageContext,
        before: Mapping[str, int],
        wanted: float,
        cost: Callable[[nn.Module], float] | None,
    ) -> nn.Module:
        """One step: scores, numbers of channels, a smaller copy, its statistics."""
        from nasbench.pruning.allocation import (
            rounded,
            sensitive_within,
            sensitivity,
            uniform_within,
        )
        from nasbench.pruning.groups import removed
        from nasbench.pruning.importance import channel_scores, mean_loss, recalibrate, strongest
        from nasbench.training import fixed_subset

        task, shape = context.task, context.input_shape
        images = fixed_subset(task.split("train"), self.images, context.seed)
        groups: Sequence[ChannelGroup] = self._channels(network, context).groups
        scores, without = channel_scores(network, groups, self.importance, task, images, shape)
        if without and (self.unprunable == "refuse" or len(without) == len(groups)):
            name, reason = next(iter(without.items()))
            raise UserError(f"layer {name!r} cannot be ranked by {self.importance}: {reason}; take l1 or taylor")
        groups = [g for g in groups if g.name in scores]
        if cost is None:
            counts = {
                g.name: min(g.channels, rounded(g, wanted * before.get(g.name, g.channels), self.multiple))
                for g in groups
            }
        elif self.allocation == "uniform":
            counts = uniform_within(network, groups, scores, self.multiple, cost, wanted)
        else:
            few = fixed_subset(images, SENSITIVITY_IMAGES, context.seed)
            curves = sensitivity(network, groups, scores, self.multiple, cost, lambda n: mean_loss(n, task, few, shape))
            counts = sensitive_within(network, groups, scores, curves, cost, wanted)
        smaller = removed(network, groups, strongest(scores, counts))
        recalibrate(smaller, task, images, shape)
        return smaller


class Amount:
    """How much to prune: exactly one of a ratio of channels, a share of a cost, and a cost.

    Raises:
        UserError: none or several are given, or one that is impossible.
    """

    def __init__(self, ratio: float | None, budget: float | None, limit: float | None) -> None:
        given = {"ratio": ratio, "budget": budget, "limit": limit}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise UserError(f"give one of ratio, budget and limit; got {' and '.join(named) or 'none'}")
        (name,) = named
        value = given[name]
        assert value is not None
        if not (0 < value < 1 if name != "limit" else 0 < value < float("inf")):
            raise UserError(f"{name} = {value:g}: expected above 0" + (" and below 1" if name != "limit" else ""))
        self.ratio, self.budget, self.limit = ratio, budget, limit

    def after(self, share: float, cost: float) -> float:
        """What may remain when a share of the way is gone: of the channels (a share), or of the cost `cost`.

        Raises:
            UserError: a limit that is above the cost already.
        """
        if self.ratio is not None:
            return 1 - self.ratio * share
        end = self.limit if self.limit is not None else (self.budget or 0.0) * cost
        if end >= cost:
            raise UserError(f"limit = {end:.4g}: the network's predicted cost is {cost:.4g} already; nothing to prune")
        return cost - (cost - end) * share


def _report(
    path: Path,
    before: Mapping[str, int],
    channels: Channels,
    stage: Prune,
    cost_before: float,
    cost: Callable[[nn.Module], float] | None,
    network: nn.Module,
) -> None:
    """What was pruned, for people and figures."""
    after = {g.name: g.channels for g in channels.groups} | {
        n: 1 for n, r in channels.fixed.items() if "one channel" in r
    }
    report: dict[str, Any] = {
        "target": stage.target.name,
        "multiple": stage.multiple,
        "channels": {name: [count, after.get(name, count)] for name, count in before.items()},
        "left_alone": dict(channels.fixed),
    }
    if cost is not None:
        report |= {"metric": stage.metric, "predicted_before": cost_before, "predicted_after": cost(network)}
    write_text(
        path, json.dumps(report, indent=1, default=lambda v: v.item() if isinstance(v, np.generic) else str(v)) + "\n"
    )


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more layers" if len(names) > most else ""
    return ", ".join(names[:most]) + more
