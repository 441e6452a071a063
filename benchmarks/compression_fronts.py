"""Two fronts of networks, chosen on validation images, compared by test accuracy and by latencies measured together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from hardware_profiles import Artifact, load_target, meter_for
from nasbench.pareto import hypervolume, non_dominated_mask

ROUNDS = 3


def measured(files: Iterable[str | Path], input_shape: tuple[int, ...], device: str) -> list[float]:
    """Latency in ms of ONNX files on one device, all in the same interleaved passes, the least of a few rounds of them.

    Files of two runs are measured anew, since what else a machine does changes from hour to hour.
    """
    target = load_target(device)
    artifacts = [Artifact(Path(file), "onnx", "fp32", input_shape) for file in files]
    rounds = [[m.latency_ms for m in meter_for(target).measure(artifacts, target)] for _ in range(ROUNDS)]
    return [float(v) for v in np.nanmin(rounds, axis=0)]


def front(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that nothing beats in both latency and validation accuracy, the fastest first."""
    rows = rows.dropna(subset=[column, "accuracy", "test_accuracy"])
    costs = np.stack([rows[column].to_numpy(float), -rows["accuracy"].to_numpy(float)], 1)
    return rows[non_dominated_mask(costs)].sort_values(column)


def compare(fronts: Mapping[str, pd.DataFrame], column: str) -> dict[str, float]:
    """The second of two fronts against the first: speed at equal test accuracy, and hypervolume.

    A front's accuracy at a latency lies on straight lines in log latency through the isotonic fit of its networks' test
    accuracies, so that no network is chosen, or left out, by what it does on the test images.

    Returns:
        `speedup`: geometric mean of the ratio of latencies over the accuracies that both fronts reach, NaN where there
        are none; `low`, `high`: those accuracies; `hypervolume_ratio`: of log latency and test accuracy, to the worst
        of both.
    """
    lines = []
    for rows in fronts.values():
        logs = np.log(rows[column].to_numpy(float))
        accuracy = isotonic_regression(rows["test_accuracy"].to_numpy(float)).x
        first = np.unique(accuracy, return_index=True)[1]  # of equal accuracies the fastest
        lines.append((accuracy[first], logs[first]))
    low, high = max(a[0] for a, _ in lines), min(a[-1] for a, _ in lines)
    at = np.linspace(low, high, 41) if low <= high else np.empty(0)
    gains = np.interp(at, *lines[0]) - np.interp(at, *lines[1])
    corner = np.array([max(t.max() for _, t in lines) + 0.1, -min(a.min() for a, _ in lines) + 0.01])
    volumes = [hypervolume(np.stack([t, -a], 1), corner) for a, t in lines]
    return {
        "speedup": float(np.exp(gains.mean())) if len(gains) else float("nan"),
        "low": float(low),
        "high": float(high),
        "hypervolume_ratio": volumes[1] / volumes[0],
    }
