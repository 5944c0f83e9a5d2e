"""How far sampling and training overlapped, computed from the recorded intervals of a run, not from its configuration. Pure but for reading."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protocol.intervals import is_waiting

Interval = tuple[float, float]

LEARNER_BUSY = frozenset({"train", "publish", "journal batch", "build batch"})
DECODING = frozenset({"decode"})


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Seconds that the union covers."""
    return sum(end - start for start, end in union(intervals))


def intersection(a: Iterable[Interval], b: Iterable[Interval]) -> list[Interval]:
    """The time that lies in both."""
    left, right, common = union(a), union(b), []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if start < end:
            common.append((start, end))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file, without a last line that its writer did not live to finish."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def read_intervals(run_dir: Path, name: str) -> list[tuple[str, float, float]]:
    """(activity, start, end) in seconds of one process, such as "learner-0"."""
    path = run_dir / "events" / f"{name}.jsonl"
    rows: list[tuple[str, float, float]] = []
    if path.is_file():
        for record in read_lines(path):
            names, offset = record["names"], record["offset_s"]
            rows += [(names[n], offset + a / 1e6, offset + b / 1e6) for n, a, b in record["rows"]]
    return rows


def overlap(run_dir: Path) -> float | None:
    """The share of the learner's busy time, first batch to last publish, in which at least one generator decodes; None without training."""
    learner = [(a, b) for name, a, b in read_intervals(run_dir, "learner-0") if name in LEARNER_BUSY]
    training = [a for name, a, _ in read_intervals(run_dir, "learner-0") if name == "train"]
    if not training:
        return None
    busy = [(a, b) for a, b in learner if a >= training[0]]
    decoding: list[Interval] = []
    for path in sorted((run_dir / "events").glob("generator-*.jsonl")):
        decoding += [(a, b) for name, a, b in read_intervals(run_dir, path.stem) if name in DECODING]
    return length(intersection(busy, decoding)) / length(busy) if length(busy) else None


def idle_share(run_dir: Path, name: str) -> float | None:
    """The share of a process's recorded time that it waited."""
    rows = read_intervals(run_dir, name)
    total = sum(b - a for _, a, b in rows)
    return sum(b - a for n, a, b in rows if is_waiting(n)) / total if total else None
