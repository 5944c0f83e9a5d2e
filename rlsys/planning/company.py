"""Other cores that are at work while something is measured on one: in a run they are, and then memory and shared parts of a core are slower."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WORK = """
import os, numpy
parent, a = os.getppid(), numpy.random.default_rng(0).random((384, 384), numpy.float32)
b = a.copy()
while os.getppid() == parent:
    numpy.matmul(a, b, out=b)
    b /= b.max()
"""
"""Matrix products with some memory behind them, as an engine or a step has; ends with its parent."""


@contextmanager
def company(number: int) -> Iterator[frozenset[int]]:
    """`number` processes that compute until the block ends; their process ids."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(number):
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-I", "-c", _WORK],
                    stdin=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **one_thread},
                    start_new_session=True,  # Ctrl-C is ours to answer
                )
            )
        yield frozenset(process.pid for process in processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
