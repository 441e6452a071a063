"""`python -m nasbench` is the command `nasbench`."""

from nasbench.cli import main

if __name__ == "__main__":
    main()
