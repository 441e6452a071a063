"""Comparison of search strategies: problems x strategies x seeds, hypervolume and regret, rank tests.

`nasbench.comparison.statistics` and `trial` stand alone, for benchmarks with methods from elsewhere.
"""
