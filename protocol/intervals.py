"""One recorder of named busy and waiting intervals, used by every process.

A process is in exactly one activity at a time on each track, so that the seconds by name sum to the wall time by construction.
Names of waits start with "waiting:" and name a peer; everything else is work.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from protocol.messages import Intervals

WAITING = "waiting:"


def is_waiting(name: str) -> bool:
    """Whether an activity is a wait."""
    return name.startswith(WAITING)


@dataclass(frozen=True, slots=True)
class Activity:
    """What a process does now: a name, the peer that it waits for, and since when (seconds of time.time())."""

    name: str
    peer: str = ""
    detail: str = ""
    since_s: float = 0.0


class Recorder:
    """The activities of one track. `enter` ends the present one and starts the next; equal neighbours merge.

    Thread-safe, because heartbeats read what the working thread writes. Bounded: at most `max_rows` rows wait for `drain`; past that
    the oldest rows are merged into the totals alone and counted in `rows_lost`.
    """

    def __init__(self, identity: str, first: str = "starting", clock: Callable[[], float] = time.time, max_rows: int = 100_000) -> None:
        self._identity, self._clock, self._max_rows = identity, clock, max_rows
        self._lock = threading.Lock()
        self._offset_s = clock()
        self._now = Activity(first, since_s=self._offset_s)
        self._started_s = self._offset_s
        self._rows: list[tuple[str, float, float]] = []
        self._totals: dict[str, float] = {}
        self.rows_lost = 0

    @property
    def activity(self) -> Activity:
        """The present activity."""
        return self._now

    def enter(self, name: str, peer: str = "", detail: str = "") -> Activity:
        """End the present activity and start `name`. Returns the one that ended, so that a caller can go back to it."""
        with self._lock:
            before = self._now
            if before.name == name and before.peer == peer:
                self._now = Activity(name, peer, detail, before.since_s)
                return before
            now = self._clock()
            self._close(now)
            self._now = Activity(name, peer, detail, now)
            return before

    @contextmanager
    def during(self, name: str, peer: str = "", detail: str = "") -> Iterator[None]:
        """`name` for the length of the block, then what was before."""
        before = self.enter(name, peer, detail)
        try:
            yield
        finally:
            self.enter(before.name, before.peer, before.detail)

    def _close(self, now: float) -> None:
        name = self._now.name
        self._totals[name] = self._totals.get(name, 0.0) + now - self._started_s
        if self._rows and self._rows[-1][0] == name and self._started_s - self._rows[-1][2] < 1e-6:
            self._rows[-1] = (name, self._rows[-1][1], now)
        else:
            self._rows.append((name, self._started_s, now))
        self._started_s = now
        if len(self._rows) > self._max_rows:
            del self._rows[0]
            self.rows_lost += 1

    def totals(self) -> dict[str, float]:
        """Seconds by activity since the start, the present one included. They sum to the time since the start."""
        with self._lock:
            totals = dict(self._totals)
            totals[self._now.name] = totals.get(self._now.name, 0.0) + self._clock() - self._started_s
            return totals

    def drain(self) -> Intervals:
        """The rows since the last call, the present activity cut at this moment, as a message for the dashboard."""
        with self._lock:
            self._close(self._clock())
            rows, self._rows = self._rows, []
            names = sorted({name for name, _, _ in rows})
            place = {name: i for i, name in enumerate(names)}
            offset = rows[0][1]
            table = np.array([(place[n], round((a - offset) * 1e6), round((b - offset) * 1e6)) for n, a, b in rows], np.int64)
            return Intervals(identity=self._identity, names=names, rows=table.reshape(-1, 3), offset_s=offset)
