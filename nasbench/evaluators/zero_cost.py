"""Zero-cost proxies of untrained networks as objectives."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from nasbench.evaluators.base import Evaluation, Evaluator, Proposals, Status
from nasbench.tasks.base import Task
from nasbench.training.evaluation import fixed_subset
from predictors.zero_cost import PROXIES, score_architecture
from search_spaces import SearchSpace, UserError, nearest


class ZeroCostEvaluator(Evaluator):
    """Scores of freshly initialised networks on one fixed batch of training images (see `predictors.zero_cost`).

    Larger is better: an objective on a proxy has `direction = "maximise"`. A value depends on the architecture, the
    options and the task alone. A row whose network cannot be built, or whose score raises or is not
    finite, is `FAILED`.

    Args:
        space: that the architectures come from.
        task: gives the training images.
        metrics: proxies, of `predictors.zero_cost.PROXIES`.
        images: in the batch.
        initialisations: of which the mean counts.
        seed: of the choice of images and the initialisations.

    Example:
        [evaluator]
        name = "zero_cost"
        metrics = ["naswot"]

        [objectives.naswot]
        direction = "maximise"
    """

    def __init__(
        self,
        space: SearchSpace,
        task: Task,
        *,
        metrics: Sequence[str] = ("naswot",),
        images: int = 64,
        initialisations: int = 1,
        seed: int = 0,
    ) -> None:
        for name in metrics:
            if name not in PROXIES:
                raise UserError(f"evaluator.metrics: unknown zero-cost proxy {name!r}. {nearest(name, PROXIES)}")
        if not metrics or len(set(metrics)) != len(metrics):
            raise UserError(f"evaluator.metrics = {list(metrics)}: expected distinct proxies, at least one")
        for key, value, least in (("images", images, 2), ("initialisations", initialisations, 1)):
            if value < least:
                raise UserError(f"evaluator.{key} = {value}: expected {least} or more")
        self.space = space
        self.metrics = tuple(metrics)
        self.initialisations = initialisations
        self.seed = seed
        batch = fixed_subset(task.split("train"), images, seed)
        self.images, self.labels = task.prepare(batch.images[:images]), batch.labels[:images]

    def evaluate(self, proposals: Proposals) -> Evaluation:
        n = len(proposals)
        values, seconds = np.full((n, len(self.metrics)), np.nan), np.zeros(n)
        status = np.full(n, Status.OK, dtype=np.uint8)
        messages: dict[int, str] = {}
        for row, arch in enumerate(self.space.canonical(proposals.archs)):
            start = time.perf_counter()
            try:
                scores = score_architecture(
                    self.space,
                    arch,
                    self.images,
                    self.labels,
                    self.metrics,
                    seed=self.seed,
                    initialisations=self.initialisations,
                )
                if not np.isfinite(scores).all():
                    raise FloatingPointError(f"not finite: {dict(zip(self.metrics, scores.tolist(), strict=True))}")
                values[row] = scores
            except (UserError, RuntimeError, ValueError, ArithmeticError) as error:
                status[row] = Status.FAILED
                messages[row] = f"{type(error).__name__}: {error}"
            seconds[row] = time.perf_counter() - start
        return Evaluation(values, status, seconds=seconds, messages=messages)
