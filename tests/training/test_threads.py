"""Threads that share parameters."""

from __future__ import annotations

import subprocess
import sys

SHARED = """
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from nasbench.training.step import held_ends


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient


sys.setswitchinterval(1e-5)
torch.set_num_threads(1)
parameters = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(100)]
with ThreadPoolExecutor(2) as executor:
    for _ in range(100):
        ends = held_ends(parameters)
        jobs = [
            executor.submit(lambda: [Twice.apply(p) for p in parameters]),
            executor.submit(lambda: [p.as_strided((2, 2), (4, 1)) for p in parameters]),
        ]
        assert all(len(job.result()) == 100 for job in jobs)
        del jobs, ends
print("ended")
"""


def test_threads_that_begin_graphs_at_the_same_parameters_do_not_wait_for_each_other() -> None:
    # Without `held_ends` this stands still within the first steps.
    ended = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "ended\n", ended.stderr
