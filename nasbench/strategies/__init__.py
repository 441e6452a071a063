"""Search strategies: what proposes architectures. None of them evaluates; `nasbench.registry` names them.

The ask/tell family (`base.Strategy`) works on integer arrays, whole populations at a time; the gradient family
(`base.GradientStrategy`) trains a mixture supernet. Dominance and variation, which they share, are in `nasbench.pareto`
and `nasbench.variation`.
"""
