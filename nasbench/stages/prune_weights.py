"""Zeros in weights: unstructured, or N of every M."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from nasbench.stages.base import Candidate, StageContext
from nasbench.stages.structure import load_network, save_network
from nasbench.stages.training import TuningOptions, TuningStage, clear, cubic_share
from search_spaces.errors import UserError, nearest


class PruneWeights(TuningStage):
    """Sets the smallest weights to zero and trains the others.

    The file stays as large and, in every runtime here, the network as slow as it was: ONNX Runtime, LiteRT, OpenVINO
    and ExecuTorch multiply by zeros like by any number. It is of use for compressed storage, and on hardware that skips
    them (2:4 on NVIDIA's sparse tensor cores). The zeros are permanent as weights, but a later `finetune` would fill
    them: train here.

    Args:
        sparsity: share of zeros, above 0 and below 1.
        pattern: instead, `N:M`: of every M weights along the input channels the N largest stay, such as `2:4`.
        scope: of a sparsity: `global`, one threshold for all layers, or `layer`, the same share in each.
        ignore: layers that stay as they are.
        unprunable: layers that a pattern does not fit are left alone and named (`skip`), or end the stage (`refuse`).
        steps: 1 for all at once, or as many as there are, each smaller than the one before it; a pattern has one.
        epochs: of training after each step.
        lr, batch_size, optimizer, weight_decay, label_smoothing, distillation_weight: of that training, as in `prune`.
    """

    def __init__(
        self,
        *,
        sparsity: float | None = None,
        pattern: str | None = None,
        scope: str = "global",
        ignore: Sequence[str] = (),
        unprunable: str = "skip",
        steps: int = 1,
        **tuning: Unpack[TuningOptions],
    ) -> None:
        super().__init__(**tuning)
        from nasbench.pruning.sparsity import check_n_of_m

        if (sparsity is None) == (pattern is None):
            raise UserError("give one of sparsity and pattern")
        if sparsity is not None and not 0 < sparsity < 1:
            raise UserError(f"sparsity = {sparsity:g}: expected above 0 and below 1")
        for name, value, known in (
            ("scope", scope, ("global", "layer")), ("unprunable", unprunable, ("skip", "refuse"))
        ):  # fmt: skip
            if value not in known:
                raise UserError(f"{name} = {value!r}. {nearest(value, known)}")
        if steps < 1 or (pattern is not None and steps > 1):
            raise UserError(f"steps = {steps}: expected 1 or more, and 1 with a pattern")
        self.sparsity = sparsity
        self.pattern = check_n_of_m(pattern) if pattern is not None else None
        self.scope = scope
        self.ignore = tuple(ignore)
        self.unprunable = unprunable
        self.steps = steps

    def run(self, candidate: Candidate, context: StageContext) -> Candidate:
        """The candidate with zeros in a copy of its network.

        Raises:
            UserError: layers that are not there or must be refused, or training that breaks down.
        """
        from nasbench.pruning.sparsity import held, magnitude_masks, n_of_m_masks, prunable_weights

        assert candidate.network is not None
        teacher = self.former(candidate.network, context)
        network = copy.deepcopy(candidate.network)
        files = [context.directory / f"{candidate.name}-sparse-{step}.safetensors" for step in range(1, self.steps + 1)]
        training = [file.with_suffix(".tuning.safetensors") for file in files]
        done = max((step for step, file in enumerate(files, 1) if file.is_file()), default=0)
        if done and context.fresh is not None:
            network = load_network(files[done - 1], context.fresh())
        without: dict[str, str] = {}
        for step in range(done + 1, self.steps + 1):
            weights = prunable_weights(network)
            for name in self.ignore:
                if name not in weights:
                    raise UserError(f"ignore: no layer {name!r} with weights. {nearest(name, weights)[:400]}")
                del weights[name]
            if self.pattern is not None:
                masks, without = n_of_m_masks(weights, *self.pattern)
                if without and self.unprunable == "refuse":
                    name, reason = next(iter(without.items()))
                    raise UserError(f"layer {name!r} cannot be pruned: {reason}; add it to ignore")
            else:
                assert self.sparsity is not None
                share = self.sparsity * cubic_share(step, self.steps)
                masks = magnitude_masks(weights, share, everywhere=self.scope == "global")
            if not masks:
                raise UserError("no layer has weights that the pattern fits")
            with held(network, masks):
                self.tune(network, teacher, context, training[step - 1], context.seed + step)
            if context.fresh is not None and step < self.steps:
                save_network(files[step - 1], network, context.fresh())
        clear([*files, *training])
        names = list(without)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        notes = (
            (f"prune_weights left alone {', '.join(names[:4])}{more}: input channels do not divide",) if names else ()
        )
        return replace(candidate, network=network.eval(), metrics={}, notes=notes)
