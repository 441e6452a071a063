"""Gradient ascent on predictors: a front by many relaxed searches side by side, without a supernet of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasbench.evaluators.base import Proposals
from nasbench.objectives import Objective, minimised, violations
from nasbench.pareto import non_dominated_mask
from nasbench.strategies.base import Strategy
from nasbench.strategies.gradient import check_numbers
from nasbench.variation import first_of_each, new_rows
from predictors.base import BoundPredictor
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

_SAMPLES = 8  # per restart, beside the most likely architecture
_SCALE_SAMPLES = 512  # random architectures whose range an objective is measured in
_TEMPERATURES = 1.0, 0.1  # of the probabilities, first and last step
_PRESSURE = 5.0  # of the quadratic term on broken limits
_FORBIDDEN = 1e6  # what breaking limits costs an architecture, beside any trade-off

Floats = NDArray[np.float64]


class PredictorGradient(Strategy):
    """Searches the predictors themselves: distributions over architectures descend on what is predicted of them.

    Every restart has logits for all knobs and a trade-off of its own, drawn at random, so that all together sweep the
    front. They descend side by side (Adam) on the augmented Chebyshev scalarisation of the expected objectives (as in
    ParEGO: Knowles, IEEE TEC 10, 2006; costs by their logarithm), plus multipliers times the excess over limits, which
    are ascended. Relaxing choices to a distribution and ascending a predictor is that of NAO (Luo et al., NeurIPS 2018)
    without an encoder; probabilities are sharpened on the way (a temperature from 1 to 0.1), so that little is lost
    when each restart takes the best of its samples, and then changes one knob at a time as long as that is better.

    It needs a predictor of every objective, so `evaluator.samples` above 0 where one is evaluated; torch need not be
    able to differentiate it (see `predictors.expectation`), which takes longer. What is predicted inside counts as no
    evaluation. Proposed are the restarts' architectures, then what else is not dominated of all that was looked at.
    After `rounds` times `restarts` it has no more to propose.

    Args:
        restarts: searches side by side in a round.
        rounds: of restarts, each with new trade-offs.
        steps: of gradient descent.
        lr: of the logits.
        repairs: changes of one knob that follow, at most.
    """

    needs_predictors = True

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        restarts: int = 64,
        rounds: int = 8,
        steps: int = 100,
        lr: float = 0.2,
        repairs: int = 10,
    ) -> None:
        super().__init__(space, seed, initial)
        for key, value, least in (("restarts", restarts, 1), ("rounds", rounds, 1), ("steps", steps, 1),
                                  ("repairs", repairs, 0)):  # fmt: skip
            if value < least:
                raise UserError(f"strategy.{key}: must be at least {least}, got {value}")
        check_numbers(lr=lr)
        self.restarts, self.rounds, self.steps, self.lr, self.repairs = restarts, rounds, steps, lr, repairs
        self._model: _Model | None = None
        self._done = 0  # rounds
        self._known = space.sample(0, self.rng) if self.initial is None else first_of_each(self.initial)
        self._asked = 0  # of those known

    def use_predictors(self, predictors: Mapping[str, BoundPredictor], objectives: Sequence[Objective]) -> None:
        self._model = _Model.of(self.space, predictors, objectives)

    def ask(self, n: int) -> Proposals:
        """See `Strategy.ask`.

        Raises:
            UserError: before `use_predictors`.
        """
        if self._model is None:
            raise UserError(
                "strategy predictor_gradient searches predictions of every objective, and has none here: give it "
                "evaluator.samples above 0 (in Python: use_predictors(...)), or take a strategy that learns "
                "from evaluations alone, such as nsga2, regularized_evolution or local_search"
            )
        while len(self._known) < self._asked + n and self._done < self.rounds:
            found = self._round(self._model)
            self._known = np.concatenate([self._known, found[new_rows(found, self._known)]])
            self._done += 1
        archs = self._known[self._asked : self._asked + n]
        self._asked += len(archs)
        return self._proposals(archs)

    def tell(self, proposals: Proposals, values: Floats, violations: Floats, status: NDArray[np.uint8]) -> None:
        """Nothing is learned: the predictors are all it knows."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"done": self._done, "asked": self._asked, "known": self._known.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._done, self._asked = int(state["done"]), int(state["asked"])
        self._known = np.asarray(state["known"], dtype=self.space.dtype).reshape(-1, len(self.space.knobs))

    def _round(self, model: _Model) -> Archs:
        """Distinct architectures `(n, K)` of one round: each restart's own, then what else was found worth a look."""
        weights = self.rng.dirichlet(np.ones(len(model.objectives)), self.restarts)
        if self._done == 0:  # the ends of the front
            ends = np.eye(len(model.objectives))[: self.restarts]
            weights[: len(ends)] = ends
        found, seen = self._discretised(model, weights, self._descended(model, weights))
        values, excess = model.judge(seen)
        kept = seen[(excess == excess.min()) & np.isfinite(values).all(axis=1)]
        front = kept[non_dominated_mask(model.judge(kept)[0])]
        return first_of_each(np.concatenate([found, front]))

    def _descended(self, model: _Model, weights: Floats) -> list[Tensor]:
        """Per knob the probabilities `(restarts, choices)` that the restarts end with."""
        logits = []
        for knob, count in enumerate(self.space.cardinalities.tolist()):
            start = torch.full((self.restarts, count), -torch.inf)
            offered = torch.as_tensor(self.space.menu.choices(knob))
            start[:, offered] = torch.from_numpy(self.rng.normal(size=(self.restarts, len(offered)))).float()
            logits.append(start.requires_grad_())
        trade_off = torch.from_numpy(weights).float()
        multipliers = torch.zeros(self.restarts, len(model.sides))
        optimizer = torch.optim.Adam(logits, lr=self.lr)
        first, last = _TEMPERATURES
        for step in range(self.steps):
            temperature = first * (last / first) ** (step / max(self.steps - 1, 1))
            scaled, excess = model.expected([(v / temperature).softmax(-1) for v in logits])
            loss = _scalarised(scaled, trade_off)
            if len(model.sides):
                loss = loss + (multipliers * excess + _PRESSURE * excess.clamp_min(0.0) ** 2).sum(-1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            multipliers = (multipliers + excess.detach()).clamp_min(0.0)
        return [(v.detach() / last).softmax(-1) for v in logits]

    def _discretised(self, model: _Model, weights: Floats, probabilities: list[Tensor]) -> tuple[Archs, Archs]:
        """Each restart's architecture `(restarts, K)`, and all permitted ones that were looked at on the way."""
        trade_off = torch.from_numpy(weights)
        count = self.restarts
        likely = np.stack([p.argmax(-1).numpy() for p in probabilities], axis=1)
        columns = []
        for p in probabilities:
            cumulative = p.double().cumsum(-1).numpy()
            drawn = self.rng.random((count, _SAMPLES, 1)) * cumulative[:, None, -1:]
            columns.append((drawn >= cumulative[:, None, :]).sum(-1).clip(max=p.shape[1] - 1))
        samples = np.concatenate([likely[:, None], np.stack(columns, axis=-1)], axis=1)
        knobs, choices = np.array(
            [(k, c) for k in range(len(probabilities)) for c in self.space.menu.choices(k)], dtype=np.int64
        ).T  # fmt: skip
        seen = []

        def best_of(candidates: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
            """The best `(restarts, K)` of `(restarts, c, K)`, before it is made canonical, and its score."""
            flat = self.space.canonical(candidates.reshape(-1, candidates.shape[-1]).astype(self.space.dtype))
            values, excess = model.judge(flat)
            owner = torch.from_numpy(np.repeat(np.arange(count), candidates.shape[1]))
            score = _scalarised(torch.from_numpy(model.scaled(values)), trade_off[owner]).numpy()
            score = np.where(self.space.permits(flat), score + _FORBIDDEN * excess, np.inf)
            score = np.where(np.isnan(score), np.inf, score).reshape(count, -1)
            seen.append(flat[np.isfinite(score.reshape(-1))])
            best = score.argmin(axis=1)
            return candidates[np.arange(count), best], score[np.arange(count), best]

        archs, scores = best_of(samples)
        for _ in range(self.repairs):
            changed = np.repeat(archs[:, None], len(knobs), axis=1)
            changed[:, np.arange(len(knobs)), knobs] = choices
            better, found = best_of(changed)
            improved = found < scores
            if not improved.any():
                break
            archs, scores = np.where(improved[:, None], better, archs), np.minimum(found, scores)
        good = np.isfinite(scores)
        all_seen = first_of_each(np.concatenate(seen))
        if not len(all_seen):  # the likely choices are permitted one by one, but not together
            all_seen = first_of_each(self.space.sample(count, self.rng))
        return self.space.canonical(archs[good].astype(self.space.dtype)), all_seen


def _scalarised(scaled: Tensor, weights: Tensor) -> Tensor:
    """The augmented Chebyshev scalarisation `(n,)` of scaled objectives `(n, M)`, seen from beyond the best of all."""
    weighted = weights * (scaled + 0.25)
    return weighted.amax(-1) + 0.05 * weighted.sum(-1)


@dataclass(frozen=True)
class _Model:
    """What is predicted of architectures and of distributions over them.

    Args:
        low, high: `(M,)` the range of each objective, minimised and by its logarithm where `logarithmic`.
        sides: the limits, each with the column of its objective.
    """

    objectives: tuple[Objective, ...]
    predictors: tuple[BoundPredictor, ...]
    logarithmic: tuple[bool, ...]
    low: Floats
    high: Floats
    sides: tuple[tuple[int, Objective], ...]

    @classmethod
    def of(
        cls, space: SearchSpace, predictors: Mapping[str, BoundPredictor], objectives: Sequence[Objective]
    ) -> _Model:
        if missing := [o.name for o in objectives if o.name not in predictors]:
            raise UserError(
                f"strategy predictor_gradient: there is no predictor for objectives.{missing[0]}; there are "
                f"{', '.join(predictors)}"
            )
        archs = space.sample(_SCALE_SAMPLES, np.random.default_rng(0))
        means = np.column_stack([predictors[o.name].predict(archs).mean for o in objectives])
        logarithmic = tuple(bool(not o.maximise and (means[:, i] > 0).all()) for i, o in enumerate(objectives))
        model = cls(
            tuple(objectives),
            tuple(predictors[o.name] for o in objectives),
            logarithmic,
            np.zeros(len(objectives)),
            np.ones(len(objectives)),
            tuple((i, side) for i, o in enumerate(objectives) for _, side in o.sides),
        )
        scaled = model.scaled(minimised(means, tuple(objectives)))
        low, high = np.nanmin(scaled, axis=0), np.nanmax(scaled, axis=0)
        return cls(
            model.objectives, model.predictors, logarithmic, low, np.where(high > low, high, low + 1.0), model.sides
        )

    def judge(self, archs: Archs) -> tuple[Floats, Floats]:
        """Minimised means `(n, M)` and total violation `(n,)`, of the quantile where a limit is on one."""
        means, limited = np.empty((2, len(archs), len(self.objectives)))
        for column, (objective, predictor) in enumerate(zip(self.objectives, self.predictors, strict=True)):
            estimate = predictor.predict(archs)
            means[:, column] = limited[:, column] = estimate.mean
            if objective.limited and objective.quantile is not None:
                limited[:, column] = estimate.quantile(objective.quantile)
        return minimised(means, self.objectives), violations(limited, self.objectives).sum(axis=1)

    def scaled(self, values: Floats) -> Floats:
        """Minimised values `(n, M)` in units of their range over random architectures."""
        logs = np.log(np.maximum(values, 1e-12))
        return np.asarray((np.where(self.logarithmic, logs, values) - self.low) / (self.high - self.low))

    def expected(self, probabilities: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Scaled objectives `(R, M)` and signed relative excess over each limit `(R, L)`, both differentiable."""
        means = [predictor.expected(probabilities).float() for predictor in self.predictors]
        scaled = []
        for column, (objective, mean) in enumerate(zip(self.objectives, means, strict=True)):
            value = -mean if objective.maximise else mean.clamp_min(1e-12).log() if self.logarithmic[column] else mean
            scaled.append((value - self.low[column]) / (self.high[column] - self.low[column]))
        excess = []
        for column, side in self.sides:
            assert side.limit is not None
            sign = -1.0 if side.maximise else 1.0
            excess.append(sign * (means[column] - side.limit) / max(abs(side.limit), 1e-12))
        none = means[0].new_zeros(len(means[0]), 0)
        return torch.stack(scaled, dim=-1), torch.stack(excess, dim=-1) if excess else none
