"""Smaller networks from larger ones: channels, blocks and weights, what they are worth, and taking them out.

Stages (`nasbench.stages.prune*`) put these pieces together; nothing here trains or measures. Torch-Pruning finds which
channels go together; predictors say what a smaller network costs.
"""
