"""How many requests an engine's server is given at once: additive increase, multiplicative decrease, from the server's own load. Pure."""

from __future__ import annotations

from dataclasses import dataclass

FULL = 0.95
"""Share of the cache in use above which the server is about to throw running requests out of it."""
DECREASE = 0.75
STEPS = 32
"""Steps from nothing to the maximum. With an observation a second, half a minute."""
PATIENCE = 2
"""Observations in a row with a queue before it counts: a single one also sees requests that have only just arrived."""


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """One look at a server."""

    running: int
    waiting: int
    cache_used: float
    """Share of the cache that holds tokens of running requests."""
    retracted: int = 0
    """Requests that lost their cache and wait for room."""


@dataclass(slots=True)
class Concurrency:
    """The present limit, between `minimum` and `maximum` requests. It starts at the maximum: an empty server has no queue."""

    minimum: int
    maximum: int
    _limit: float = 0.0
    _queued: int = 0

    def __post_init__(self) -> None:
        self.minimum = min(self.minimum, self.maximum)
        self._limit = float(self.maximum)

    @property
    def limit(self) -> int:
        """Requests that may be in the server."""
        return int(self._limit)

    def observe(self, load: ServerLoad) -> None:
        """Move the limit: down when the server queues, throws out or is nearly full; up by a step when all that is allowed runs."""
        self._queued = self._queued + 1 if load.waiting else 0
        if load.retracted or load.cache_used > FULL or self._queued >= PATIENCE:
            self._queued = 0
            self._limit = max(float(self.minimum), min(self._limit, load.running + load.waiting) * DECREASE)
        elif load.running >= self.limit:
            self._limit = min(float(self.maximum), self._limit + max(1.0, self.maximum / STEPS))
