"""Processes that keep other cores at work are there during the block and gone after it, whatever ends it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlsys.planning.company import company
from rlsys.planning.measure import _descendants_cpu_s


def at_work(pids: frozenset[int]) -> bool:
    """Whether each has used processor time (a tick of it)."""
    return all(sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) > 5 for pid in pids)


def test_company_works_and_ends_and_does_not_count_as_ours() -> None:
    with pytest.raises(ZeroDivisionError), company(2) as pids:
        deadline = time.monotonic() + 600
        while not at_work(pids):
            assert time.monotonic() < deadline
            os.sched_yield()
        assert len(pids) == 2
        assert _descendants_cpu_s(pids) < _descendants_cpu_s()
        raise ZeroDivisionError
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_nobody_is_company_too() -> None:
    with company(0) as pids:
        assert pids == frozenset()
