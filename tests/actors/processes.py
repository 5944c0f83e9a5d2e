"""What processes there are, read from /proc."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rlsys.launchers.local import start_ticks


def parents() -> dict[int, int]:
    """pid -> parent's pid, of every process that is not a zombie."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                table[int(entry.name)] = int(fields[1])
    return table


def descendants(*roots: int) -> set[int]:
    """Processes below `roots`, without the roots."""
    table = parents()
    found: set[int] = set()
    while fresh := {pid for pid, parent in table.items() if parent in found | set(roots)} - found:
        found |= fresh
    return found


def born(pids: Iterable[int]) -> set[tuple[int, int]]:
    """(pid, start in the kernel's ticks) of those that live: a pid alone may be another process's some minutes later."""
    return {(pid, ticks) for pid in pids if (ticks := start_ticks(pid))}


def alive(processes: Iterable[tuple[int, int]]) -> list[int]:
    """Those of `born` that live still. One that nobody has reaped does not: on some machines nobody does."""
    return [pid for pid, ticks in processes if start_ticks(pid) == ticks]


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 120.0) -> None:
    """Poll `condition` until it holds; fail at the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.01)
