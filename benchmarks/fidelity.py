"""Supernet fidelity: does accuracy with shared weights rank architectures as training them alone does?

    python -m benchmarks.fidelity [--architectures 20] [--epochs 3] [--run DIR]

Trains the quickstart supernet (or takes that of a finished run), evaluates architectures spread over the space with it,
and trains each of them alone from scratch. Both accuracies are of the validation split. Ends with one JSON line:
`kendall_tau`, `spearman`, `n`, and the mean accuracies.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from nasbench.config import find_experiment, load_config
from nasbench.evaluators.base import Proposals
from nasbench.experiment import SUPERNET, spread_sample
from nasbench.plan import make_plan
from nasbench.run import load_run_config
from nasbench.training import evaluate_network, load_weights, train_network, train_supernet
from predictors.measuring import network_input_shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=3, help="of stand-alone training")
    parser.add_argument("--run", type=Path, help="a finished quickstart run, whose supernet is taken")
    arguments = parser.parse_args()

    config = load_run_config(arguments.run) if arguments.run else load_config(find_experiment("quickstart"))
    plan = make_plan(config)
    torch.manual_seed(config.seed)
    supernet = plan.space.supernet()
    if arguments.run:
        load_weights(supernet, arguments.run / SUPERNET)
    else:
        with tempfile.TemporaryDirectory() as folder:
            options = plan.training_options
            train_supernet(
                supernet, plan.space, plan.task, **options, seed=config.seed, checkpoint=Path(folder) / "s.safetensors"
            )
    archs = spread_sample(plan.space, arguments.architectures, config.seed + 1, {})
    evaluator = plan.make_evaluator(supernet)
    shared = evaluator.evaluate(Proposals(np.arange(len(archs), dtype=np.int64), archs)).values[:, 0]
    alone = np.empty(len(archs))
    print(f"{'M MACs':>8} {'shared':>8} {'alone':>8} {'seconds':>8}")
    for index, arch in enumerate(archs):
        start = time.perf_counter()
        torch.manual_seed(index)
        network = plan.space.build(arch)
        workload = plan.space.workload(arch)
        shape = network_input_shape(plan.space, arch)
        # By the recipe of the quickstart's fine-tuning.
        train_network(network, plan.task, shape, epochs=arguments.epochs, lr=0.1, label_smoothing=0.0, seed=index)
        alone[index] = evaluate_network(network, plan.task, "val", shape)
        seconds = time.perf_counter() - start
        print(f"{workload.macs / 1e6:8.2f} {shared[index]:8.4f} {alone[index]:8.4f} {seconds:8.1f}", flush=True)
    result = {
        "kendall_tau": round(float(kendalltau(shared, alone).statistic), 3),
        "spearman": round(float(spearmanr(shared, alone).statistic), 3),
        "n": len(archs),
        "epochs_alone": arguments.epochs,
        "mean_accuracy_shared": round(float(shared.mean()), 4),
        "mean_accuracy_alone": round(float(alone.mean()), 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
