"""The default strategy beside pymoo's and Optuna's on NAS-Bench-201, by distinct evaluations. One thread.

Four problems: accuracy on CIFAR-100 or ImageNet16-120 against latency on raspi4, pixel3, eyeriss and fpga (the last two
are estimates of tools), from the tables in `$NASBENCH_DATA`, which hold test accuracies: comparing search algorithms is
what they are for, and nothing here is about networks. Every strategy searches with the same seeds; only distinct
architectures count, a repeated one gets its value again for nothing. Reported is the hypervolume of what was evaluated,
as a share of the true front's, both objectives scaled to the table's range with its worst values as reference.

Contenders: the strategy that a configuration without `strategy.name` gets, asked for 16 at a time as a run does;
pymoo's NSGA-II with the operators that its documentation gives for integers and its elimination of duplicates,
population 20, which of 10, 20, 40 and 100 was best to 99 % on other devices and CIFAR-10; Optuna's NSGA-II (population
20 too) and TPE with categorical parameters and their other defaults; random search. None gets reference networks.

In half of the cells latency is as unknown as accuracy (`paid`); in the others every method may look it up for any
architecture (`free`): the default strategy by `use_costs`; the others start from 20 architectures that are spread
evenly over latency, instead of random ones. There pymoo's NSGA-II also runs `screened`: of four children for each
evaluation those whose latency lies farthest from what was evaluated, which gains early and loses late (Optuna's NSGA-II
only lost by it).

    python -m benchmarks.strategies [--quick] [--seeds 30] [--output FILE] [--strategies default pymoo_nsga2 ...]

A cell (problem, variant, strategy, seed) is one line of FILE, and none is computed twice. Ends with one JSON line:
`evaluations_ratio_to_pymoo` (median over problems of the ratio of median evaluations to 99 %; runs that never get there
count as the budget; `paid`), medians of shares per budget, and `p` per opponent, variant and budget: Wilcoxon's signed
rank test over the seeds, one-sided, the worst of the problems after Holm's correction over these, and pooled over them.
`--quick` takes about ten minutes of processor time: 10 seeds, with TPE to 150 evaluations alone.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from nasbench.config import StrategySection
from nasbench.evaluators.table import ArchitectureTable
from nasbench.pareto import hypervolume
from nasbench.registry import resolve
from nasbench.strategies.base import Strategy
from nasbench.variation import sample_distinct
from search_spaces import SearchSpace
from search_spaces.base import Archs
from search_spaces.nasbench201 import NASBench201Space

PROBLEMS = (
    ("cifar100", "raspi4"),
    ("imagenet16_120", "eyeriss"),
    ("cifar100", "pixel3"),
    ("imagenet16_120", "fpga"),
)
BUDGETS = (50, 150, 500)
BUDGET = max(BUDGETS)
VARIANTS = ("paid", "free")
BATCH = 16  # what a run asks for where proposals are evaluated
POPULATION = 20
MOST_ASKS = 4  # times the budget, after which a method that only repeats itself ends
Floats = NDArray[np.float64]


class Problem:
    """Two columns of the tables, minimised and scaled to 0..1."""

    def __init__(self, space: SearchSpace, accuracy: str, device: str) -> None:
        folder = Path(os.environ["NASBENCH_DATA"])
        table = ArchitectureTable.read(
            [folder / "nb201_accuracy.csv.gz", folder / "nb201_latency_help.csv.gz"],
            space,
            arch_column="op_code",
            columns={"a": f"{accuracy}_test_acc", "b": device},
        )
        self.name = f"{accuracy} {device}"
        self.space = space
        values = table.values * np.array([-1.0, 1.0])
        self._values = (values - values.min(axis=0)) / np.ptp(values, axis=0)
        self._index = table.index
        self._whole = self.volume(self._values)

    def __call__(self, archs: Archs) -> Floats:
        """`(n, 2)` error and latency."""
        return np.asarray(self._values[self._index.find(self.space.canonical(archs))])

    def latency(self, archs: Archs) -> Floats:
        """`(n, 2)` with the error unknown."""
        values = self(archs)
        values[:, 0] = np.nan
        return values

    def volume(self, values: Floats) -> float:
        return hypervolume(values, np.ones(2))

    def share(self, archs: Archs) -> float:
        return self.volume(self(archs)) / self._whole


@dataclass
class Count:
    """The distinct architectures that were evaluated, in order."""

    problem: Problem
    budget: int = BUDGET
    seen: dict[bytes, Archs] = field(default_factory=dict)
    asked: int = 0

    def __call__(self, archs: Archs) -> Floats:
        self.asked += len(archs)
        for arch in archs:
            self.seen.setdefault(arch.tobytes(), arch)
        return self.problem(archs)

    @property
    def done(self) -> bool:
        return len(self.seen) >= self.budget or self.asked >= MOST_ASKS * self.budget

    @property
    def archs(self) -> Archs:
        return np.stack(list(self.seen.values()))[: self.budget]


def spread(problem: Problem, seed: int) -> Archs:
    """`POPULATION` architectures evenly over latency, of 1,000 random ones."""
    pool = sample_distinct(problem.space, 1000, np.random.default_rng([seed, 1]))
    latency = problem(pool)[:, 1]
    chosen: list[int] = []
    for level in np.linspace(latency.min(), latency.max(), POPULATION):
        chosen.append(next(int(r) for r in np.argsort(np.abs(latency - level), kind="stable") if int(r) not in chosen))
    return pool[chosen]


def lonely(problem: Problem, candidates: Archs, seen: Archs, n: int) -> list[int]:
    """`n` rows of `candidates`, one after the other that whose latency is farthest from those seen and chosen."""
    latency, known = problem(candidates)[:, 1], problem(seen)[:, 1]
    distance = np.abs(latency[:, None] - known).min(axis=1)
    chosen: list[int] = []
    for _ in range(min(n, len(candidates))):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.abs(latency - latency[chosen[-1]]))
    return chosen


def ours(name: str) -> Callable[..., None]:
    """A strategy of this project, in its default settings."""

    def run(problem: Problem, evaluate: Count, seed: int, free: bool) -> None:
        strategy: Strategy = resolve("strategy", name)(problem.space, seed)
        if free:
            strategy.use_costs(problem.latency)
        while not evaluate.done:
            proposals = strategy.ask(min(BATCH, max(1, evaluate.budget - len(evaluate.seen))))
            values = evaluate(proposals.archs)
            strategy.tell(proposals, values, np.zeros((len(values), 0)), np.zeros(len(values), dtype=np.uint8))

    return run


def pymoo_nsga2(problem: Problem, evaluate: Count, seed: int, free: bool, screen: bool = False) -> None:
    """pymoo's NSGA-II on integer variables, as its documentation sets it up; `screen` judges children by latency."""
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    space = problem.space

    class Searching(PymooProblem):
        def __init__(self) -> None:
            super().__init__(n_var=len(space.knobs), n_obj=2, xl=0, xu=space.cardinalities - 1, vtype=int)

        def _evaluate(self, x: NDArray[Any], out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"] = evaluate(space.canonical(x))

    algorithm = NSGA2(
        pop_size=POPULATION,
        n_offsprings=4 * POPULATION if screen else POPULATION,
        sampling=spread(problem, seed).astype(int) if free else IntegerRandomSampling(),
        crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    algorithm.setup(Searching(), termination=("n_gen", 10**9), seed=seed, verbose=False)
    while not evaluate.done:
        children = algorithm.ask()
        if len(children) > POPULATION:
            x = space.canonical(children.get("X"))
            children = children[lonely(problem, x, evaluate.archs, POPULATION)]
        algorithm.evaluator.eval(algorithm.problem, children)
        algorithm.tell(infills=children)


def optuna_sampler(name: str, **options: Any) -> Callable[..., None]:
    """A sampler of Optuna, through its own ask and tell, one trial at a time."""

    def run(problem: Problem, evaluate: Count, seed: int, free: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        space = problem.space
        distributions = {
            k.name: optuna.distributions.CategoricalDistribution(list(range(len(k.choices)))) for k in space.knobs
        }
        sampler = getattr(optuna.samplers, name)(seed=seed, **options)
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        if free:
            for arch in spread(problem, seed):
                study.enqueue_trial({k.name: int(c) for k, c in zip(space.knobs, arch, strict=True)})
        while not evaluate.done:
            trial = study.ask(distributions)
            arch = np.array([[trial.params[k.name] for k in space.knobs]], dtype=space.dtype)
            study.tell(trial, evaluate(arch)[0].tolist())

    return run


DEFAULT = StrategySection().name
STRATEGIES: dict[str, Callable[..., None]] = {
    "default": ours(DEFAULT),
    "pymoo_nsga2": pymoo_nsga2,
    "pymoo_nsga2_screened": partial(pymoo_nsga2, screen=True),
    "optuna_nsga2": optuna_sampler("NSGAIISampler", population_size=POPULATION),
    "optuna_tpe": optuna_sampler("TPESampler"),
    "random": ours("random"),
}
ONLY_FREE = ("pymoo_nsga2_screened",)
SEEDS, QUICK_SEEDS = 30, 10
# TPE asks for ever more architectures again, each trial slower than the last: over a minute to 500 distinct ones.
QUICK_BUDGETS = {"optuna_tpe": 150}


def to_99(problem: Problem, archs: Archs) -> int:
    """The fewest first rows that have 99 % of the true hypervolume; the budget where none have."""
    if problem.share(archs) < 0.99:
        return BUDGET
    low, high = 1, len(archs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if problem.share(archs[:middle]) >= 0.99 else (middle + 1, high)
    return low


def cell(problem: Problem, variant: str, name: str, seed: int, budget: int = BUDGET) -> dict[str, Any]:
    """One search."""
    evaluate, start = Count(problem, budget), time.process_time()
    STRATEGIES[name](problem, evaluate, seed, variant == "free")
    seconds = time.process_time() - start
    archs = evaluate.archs
    return {
        "problem": problem.name,
        "variant": variant,
        "strategy": name,
        "seed": seed,
        "shares": [problem.share(archs[:n]) for n in BUDGETS if n <= budget],
        "to_99": to_99(problem, archs) if budget == BUDGET else None,
        "distinct": len(archs),
        "seconds": round(seconds, 3),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["problem"], row["variant"], row["strategy"], row["seed"]


def rows_of(file: Path) -> Iterator[dict[str, Any]]:
    """Finished cells; a line that a kill cut short is none."""
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def better(first: Floats, second: Floats) -> float:
    """One-sided p of Wilcoxon's signed rank test that `first` is larger than `second`; 1 where they are equal."""
    return (
        1.0
        if np.allclose(first, second, rtol=0, atol=1e-12)
        else float(wilcoxon(first, second, alternative="greater").pvalue)
    )


def holm(p: list[float]) -> list[float]:
    """Holm's correction for several tests (Holm 1979)."""
    order, out, worst = np.argsort(p), [0.0] * len(p), 0.0
    for rank, i in enumerate(order.tolist()):
        worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
        out[i] = worst
    return out


def summary(rows: dict[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Medians, ratios and tests over the seeds that both sides of a comparison have, at the budgets that all have."""
    names = [n for n in STRATEGIES if any(k[2] == n for k in rows)]
    problems = [f"{a} {d}" for a, d in PROBLEMS]
    out: dict[str, Any] = {"default": DEFAULT, "seeds": {}, "shares": {}, "p": {}, "to_99": {}}

    def of(problem: str, variant: str, name: str) -> dict[int, dict[str, Any]]:
        return {k[3]: r for k, r in rows.items() if k[:3] == (problem, variant, name)}

    for variant in VARIANTS:
        for name in names:
            found = [list(of(p, variant, name).values()) for p in problems]
            if not all(found):
                continue
            tag = f"{variant} {name}"
            out["seeds"][tag] = min(map(len, found))
            reached = min(len(r["shares"]) for f in found for r in f)
            medians = [np.median([r["shares"][:reached] for r in f], axis=0) for f in found]
            out["shares"][tag] = [[round(float(v), 4) for v in m] for m in medians]
            whole = reached == len(BUDGETS)
            out["to_99"][tag] = [float(np.median([r["to_99"] for r in f])) for f in found] if whole else None
            if name == "default":
                continue
            per_problem: list[list[float]] = []
            pooled: list[list[Floats]] = [[], []]
            for p in problems:
                own, other = of(p, variant, "default"), of(p, variant, name)
                seeds = sorted(own.keys() & other.keys())
                a, b = (np.array([x[s]["shares"][:reached] for s in seeds]).reshape(-1, reached) for x in (own, other))
                per_problem.append([better(a[:, i], b[:, i]) if len(a) else 1.0 for i in range(reached)])
                pooled[0].append(a)
                pooled[1].append(b)
            first, second = (np.concatenate(x) for x in pooled)
            out["p"][tag] = {
                str(budget): {
                    "worst_of_problems": float(f"{max(holm([p[i] for p in per_problem])):.2g}"),
                    "pooled": float(f"{better(first[:, i], second[:, i]):.2g}"),
                }
                for i, budget in enumerate(BUDGETS[:reached])
            }
    for variant in VARIANTS:
        ratios = []
        for p in problems:
            own, other = of(p, variant, "default"), of(p, variant, "pymoo_nsga2")
            if seeds := sorted(own.keys() & other.keys()):
                ratios.append(
                    np.median([own[s]["to_99"] for s in seeds]) / np.median([other[s]["to_99"] for s in seeds])
                )
        if len(ratios) == len(problems):
            suffix = "" if variant == "paid" else "_free"
            out[f"evaluations_ratio_to_pymoo{suffix}"] = round(float(np.median(ratios)), 3)
    seconds = [r["seconds"] / max(r["distinct"], 1) for k, r in rows.items() if k[2] == "default"]
    out["default_ms_per_evaluation"] = round(1000 * float(np.median(seconds)), 2) if seconds else None
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, help="30 by default, 10 with --quick")
    parser.add_argument("--quick", action="store_true", help="TPE to 150 evaluations only")
    parser.add_argument("--output", type=Path, default=Path("strategies.jsonl"), help="finished cells, to go on from")
    parser.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further cell after so many")
    args = parser.parse_args()
    if "NASBENCH_DATA" not in os.environ:
        parser.error("NASBENCH_DATA must name the folder with nb201_accuracy.csv.gz and nb201_latency_help.csv.gz")

    space = NASBench201Space()
    problems = [Problem(space, *names) for names in PROBLEMS]
    rows = {key(row): row for row in rows_of(args.output)}
    end = time.monotonic() + 60 * args.minutes
    with args.output.open("a") as file:
        for seed in range(args.seeds or (QUICK_SEEDS if args.quick else SEEDS)):
            for problem in problems:
                for variant in VARIANTS:
                    for name in args.strategies:
                        budget = QUICK_BUDGETS.get(name, BUDGET) if args.quick else BUDGET
                        done = rows.get((problem.name, variant, name, seed))
                        finished = done is not None and len(done["shares"]) >= sum(n <= budget for n in BUDGETS)
                        if finished or time.monotonic() > end or (variant == "paid" and name in ONLY_FREE):
                            continue
                        row = cell(problem, variant, name, seed, budget)
                        rows[key(row)] = row
                        file.write(json.dumps(row) + "\n")
                        file.flush()
            print(f"seed {seed}: {len(rows)} cells", flush=True)
            if time.monotonic() > end:
                break

    result = summary(rows)
    print(f"\n{'':>22}  share of the true hypervolume, medians over seeds, at {BUDGETS}; evaluations to 99 %")
    for tag, shares in result["shares"].items():
        for i, ((accuracy, device), share) in enumerate(zip(PROBLEMS, shares, strict=True)):
            count = f"{result['to_99'][tag][i]:6.1f}" if result["to_99"][tag] else ""
            print(f"{tag:>22}  {accuracy:>14} {device:<8}", *(f"{v:.4f}" for v in share), count)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
