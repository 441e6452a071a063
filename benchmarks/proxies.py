"""How well zero-cost proxies rank the networks of NAS-Bench-201, before any training.

    NASBENCH_DATA=... python -m benchmarks.proxies [--cells 300] [--batch 32] [--initialisations 1] [--seed 0]

Random cells of the whole space, those that cut the output off from the input included, as in the literature; Spearman
rank correlation of each proxy with the benchmark's CIFAR-10 test accuracy after 200 epochs. Images: Fashion-MNIST, the
embedded training images, resized to 32x32 and copied to three channels; `--images noise` takes Gaussian noise instead.
`--scores FILE` keeps the scores as CSV.

The last line is JSON, one object per proxy:

spearman             over all cells
spearman_connected   over the cells whose output depends on the input
spearman_top         over the best tenth of the cells by accuracy
standard_error       of `spearman`, from 1,000 bootstrap samples of the cells
seconds              processor time per network, the mean; `score_network` lets `grad_norm` and `snip` share one
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from torch import Tensor

from nasbench.tasks.fashion_mnist import FashionMNIST
from predictors.zero_cost import PROXIES
from search_spaces import NASBench201Space
from search_spaces.supernet import resize

# Cells that cut the output off from the input have the accuracy of a guess.
GUESS = 10.5


def batch_of(images: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images `(count, 3, 32, 32)` and labels `(count,)`."""
    generator = torch.Generator().manual_seed(seed)
    if images == "noise":
        return torch.randn((count, 3, 32, 32), generator=generator), torch.randint(10, (count,), generator=generator)
    task = FashionMNIST()
    split = task.split("train")
    rows = torch.randperm(len(split), generator=generator)[:count]
    grey = resize(task.prepare(split.images[rows]), 32)
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), split.labels[rows]


def score(
    cells: int, batch: int, initialisations: int, images: str, seed: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """A row per cell with its official index and every proxy; and seconds per network of each proxy."""
    space = NASBench201Space()
    indices = np.random.default_rng(seed).permutation(space.size)[:cells]
    x, labels = batch_of(images, batch, seed)
    values, seconds = np.zeros((cells, len(PROXIES))), np.zeros(len(PROXIES))
    for row, arch in enumerate(space.from_official_index(indices)):
        for start in range(initialisations):
            torch.manual_seed(seed + start)
            network = space.build(arch)
            for column, proxy in enumerate(PROXIES.values()):
                began = time.process_time()
                values[row, column] += proxy(network, x, labels) / initialisations
                seconds[column] += time.process_time() - began
        if row % 50 == 49:
            print(f"{row + 1} of {cells} cells, {seconds.sum():.0f} s of processor time", flush=True)
    table = pd.DataFrame(values, columns=list(PROXIES), index=pd.Index(indices, name="index"))
    return table, dict(zip(PROXIES, seconds / cells / initialisations, strict=True))


def figures(table: pd.DataFrame, accuracy: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Rank correlations of every proxy with the accuracies `(n,)`."""
    connected = accuracy > GUESS
    top = accuracy >= np.quantile(accuracy, 0.9)
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(table), size=(1000, len(table)))
    result = {}
    for name in PROXIES:
        values = table[name].to_numpy()
        result[name] = {
            "spearman": spearmanr(values, accuracy).statistic,
            "spearman_connected": spearmanr(values[connected], accuracy[connected]).statistic,
            "spearman_top": spearmanr(values[top], accuracy[top]).statistic,
            "standard_error": float(np.std([spearmanr(values[d], accuracy[d]).statistic for d in draws])),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--initialisations", type=int, default=1)
    parser.add_argument("--images", choices=("fashion_mnist", "noise"), default="fashion_mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scores", type=Path, help="CSV file to keep the scores in")
    args = parser.parse_args()
    if not os.environ.get("NASBENCH_DATA"):
        sys.exit("NASBENCH_DATA names the folder with nb201_accuracy.csv.gz")
    torch.set_num_threads(1)
    file = Path(os.environ["NASBENCH_DATA"]) / "nb201_accuracy.csv.gz"
    accuracies = pd.read_csv(file, index_col="arch_idx")["cifar10_test_acc"]
    table, seconds = score(args.cells, args.batch, args.initialisations, args.images, args.seed)
    if args.scores:
        table.to_csv(args.scores)
    found = figures(table, accuracies.loc[table.index].to_numpy(), args.seed)
    for name, row in found.items():
        row["seconds"] = seconds[name]
        print(f"{name:>20} " + "  ".join(f"{key} {value:7.3f}" for key, value in row.items()))
    print(json.dumps({name: {key: round(value, 4) for key, value in row.items()} for name, row in found.items()}))


if __name__ == "__main__":
    main()
