"""Fewer layers: residual blocks, attentions and perceptrons taken out whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, Unpack

from hardware_profiles import load_target
from hardware_profiles.paths import write_text
from nasbench.stages.base import Candidate, StageContext
from nasbench.stages.training import TuningOptions, TuningStage, clear
from search_spaces.errors import UserError, nearest


class PruneBlocks(TuningStage):
    """Takes out the residual blocks that the loss on training images misses least, one after the other, then trains.

    Unlike channels, whole blocks shorten the chain of operators, which is what small networks on a processor wait for.

    Args:
        count: how many blocks; or
        budget: the share of the present predicted cost that may remain.
        metric: what a budget is about: `latency_ms`, `energy_mj`, `macs` or `params`.
        target: the device whose predictor answers for it.
        ignore: blocks that stay.
        images: training images that the loss is taken from.
        epochs: of training at the end.
        lr, batch_size, optimizer, weight_decay, label_smoothing, distillation_weight: of that training, as in `prune`.
    """

    def __init__(
        self,
        *,
        count: int | None = None,
        budget: float | None = None,
        metric: Literal["latency_ms", "energy_mj", "macs", "params"] = "latency_ms",
        target: str = "host",
        ignore: Sequence[str] = (),
        images: int = 512,
        **tuning: Unpack[TuningOptions],
    ) -> None:
        super().__init__(**tuning)
        if (count is None) == (budget is None):
            raise UserError("give one of count and budget")
        if count is not None and count < 1:
            raise UserError(f"count = {count}: expected 1 or more")
        if budget is not None and not 0 < budget < 1:
            raise UserError(f"budget = {budget:g}: expected above 0 and below 1")
        if images < 1:
            raise UserError(f"images = {images}: expected 1 or more")
        self.count = count
        self.budget = budget
        self.metric = metric
        self.target = load_target(target)
        self.ignore = tuple(ignore)
        self.images = images

    @property
    def predicts(self) -> tuple[str, str] | None:
        """Target and metric that a predictor must answer for."""
        return None if self.budget is None else (self.target.name, self.metric)

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with fewer blocks in a copy of its network.

        Raises:
            UserError: fewer blocks than are to go, a budget that cannot be reached, a block that is not there, or
                training that breaks down.
        """
        from nasbench.pruning.blocks import find_blocks, least_needed, without
        from nasbench.pruning.importance import mean_loss, recalibrate
        from nasbench.training import fixed_subset
        from search_spaces import trace

        assert candidate.network is not None
        network, task, shape = candidate.network.eval(), context.task, context.input_shape
        blocks = find_blocks(network, shape)
        for name in self.ignore:
            if name not in blocks:
                raise UserError(f"ignore: no residual block {name!r}. {nearest(name, blocks)[:400]}")
        blocks = [name for name in blocks if name not in self.ignore]
        if self.count is not None and self.count > len(blocks):
            raise UserError(
                f"count = {self.count}: the network has {len(blocks)} residual blocks that can go: {', '.join(blocks)}"
            )
        images = fixed_subset(task.split("train"), self.images, context.seed)
        if self.count is not None:
            count = self.count
            enough = lambda gone: len(gone) >= count  # noqa: E731
        else:
            assert self.budget is not None
            predictor = context.predictor(self.target.name, self.metric)
            cost = lambda gone: float(predictor.predict([trace(without(network, gone), shape)]).mean[0])  # noqa: E731
            limit = self.budget * cost([])
            enough = lambda gone: cost(gone) <= limit  # noqa: E731
        gone, reached = least_needed(network, blocks, lambda n: mean_loss(n, task, images, shape), enough)
        if not reached:
            raise UserError(
                f"budget = {self.budget:g}: without all of its {len(blocks)} residual blocks the network costs "
                f"{cost(gone):.4g}, more than {limit:.4g}"
            )
        teacher = self.former(network, context)
        smaller = without(network, gone)
        recalibrate(smaller, task, images, shape)
        training = context.directory / f"{candidate.name}-blocks.tuning.safetensors"
        self.tune(smaller, teacher, context, training)
        write_text(
            context.directory / f"{candidate.name}-blocks.json",
            json.dumps({"taken_out": gone, "left": [b for b in blocks if b not in gone]}, indent=1) + "\n",
        )
        clear([training])
        return replace(candidate, network=smaller, metrics={}, notes=(f"took out {', '.join(gone)}",))
