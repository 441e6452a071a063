"""Training and evaluation of networks and supernets.

One loop, two procedures (`train_supernet`, `train_network`) that say what a step is, checkpoints that resume to the
bit, and batched evaluation. Data come from a `Task`, networks from a `SearchSpace`; neither lives here.
"""

from nasbench.training.checkpoint import load_weights, save_weights
from nasbench.training.evaluation import (
    evaluate_network,
    fit_size,
    fixed_subset,
    predict_logits,
    subnet_accuracy,
)
from nasbench.training.loop import Recipe
from nasbench.training.network import subnet_teacher, train_network
from nasbench.training.progress import ProgressCallback, Update
from nasbench.training.supernet import sandwich_ends, train_supernet

__all__ = [
    "ProgressCallback", "Recipe", "Update", "evaluate_network", "fit_size", "fixed_subset", "load_weights",
    "predict_logits", "sandwich_ends", "save_weights", "subnet_accuracy", "subnet_teacher", "train_network",
    "train_supernet",
]  # fmt: skip
