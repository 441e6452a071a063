"""Smaller networks from larger ones: which channels, blocks and weights there are, what they are worth, taking them out.

Stages (`nasbench.stages.prune*`) put these pieces together; nothing here trains or measures. Torch-Pruning finds which
channels go together; predictors say what a smaller network costs.
"""
