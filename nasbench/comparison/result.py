"""The outcome of a comparison, as frames and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hardware_profiles.paths import write_text
from nasbench.comparison.problems import Problem
from nasbench.comparison.settings import Settings
from nasbench.comparison.statistics import (
    RankTest,
    at_times,
    band,
    evaluations_to,
    front_of,
    hypervolume_curve,
    rank_test,
    regret_curve,
)
from nasbench.comparison.trial import Trial
from nasbench.evaluators.table import TableEvaluator
from nasbench.pareto import hypervolume, hypervolume_box

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
Key = tuple[str, str, int]  # problem, strategy, seed
_TIMES = 60  # points of a curve against time


@dataclass(frozen=True, eq=False)
class Yardstick:
    """What hypervolume and regret of a problem are measured against.

    Args:
        best, worst: `(M,)` ends of each objective; `worst` is the reference point.
        front: `(t, M)` the best there is, minimised.
        basis: where that is from, in words.
    """

    best: Floats
    worst: Floats
    front: Floats
    basis: str

    def scaled(self, values: Floats) -> Floats:
        """`(n, M)` values with 0 for the best and 1 for the worst, so that volumes are shares of the box between."""
        return (values - self.best) / (self.worst - self.best)

    @cached_property
    def volume(self) -> float:
        """Hypervolume of the scaled front."""
        return hypervolume(self.scaled(self.front), np.ones(len(self.best)))


class Comparison:
    """Searches of several strategies on several problems, and what they say.

    Hypervolumes are shares of the best front's, all from the reference point of the problem (`yardstick`). Bands are
    the quartiles over seeds.

    Args:
        path: the directory of the comparison.
        settings: that it was made with.
        problems: by name.
        trials: by problem, strategy and seed.
    """

    def __init__(
        self, path: Path, settings: Settings, problems: Mapping[str, Problem], trials: Mapping[Key, Trial]
    ) -> None:
        self.path = path
        self.settings = settings
        self.problems = dict(problems)
        self.trials = dict(trials)
        self.strategies = tuple(settings.strategies)
        self._curves: dict[tuple[Key, str], Floats] = {}

    @cached_property
    def yardsticks(self) -> dict[str, Yardstick]:
        """Per problem, the reference point and the best front: of the table where it is complete, else of all runs."""
        found = {}
        for name, problem in self.problems.items():
            values, basis = problem.known, "the true front"
            if values is None:
                runs = [t.found for (p, _, _), t in self.trials.items() if p == name]
                values, basis = np.concatenate(runs), "the best of all runs, since the true front is not known"
            else:
                basis += f", known from all {len(values):,} rows of the table"
            good = values[~np.isnan(values).any(axis=1)]
            if len(good):
                best, worst = hypervolume_box(good)
                found[name] = Yardstick(best, worst, front_of(good), basis)
            else:
                empty = np.zeros(len(problem.objectives))
                found[name] = Yardstick(empty, empty + 1, empty[None], "nothing: no run found anything within limits")
        return found

    def hypervolume(self, problem: str, strategy: str, seed: int) -> Floats:
        """`(n,)` share of the best front's hypervolume after each distinct evaluation."""
        key = (problem, strategy, seed)
        if (key, "hypervolume") not in self._curves:
            stick = self.yardsticks[problem]
            curve = hypervolume_curve(stick.scaled(self.trials[key].found), np.ones(len(stick.best)))
            self._curves[key, "hypervolume"] = curve / stick.volume if stick.volume > 0 else np.ones_like(curve)
        return self._curves[key, "hypervolume"]

    def regret(self, problem: str, strategy: str, seed: int) -> Floats:
        """`(n,)` simple regret after each distinct evaluation (see `statistics.regret_curve`)."""
        key = (problem, strategy, seed)
        if (key, "regret") not in self._curves:
            stick = self.yardsticks[problem]
            self._curves[key, "regret"] = regret_curve(self.trials[key].found, stick.front, stick.best, stick.worst)
        return self._curves[key, "regret"]

    def _of(self, what: str, problem: str, strategy: str) -> list[Floats]:
        one = self.hypervolume if what == "hypervolume" else self.regret
        return [one(problem, strategy, seed) for seed in self.settings.seed_list]

    def at(self, what: str, problem: str, strategy: str, evaluations: int) -> Floats:
        """`(seeds,)` hypervolume or regret after so many evaluations; of a search that ended early, at its end."""
        start = 0.0 if what == "hypervolume" else 1.0
        return np.array(
            [c[min(evaluations, len(c)) - 1] if len(c) else start for c in self._of(what, problem, strategy)]
        )

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Quartiles over seeds after every evaluation: `problem`, `strategy`, `evaluations`, and per measure three."""
        frames = []
        for problem in self.problems:
            for strategy in self.strategies:
                columns: dict[str, Any] = {"problem": problem, "strategy": strategy}
                for what in ("hypervolume", "regret"):
                    low, middle, high = band(self._of(what, problem, strategy))
                    columns |= {"evaluations": np.arange(1, len(middle) + 1), f"{what}_low": low, what: middle,
                                f"{what}_high": high}  # fmt: skip
                frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def time_curves(self) -> pd.DataFrame:
        """As `curves`, against `seconds`: the strategy's processor time and what its evaluations cost."""
        frames = []
        for problem in self.problems:
            spans = [t.seconds for (p, _, _), t in self.trials.items() if p == problem and len(t.seconds)]
            first, last = min(s[0] for s in spans), max(s[-1] for s in spans)
            times = np.geomspace(max(first, 1e-6), max(last, 2e-6), _TIMES)
            for strategy in self.strategies:
                columns: dict[str, Any] = {"problem": problem, "strategy": strategy, "seconds": times}
                for what in ("hypervolume", "regret"):
                    runs = [
                        at_times(curve, self.trials[problem, strategy, seed].seconds, times)
                        for seed, curve in zip(self.settings.seed_list, self._of(what, problem, strategy), strict=True)
                    ]
                    started = ~np.isnan(np.stack(runs)).any(axis=0)
                    low, middle, high = (
                        np.where(started, np.percentile(np.nan_to_num(runs), q, axis=0), np.nan) for q in (25, 50, 75)
                    )
                    columns |= {f"{what}_low": low, what: middle, f"{what}_high": high}
                frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row per problem, strategy and budget: medians with quartiles, evaluations to 99 %, seconds, rank."""
        rows = []
        for problem in self.problems:
            for budget in self.settings.budget_list:
                ranks = rank_test_or_none({s: self.at("hypervolume", problem, s, budget) for s in self.strategies})
                for strategy in self.strategies:
                    volume = np.percentile(self.at("hypervolume", problem, strategy, budget), [25, 50, 75])
                    regret = np.percentile(self.at("regret", problem, strategy, budget), [25, 50, 75])
                    trials = [self.trials[problem, strategy, seed] for seed in self.settings.seed_list]
                    to_99 = [evaluations_to(c[:budget], 0.99) for c in self._of("hypervolume", problem, strategy)]
                    rows.append(
                        {
                            "problem": problem,
                            "strategy": strategy,
                            "evaluations": budget,
                            "hypervolume": volume[1],
                            "hypervolume_low": volume[0],
                            "hypervolume_high": volume[2],
                            "regret": regret[1],
                            "regret_low": regret[0],
                            "regret_high": regret[2],
                            "evaluations_to_99": float(np.median(to_99)),
                            "strategy_ms_per_proposal": float(
                                np.median([1000 * t.strategy_seconds / max(t.asked, 1) for t in trials])
                            ),
                            "rank": ranks.ranks[strategy] if ranks else 1.0,
                        }
                    )
        return pd.DataFrame(rows)

    @cached_property
    def rank_tests(self) -> dict[int, RankTest]:
        """Per budget, the tests over all problems and seeds; empty where there is one strategy alone."""
        found = {}
        for budget in self.settings.budget_list:
            scores = {
                s: np.concatenate([self.at("hypervolume", p, s, budget) for p in self.problems])
                for s in self.strategies
            }
            if test := rank_test_or_none(scores):
                found[budget] = test
        return found

    @property
    def ranks(self) -> pd.DataFrame:
        """Average rank per strategy (1 is best) at each budget, over all problems and seeds, best first."""
        budgets = sorted(self.rank_tests)
        last = self.rank_tests[budgets[-1]].ranks if budgets else {}
        names = sorted(self.strategies, key=lambda s: last.get(s, 0.0))
        index = pd.Index(names, name="strategy")
        return pd.DataFrame({b: [self.rank_tests[b].ranks[n] for n in names] for b in budgets}, index=index)

    @property
    def tests(self) -> pd.DataFrame:
        """Every pair of strategies at each budget, with p-values before and after Holm's correction."""
        frames = [t.pairs.assign(evaluations=b, friedman_p=t.friedman_p) for b, t in self.rank_tests.items()]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @property
    def runs(self) -> pd.DataFrame:
        """One row per search: what it reached, how often it asked, what it cost."""
        return pd.DataFrame(
            [
                {
                    "problem": problem,
                    "strategy": strategy,
                    "seed": seed,
                    "evaluations": len(trial.values),
                    "proposals": trial.asked,
                    "failed": int(np.isnan(trial.values).any(axis=1).sum()),
                    "infeasible": int((~trial.feasible).sum()),
                    "hypervolume": self.at("hypervolume", problem, strategy, self.settings.evaluations)[i],
                    "regret": self.at("regret", problem, strategy, self.settings.evaluations)[i],
                    "strategy_seconds": trial.strategy_seconds,
                    "seconds": trial.seconds[-1] if len(trial.seconds) else 0.0,
                }
                for (problem, strategy, seed), trial in self.trials.items()
                for i in [self.settings.seed_list.index(seed)]
            ]
        )

    @property
    def priced(self) -> bool:
        """Whether a table says what evaluations cost, so that seconds tell of more than the strategies."""
        return any(
            isinstance(p.evaluator.evaluator, TableEvaluator) and p.evaluator.evaluator.priced
            for p in self.problems.values()
        )

    def plot_hypervolume(self, against: str = "evaluations") -> Figure:
        """Median hypervolume with quartile bands, one panel per problem; `against` evaluations or `seconds`."""
        from nasbench.report.comparison import curves_figure

        return curves_figure(self, "hypervolume", against)

    def plot_regret(self, against: str = "evaluations") -> Figure:
        """Median simple regret with quartile bands, one panel per problem; `against` evaluations or `seconds`."""
        from nasbench.report.comparison import curves_figure

        return curves_figure(self, "regret", against)

    def plot_ranks(self) -> Figure:
        """Average ranks at each budget."""
        from nasbench.report.comparison import ranks_figure

        return ranks_figure(self)

    def write(self) -> None:
        """Write the tables, figures, `summary.md` and `report.html` to the directory."""
        from nasbench.report.comparison import write_comparison

        for name in ("curves", "time_curves", "summary", "tests", "runs"):
            write_text(self.path / f"{name}.csv", getattr(self, name).to_csv(index=False))
        write_text(self.path / "ranks.csv", self.ranks.to_csv())
        write_comparison(self)


def rank_test_or_none(scores: Mapping[str, Floats]) -> RankTest | None:
    """The rank test, where there is more than one strategy."""
    return rank_test(scores) if len(scores) > 1 else None
