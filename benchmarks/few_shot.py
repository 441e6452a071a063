"""Latency of all networks of a space on a new device, from 10 or 20 measured ones and other devices' tables.

    NASBENCH_DATA=... python -m benchmarks.few_shot [--draws 20] [--tables nasbench201 fbnet]
    NASBENCH_DATA=... python -m benchmarks.few_shot --select [--designs default ...]

NAS-Bench-201: six unseen devices, nine source columns (the protocol of HELP, Lee et al., NeurIPS 2021, but 10 or 20
measurements in all and every other architecture as a query). FBNet: each device in turn is unseen, and the sources are
all columns of other device families, so that no batch size or near-copy of it is left among them. Random draws of the
measured networks, and those that `suggest` picks, for as many seeds; `suggest` sees nothing but the sources.

`--select` compares designs, each NAS-Bench-201 source device in turn unseen and its family left out, families counting
alike. The default `Design` is the simplest of those best in `average_spearman` and `suggest_average` together. It never
touches the six.

The last line is JSON, per table and number of measurements, averaged over devices:

mean_spearman, worst_spearman   rank correlation of the median draw; of the lowest draw
average_spearman                rank correlation, averaged over draws
suggest_spearman                as mean_spearman, measuring what `suggest` picks, the median seed
suggest_average, suggest_worst  as average_spearman and worst_spearman
within_10_percent, median_ape   share of queries within 10 %, and median relative error, averaged over draws
coverage_90                     share of queries inside their 90 % interval
adapt_s                         seconds to adapt and predict all networks, the median
learn_s                         seconds to learn from the sources, once per table (NAS-Bench-201)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from predictors.few_shot import Design, FewShot, device_family
from predictors.tables import MeasuredTable

SOURCES = (
    "1080ti_1", "1080ti_32", "1080ti_256", "silver_4114", "silver_4210r", "samsung_a50", "pixel3", "essential_ph_1",
    "samsung_s7",
)  # fmt: skip
UNSEEN = ("titan_rtx_256", "gold_6226", "fpga", "pixel2", "raspi4", "eyeriss")
SAMPLES = (10, 20)
FILES = {"nasbench201": "nb201_latency_help.csv.gz", "fbnet": "fbnet_latency_help.csv.gz"}
SELECT_QUERIES = 2000  # of --select, for speed
DESIGNS = {
    "default": Design(),
    "sums only": Design(scales=("linear",)),
    "logarithms only": Design(scales=("log",)),
    "whole networks only": Design(executed=False),
    "every hypothesis alike": Design(unlike=1e6),
    "unlike 1": Design(unlike=1.0),
    "finer noise": Design(noise=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16)),
    "sources as measured": Design(smooth=False),
}
COLUMNS = (
    "mean_spearman", "average_spearman", "worst_spearman", "suggest_spearman", "suggest_average", "suggest_worst",
    "within_10_percent", "median_ape", "coverage_90", "adapt_s",
)  # fmt: skip


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def evaluate(
    learned: FewShot,
    table: MeasuredTable,
    device: str,
    k: int,
    draws: int,
    picks: int,
    queries: np.ndarray | None = None,
) -> dict[str, float]:
    """The figures of one device and number of measurements; of some queries only, where they are given."""
    truth = table.column(device)
    queries = np.arange(len(table)) if queries is None else queries
    drawn = [np.random.default_rng([i, k]).choice(len(table), k, replace=False) for i in range(draws)]
    suggested = [learned.suggest(k, seed) for seed in range(picks)]
    rows = []
    for measured in [*drawn, *suggested]:
        start = time.perf_counter()
        estimate = learned.adapt(table.archs[measured], truth[measured]).of(table.archs[queries])
        seconds = time.perf_counter() - start
        new = ~np.isin(queries, measured)
        true = truth[queries[new]]
        middle, low, high = (estimate.quantile(q)[new] for q in (0.5, 0.05, 0.95))
        error, inside = np.abs(middle / true - 1), (true >= low) & (true <= high)
        rows.append((spearman(middle, true), np.mean(error <= 0.1), np.median(error), np.mean(inside), seconds))
    at_random, picked = np.array(rows[:draws]), np.array(rows[draws:]).reshape(-1, 5)
    return {
        "mean_spearman": float(np.median(at_random[:, 0])),
        "average_spearman": float(at_random[:, 0].mean()),
        "worst_spearman": float(at_random[:, 0].min()),
        "suggest_spearman": float(np.median(picked[:, 0])) if len(picked) else float("nan"),
        "suggest_average": float(picked[:, 0].mean()) if len(picked) else float("nan"),
        "suggest_worst": float(picked[:, 0].min()) if len(picked) else float("nan"),
        "within_10_percent": float(at_random[:, 1].mean()),
        "median_ape": float(at_random[:, 2].mean()),
        "coverage_90": float(at_random[:, 3].mean()),
        "adapt_s": float(np.median(at_random[:, 4])),
    }


def report(title: str, results: dict[str, dict[str, float]], families: bool = False) -> dict[str, float]:
    """Print a row per device and their average, in which families may count alike; return the average."""
    share = Counter(device_family(name) for name in results)
    weights = [1 / share[device_family(name)] if families else 1.0 for name in results]
    average = {c: float(np.average([row[c] for row in results.values()], weights=weights)) for c in COLUMNS}
    print(f"\n{title}\n{'device':16}" + "".join(c.rjust(len(c) + 2) for c in COLUMNS))
    for name, row in {**results, "average": average}.items():
        print(f"{name:16}" + "".join(f"{row[c]:.4f}".rjust(len(c) + 2) for c in COLUMNS), flush=True)
    return {c: round(v, 4) for c, v in average.items()}


def nasbench201(table: MeasuredTable, draws: int, picks: int) -> dict[str, dict[str, float]]:
    """The six unseen devices."""
    start = time.perf_counter()
    learned = FewShot.learn(table, SOURCES)
    seconds = time.perf_counter() - start
    print(f"learned from {len(SOURCES)} devices in {seconds:.1f} s")
    figures = {}
    for k in SAMPLES:
        rows = {device: evaluate(learned, table, device, k, draws, picks) for device in UNSEEN}
        figures[str(k)] = report(f"NAS-Bench-201, {k} measurements, {draws} draws", rows) | {
            "learn_s": round(seconds, 2)
        }
    return figures


def fbnet(table: MeasuredTable, draws: int, picks: int) -> dict[str, dict[str, float]]:
    """Every device in turn, its family left out of the sources."""
    families = list(dict.fromkeys(map(device_family, table.devices)))
    results: dict[int, dict[str, dict[str, float]]] = {k: {} for k in SAMPLES}
    for family in families:
        learned = FewShot.learn(table, [d for d in table.devices if device_family(d) != family])
        for k in SAMPLES:
            for device in table.devices:
                if device_family(device) == family:
                    results[k][device] = evaluate(learned, table, device, k, draws, picks)
    return {str(k): report(f"FBNet, {k} measurements, {draws} draws", rows) for k, rows in results.items()}


def select(table: MeasuredTable, designs: list[str], draws: int, picks: int) -> dict[str, dict[str, dict[str, float]]]:
    """Every design on the source devices, each in turn unseen and its family left out; families count alike."""
    table = table.select(SOURCES)
    queries = np.random.default_rng(0).permutation(len(table))[:SELECT_QUERIES]
    figures = {}
    for name in designs:
        rows: dict[int, dict[str, dict[str, float]]] = {k: {} for k in SAMPLES}
        for family in dict.fromkeys(map(device_family, SOURCES)):
            learned = FewShot.learn(table, [d for d in SOURCES if device_family(d) != family], design=DESIGNS[name])
            for device in SOURCES:
                if device_family(device) == family:
                    for k in SAMPLES:
                        rows[k][device] = evaluate(learned, table, device, k, draws, picks, queries)
        figures[name] = {str(k): report(f"{name}: {k} measurements", r, families=True) for k, r in rows.items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Few-shot transfer of latency to devices that were never seen.")
    parser.add_argument("--draws", type=int, default=20, help="random sets of measured networks per device")
    parser.add_argument("--picks", type=int, default=5, help="sets that suggest picks, by seed")
    parser.add_argument("--tables", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--select", action="store_true", help="compare designs on the source devices only")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=list(DESIGNS), help="which of them")
    args = parser.parse_args()
    if not os.environ.get("NASBENCH_DATA"):
        sys.exit("set NASBENCH_DATA to the folder of real measurements")
    tables = {name: MeasuredTable.from_help(Path(os.environ["NASBENCH_DATA"]) / FILES[name]) for name in args.tables}
    if args.select:
        print(json.dumps(select(tables["nasbench201"], args.designs, args.draws, args.picks)))
        return
    run = {"nasbench201": nasbench201, "fbnet": fbnet}
    print(json.dumps({name: run[name](table, args.draws, args.picks) for name, table in tables.items()}))


if __name__ == "__main__":
    main()
