"""Federated learning: rounds and megabytes to 95 % of what training on all data in one place reaches.

    python -m benchmarks.federated [--seeds 5] [--rounds 40] [--quick] [--output FILE]

The ten people of the smartwatch recordings are the clients. Each trains on the first 60 % of each of its recordings;
the network is judged by the rest of all ten. A round asks half of them, each makes one pass over its data in batches of
16. *central* trains the same network on all ten people's data for ten passes, its rate falling; a client makes about
twenty in forty rounds, at a constant rate. Ways that send whole updates are run without and with dropouts: 30 % of
those asked fail in mid-round.

The network is the smallest of `sensor_1d`, but for `subnets`: there the people have three kinds of device, each trains
the largest subnet that it can train within its memory, and accuracy is the mean over the ten of their own subnets'.

`--output` keeps finished seeds and goes on from them. The last line is JSON: per way mean and standard deviation over
seeds of the accuracy after the last round, rounds and megabytes (both ways, all clients) until 95 % of central accuracy
was first reached, in how many seeds it was, and megabytes in all. `subnets` is compared with the same central network.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hardware_profiles.paths import write_text
from nasbench.ondevice.clients import Client, LocalTraining
from nasbench.ondevice.federated import evaluator, federate
from nasbench.ondevice.streams import person_stream
from nasbench.ondevice.subnets import fitting_subnet
from nasbench.ondevice.updates import Compression
from nasbench.tasks.base import Split
from nasbench.tasks.part import PartOfTask
from nasbench.tasks.smartwatch import SmartwatchExercises
from nasbench.training.evaluation import evaluate_network, fixed_subset
from nasbench.training.network import train_network
from predictors.training_memory import TrainingMemoryCount
from search_spaces import load_space

BATCH, LR, SHARE = 16, 0.1, 0.6
PARTICIPATION, DROPOUT = 0.5, 0.3
BUDGETS_KB = (560, 720, 960)
CENTRAL_PASSES = 10
WAYS: dict[str, tuple[LocalTraining, Compression]] = {
    "fedavg": (LocalTraining("fedavg", epochs=1, batch_size=BATCH, lr=LR), Compression()),
    "fedprox": (LocalTraining("fedprox", epochs=1, batch_size=BATCH, lr=LR, mu=0.1), Compression()),
    "scaffold": (LocalTraining("scaffold", epochs=1, batch_size=BATCH, lr=LR), Compression()),
    "fedavg int8": (LocalTraining("fedavg", epochs=1, batch_size=BATCH, lr=LR), Compression(1.0, 8)),
    "fedavg 10 % int8": (LocalTraining("fedavg", epochs=1, batch_size=BATCH, lr=LR), Compression(0.1, 8)),
    "subnets": (LocalTraining("fedavg", epochs=1, batch_size=BATCH, lr=LR), Compression()),
}


def seed_rows(seed: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What one seed gives: the central accuracy, and a row per way with and without dropouts."""
    watch = SmartwatchExercises(overlap=0.25)
    people = sorted({int(p) for p in watch.recordings.persons})
    shape = watch.input_shape
    space = load_space("sensor_1d", shape[0], watch.num_classes)
    own = [watch.of_person(p, SHARE) for p in people]
    whole = person_stream(watch, [people[:5], people[5:]], share=SHARE).tasks
    splits = {
        name: Split(torch.cat([t.split(name).images for t in whole]), torch.cat([t.split(name).labels for t in whole]))
        for name in ("train", "test")
    }
    judged = fixed_subset(splits["test"], 400, 0)
    splits["test"] = judged
    everything = PartOfTask(watch, splits)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    central = space.build(space.references["smallest"])
    train_network(
        central, everything, shape, epochs=CENTRAL_PASSES, batch_size=BATCH, lr=LR, momentum=0.0,
        label_smoothing=0.0, weight_decay=0.0, seed=seed,
    )  # fmt: skip
    accuracy = evaluate_network(central, everything, "test", shape)
    found: dict[str, dict[str, Any]] = {"central": {"accuracy": accuracy}}
    memory = TrainingMemoryCount(batch=BATCH).bind(space)
    archs = [fitting_subnet(space, memory, kb * 1024) for kb in BUDGETS_KB]
    for way, (local, compression) in WAYS.items():
        for dropout in (0.0, DROPOUT) if compression == Compression() else (0.0,):
            torch.manual_seed(seed)
            network = space.supernet() if way == "subnets" else space.build(space.references["smallest"])
            clients = [
                Client(f"person {p}", task, archs[(i + seed) % len(archs)] if way == "subnets" else None, shape)
                for i, (p, task) in enumerate(zip(people, own, strict=True))
            ]
            result = federate(
                network, clients, rounds=rounds, local=local, compression=compression, participation=PARTICIPATION,
                dropout=dropout, evaluate=evaluator(watch, judged, clients), seed=seed,
            )  # fmt: skip
            table = result.frame()
            reached = result.to_reach(0.95 * accuracy)
            name = f"{way}, dropouts" if dropout else way
            found[name] = {
                "accuracy": float(table["accuracy"].iloc[-1]),
                "megabytes": float(table["megabytes"].iloc[-1]),
                "rounds_to_95": reached and reached[0],
                "megabytes_to_95": reached and round(reached[1], 4),
                "left_out": sum(result.left_out.values()),
            }
            print(f"seed {seed}: {name:<28} {found[name]}  (central {accuracy:.1%})", flush=True)
    return found


def main() -> None:
    """Print rows and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="one seed, six rounds")
    parser.add_argument("--output", type=Path, help="JSON file of finished seeds, to go on from")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, rounds = (1, 6) if arguments.quick else (arguments.seeds, arguments.rounds)
    done: dict[str, dict[str, dict[str, Any]]] = {}
    if arguments.output and arguments.output.exists():
        done = json.loads(arguments.output.read_text())
    for seed in range(seeds):
        key = f"{seed}/{rounds}"
        if key not in done:
            done[key] = seed_rows(seed, rounds)
            if arguments.output:
                write_text(arguments.output, json.dumps(done, indent=1))
    rows = [done[f"{seed}/{rounds}"] for seed in range(seeds)]
    summary: dict[str, Any] = {"seeds": seeds, "rounds": rounds}
    for name in rows[0]:
        summary[name] = {"reached": sum(r[name].get("rounds_to_95") is not None for r in rows)}
        for metric in rows[0][name]:
            values = [r[name][metric] for r in rows if r[name][metric] is not None]
            summary[name][metric] = round(float(np.mean(values)), 4) if values else None
            if metric != "left_out" and len(values) > 1:
                summary[name][f"{metric}_std"] = round(float(np.std(values, ddof=1)), 4)
    del summary["central"]["reached"]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
