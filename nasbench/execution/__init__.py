"""Where evaluations run: in this process, in worker processes, or on a Ray cluster (`[execution]`, docs/scale_out.md).

What is evaluated is the business of `nasbench.evaluators`, and what is recorded that of the archive.
"""
