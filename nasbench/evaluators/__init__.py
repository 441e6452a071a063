"""Evaluators: what turns proposed architectures into objective values. None of them proposes.

Predictors and tables for whole populations, a trained supernet, and the user's own function or command for one
architecture after another.
"""
