"""Architectures per second through the real search loop, beside the predictor alone and beside pymoo. One thread.

The published once-for-all MobileNetV3 space, population 1,000, two objectives: accuracy from a 128-400-400-400-1 fp32
MLP on one-hot features (once-for-all's own predictor in shape, random weights), latency from a bound table. Ask,
evaluate, limits, tell and the archive are those of `nasbench run`. Every round runs NSGA-II, regularised evolution, the
MLP's forward alone (a ready batch of 1,000) and pymoo's NSGA-II (integer variables, the same two predictors) in turn;
rates are medians over the rounds, in processor time.

    python -m benchmarks.search_throughput [--rounds 12] [--generations 10]

Ends with one JSON line: `archs_per_s` of the slower strategy, its `fraction_of_predictor_limit` and `ratio_to_pymoo`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.objectives import make_objective
from nasbench.pareto import ParetoArchive
from nasbench.search import search
from nasbench.strategies.nsga2 import NSGA2
from nasbench.strategies.regularized_evolution import RegularizedEvolution
from predictors import predictor_for
from predictors.base import BoundPredictor, Estimate
from search_spaces import SearchSpace, load_space
from search_spaces.base import Archs

POPULATION = 1000
INPUTS, HIDDEN = 128, 400
TARGET = "raspberry_pi_4"


class MLPAccuracy(BoundPredictor):
    """A multi-layer perceptron on one-hot features, padded to a width of 128."""

    def __init__(self, space: SearchSpace, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.space = space
        self.network = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def inputs(self, archs: Archs) -> torch.Tensor:
        """`(n, 128)` float32."""
        features = self.space.features(archs)
        padded = np.zeros((len(features), INPUTS), dtype=np.float32)
        padded[:, : features.shape[1]] = features
        return torch.from_numpy(padded)

    @torch.inference_mode()
    def forward(self, inputs: torch.Tensor) -> NDArray[np.float64]:
        """`(n,)` predictions."""
        return self.network(inputs).numpy()[:, 0].astype(np.float64)

    def predict(self, archs: Archs) -> Estimate:
        mean = self.forward(self.inputs(archs))
        return Estimate(mean, np.zeros(len(mean)))

    def expected(self, probabilities: Sequence[torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError("this benchmark searches without gradients")


def pymoo_nsga2(space: SearchSpace, accuracy: BoundPredictor, latency: BoundPredictor) -> Callable[[], None]:
    """A function that runs one generation of pymoo's NSGA-II on integer variables, as its documentation sets it up."""
    from pymoo.algorithms.moo.nsga2 import NSGA2 as PymooNSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling

    class Searching(Problem):
        def __init__(self) -> None:
            super().__init__(n_var=len(space.knobs), n_obj=2, xl=0, xu=space.cardinalities - 1, vtype=int)

        def _evaluate(self, x: NDArray[Any], out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            archs = space.canonical(x)
            out["F"] = np.column_stack([-accuracy.predict(archs).mean, latency.predict(archs).mean])

    algorithm = PymooNSGA2(
        pop_size=POPULATION,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    algorithm.setup(Searching(), termination=("n_gen", 10**9), seed=0, verbose=False)
    return lambda: algorithm.next()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--generations", type=int, default=10, help="of each contender in each round")
    args = parser.parse_args()
    torch.set_num_threads(1)

    space = load_space("ofa_mobilenet_v3")
    accuracy = MLPAccuracy(space)
    latency = predictor_for(TARGET, "latency_ms").bind(space)
    objectives = (make_objective("accuracy"), make_objective("latency_ms", target=TARGET))
    evaluator = PredictedEvaluator(objectives, {"accuracy": accuracy, "latency_ms": latency})

    def contender(strategy: NSGA2 | RegularizedEvolution) -> Callable[[], None]:
        archive = ParetoArchive(space, len(objectives))

        def generation() -> None:
            search(strategy, evaluator, objectives, evaluations=archive.evaluated + POPULATION, batch=POPULATION,
                   archive=archive)  # fmt: skip

        return generation

    batch = accuracy.inputs(space.sample(POPULATION, np.random.default_rng(0)))
    contenders: dict[str, Callable[[], Any]] = {
        "nsga2": contender(NSGA2(space, 0, population_size=POPULATION)),
        "regularized_evolution": contender(RegularizedEvolution(space, 0, population_size=POPULATION)),
        "predictor alone": lambda: accuracy.forward(batch),
        "pymoo": pymoo_nsga2(space, accuracy, latency),
    }
    for generation in contenders.values():  # the first, random population, and whatever is made on first use
        generation()
        generation()
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, generation in contenders.items():
            start = time.process_time()
            for _ in range(args.generations):
                generation()
            rates[name].append(args.generations * POPULATION / (time.process_time() - start))
    for name, found in rates.items():
        print(f"{name:>22}: {np.median(found):>9,.0f} architectures/s ({min(found):,.0f} to {max(found):,.0f})")

    slower = min(("nsga2", "regularized_evolution"), key=lambda name: float(np.median(rates[name])))

    def ratio(to: str) -> float:
        # Within a round, so that a drift of the clock falls on both.
        return float(np.median(np.array(rates[slower]) / np.array(rates[to])))

    print(
        json.dumps(
            {
                "archs_per_s": round(float(np.median(rates[slower]))),
                "fraction_of_predictor_limit": round(ratio("predictor alone"), 3),
                "ratio_to_pymoo": round(ratio("pymoo"), 2),
                "strategy": slower,
                "population": POPULATION,
            }
        )
    )


if __name__ == "__main__":
    main()
