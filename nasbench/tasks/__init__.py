"""Tasks: data with fixed splits, normalisation, augmentation, loss and metrics.

What a network is to learn, and nothing about networks. The embedded images lie in `data/` with their licence. Training
loops live in `nasbench.training`.
"""
