"""A device that samples many sequences at once, as a fluid: exact, pure, and cheap to move from event to event.

Continuous batching is described by two rates: one sequence alone gets `sample_rate` tokens per second, and all together get at most
`total_rate`, shared equally. n running sequences therefore each advance by min(sample_rate, total_rate / n) tokens per second (a device that
reads its weights and computes at the same time), or, `additive`, by 1 / (1 / sample_rate + (n - 1) / total_rate) (a CPU, which does one after the
other). All advance by the same amount, so one counter of progress and a heap of ends describe all of them: an event costs O(log n), and no time
step is taken between.

    waiting --(free slot; its prefill holds everyone up)--> running --(progress reaches its length)--> ended

Used by the simulated engine (`actors/engines/simulated.py`), with the clock of the machine, and by `rlsys plan`, with a clock of its own.
It does not model memory pressure: `slots` is all that bounds how many run.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class FluidDevice(Generic[Key]):
    """Sequences on one device. Times are seconds on the caller's clock, which `advance` moves; they never go back.

    Raises ValueError for rates or slots that are not above 0.
    """

    def __init__(self, *, sample_rate: float, total_rate: float, slots: int, additive: bool = False) -> None:
        if not (sample_rate > 0 and total_rate > 0 and slots > 0):
            raise ValueError(f"a device of {sample_rate} tokens/s per sample, {total_rate} in all and {slots} slots; all must be above 0")
        self.sample_rate, self.total_rate, self.slots, self._additive = sample_rate, total_rate, slots, additive
        self.now = 0.0
        self.busy_s = 0.0
        """Time with something running or waiting, stalls included."""
        self._progress = 0.0
        self._heap: list[tuple[float, int, Key]] = []
        self._running: dict[Key, tuple[float, float, int]] = {}
        """Progress at its start, tokens to sample, place in the order of starts."""
        self._tokens_ended = 0.0
        self._waiting: deque[tuple[Key, float, float]] = deque()
        self._stalled_until = 0.0
        self._order = 0

    @property
    def running(self) -> int:
        """Sequences that are sampled."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def tokens(self) -> float:
        """Sampled since the start. What has ended counts exactly, however many steps of time it took."""
        return self._tokens_ended + sum(map(self.sampled, self._running))

    def active(self) -> list[Key]:
        """The running sequences."""
        return list(self._running)

    def submit(self, key: Key, tokens: float, prefill_s: float = 0.0) -> None:
        """Sample `tokens` for `key` as soon as a slot is free, first come, first served. Its prefill holds up everything that runs."""
        self._waiting.append((key, tokens, prefill_s))
        self._start_waiting()

    def stall(self, seconds: float) -> None:
        """Nothing advances for so long from now on (a weight update, a prefill); stalls add up."""
        self._stalled_until = max(self.now, self._stalled_until) + seconds

    def sampled(self, key: Key) -> float:
        """Tokens of a running sequence so far."""
        start, tokens, _ = self._running[key]
        return min(self._progress - start, tokens)

    def cancel(self, key: Key) -> float | None:
        """Take a sequence out. Returns its tokens so far; None when it never started or has ended."""
        if key in self._running:
            done = self.sampled(key)
            self._tokens_ended += done
            del self._running[key]
            self._start_waiting()
            return done
        self._waiting = deque(entry for entry in self._waiting if entry[0] != key)
        return None

    def next_event(self) -> float | None:
        """When the next sequence ends if nothing else happens; None when nothing runs."""
        top = self._top()
        if top is None:
            return None
        return max(self.now, self._stalled_until) + max(0.0, top[0] - self._progress) / self._rate()

    def advance(self, until: float) -> list[tuple[float, Key]]:
        """Move the clock to `until`. Returns (time, key) of what ended on the way, in order."""
        ended: list[tuple[float, Key]] = []
        while self.now < until:
            if self._stalled_until > self.now:
                self._pass(min(until, self._stalled_until), 0.0)
                continue
            top = self._top()
            if top is None:
                self._progress = 0.0
                self.now = until
                break
            rate = self._rate()
            at = self.now + (top[0] - self._progress) / rate
            if at > until:
                self._pass(until, rate)
                break
            self._pass(max(at, self.now), rate)
            self._progress = top[0]
            heapq.heappop(self._heap)
            self._tokens_ended += self._running.pop(top[2])[1]
            ended.append((self.now, top[2]))
            self._start_waiting()
        return ended

    def _rate(self) -> float:
        if self._additive:
            return 1.0 / (1.0 / self.sample_rate + (len(self._running) - 1) / self.total_rate)
        return min(self.sample_rate, self.total_rate / len(self._running))

    def _pass(self, until: float, rate: float) -> None:
        seconds = until - self.now
        if self._running:
            self.busy_s += seconds
        self._progress += rate * seconds
        self.now = until

    def _top(self) -> tuple[float, int, Key] | None:
        """The next end; what was cancelled is forgotten on the way."""
        while self._heap:
            top = self._heap[0]
            running = self._running.get(top[2])
            if running is not None and running[2] == top[1]:
                return top
            heapq.heappop(self._heap)
        return None

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            key, tokens, prefill_s = self._waiting.popleft()
            if prefill_s:
                self.stall(prefill_s)
            self._order += 1
            self._running[key] = (self._progress, tokens, self._order)
            heapq.heappush(self._heap, (self._progress + tokens, self._order, key))
