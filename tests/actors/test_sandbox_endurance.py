"""Long runs: many executions leave nothing behind, and a crowd does not change a verdict."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from actors.rewards import Sample
from actors.rewards.unit_tests import UnitTests
from actors.sandbox import MIB, Limits, wire
from actors.sandbox.execution import Program
from actors.sandbox.runner import Sandbox
from tests.actors import hostile_python
from tests.actors.processes import descendants

LIMITS = Limits(cpu_s=0.2, wall_s=0.4, memory_bytes=128 * MIB, output_bytes=MIB)


def resident_bytes(pids: set[int]) -> int:
    """Memory of the processes that is theirs alone or shared among them, in bytes."""
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += next(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def zombies(pids: set[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"]


@pytest.mark.slow
def test_twenty_thousand_executions_leave_nothing() -> None:
    quick = [source for source, outcome in hostile_python.HOSTILE.values() if outcome == "ok"]
    with Sandbox(2) as sandbox:
        generator = random.Random(1)
        before: tuple[set[int], int, int] | None = None
        for number in range(20_000):
            source = "print(sum(map(int, input().split())))" if number % 10 else generator.choice(quick)
            execution = sandbox.run(Program(kind=wire.PYTHON, content=source.encode()), b"1 2\n", LIMITS)
            if number % 10:
                assert execution.stdout == b"3\n", (number, execution)
            if number == 1000:  # by then every cache is warm
                cells = descendants(os.getpid())
                before = (cells, resident_bytes(cells | {os.getpid()}), open_descriptors())
        assert before is not None and sandbox.pool.cells_replaced == 0
        cells, memory, descriptors = before
        assert descendants(os.getpid()) == cells and not zombies(cells)
        assert open_descriptors() == descriptors
        grown = resident_bytes(cells | {os.getpid()}) - memory
        assert grown < 8 * MIB, f"{grown / MIB:.1f} MiB more than after 1000 executions"


PROGRAMS = {
    "accepted": "n = int(input())\nprint(sum(i * i for i in range(n)))",
    "wrong_answer": "n = int(input())\nprint(sum(i * i for i in range(n)) + (n > 3000))",
    "runtime_error": "n = int(input())\nprint(sum(i * i for i in range(n)) // (n <= 3000))",
    "memory_limit": "n = int(input())\nx = [0] * (n << 20) if n > 3000 else 0\nprint(sum(i * i for i in range(n)))",
    "output_limit": "n = int(input())\nprint(sum(i * i for i in range(n)), ' ' * (0 if n < 3000 else 1 << 25))",
}


def crowd(num_problems: int) -> list[tuple[dict[str, Any], str, str]]:
    """(problem, program, expected verdict)."""
    sizes = [100 + 300 * index for index in range(15)]
    tests = [{"input": f"{n}\n", "output": f"{sum(i * i for i in range(n))}\n"} for n in sizes]
    names = list(PROGRAMS)
    return [
        ({"id": str(number), "tests": tests}, PROGRAMS[names[number % len(names)]], names[number % len(names)])
        for number in range(num_problems)
    ]


@pytest.mark.parametrize("num_problems", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_crowd_of_problems_is_judged_as_each_alone(num_problems: int) -> None:
    reward = UnitTests({"cells": 2, "score": "soft", "memory_limit_bytes": 256 * MIB})

    def judge(item: tuple[dict[str, Any], str, str]) -> tuple[str, float | None]:
        score = reward.score(Sample(problem=item[0], completion=f"```python\n{item[1]}\n```", truncated=False))
        return score.status, score.value

    try:
        problems = crowd(num_problems)
        alone = {item[2]: judge(item) for item in problems[: len(PROGRAMS)]}
        assert {name: status for name, (status, _) in alone.items()} == {name: name for name in PROGRAMS}
        with ThreadPoolExecutor(num_problems) as threads:
            together = list(threads.map(judge, problems))
        assert together == [alone[name] for _, _, name in problems]
    finally:
        reward.close()
