"""How far sampling and training overlapped, computed from the recorded intervals of a run, not from its configuration."""

from __future__ import annotations

from pathlib import Path

from protocol.intervals import TRAINING, is_waiting
from rlsys.usage import Interval, intersection, length, read_rows, tracks, union

__all__ = ["idle_share", "intersection", "length", "overlap", "read_intervals", "union"]

LEARNER_BUSY = TRAINING | {"publish", "journal batch", "build batch", "snapshot", "commit"}
DECODING = frozenset({"decode", "prefill"})


def read_intervals(run_dir: Path, name: str) -> list[tuple[str, float, float]]:
    """(activity, start, end) in seconds of one process, such as "learner-0"."""
    return [(row.name, row.start_s, row.end_s) for row in read_rows(run_dir, name)]


def overlap(run_dir: Path) -> float | None:
    """The share of the learner's busy time, first batch to last publish, in which at least one generator decodes; None without training."""
    learner = [(a, b) for name, a, b in read_intervals(run_dir, "learner-0") if name in LEARNER_BUSY]
    training = [a for name, a, _ in read_intervals(run_dir, "learner-0") if name in TRAINING]
    if not training:
        return None
    busy = [(a, b) for a, b in learner if a >= training[0]]
    decoding: list[Interval] = []
    for track in tracks(run_dir, main_only=True):
        if track.startswith("generator-"):
            decoding += [(a, b) for name, a, b in read_intervals(run_dir, track) if name in DECODING]
    return length(intersection(busy, decoding)) / length(busy) if length(busy) else None


def idle_share(run_dir: Path, name: str) -> float | None:
    """The share of a process's recorded time that it waited."""
    rows = read_intervals(run_dir, name)
    total = sum(b - a for _, a, b in rows)
    return sum(b - a for n, a, b in rows if is_waiting(n)) / total if total else None
