"""One clock per process that never jumps, and how far it stands from the supervisor's. Pure but for reading the time.

    process --Heartbeat(sent)--> supervisor --ClockEcho(sent, received, replied)--> process, at `returned`

As in NTP (RFC 5905, section 8): offset = ((received - sent) + (replied - returned)) / 2, and the truth lies within half of the round trip of
that. The sample with the shortest round trip of the last minute counts, because queueing is what spoils the others.
"""

from __future__ import annotations

import time
from collections import deque


def _anchor_s() -> float:
    """What `time.time()` is ahead of `time.perf_counter()`: by the closest of several looks at both, for the processor may be lost between two."""
    looks = [(time.perf_counter(), time.time(), time.perf_counter()) for _ in range(5)]
    before, wall, after = min(looks, key=lambda look: look[2] - look[0])
    return wall - (before + after) / 2


_ANCHOR_S = _anchor_s()
WINDOW = 120
"""Samples that are kept: a minute of heartbeats, so that slow drift between hosts is followed."""


def now_s() -> float:
    """Seconds since 1970 as `time.time()` gave them when the process began, moved on by a clock that is never set."""
    return _ANCHOR_S + time.perf_counter()


class Alignment:
    """How far the supervisor's clock is ahead of this process's, from echoes."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def observe(self, sent_s: float, received_s: float, replied_s: float, returned_s: float) -> None:
        """One echo: `sent_s` and `returned_s` on this clock, the other two on the supervisor's."""
        error = max(0.0, (returned_s - sent_s) - (replied_s - received_s)) / 2
        self._samples.append((error, ((received_s - sent_s) + (replied_s - returned_s)) / 2))

    @property
    def error_s(self) -> float:
        """Half of the shortest round trip; infinite before the first echo."""
        return min(self._samples)[0] if self._samples else float("inf")

    @property
    def offset_s(self) -> float:
        """What to add to times of this process; 0 while clocks agree within the error, as those of one host do."""
        error, offset = min(self._samples, default=(0.0, 0.0))
        return offset if abs(offset) > error else 0.0
