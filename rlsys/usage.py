"""Where the time of a run went, from the intervals in `events/`: busy, idle and their causes by process and by device. Pure but for reading.

A file is one track: `events/<process>.jsonl` is the process's main one, `events/<process>+<track>.jsonl` another thread of it. Files are
bounded: past `events_bytes` one is moved to `events/old/`, where it replaces the one before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from protocol.intervals import is_waiting
from rlsys.lines import read_lines

Interval = tuple[float, float]
UNRECORDED = "not recorded"
"""Before a process began, after it ended, and what was lost with the dashboard or by rotation."""


class Row(NamedTuple):
    """One activity, seconds on the supervisor's clock; iteration and group are -1 for none."""

    name: str
    start_s: float
    end_s: float
    iteration: int = -1
    group: int = -1


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


def causes(rows: Iterable[Row], start_s: float, end_s: float) -> dict[str, float]:
    """Seconds by activity within [start_s, end_s]. They sum to its length, whatever the rows: gaps are UNRECORDED, and where rows overlap
    (a clock was aligned anew between them) the earlier one counts."""
    seconds: dict[str, float] = defaultdict(float)
    at = start_s
    for row in sorted(rows, key=lambda row: row.start_s):
        begin, end = max(row.start_s, at), min(row.end_s, end_s)
        if end > begin:
            seconds[UNRECORDED] += begin - at
            seconds[row.name] += end - begin
            at = end
    seconds[UNRECORDED] += max(0.0, end_s - at)
    return {name: value for name, value in seconds.items() if value > 0 or name != UNRECORDED}


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one process, or of several on one device, over a stretch of time."""

    wall_s: float
    busy_s: float
    idle_s: dict[str, float]
    """By cause; with `busy_s` they sum to `wall_s`."""
    work_s: dict[str, float]
    """What `busy_s` was spent on, by activity; for several processes on one device this may sum to more."""

    @property
    def busy_share(self) -> float:
        return self.busy_s / self.wall_s if self.wall_s else 0.0


def usage(rows: Iterable[Row], start_s: float, end_s: float) -> Usage:
    """Of one track."""
    seconds = causes(rows, start_s, end_s)
    idle = {name: s for name, s in seconds.items() if is_waiting(name) or name == UNRECORDED}
    work = {name: s for name, s in seconds.items() if name not in idle}
    return Usage(end_s - start_s, sum(work.values()), idle, work)


def device_usage(tracks: Sequence[Sequence[Row]], start_s: float, end_s: float) -> Usage:
    """Of several tracks that share a device: it is busy while any of them is, starting up aside; idle time is shared evenly among what they
    are at meanwhile."""
    at_work = [r for rows in tracks for r in rows if not is_waiting(r.name) and r.name != "starting"]
    busy = union((max(r.start_s, start_s), min(r.end_s, end_s)) for r in at_work)
    work: dict[str, float] = defaultdict(float)
    for rows in tracks:
        for name, seconds in usage(rows, start_s, end_s).work_s.items():
            work[name] += seconds
    edges = [start_s, *(edge for interval in busy for edge in interval), end_s]
    idle_parts = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]
    idle: dict[str, float] = defaultdict(float)
    for rows in tracks:
        for start, end in idle_parts:
            for name, seconds in causes((r for r in rows if r.end_s > start and r.start_s < end), start, end).items():
                idle[name] += seconds / len(tracks)
    return Usage(end_s - start_s, length(busy), dict(idle), dict(work))


# ---------------------------------------------------------------------------------------------------- reading


def read_rows(run_dir: Path, track: str) -> list[Row]:
    """What one track recorded, such as "learner-0" or "learner-0+intake", oldest first; equal neighbours are one row."""
    rows: list[Row] = []
    for path in (run_dir / "events" / "old" / f"{track}.jsonl", run_dir / "events" / f"{track}.jsonl"):
        for record in read_lines(path) if path.is_file() else ():
            if not {"names", "offset_s", "rows"} <= record.keys():
                continue
            names, offset = record["names"], record["offset_s"]
            for n, a, b, *ids in record["rows"]:
                row = Row(names[n], offset + a / 1e6, offset + b / 1e6, *ids)
                last = rows[-1] if rows else None
                if last and last.name == row.name and last[3:] == row[3:] and abs(row.start_s - last.end_s) < 1e-4:
                    rows[-1] = last._replace(end_s=row.end_s)
                else:
                    rows.append(row)
    return rows


def tracks(run_dir: Path, *, main_only: bool = False) -> list[str]:
    """The tracks of a run, the main one of each process first."""
    events = run_dir / "events"
    names = {path.stem for folder in (events, events / "old") for path in folder.glob("*.jsonl")}
    return sorted((n for n in names if not main_only or "+" not in n), key=lambda n: (n.partition("+")[0], n))
