"""Post-search stages: what happens to a chosen network before it is deployed.

A stage takes a network in one form and gives it in another; the runner checks the order beforehand and measures every
result anew. Training loops live in `nasbench.training`, conversion and meters in `hardware_profiles`.
"""
