"""What reinforcement-learning strategies share: a factorised policy over the knobs, and rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from nasbench.evaluators.base import Proposals
from nasbench.pareto import non_dominated_mask
from nasbench.strategies.base import Strategy
from nasbench.variation import new_rows, row_keys
from search_spaces import SearchSpace, UserError
from search_spaces.base import Archs

if TYPE_CHECKING:
    from nasbench.objectives import Objective

Floats = NDArray[np.float64]

_WINDOW = 256  # latest results that rewards are standardised over
_REDRAWS = 10  # of rows that were proposed before; then they are proposed again
_RHO = 0.05  # share of the plain sum in the augmented Chebyshev scalarisation (Knowles, ParEGO, IEEE TEC 2006)
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam (Kingma & Ba, ICLR 2015)


_TAKES_ONE_SIGN = (
    "strategy.reward = 'mnasnet' multiplies maximised objectives such as accuracy, all at least 0, with powers of "
    "costs, all above 0: choose reward = 'pareto'"
)


class PolicyOptions(TypedDict, total=False):
    """The keys of `PolicyStrategy`, for methods that add some of their own."""

    reward: Literal["mnasnet", "pareto"]
    targets: Sequence[float]
    exponents: tuple[float, float]
    policies: int
    lr: float
    entropy: float
    batch_size: int


class PolicyStrategy(Strategy):
    """Samples from learned distributions, one categorical per knob, and reinforces what was rewarded.

    The policy is factorised: knobs are drawn independently, and the likelihood counts those that are active. That is
    what TuNAS uses (Bender et al., CVPR 2020) in the place of an RNN controller (Zoph & Le, ICLR 2017; MnasNet). What a
    space does not permit, and what was proposed before, is drawn again.

    Rewards:

    - `mnasnet`: the product of the maximised objectives times `(cost / target) ** w` for each minimised one, with `w`
      the first of `exponents` where the cost is within its target and the second beyond (Tan et al., CVPR 2019, eq.
      2-3). With equal exponents the target only scales the reward and need not be given. One policy, which ends at one
      trade-off.
    - `pareto`: several policies, each with a weighting of the objectives of its own, spread over the front; the reward
      is
      the negative augmented Chebyshev value of the objectives scaled over the front so far (decomposition, as in
      MOEA/D: Zhang & Li, IEEE TEC 2007).

    One objective is its own reward in both. Rewards are standardised over the latest results; a row that breaks limits
    falls behind all that keep them, the farther the more it breaks them.

    Args:
        reward: `mnasnet` or `pareto`.
        targets: per minimised objective, in their order, for `mnasnet`.
        exponents: within and beyond a target.
        policies: of `pareto`.
        lr: step of Adam on the logits.
        entropy: weight of the policy's entropy beside the reward.
        batch_size: results that one update learns from.
    """

    def __init__(
        self,
        space: SearchSpace,
        seed: int = 0,
        initial: Archs | None = None,
        *,
        reward: Literal["mnasnet", "pareto"] = "mnasnet",
        targets: Sequence[float] = (),
        exponents: tuple[float, float] = (-0.07, -0.07),
        policies: int = 3,
        lr: float = 0.1,
        entropy: float = 0.01,
        batch_size: int = 20,
    ) -> None:
        super().__init__(space, seed, initial)
        if reward not in ("mnasnet", "pareto"):
            raise UserError(f"strategy.reward = {reward!r}: expected 'mnasnet' or 'pareto'")
        if len(exponents) != 2 or not all(-np.inf < exponent <= 0 for exponent in exponents):
            raise UserError(
                f"strategy.exponents = {list(exponents)}: expected two numbers of 0 or less, such as -0.07: above 0 a "
                "higher cost would be a higher reward"
            )
        if exponents[0] != exponents[1] and not len(targets) and reward == "mnasnet":
            raise UserError(
                f"strategy.targets: exponents {list(exponents)} differ, so the costs' targets must be given"
            )
        if any(not target > 0 for target in targets):
            raise UserError(f"strategy.targets = {list(targets)}: expected numbers above 0")
        for key, value, least in (("policies", policies, 1), ("batch_size", batch_size, 1)):
            if value < least:
                raise UserError(f"strategy.{key} = {value}: expected {least} or more")
        if not lr > 0 or not entropy >= 0:
            raise UserError(f"strategy.lr = {lr}, strategy.entropy = {entropy}: expected lr > 0 and entropy >= 0")
        self.reward, self.targets, self.exponents = reward, tuple(targets), exponents
        self.policies = policies if reward == "pareto" else 1
        self.lr, self.entropy, self.batch_size = lr, entropy, batch_size
        self._offered = np.zeros((len(space.knobs), int(space.cardinalities.max())), dtype=bool)
        for knob in range(len(space.knobs)):
            self._offered[knob, space.menu.choices(knob)] = True
        shape = (self.policies, *self._offered.shape)
        self.logits = np.zeros(shape)
        self._moments = np.zeros((2, *shape))  # Adam's
        self._steps = np.zeros(self.policies, dtype=np.int64)
        self._known: set[int] = set()
        self._front: Floats = np.empty((0, 0))  # feasible values that none dominates
        # The window: latest results, of which the last `_unlearned` wait for an update.
        self._archs: Archs = np.empty((0, len(space.knobs)), dtype=space.dtype)
        self._values: Floats = np.empty((0, 0))
        self._violation: Floats = np.empty(0)
        self._of: NDArray[np.int64] = np.empty(0, dtype=np.int64)  # which policy proposed it
        self._unlearned = 0

    def check(self, objectives: Sequence[Objective]) -> None:
        costs = sum(not o.maximise for o in objectives)
        if self.reward == "mnasnet" and len(objectives) > 1 and self.targets and len(self.targets) != costs:
            raise UserError(f"strategy.targets: {len(self.targets)} given, but {costs} objectives are minimised")

    def check_values(self, objectives: Sequence[Objective], values: Floats) -> None:
        if self.reward != "mnasnet" or len(objectives) == 1:
            return
        for objective, column in zip(objectives, values.T, strict=True):
            if len(known := column[~np.isnan(column)]) and None in _signs(known[:, None]):
                told = -known if objective.maximise else known
                raise UserError(
                    f"objectives.{objective.name} goes from {told.min():.4g} to {told.max():.4g}, and {_TAKES_ONE_SIGN}"
                )

    def remark(self, evaluations: int) -> str:
        if evaluations > self.batch_size:
            return ""
        return (
            f"evaluations = {evaluations} is not above batch_size = {self.batch_size}, the results that a policy first "
            "learns from: this is random search. Take a smaller batch, or more evaluations"
        )

    @property
    def preferred_batch(self) -> int:
        """Results of one update: of a larger batch all come from the same, older policy."""
        return self.batch_size

    @abstractmethod
    def _learn(self, policy: int, archs: Archs, advantages: Floats) -> None:
        """Update one policy by what it proposed, `(b, K)`, with advantages `(b,)`."""

    def probabilities(self, policy: int) -> Floats:
        """Chance of each choice of each knob, `(K, C)`; 0 for what is not offered."""
        logits = np.where(self._offered, self.logits[policy], -np.inf)
        exp: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def ask(self, n: int) -> Proposals:
        given = 0 if self.initial is None else int(np.clip(len(self.initial) - self.next_id, 0, n))
        archs = np.empty((n, len(self.space.knobs)), dtype=self.space.dtype)
        if given and self.initial is not None:
            archs[:given] = self.initial[self.next_id : self.next_id + given]
        archs[given:] = self._drawn(self._turns(self.next_id + np.arange(given, n)))
        for _ in range(_REDRAWS):
            known = np.array([key in self._known for key in row_keys(archs).tolist()], dtype=bool)
            again = np.flatnonzero(known | ~new_rows(archs))
            again = again[again >= given]
            if not len(again):
                break
            archs[again] = self._drawn(self._turns(self.next_id + again))
        self._known.update(row_keys(archs).tolist())
        return self._proposals(archs)

    def _turns(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Policies propose in turn."""
        return ids % self.policies

    def _drawn(self, policies: NDArray[np.int64]) -> Archs:
        """Canonical permitted rows `(n, K)`, each of the policy named; uniform ones where a policy finds none."""
        out = np.empty((len(policies), len(self.space.knobs)), dtype=self.space.dtype)
        cumulative = np.stack([self.probabilities(p).cumsum(axis=1) for p in range(self.policies)])
        todo = np.arange(len(policies))
        for _ in range(_REDRAWS):
            point = self.rng.random((len(todo), len(self.space.knobs), 1)) * cumulative[policies[todo], :, -1:]
            out[todo] = self.space.canonical((cumulative[policies[todo]] <= point).sum(axis=2).astype(out.dtype))
            todo = todo[~self.space.permits(out[todo])]
            if not len(todo):
                return out
        out[todo] = self.space.sample(len(todo), self.rng)
        return out

    def tell(
        self,
        proposals: Proposals,
        values: Floats,
        violations: Floats,
        status: NDArray[np.uint8],
    ) -> None:
        ok = (status == 0) & ~np.isnan(values).any(axis=1)
        violation = violations[ok].sum(axis=1)
        self._archs = np.concatenate([self._archs, proposals.archs[ok]])
        self._values = np.concatenate([self._values.reshape(-1, values.shape[1]), values[ok]])
        self._violation = np.concatenate([self._violation, violation])
        self._of = np.concatenate([self._of, self._turns(proposals.ids[ok])])
        self._unlearned += int(ok.sum())
        front = np.concatenate([self._front.reshape(-1, values.shape[1]), values[ok][violation <= 0]])
        self._front = np.unique(front[non_dominated_mask(front)], axis=0)
        if self._unlearned >= self.batch_size:
            for policy in range(self.policies):
                advantages = self._advantages(policy)
                mine = np.flatnonzero(self._of[-self._unlearned :] == policy) - self._unlearned
                if len(mine):
                    self._learn(policy, self._archs[mine], advantages[mine])
            self._unlearned = 0
        keep = slice(max(len(self._archs) - max(_WINDOW, self._unlearned), 0), None)
        self._archs, self._values = self._archs[keep], self._values[keep]
        self._violation, self._of = self._violation[keep], self._of[keep]

    def _advantages(self, policy: int) -> Floats:
        """Standardised rewards of the window, to one policy's taste, less their mean `(w,)`."""
        rewards = self._rewards(policy)
        feasible = self._violation <= 0
        scored = np.zeros(len(rewards))
        if feasible.any():
            spread = rewards[feasible].std()
            scored[feasible] = (rewards[feasible] - rewards[feasible].mean()) / (spread if spread > 1e-12 else 1.0)
        # Behind the worst that keeps the limits; the order counts, not how far beyond all measure a limit is broken.
        scored[~feasible] = scored.min(initial=0.0) - 1.0 - np.minimum(self._violation[~feasible], 3.0)
        return scored - scored.mean()

    def _rewards(self, policy: int) -> Floats:
        """Rewards of the window `(w,)`, more is better.

        Raises:
            UserError: objectives that `mnasnet` has no reward for.
        """
        if self._values.shape[1] == 1:
            return -self._values[:, 0]
        if self.reward == "pareto":
            return -self._chebyshev(policy)
        gains, costs = self._sides()
        reward = np.prod(-self._values[:, gains], axis=1)
        targets = self.targets or (1.0,) * len(costs)
        if len(targets) != len(costs):
            raise UserError(f"strategy.targets: {len(targets)} given, but {len(costs)} objectives are minimised")
        for column, target in zip(costs, targets, strict=True):
            ratio = self._values[:, column] / target
            reward = reward * ratio ** np.where(ratio <= 1.0, *self.exponents)
        return np.asarray(reward)

    def _sides(self) -> tuple[list[int], list[int]]:
        """Columns of maximised and of minimised objectives, told by their signs, since values are minimised."""
        signs = _signs(self._values)
        if None in signs:
            raise UserError(f"one of these objectives takes both signs, and {_TAKES_ONE_SIGN}")
        return [i for i, s in enumerate(signs) if s == -1], [i for i, s in enumerate(signs) if s == 1]

    def _chebyshev(self, policy: int) -> Floats:
        values = np.where(np.isfinite(self._values), self._values, np.nan)
        basis = self._front if len(self._front) > 1 else values
        low, high = np.nanmin(basis, axis=0), np.nanmax(basis, axis=0)
        scaled = np.nan_to_num((values - low) / np.where(high > low, high - low, 1.0), nan=10.0)
        weighted: Floats = self._weights(policy) * scaled
        return np.asarray(weighted.max(axis=1) + _RHO * weighted.sum(axis=1))

    def _weights(self, policy: int) -> Floats:
        """A policy's weighting `(M,)`: evenly spaced for two objectives, quasi-random on the simplex for more."""
        objectives = self._values.shape[1]
        if objectives == 2:
            share = (policy + 0.5) / self.policies
            return np.array([share, 1.0 - share])
        draws = np.random.default_rng([policy, objectives]).dirichlet(np.ones(objectives))
        return np.asarray(draws)

    def _log_likelihood(self, policy: int, archs: Archs) -> Floats:
        """Log-likelihood of canonical rows `(b, K)`, over their active knobs, `(b,)`."""
        log = np.log(np.maximum(self.probabilities(policy), 1e-300))
        each = log[np.arange(archs.shape[1]), archs]
        return np.asarray((each * self.space.active(archs)).sum(axis=1))

    def _ascend(self, policy: int, archs: Archs, weights: Floats) -> None:
        """One step of Adam up the gradient of the mean of `weights * log-likelihood`, plus entropy."""
        p = self.probabilities(policy)
        active = self.space.active(archs) * weights[:, None]
        chosen = np.zeros_like(p)
        knobs = np.broadcast_to(np.arange(archs.shape[1]), archs.shape)
        np.add.at(chosen, (knobs, archs), active)
        gradient = (chosen - p * active.sum(axis=0)[:, None]) / len(archs)
        log = np.log(np.maximum(p, 1e-300))
        gradient += self.entropy * -p * (log - (p * log).sum(axis=1, keepdims=True))
        self._steps[policy] += 1
        step, (first, second) = self._steps[policy], self._moments[:, policy]
        first += (1 - _BETA1) * (gradient - first)
        second += (1 - _BETA2) * (gradient**2 - second)
        rate = self.lr * np.sqrt(1 - _BETA2**step) / (1 - _BETA1**step)
        self.logits[policy] += rate * first / (np.sqrt(second) + _EPSILON)

    _ARRAYS = ("logits", "_moments", "_steps", "_front", "_archs", "_values", "_violation", "_of")

    def state_dict(self) -> dict[str, Any]:
        own = {name.lstrip("_"): getattr(self, name).copy() for name in self._ARRAYS}
        known = np.array(sorted(self._known), dtype=np.uint64)
        return super().state_dict() | own | {"known": known, "unlearned": self._unlearned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name in self._ARRAYS:
            mine = getattr(self, name)
            given = np.asarray(state[name.lstrip("_")], dtype=mine.dtype)
            setattr(self, name, given.reshape(-1, mine.shape[1]) if name == "_archs" else given.copy())
        self._known = {int(key) for key in state["known"]}
        self._unlearned = int(state["unlearned"])


def _signs(values: Floats) -> list[int | None]:
    """Per column of minimised values: -1 where all are at most 0, 1 where all are above, None where they are mixed."""
    return [-1 if (c <= 0).all() else 1 if (c > 0).all() else None for c in values.T]
