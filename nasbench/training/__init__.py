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
from nasbench.training.losses import alpha_loss, smoothed_loss, soft_loss
from nasbench.training.network import subnet_teacher, train_network
from nasbench.training.progress import ProgressCallback, Update
from nasbench.training.recipe import Recipe
from nasbench.training.shrinking import Shrinking
from nasbench.training.supernet import sandwich_ends, train_supernet

__all__ = [
    "ProgressCallback", "Recipe", "Shrinking", "Update", "alpha_loss", "evaluate_network", "fit_size", "fixed_subset",
    "load_weights", "predict_logits", "sandwich_ends", "save_weights", "smoothed_loss", "soft_loss", "subnet_accuracy",
    "subnet_teacher", "train_network", "train_supernet",
]  # fmt: skip
