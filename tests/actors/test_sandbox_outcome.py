"""Which outcome the end of a program is, from what the cell reports: what ended it comes before what it also used too much of."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from actors.sandbox import MIB, Limits, Outcome, wire
from actors.sandbox.execution import judge

LIMITS = Limits(cpu_s=0.5, wall_s=1.5, memory_bytes=128 * MIB, output_bytes=MIB)
WELL = wire.Report(exit_code=0, cut=wire.CUT_BY_NOTHING, started=1, cpu_us=1000, wall_us=1000, peak_kib=1 << 10, strays=0, ended_us=2000)


@pytest.mark.parametrize(
    ("changes", "stderr", "expected"),
    [
        ({}, b"", "ok"),
        ({}, b"MemoryError", "ok"),
        ({"exit_code": 1}, b"ValueError", "runtime_error"),
        ({"exit_code": 1}, b"MemoryError", "memory_limit"),
        ({"exit_code": 1, "cpu_us": 640_000, "peak_kib": 183 << 10}, b"MemoryError", "memory_limit"),
        ({"exit_code": -signal.SIGXCPU, "peak_kib": 183 << 10}, b"", "time_limit"),
        ({"exit_code": -signal.SIGKILL, "cut": wire.CUT_BY_WALL}, b"MemoryError", "time_limit"),
        ({"cpu_us": 640_000}, b"", "time_limit"),
        ({"exit_code": 1, "cpu_us": 640_000}, b"ValueError", "time_limit"),
        ({"peak_kib": 183 << 10}, b"", "memory_limit"),
        ({"exit_code": -signal.SIGXFSZ, "cpu_us": 640_000}, b"", "output_limit"),
    ],
)
def test_what_ended_a_program(changes: dict[str, Any], stderr: bytes, expected: Outcome) -> None:
    assert judge(WELL._replace(**changes), LIMITS, 0, stderr) == expected


def test_too_much_output_comes_first() -> None:
    assert judge(WELL._replace(exit_code=1, cpu_us=640_000), LIMITS, MIB, b"MemoryError") == "output_limit"
