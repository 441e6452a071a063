"""Whether searches under hard limits end as they should, and whether limits hold when networks are measured.

    python -m benchmarks.limits [--problems 200] [--host 3] [--quick] [--output FILE]

Random problems: a space, a device's predicted latency (for some with a second limit, on multiply-accumulates or peak
memory), and a limit. One in four is impossible by a figure that the check knows nothing of: the least of all, of spaces
that can be enumerated; else below where coordinate descent ends from several starts, and below what the least blocks of
all positions would make, whether they go together or not (a bound where the predictor's head is linear). The others are
kept by an architecture that was found without the check: a quantile of random ones, or where coordinate descent ends. A
problem ends correctly if an impossible limit is refused with the true minimum (of spaces that can be enumerated the
enumerated one; else one that no coordinate descent gets below), and if a possible one ends with a front within the
limits.

Then `--host` runs search networks of the quickstart space (untrained: only latency is limited, and a function of the
choices stands for accuracy) for this machine, with few calibration networks, and predict, measure, correct. Their final
networks are converted and measured once more, which nothing was chosen by. The limit applies to the likely latency, not
to a cautious quantile, so that networks on the limit are proposed and half of them are too slow before the correction.

With `--output` every problem and run is a line in that file, and those that are there are not solved again. The last
line is JSON:

problems, ended_correctly         and the share of the problems that ended as they should
infeasible_refused, minimum_true  of the impossible ones: refused; refused with the true minimum
largest_predicted_violation       relative, over all networks of all fronts
host_runs, host_networks          runs, and their final networks that were measured again
host_first_violation              largest relative excess over the limit when first measured, before any correction
host_final_violation              of the final networks, by the measurement that they were judged by (0 by construction)
host_slack                        how far the slowest final network is below its limit, relative, in the worst run
host_remeasured_violation         of the final networks, by the further one
host_remeasured_share_above_2     share of the final networks that exceed the limit by more than 2 % then
share, rows_per_second, uniform_rows_per_second   architectures drawn a second under a limit that this share keeps:
                                  spread over costs; and as the space would draw them
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.evaluators.predicted import PredictedEvaluator
from nasbench.feasibility import check_limits
from nasbench.objectives import Objective, make_objective, violations
from nasbench.sampling import FeasibleSampler, limited_space
from nasbench.search import search
from nasbench.strategies.nsga2 import NSGA2
from predictors import BoundAdditive, BoundPredictor, predictor_for
from search_spaces import SearchSpace, UserError, load_space
from search_spaces.base import Archs

SPACES = (
    "nasbench201", "tiny_images", "quickstart", "ofa_mobilenet_v3", "proxylessnas", "ofa_resnet50", "autoformer_tiny",
    "vit28", "mobile96",
)  # fmt: skip
DEVICES = ("edge_tpu", "jetson_nano", "jetson_tx2", "ncs2", "pixel_1", "pixel_4", "raspberry_pi_3", "raspberry_pi_4")
ENUMERABLE = 2 * 10**5


def descend(space: SearchSpace, predictor: BoundPredictor, arch: Archs) -> float:
    """The latency where changing one knob after the other, to its best choice, ends."""
    here, least = arch.copy(), np.inf
    while True:
        for k in range(len(space.knobs)):
            options = np.repeat(here[None], space.cardinalities[k], axis=0)
            options[:, k] = np.arange(space.cardinalities[k])
            here = options[int(predictor.predict(space.canonical(options)).mean.argmin())]
        value = float(predictor.predict(space.canonical(here[None])).mean[0])
        if value >= least * (1 - 1e-12):
            return least
        least = value


def relaxed_minimum(predictor: BoundAdditive) -> float:
    """The cost of the least of each feature at each position; a bound where more of a feature never costs less."""
    leading = predictor.predictor.leading or None
    totals = sum(rows[:, :leading].min(0) for _, _, rows in predictor.positions)
    return float(predictor.predictor.estimate(np.asarray(totals)[None]).mean[0])


class Problems:
    """Spaces and predictors, made once."""

    def __init__(self) -> None:
        self.spaces: dict[str, SearchSpace] = {}
        self.bound: dict[tuple[str, str, str], BoundAdditive] = {}
        self.least: dict[tuple[str, str], float] = {}
        self.samples: dict[str, Archs] = {}

    def space(self, name: str) -> SearchSpace:
        if name not in self.spaces:
            self.spaces[name] = load_space(name)
            self.samples[name] = self.spaces[name].sample(20_000, np.random.default_rng(0))
        return self.spaces[name]

    def predictor(self, space: str, device: str, metric: str) -> BoundAdditive:
        key = (space, device, metric)
        if key not in self.bound:
            bound = predictor_for(device, metric).bind(self.space(space))
            assert isinstance(bound, BoundAdditive)
            self.bound[key] = bound
        return self.bound[key]

    def independent_minimum(self, space: str, device: str) -> float:
        """The least latency that was found without the check: of all, or by coordinate descent from many starts."""
        if (space, device) not in self.least:
            made, predictor = self.space(space), self.predictor(space, device, "latency_ms")
            if made.size <= ENUMERABLE:
                rows = np.indices(tuple(made.cardinalities.tolist())).reshape(len(made.knobs), -1).T
                least = float(predictor.predict(made.canonical(rows.astype(made.dtype))).mean.min())
            else:
                starts = self.samples[space][:6]
                least = min(descend(made, predictor, start) for start in starts)
            self.least[space, device] = least
        return self.least[space, device]


def solve(problems: Problems, rng: np.random.Generator, impossible: bool) -> dict[str, Any]:
    """One problem, and how it ended."""
    name, device = str(rng.choice(SPACES)), str(rng.choice(DEVICES))
    space, latency = problems.space(name), problems.predictor(name, device, "latency_ms")
    least = problems.independent_minimum(name, device)
    bound: dict[str, BoundPredictor] = {"latency_ms": latency, "params": problems.predictor(name, device, "params")}
    if impossible:
        enumerated = space.size <= ENUMERABLE
        limit = (least if enumerated else min(relaxed_minimum(latency), least)) * rng.uniform(0.5, 0.99)
        limits = [make_objective("latency_ms", target=device, limit=float(limit))]
    else:
        values = latency.predict(problems.samples[name]).mean
        if rng.random() < 0.5:
            limit = float(np.quantile(values, 10.0 ** rng.uniform(-4, -0.1)))
            arch = problems.samples[name][int(np.abs(values - limit).argmin())]
        else:
            limit, arch = least * 10.0 ** rng.uniform(0.002, 0.1), None
        limits = [make_objective("latency_ms", target=device, limit=limit)]
        if arch is not None and rng.random() < 0.6:
            metric = str(rng.choice(["peak_memory_bytes", "macs"]))
            bound[metric] = problems.predictor(name, device, metric)
            kept = float(bound[metric].predict(arch[None]).mean[0])
            limits[0] = make_objective(
                "latency_ms", target=device, limit=max(limit, float(latency.predict(arch[None]).mean[0]))
            )
            limits.append(make_objective(metric, limit=kept * (1 + 1e-9)))
    result: dict[str, Any] = {"space": name, "device": device, "impossible": impossible, "limits": len(limits)}
    try:
        found = check_limits(space, limits, bound)
    except UserError as error:
        told = float(str(error).split("limit is ")[1].split(" ms")[0]) if "limit is " in str(error) else np.nan
        # Four digits are told, rounded up.
        true = least * (1 - 1e-9) <= told <= least * 1.002 if space.size <= ENUMERABLE else told <= least * 1.002
        return result | {"correct": impossible and bool(true), "refused": True, "true": bool(true), "error": str(error)}
    if impossible:
        return result | {"correct": False, "refused": False, "true": False}
    objectives = [make_objective("params", direction="maximise"), *limits]
    start = None if found.arch is None else found.arch[None]
    strategy = NSGA2(limited_space(space, objectives, bound, start=start), 0)
    archive = search(strategy, PredictedEvaluator(objectives, bound), objectives, evaluations=1500, batch=300)
    excess = _excess(archive.archs, limits, bound)
    return result | {"correct": bool(len(archive)) and excess == 0.0, "violation": excess, "networks": len(archive)}


def _excess(archs: Archs, limits: list[Objective], bound: Mapping[str, BoundPredictor]) -> float:
    if not len(archs):
        return 0.0
    values = np.stack([bound[o.name].predict(archs).mean for o in limits], axis=1)
    return float(violations(values, limits).max())


def sampling() -> dict[str, float]:
    """Draws a second under a limit that one in a million keeps."""
    space = load_space("ofa_mobilenet_v3")
    bound = {"latency_ms": predictor_for("raspberry_pi_4", "latency_ms").bind(space)}
    low, high = 29.0, 45.0
    for _ in range(12):
        limit = (low + high) / 2
        sampler = FeasibleSampler(space, [make_objective("latency_ms", target="raspberry_pi_4", limit=limit)], bound)
        low, high = (limit, high) if sampler.share < 1e-6 else (low, limit)
    rates = []
    for spread in (True, False):
        start = time.process_time()
        drawn = sampler.draw(50_000, np.random.default_rng(0), spread=spread)
        rates.append(len(drawn) / (time.process_time() - start))
        assert (bound["latency_ms"].predict(drawn).mean <= limit).all()
    return {"rows_per_second": rates[0], "uniform_rows_per_second": rates[1], "share": sampler.share}


def stand_in(choices: Mapping[str, Any]) -> float:
    """A figure between 0 and 1 that grows with every choice, by how much larger it is, in place of accuracy."""
    return float(np.log([v for v in choices.values() if isinstance(v, int | float)]).sum()) / 100


def host_run(seed: int, folder: Path) -> dict[str, Any]:
    """One search for this machine under a limit, and what its final networks measure once more."""
    from hardware_profiles import load_target
    from nasbench.archive import arch_row
    from nasbench.config import parse_config
    from nasbench.experiment import run_experiment
    from nasbench.measurements import measure_networks
    from nasbench.networks import space_network

    space, host = load_space("quickstart"), load_target("host")
    ends = measure_networks(host, [space_network(space, name, "quickstart") for name in ("smallest", "largest")])
    low, high = (float(m.measurement.latency_ms) for m in ends if m.measurement is not None)
    limit = low * (high / low) ** SHARES[seed % len(SHARES)]
    config = {
        "seed": seed,
        "task": {"name": "none"},
        "space": {"name": "quickstart"},
        "evaluator": {"name": "benchmarks.limits:stand_in", "samples": 40, "verify": 6},
        "targets": {"devices": ["host"], "calibration_networks": 10},
        "objectives": {"accuracy": {}, "latency_ms": {"limit": limit}},
        "strategy": {"name": "nsga2", "evaluations": 40_000, "batch": 500},
        "verify": {"rounds": 5, "tolerance": 0.03, "quantile": 0.5},  # the likely value: networks on the limit
        "selection": {"count": 1},
    }
    view = run_experiment(parse_config(config), folder / str(seed))
    front, rounds = view.front(), view.rounds()
    final = front[front["pareto"]]
    networks = [space_network(space, ".".join(map(str, arch_row(a))), "quickstart") for a in final["arch"]]
    again = measure_networks(host, networks)
    excess = np.array([m.measurement.latency_ms / limit - 1 for m in again if m.measurement is not None])
    print(rounds.to_string(), flush=True)
    print(f"  {len(final)} final networks, measured again: excess {np.round(excess, 3).tolist()}", flush=True)
    return {
        "first": float(rounds.iloc[0]["largest_excess"]),
        "final": float(np.maximum(final["latency_ms_measured"] / limit - 1, 0).max()),
        "slack": float(1 - final["latency_ms_measured"].max() / limit),
        "again": np.maximum(excess, 0.0).tolist(),
        "rounds": int(rounds["round"].max()),
    }


SHARES = (0.4, 0.6, 0.8)  # where the limits lie between the latencies of the smallest and the largest network, in logs


class Known:
    """Results by key, kept in a file of JSON lines where one is named."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.results: dict[str, dict[str, Any]] = {r.pop("key"): r for r in map(json.loads, lines)}

    def __call__(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self.results:
            self.results[key] = make()
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps({"key": key} | self.results[key]) + "\n")
        return self.results[key]


