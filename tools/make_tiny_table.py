"""Make the table that `nasbench compare` has by default: every network of the space `tiny_images`, really trained.

    python tools/make_tiny_table.py

Each of the 256 networks is trained on 5,000 of the embedded Fashion-MNIST training images for two epochs, from a seed
that is its place in the table, and judged on the 9,000 training and validation images that it has not seen (the test
images are not touched). That takes some four minutes of one thread; what is done is kept, and an interrupted call
goes on.

Multiply-accumulates and parameters are exact, latencies are predictions from the devices' datasheets.

The table is that of torch 2.13 on one x86 thread; elsewhere the rounding differs, and with it accuracies in the third
digit.
"""

import csv
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardware_profiles.paths import atomic, read_csv, write_text
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training.evaluation import fit_size
from predictors import predictor_for
from search_spaces import SearchSpace, load_space

TABLE = Path(__file__).parent.parent / "nasbench" / "comparison" / "data" / "tiny_images.csv"
DEVICES = ("raspberry_pi_4", "pixel_3", "jetson_nano", "edge_tpu")
TRAINING_IMAGES, EPOCHS, BATCH, PEAK_LR = 5000, 2, 128, 0.3
SAVE_EVERY = 16


def all_archs(space: SearchSpace) -> np.ndarray:
    """`(256, K)`, the last knob fastest."""
    return np.array(list(itertools.product(*(range(c) for c in space.cardinalities))), dtype=space.dtype)


def images(space: SearchSpace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then those to judge by."""
    task = FashionMNIST()
    splits = [task.split("train"), task.split("val")]
    x = torch.cat([fit_size(task.prepare(s.images), space.input_shape) for s in splits])
    y = torch.cat([s.labels for s in splits])
    order = torch.randperm(len(splits[0]), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([order, torch.arange(len(order), len(y))])
    x, y = x[rows].contiguous(memory_format=torch.channels_last), y[rows]
    return x[:TRAINING_IMAGES], y[:TRAINING_IMAGES], x[TRAINING_IMAGES:], y[TRAINING_IMAGES:]


def accuracy_of(network: nn.Module, x: Tensor, y: Tensor, held: Tensor, labels: Tensor) -> float:
    """Train, and judge."""
    network.train()
    steps = EPOCHS * -(-len(x) // BATCH)
    optimizer = torch.optim.SGD(network.parameters(), lr=PEAK_LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.2)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        return float((torch.cat([network(b).argmax(1) for b in held.split(1000)]) == labels).double().mean())


def main() -> None:
    torch.set_num_threads(1)
    space = load_space("tiny_images", 1, 10)
    archs = all_archs(space)
    costs = {name: predictor_for("", name).bind(space).predict(archs).mean.astype(int) for name in ("macs", "params")}
    for device in DEVICES:
        predicted = predictor_for(device, "latency_ms", predictor="roofline").bind(space).predict(archs).mean
        costs[f"{device}_predicted_ms"] = np.round(predicted, 5)
    header = ["arch", "accuracy", "train_seconds", *costs]
    done: dict[str, list[str]] = {}
    if TABLE.is_file():
        found, rows = read_csv(TABLE)
        done = {row[0]: row[1:3] for _, row in rows} if found[:3] == header[:3] else {}
    data = images(space)
    texts = ["".join(map(str, a)) for a in archs]

    def save() -> None:
        with atomic(TABLE) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            for i, text in enumerate(texts):
                if text in done:
                    writer.writerow([text, *done[text], *(column[i] for column in costs.values())])

    for place, text in enumerate(texts):
        if text in done:
            continue
        torch.manual_seed(place)
        start = time.process_time()
        accuracy = accuracy_of(space.build(archs[place]), *data)
        done[text] = [f"{accuracy:.6f}", f"{time.process_time() - start:.2f}"]
        if len(done) % SAVE_EVERY == 0:
            save()
            print(f"{len(done)} of {len(texts)}", end="\r", file=sys.stderr)
    save()
    record = {
        "source": "tools/make_tiny_table.py, Fashion-MNIST (Zalando, MIT)",
        "sha256": hashlib.sha256(TABLE.read_bytes()).hexdigest(),
        "rows": len(done),
        "columns": {
            "arch": "choice indices of the space tiny_images",
            "accuracy": f"share of 9,000 images not trained on; {EPOCHS} epochs on {TRAINING_IMAGES} images",
            "train_seconds": "processor seconds of training and judging, one x86 thread",
            "macs": "exact",
            "params": "exact",
        }
        | {f"{device}_predicted_ms": "ms, predicted from the datasheet, not measured" for device in DEVICES},
    }
    write_text(TABLE.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    print(f"{TABLE}: {len(done)} networks")


if __name__ == "__main__":
    main()
