"""A generator's end of the weights channel: take the newest announced version, verify every tensor, hand it to the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.engines import Engine
from actors.engines.conformance import check_conformance
from actors.fetcher import Fetcher
from protocol.canary import PROMPT_TOKENS, Canary, bound_of, difference, read_canary
from protocol.errors import InfrastructureFault, UserError, WeightsError
from protocol.manifest import verify
from protocol.messages import Version, WeightsLoaded, WeightsReady

log = logging.getLogger("rlsys.weights")

GONE = 50
"""So many versions in a row may be removed before they are read; more mean that this process does not see the directory at all."""

LOSSES = 3
"""An engine that loses its server between a load and the end of its proof loads and proves the next; so many such losses in a row end the actor."""


class WeightsIntake:
    """Remembers the newest announcement and loads it when asked. Older ones and repeats change nothing."""

    def __init__(
        self, identity: str, engine: Engine, dtype: str = "float32", directory: Path | None = None, fetcher: Fetcher | None = None
    ) -> None:
        """`directory` is where versions lie as this host sees them, if not where the learner says; a `fetcher` brings them there first."""
        self._directory, self._fetcher = directory, fetcher
        self._identity = identity
        self._engine = engine
        self._announced: WeightsReady | None = None
        self._dtype = dtype
        self._conforms = False
        self.failures = self.gone = 0
        """Loads in a row that failed, and those whose version had been removed; the newest is announced again after each."""
        self.quarantined = False
        """Whether the loaded weights failed the canary."""

    def announce(self, ready: WeightsReady) -> None:
        """A version is complete on disk."""
        if self._announced is None or (ready.number, ready.incarnation) > (self._announced.number, self._announced.incarnation):
            self._announced = ready
            if self._fetcher is not None:
                self._fetcher.want(ready)

    @property
    def announced(self) -> int:
        """The newest announced version; -1 for none. It may be asked while another thread loads."""
        announced = self._announced
        return -1 if announced is None else announced.number

    @property
    def pending(self) -> WeightsReady | None:
        """The announced version that is not loaded, or is in quarantine, if any."""
        announced = self._announced if self._fetcher is None else self._fetcher.complete
        if self.quarantined:
            return announced
        ready, loaded = announced, self._engine.version
        return ready if ready is not None and (loaded is None or Version(ready.number, ready.incarnation) > loaded) else None

    def lost(self) -> WeightsLoaded | None:
        """A version that could not be brought here, as the learner is told of it; the newest is announced again then. Raises UserError and bugs."""
        if self._fetcher is None:
            return None
        if isinstance(self._fetcher.error, OSError):
            raise UserError(f"weights cannot be kept on this host: {self._fetcher.error}") from self._fetcher.error
        if self._fetcher.error is not None:
            raise self._fetcher.error
        failure = self._fetcher.take_failure()
        if failure is None:
            return None
        ready, reason, broken = failure
        self.failures += broken
        if self._announced is ready:
            self._announced = None
        return WeightsLoaded(
            generator=self._identity,
            number=ready.number,
            incarnation=ready.incarnation,
            load_s=0.0,
            pause_s=0.0,
            error=reason,
            canary_error=float("nan"),
        )

    def load(self, ready: WeightsReady) -> WeightsLoaded:
        """Verify and load `ready`, and let the engine prove itself on the canary. A fault is returned in `error`.

        What cannot be loaded leaves the old weights at work, and nothing is tried until something is announced again. Weights that are
        loaded but fail the canary put the actor into quarantine: they are `pending` again, and nothing sampled with them may be used.
        An engine that loses its server meanwhile says nothing about the weights: its next server is loaded and proved instead.
        Raises InfrastructureFault when the engine itself is broken, or lost its server LOSSES times.
        """
        started = time.monotonic()
        version, directory = Version(ready.number, ready.incarnation), self._locate(ready)
        error, pause, distance = "", 0.0, float("nan")
        try:
            pause, error, distance = self._swap(directory, version, verify(directory, ready.manifest_sha256))
            self.quarantined = bool(error)
            self.gone = 0
            self.failures = self.failures + 1 if error else 0
        except WeightsError as fault:
            error = str(fault)
            self.gone = 0 if directory.exists() else self.gone + 1
            self.failures += not self.gone or self.gone > GONE
            if self._announced is ready:
                self._announced = None
            if self._fetcher is not None:
                self._fetcher.discard(ready)
        if error:
            log.warning("%s %s: %s", version, "in quarantine" if self.quarantined else "not loaded", error)
        return WeightsLoaded(
            generator=self._identity,
            number=ready.number,
            incarnation=ready.incarnation,
            load_s=time.monotonic() - started,
            pause_s=pause,
            error=error,
            canary_error=distance,
        )

    def _locate(self, ready: WeightsReady) -> Path:
        """Where the version lies as this host sees it: where the learner says, or under that name in the directory that was given for it."""
        return self._directory / Path(ready.directory).name if self._directory else Path(ready.directory)

    def _swap(self, directory: Path, version: Version, manifest: Mapping[str, Any]) -> tuple[float, str, float]:
        """Seconds that samples stood still, and what `_prove` says of the version once it is loaded."""
        canary = read_canary(manifest)
        for left in reversed(range(LOSSES)):
            pause = self._engine.load_weights(directory, version)
            if canary is None or not getattr(self._engine, "samples_the_model", True):
                break
            try:
                return (pause, *self._prove(canary, manifest))
            except InfrastructureFault as fault:
                if self._engine.version is not None or not left:
                    raise
                log.warning("%s was not proved, the engine's next server is to load it: %s", version, fault)
        return pause, "", float("nan")

    def _prove(self, canary: Canary, manifest: Mapping[str, Any]) -> tuple[str, float]:
        """What is wrong, empty if nothing is, and the largest difference between the learner's log-probs and the engine's.

        Raises InfrastructureFault when the engine lost what it loaded, or does not sample as it says.
        """
        published = {entry["dtype"] for shard in manifest["shards"].values() for entry in shard.values()}
        bound = bound_of([self._dtype, canary.dtype, "float32" if published <= {"F32", "F64"} else "bfloat16"])
        try:
            found = self._engine.score(canary.ids[:PROMPT_TOKENS], canary.ids[PROMPT_TOKENS:], 1.0)
        except InfrastructureFault as fault:
            if self._engine.version is None:
                raise
            return f"the canary cannot be scored ({fault})", float("inf")
        distance = difference(canary.logprobs, found)
        if not distance <= bound:
            return f"the canary's log-probs differ by {distance:.3g} from the learner's, at most {bound:g} is allowed", distance
        if not self._conforms:
            check_conformance(self._engine, canary.ids, self._dtype)
            self._conforms = True
        return "", distance
