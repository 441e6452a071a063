"""What judging a subnet costs: statistics from training images and validation on others, against a slow reference.

    python -m benchmarks.subnet_evaluation [--space ofa_mobilenet_v3] [--resolution 64] [--images 2000] [--quick]

One thread, processor time, mean over five seeded random subnets of a supernet after one epoch; Fashion-MNIST in three
channels at the given resolution, as many images for the statistics as for the validation. The reference is the
extracted network: every normalisation layer pools its moments in float64 over the same batches, then the validation
images run through it.
The last line is JSON:

seconds_per_subnet    statistics and validation together
calibration_s         the statistics' part of it
images_per_s          of both
classified_otherwise  validation images that the reference gives another class, the most of all subnets
ratio_to_reference    the reference's seconds over ours
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from nasbench.tasks.array_task import ArrayTask, Dataset
from nasbench.tasks.base import Split, SplitName
from nasbench.tasks.fashion_mnist import FashionMNIST
from nasbench.training.evaluation import batches, predict_logits
from nasbench.training.supernet import train_supernet
from search_spaces import calibrate, load_space
from search_spaces.supernet import resize

BATCH = 100  # images at a time, for the statistics as for the validation


class Enlarged(ArrayTask):
    """Fashion-MNIST in three channels and at another size."""

    name = "fashion_mnist_enlarged"

    def __init__(self, resolution: int, images: int) -> None:
        super().__init__()
        self.resolution, self.images = resolution, images

    def load(self) -> Dataset:
        small = FashionMNIST().dataset
        splits: dict[SplitName, Split] = {}
        names: tuple[SplitName, ...] = ("train", "val")
        for name in names:
            split = small.splits[name]
            if len(split) < self.images:
                raise SystemExit(f"--images: at most {len(split)}, got {self.images}")
            images = resize(split.images[: self.images].float(), self.resolution).round().to(torch.uint8)
            splits[name] = Split(images.repeat(1, 3, 1, 1), split.labels[: self.images])
        return Dataset(splits, small.class_names)


def reference(network: nn.Module, task: ArrayTask) -> Tensor:
    """Classes `(n,)` of the validation images by a copy of an extracted network whose statistics are made anew."""
    network = copy.deepcopy(network)
    moments: dict[nn.BatchNorm2d, list[tuple[int, Tensor, Tensor]]] = {}

    def keep(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(inputs[0].double(), dim=(0, 2, 3), correction=0)
        moments.setdefault(module, []).append((inputs[0].numel() // len(mean), mean, var))

    layers = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    dropped = [m for m in network.modules() if isinstance(m, nn.Dropout)]
    network.train()
    for dropout in dropped:
        dropout.eval()
    for batch in batches(task, task.split("train").images, BATCH):
        network(batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:
        values, means, variances = (
            torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*moments[layer], strict=True)
        )
        share = (values / values.sum())[:, None]
        mean = (share * means).sum(0)
        layer.running_mean = mean.float()
        layer.running_var = ((share * (variances + means**2)).sum(0) - mean**2).float()
    network.eval()
    outputs = [network(batch) for batch in batches(task, task.split("val").images, BATCH)]
    return torch.cat(outputs).argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="ofa_mobilenet_v3", help="preset or TOML file")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000, help="for the statistics, and as many for the validation")
    parser.add_argument("--subnets", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one subnet and 500 images")
    options = parser.parse_args()
    if options.quick:
        options.subnets, options.images = 1, 500
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    task = Enlarged(options.resolution, options.images)
    space = load_space(options.space, 3, task.num_classes, resolutions=[options.resolution])
    supernet = space.supernet()
    train_supernet(supernet, space, task, epochs=1, lr=0.1, validation_images=0, seed=options.seed)
    supernet.eval()
    calibration, validation = task.split("train").images, task.split("val").images
    rows = []
    print(f"{'subnet':>6} {'M MACs':>7} {'statistics s':>12} {'validation s':>12} {'reference s':>11} {'otherwise':>9}")
    with torch.inference_mode():
        supernet(task.prepare(validation[:8]), space.references["largest"])  # the first call of a process is slow
        for index, arch in enumerate(space.sample(options.subnets, np.random.default_rng(options.seed))):
            marks = [time.process_time()]
            stats = calibrate(supernet, arch, batches(task, calibration, BATCH))
            marks.append(time.process_time())
            logits = predict_logits(partial(supernet, arch=arch, stats=stats), task, validation, batch_size=BATCH)
            classes = logits.argmax(1)
            marks.append(time.process_time())
            expected = reference(supernet.extract(arch, stats), task)
            marks.append(time.process_time())
            rows.append([*np.diff(marks), float((classes != expected).sum())])
            macs = space.workload(arch).macs / 1e6
            row = "{:6} {:7.1f} {:12.2f} {:12.2f} {:11.2f} {:9.0f}"
            print(row.format(index, macs, *rows[-1]), flush=True)
    statistics, judged, slow, _ = np.mean(rows, axis=0)
    seconds = statistics + judged
    figures = {
        "seconds_per_subnet": round(seconds, 3),
        "calibration_s": round(statistics, 3),
        "images_per_s": round(2 * options.images / seconds, 1),
        "classified_otherwise": int(np.max(rows, axis=0)[3]),
        "ratio_to_reference": round(slow / seconds, 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
