"""A generator's end of the weights channel: take the newest announced version, verify every tensor, hand it to the engine."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from actors.engines import Engine
from protocol.errors import WeightsError
from protocol.manifest import verify
from protocol.messages import Version, WeightsLoaded, WeightsReady

log = logging.getLogger("rlsys.weights")

GONE = 50
"""So many versions in a row may be removed before they are read; more mean that this process does not see the directory at all."""


class WeightsIntake:
    """Remembers the newest announcement and loads it when asked. Older ones and repeats change nothing."""

    def __init__(self, identity: str, engine: Engine) -> None:
        self._identity = identity
        self._engine = engine
        self._announced: WeightsReady | None = None
        self.failures = self.gone = 0
        """Loads in a row that failed, and those whose version had been removed; the newest is announced again after each."""

    def announce(self, ready: WeightsReady) -> None:
        """A version is complete on disk."""
        if self._announced is None or (ready.number, ready.incarnation) > (self._announced.number, self._announced.incarnation):
            self._announced = ready

    @property
    def announced(self) -> int:
        """The newest announced version; -1 for none."""
        return -1 if self._announced is None else self._announced.number

    @property
    def pending(self) -> WeightsReady | None:
        """The announced version that is not loaded, if any."""
        ready, loaded = self._announced, self._engine.version
        return ready if ready is not None and (loaded is None or Version(ready.number, ready.incarnation) > loaded) else None

    def load(self, ready: WeightsReady) -> WeightsLoaded:
        """Verify and load `ready`. A fault is returned in `error`, and nothing is tried until something is announced again; the old weights stay."""
        started = time.monotonic()
        version = Version(ready.number, ready.incarnation)
        error, pause = "", 0.0
        try:
            verify(Path(ready.directory), ready.manifest_sha256)
            pause = self._engine.load_weights(Path(ready.directory), version)
            self.failures = self.gone = 0
        except WeightsError as fault:
            error = str(fault)
            self.gone = 0 if Path(ready.directory).exists() else self.gone + 1
            self.failures += not self.gone or self.gone > GONE
            log.warning("%s not loaded: %s", version, error)
            if self._announced is ready:
                self._announced = None
        return WeightsLoaded(
            generator=self._identity,
            number=ready.number,
            incarnation=ready.incarnation,
            load_s=time.monotonic() - started,
            pause_s=pause,
            error=error,
            canary_error=float("nan"),
        )
