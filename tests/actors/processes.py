"""What processes there are, read from /proc."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def parents() -> dict[int, int]:
    """pid -> parent's pid, of every process that is not a zombie."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
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


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 120.0) -> None:
    """Poll `condition` until it holds; fail at the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.01)