def main() -> None:
    parser = argparse.ArgumentParser(description="Searches under hard limits: ended correctly, and kept.")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--host", type=int, default=3, help="runs on this machine")
    parser.add_argument("--quick", action="store_true", help="24 problems, no run on this machine")
    parser.add_argument("--output", type=Path, help="JSON lines to continue from and to add to")
    args = parser.parse_args()
    known = Known(args.output)
    count, runs = (24, 0) if args.quick else (args.problems, args.host)
    problems, results = Problems(), []
    for number in range(count):
        rng, impossible = np.random.default_rng([1, number]), number % 4 == 3
        result = known(f"problem {number}", partial(solve, problems, rng, impossible))
        results.append(result)
        if not result["correct"]:
            print(number, result, flush=True)
    refused = [r for r in results if r["impossible"]]
    report: dict[str, Any] = {
        "problems": count,
        "ended_correctly": float(np.mean([r["correct"] for r in results])),
        "infeasible_refused": float(np.mean([r["refused"] for r in refused])),
        "minimum_true": float(np.mean([r["true"] for r in refused])),
        "largest_predicted_violation": max(r.get("violation", 0.0) for r in results),
    }
    print(json.dumps(report), flush=True)
    report |= sampling()
    print(json.dumps(report), flush=True)
    if runs:
        with tempfile.TemporaryDirectory() as folder:
            found = [known(f"host {seed}", partial(host_run, seed, Path(folder))) for seed in range(runs)]
        again = np.concatenate([f["again"] for f in found])
        report |= {
            "host_runs": runs,
            "host_networks": len(again),
            "host_first_violation": max(f["first"] for f in found),
            "host_final_violation": max(f["final"] for f in found),
            "host_slack": max(f["slack"] for f in found),
            "host_remeasured_violation": float(again.max()),
            "host_remeasured_share_above_2": float((again > 0.02).mean()),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
