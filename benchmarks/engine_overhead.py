"""Seconds that the engine itself takes for 1,000 tabular evaluations: everything but the look-up in the table.

Regularised evolution with two objectives on NAS-Bench-201's space, batches of 16 as in `nasbench run`, through the
classes of a real run: strategy, recorded evaluator, Pareto archive, and the run's SQLite archive with one commit per
evaluation. The table is made up here, since its values do not matter; the time inside its evaluator is subtracted. In
turn with it, in the same process: the same search without the SQLite archive, a bare Python loop of regularised
evolution (Real et al. 2019) with one objective and a dict for a table, and 1,000 bare commits to a SQLite file in WAL
mode. Medians over the rounds, one thread.

    python -m benchmarks.engine_overhead [--rounds 7] [--evaluations 1000]

Ends with one JSON line: `seconds_with_archive`, `seconds_without_archive`, `seconds_bare_loop`,
`seconds_bare_commits`, `seconds_processor_with_archive` (processor time, the table's included, which other work on the
machine does not change), all medians; the same as `least_seconds_...`; and `commits` as counted in the archive.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import json
import sqlite3
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from nasbench.archive import Archive
from nasbench.evaluators.base import Evaluation, Evaluator, Proposals
from nasbench.evaluators.recorded import RecordedEvaluator
from nasbench.evaluators.table import ArchitectureTable, TableEvaluator
from nasbench.execution.in_process import InProcess
from nasbench.objectives import make_objective
from nasbench.pareto import ParetoArchive
from nasbench.search import search
from nasbench.strategies.regularized_evolution import RegularizedEvolution
from search_spaces import SearchSpace, load_space

POPULATION, SAMPLE, BATCH = 100, 25, 16


class Timed(Evaluator):
    """A tabular evaluator whose own time is counted."""

    def __init__(self, table: Evaluator) -> None:
        self.table = table
        self.metrics, self.fidelities, self.preferred_batch = table.metrics, table.fidelities, table.preferred_batch
        self.inside = 0.0

    def evaluate(self, proposals: Proposals) -> Evaluation:
        start = time.perf_counter()
        result = self.table.evaluate(proposals)
        self.inside += time.perf_counter() - start
        return result


def made_up_table(space: SearchSpace, folder: Path) -> TableEvaluator:
    """A table of all architectures of a space with random accuracies and latencies, read from a file as a user's."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(c) for c in space.cardinalities), indexing="ij"), axis=-1)
    archs = np.unique(space.canonical(grid.reshape(-1, len(space.knobs)).astype(space.dtype)), axis=0)
    file = folder / "table.csv"
    accuracy, latency = rng.uniform(0.1, 0.9, len(archs)), rng.uniform(1, 20, len(archs))
    rows = (
        f"{' '.join(map(str, a))},{x:.6f},{y:.6f}" for a, x, y in zip(archs.tolist(), accuracy, latency, strict=True)
    )
    file.write_text("arch,accuracy,latency_ms\n" + "\n".join(rows) + "\n")
    return TableEvaluator(space, path=str(file))


def engine(space: SearchSpace, table: Evaluator, evaluations: int, file: Path | None) -> tuple[float, int, float]:
    """Seconds outside the table, rows in the archive, and seconds of processor time, with the table."""
    objectives = (make_objective("accuracy"), make_objective("latency_ms"))
    start, cpu = time.perf_counter(), time.process_time()
    timed = Timed(table)
    evaluator: Evaluator = InProcess(timed)
    archive = None if file is None else Archive(file)
    if archive is not None:
        evaluator = RecordedEvaluator(objectives, evaluator, None, archive, "search")
    strategy = RegularizedEvolution(space, 0, population_size=POPULATION, sample_size=SAMPLE)
    search(strategy, evaluator, objectives, evaluations=evaluations, batch=BATCH,
           archive=ParetoArchive(space, len(objectives)))  # fmt: skip
    if archive is not None:
        archive.close()
    seconds, cpu = time.perf_counter() - start - timed.inside, time.process_time() - cpu
    if file is None:
        return seconds, 0, cpu
    rows = int(sqlite3.connect(file).execute("SELECT count(*) FROM evaluations").fetchone()[0])
    return seconds, rows, cpu


def bare_loop(table: dict[tuple[int, ...], float], choices: list[int], evaluations: int) -> float:
    """Regularised evolution as its paper's pseudo-code, nothing else."""
    import random

    rng = random.Random(0)
    start = time.perf_counter()
    population: deque[tuple[tuple[int, ...], float]] = deque()
    history = []
    for count in range(evaluations):
        if count < POPULATION:
            arch = tuple(rng.randrange(c) for c in choices)
        else:
            parent = max((rng.choice(population) for _ in range(SAMPLE)), key=lambda member: member[1])[0]
            knob = rng.randrange(len(choices))
            shifted = (parent[knob] + rng.randrange(1, choices[knob])) % choices[knob]
            arch = (*parent[:knob], shifted, *parent[knob + 1 :])
        member = (arch, table[arch])
        population.append(member)
        history.append(member)
        if len(population) > POPULATION:
            population.popleft()
    return time.perf_counter() - start


def bare_commits(file: Path, count: int) -> float:
    """So many rows, each in a transaction of its own, in WAL mode."""
    start = time.perf_counter()
    database = sqlite3.connect(file, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("CREATE TABLE evaluations (id INTEGER PRIMARY KEY, arch TEXT, vals TEXT)")
    for id in range(count):
        database.execute("INSERT INTO evaluations VALUES (?, ?, ?)", (id, "0 1 2 3 4 0", '{"accuracy": 0.5}'))
    database.close()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--evaluations", type=int, default=1000)
    args = parser.parse_args()

    space = load_space("nasbench201")
    choices = [int(c) for c in space.cardinalities]
    labels = ("with_archive", "without_archive", "bare_loop", "bare_commits", "processor_with_archive")
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    with tempfile.TemporaryDirectory(prefix="nasbench-overhead-") as name:
        folder = Path(name)
        table = made_up_table(space, folder)
        content: ArchitectureTable = table.table
        plain: dict[tuple[int, ...], Any] = {
            tuple(a): v for a, v in zip(content.archs.tolist(), content.values[:, 0].tolist(), strict=True)
        }
        engine(space, table, 100, None)  # whatever is made on first use
        for number in range(args.rounds):
            with_archive, rows, cpu = engine(space, table, args.evaluations, folder / f"engine-{number}.sqlite")
            seconds["with_archive"].append(with_archive)
            seconds["processor_with_archive"].append(cpu)
            seconds["without_archive"].append(engine(space, table, args.evaluations, None)[0])
            seconds["bare_loop"].append(bare_loop(plain, choices, args.evaluations))
            seconds["bare_commits"].append(bare_commits(folder / f"bare-{number}.sqlite", args.evaluations))
    for label, found in seconds.items():
        low, high = min(found) * 1e3, max(found) * 1e3
        print(f"{label:>16}: {np.median(found) * 1e3:8.1f} ms ({low:.1f} to {high:.1f})")
    result = {f"seconds_{label}": round(float(np.median(found)), 4) for label, found in seconds.items()}
    result |= {f"least_seconds_{label}": round(min(found), 4) for label, found in seconds.items()}
    print(json.dumps(result | {"evaluations": args.evaluations, "commits": rows}))


if __name__ == "__main__":
    main()
