"""What training minimises beside a task's own loss: smoothed labels, and what a teacher says."""

from __future__ import annotations

from torch import Tensor

from nasbench.tasks.base import Task

# Of powers of the ratio of probabilities, in AlphaNet's published setting (Wang et al., ICML 2021).
CLIP = 5.0


def smoothed_loss(task: Task, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The task's loss with label smoothing (Szegedy et al., CVPR 2016): a share of the target is uniform."""
    loss = task.loss(logits, labels)
    if not smoothing:
        return loss
    return (1 - smoothing) * loss - smoothing * logits.log_softmax(1).mean()


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy against a teacher's softened output, times T^2 to keep gradients at size (Hinton et al. 2015)."""
    target = (teacher / temperature).softmax(1)
    return -(target * (logits / temperature).log_softmax(1)).sum(1).mean() * temperature**2


def alpha_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Adaptive alpha-divergence of a student q from its teacher p (AlphaNet: Wang et al., ICML 2021).

    For every image the larger of two: alpha = 1, the Kullback-Leibler divergence, grows where the student gives too
    little weight; alpha = -1, half the chi-squared divergence, where it gives weight to what its teacher rules out. The
    ratio q/p of the latter is clipped, which bounds the gradient.

    Args:
        logits: of the student, `(batch, classes)`.
        teacher: its teacher's logits, `(batch, classes)`; no gradient goes there.

    Returns:
        The mean over the batch, 0 where both say the same. Its gradient is the paper's, which takes the ratios as
        constants: -1/alpha E_q[(p/q)^alpha grad log q].
    """
    log_q, log_p = logits.log_softmax(1), teacher.detach().log_softmax(1)
    fixed_q, p = log_q.detach(), log_p.exp()
    weight = fixed_q.exp() * (fixed_q - log_p).exp().clamp_max(CLIP)
    kl, chi2 = (p * (log_p - fixed_q)).sum(1), 0.5 * (weight.sum(1) - 1)
    value = chi2.maximum(kl).mean()
    surrogate = (weight * log_q).sum(1).where(chi2 > kl, -(p * log_q).sum(1)).mean()
    return surrogate + (value - surrogate).detach()
