"""`python -m nasbench` is the command `nasbench`."""

from nasbench.cli import main

main()
