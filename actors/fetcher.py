"""Brings announced versions to a host that does not see the learner's files, from a thread with sockets of its own.

    learner (shelf) ------Piece--> [ fetcher ] --files, once verified--> the host's cache --> every actor of this host
    other hosts (shelves) -Piece-----^                                    \\--shelf--> other hosts, while it is still coming

One process of a host fetches, the others wait for it; if it dies, the next goes on with what has come. A version appears under its name only
after every byte of it was checked against the manifest, whose hash came with the announcement. It waits for: the learner, other hosts.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from protocol.channels import Link, Poller, Transport, Waker
from protocol.errors import WeightsError
from protocol.intervals import Recorder
from protocol.manifest import MANIFEST, prune, versions
from protocol.messages import Piece, PieceRequest, Version, WeightsReady
from protocol.partial import Partial, num_here, partial_path, read_layout
from protocol.pieces import ORIGIN, Block, Layout, Picker, Region
from protocol.shelf import MANIFEST_BYTES

log = logging.getLogger("rlsys.fetcher")

KEEP = 2
"""Complete versions that stay in the cache: the newest, and one that may just be read."""
NOTHING_S = 300.0
"""A fetch to which nothing came from anybody for so long is given up, and said to have failed."""
ROUNDS = 3
"""How often bytes are fetched that do not fit the manifest."""
AGAIN_S = 1.0
"""Pause after a fetch that failed."""
MEET_S = 0.1
"""How often it is looked who serves."""
ASK_MANIFEST_S = 2.0
"""How long one source may take to send a manifest before the next is asked."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Who serves pieces: on which channel and address, as which source of the picker."""

    channel: str
    address: str
    source: str


@dataclass(slots=True)
class Tally:
    """What has come, in bytes, since the start."""

    received: dict[str, int] = field(default_factory=dict)
    """By source."""
    reused: int = 0
    """Taken from the version before."""

    @property
    def received_bytes(self) -> int:
        return sum(self.received.values())


class _Gone(WeightsError):
    """Nobody has that version any more."""


class Fetcher:
    """`want` says what to fetch; `complete` is the newest version that stands in the cache. `wake` is called after each change."""

    def __init__(
        self,
        transport: Transport,
        identity: str,
        cache: Path,
        own: str,
        providers: Callable[[], Mapping[str, Provider]],
        *,
        recorder: Recorder | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`own` is this host's name among sources; `providers` gives the present ones by identity and is called from the thread."""
        self._transport, self._identity = transport.apart(), identity
        self._cache, self._own, self._providers = cache, own, providers
        self._recorder, self._wake = recorder, wake
        self._wanted: WeightsReady | None = None
        self._lock = threading.Lock()
        self.complete: WeightsReady | None = None
        self.failed: WeightsReady | None = None
        """A version that could not be fetched, until `take_failure`."""
        self._reason, self._broken = "", False
        self.error: BaseException | None = None
        """What ended the thread: a full disk, for one."""
        self.tally = Tally()
        self.arrivals = 0
        """Counts pieces that came."""
        self.progress: tuple[int, int, int, float] = (-1, 0, 0, 0.0)
        """Of the fetch under way: version number or -1, blocks that are missing, blocks in all, when the last one came (monotonic)."""
        self._waker, self._stop = Waker(), False
        self._links: dict[str, tuple[str, Provider, Link]] = {}
        self._poller = Poller()
        self._next_meeting_s = 0.0
        self._thread = threading.Thread(target=self._run, name="fetch weights", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------ from other threads

    def want(self, ready: WeightsReady) -> None:
        """Fetch this version next. The one under way is finished first: else a slow path would never finish any."""
        with self._lock:
            self._wanted = ready
        self._waker.wake()

    def take_failure(self) -> tuple[WeightsReady, str, bool] | None:
        """A version that was given up, why, and whether it was broken rather than gone."""
        with self._lock:
            failed, self.failed = self.failed, None
            return None if failed is None else (failed, self._reason, self._broken)

    def discard(self, ready: WeightsReady) -> None:
        """What stands in the cache under this version is no good after all. A newer one that has come meanwhile stays `complete`."""
        with self._lock:
            if self.complete is not None and (self.complete.number, self.complete.incarnation) == (ready.number, ready.incarnation):
                self.complete = None
        shutil.rmtree(self._cache / str(Version(ready.number, ready.incarnation)), ignore_errors=True)

    def close(self) -> None:
        """End the thread; what has come stays for whoever goes on."""
        self._stop = True
        self._waker.wake()
        self._thread.join(10.0)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        self._poller.add(self._waker)
        try:
            while not self._stop:
                with self._lock:
                    ready, self._wanted = self._wanted, None
                if ready is None:
                    self._enter("waiting:announcement", "learner")
                    self._pause(1.0)
                    continue
                try:
                    self._bring(ready)
                    continue
                except WeightsError as error:
                    log.warning("%s", error)
                    with self._lock:
                        self.failed, self._reason, self._broken = ready, str(error), not isinstance(error, _Gone)
                self.progress = (-1, 0, 0, 0.0)
                self._wake()
                self._pause(AGAIN_S)
        except BaseException as error:  # handed over, not swallowed: the owner raises it
            self.error = error
            self._wake()
        finally:
            self._transport.close()
            self._waker.close()

    def _pause(self, seconds: float) -> None:
        self._poller.wait(seconds)
        self._waker.clear()

    def _enter(self, name: str, peer: str = "", detail: str = "") -> None:
        if self._recorder is not None:
            self._recorder.enter(name, peer, detail)

    def _bring(self, ready: WeightsReady) -> None:
        """See to it that this version stands in the cache: fetch it, or wait for the process of this host that does."""
        target = self._cache / str(Version(ready.number, ready.incarnation))
        fd = os.open(self._cache / ".fetching", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        came, deadline = -1, time.monotonic() + NOTHING_S
        try:
            while not _stands(target, ready):
                if _locked(fd):
                    if not _stands(target, ready):
                        self._fetch(ready, target)
                    break
                self._enter("waiting:weights of this host", "", f"another process of this host fetches v{ready.number}")
                self._pause(0.1)
                if self._stop:
                    return
                if (now := num_here(partial_path(self._cache, Version(ready.number, ready.incarnation)))) != came:
                    came, deadline = now, time.monotonic() + NOTHING_S
                if time.monotonic() > deadline:
                    raise _Gone(f"v{ready.number}: the process of this host that fetches it has got nothing of it for {NOTHING_S:g} s")
        finally:
            os.close(fd)
            self.progress = (-1, 0, 0, 0.0)
        if _stands(target, ready):
            with self._lock:
                self.complete = ready
            self._wake()

    # ------------------------------------------------------------------------------------------------ one version

    def _fetch(self, ready: WeightsReady, target: Path) -> None:
        version = Version(ready.number, ready.incarnation)
        directory = partial_path(self._cache, version)
        try:
            manifest = self._manifest(ready, directory)
            if manifest is None:
                return
            if target.exists():
                raise WeightsError(f"{target} is there with another manifest; bytes under one version never change")
            partial = Partial.begin(directory, manifest, ready.manifest_sha256)
            try:
                if self._fill(ready, partial):
                    partial.finish(target)
                    prune(self._cache, KEEP)
                    self._drop_other_partials(directory)
            finally:
                partial.close()
        finally:
            for source in list(self._links):
                self._unlink(source)

    def _drop_other_partials(self, mine: Path) -> None:
        """A fetch that was broken off is worth nothing once a newer version is complete."""
        for directory in self._cache.glob(".v*.partial"):
            if directory != mine:
                shutil.rmtree(directory, ignore_errors=True)

    def _manifest(self, ready: WeightsReady, directory: Path) -> bytes | None:
        """The manifest as announced: what lies here from before, or as the learner, or else another host, sends it. None when stopped."""
        with suppress(OSError):
            text = (directory / MANIFEST).read_bytes()
            if sha256(text).hexdigest() == ready.manifest_sha256:
                return text
        request = PieceRequest(number=ready.number, incarnation=ready.incarnation, file=MANIFEST, start=0, end=MANIFEST_BYTES)
        gone, turn, next_s, deadline = set[str](), 0, 0.0, time.monotonic() + NOTHING_S
        asked = ORIGIN
        while not self._stop:
            now = time.monotonic()
            if now > deadline:
                raise _Gone(f"v{ready.number}: nobody sent its manifest within {NOTHING_S:g} s")
            self._meet()
            left = sorted(set(self._links) - gone)  # the learner first
            if self._links and not left:
                raise _Gone(f"v{ready.number}: neither the learner nor a host has it any more")
            if left and now >= next_s:
                asked = left[turn % len(left)]
                self._links[asked][2].send(request)
                turn, next_s = turn + 1, now + ASK_MANIFEST_S
            self._enter("waiting:weights", self._who(asked), f"the manifest of v{ready.number}")
            self._pause(0.1)
            for source, piece in self._arrived(ready):
                if piece.file == MANIFEST and piece.has == "here":
                    text = piece.data.tobytes()
                    read_layout(text, ready.manifest_sha256)
                    return text
                if piece.file == MANIFEST:
                    gone |= {source} if piece.has == "gone" else set()
                    next_s = 0.0
        return None

    def _fill(self, ready: WeightsReady, partial: Partial) -> bool:
        """Bring everything that is missing, check all of it. False when stopped."""
        layout = partial.layout
        blocks = self._reuse(partial)
        for attempt in range(ROUNDS):
            picker = Picker(blocks, self._own, origin_only=attempt > 0)
            if not self._pump(ready, partial, picker):
                return False
            self._enter("verify weights", "", f"v{ready.number}")
            wrong = partial.wrong()
            if not wrong:
                return True
            blocks = layout.blocks(wrong)
            partial.mark((block.number for block in blocks), here=False)
            log.warning("v%d: %d tensors differ from the manifest: they are fetched again", ready.number, len(wrong))
        raise WeightsError(
            f"v{ready.number}: {wrong[0].file} bytes {wrong[0].start}:{wrong[0].end} differ from the manifest, {ROUNDS} times"
        )

    def _reuse(self, partial: Partial) -> list[Block]:
        """Copy from the newest complete version what is the same there. The blocks that remain to be fetched."""
        layout = partial.layout
        missing = partial.missing(layout.regions)
        base = next(iter(versions(self._cache)), None)
        known: dict[str, Region] = {}
        if base is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):
                known = {r.xxh3_128: r for r in Layout(json.loads((base[1] / MANIFEST).read_bytes())).regions}
        new = []
        for region in missing:
            same = known.get(region.xxh3_128)
            if base is not None and same is not None and same.end - same.start == region.end - region.start:
                partial.take_over(base[1] / same.file, same.start, region)
                self.tally.reused += region.end - region.start
            else:
                new.append(region)
        blocks = [block for block in layout.blocks(new) if not partial.has(block.file, block.start, block.end)]
        partial.mark(set(range(layout.num_blocks)) - {block.number for block in blocks})
        return blocks

    def _pump(self, ready: WeightsReady, partial: Partial, picker: Picker) -> bool:
        """Ask and take until nothing is missing. False when stopped. Raises WeightsError, and OSError when there is no room."""
        layout = partial.layout
        wanted = {block.number: block for block in picker.missing}
        last = time.monotonic()
        gone: set[str] = set()
        while not picker.done:
            if self._stop:
                return False
            now = time.monotonic()
            self._meet()
            if self._links and gone >= set(self._links):
                raise _Gone(f"v{ready.number}: neither the learner nor a host has it any more")
            picker.sources(set(self._links) - (gone & {ORIGIN}))
            for source, (_, _, link) in self._links.items():
                if link.broke():
                    picker.broken(source)
            for source in picker.silent(now):
                log.warning("v%d: %s owes pieces and is silent: connecting anew", ready.number, self._who(source))
                self._unlink(source)
                self._meet()
            for source, block in picker.ask(now):
                request = PieceRequest(
                    number=ready.number, incarnation=ready.incarnation, file=block.file, start=block.start, end=block.end
                )
                self._links[source][2].send(request)
            self.progress = (ready.number, picker.num_left, layout.num_blocks, last)
            missing = f"{picker.num_left} of {layout.num_blocks} pieces of v{ready.number} are missing"
            if now - last > 1.0:
                self._enter("waiting:weights", self._who(min(picker.owing or {ORIGIN: 0})), missing)
            if now - last > NOTHING_S:
                raise _Gone(f"v{ready.number}: nothing of it came for {NOTHING_S:g} s, {missing}")
            self._pause(0.1)
            for source, piece in self._arrived(ready):
                if piece.file not in layout.sizes or not piece.start < layout.sizes[piece.file]:
                    continue
                last = now = time.monotonic()
                found = wanted.get(layout.number(piece.file, piece.start))
                if found is None or found.start != piece.start:
                    continue
                if piece.has != "here" or len(piece.data) != found.end - found.start:
                    gone |= {source} if piece.has == "gone" else set()
                    picker.refused(source, found.number, now)
                    continue
                gone.discard(source)
                self._enter("fetch weights", self._who(source), f"v{ready.number}")
                if picker.arrived(source, found.number, now):
                    partial.write(found.file, found.start, piece.data)
                    partial.mark([found.number])
                    partial.check(found.number)
                self.tally.received[source] = self.tally.received.get(source, 0) + len(piece.data)
                self.arrivals += 1
        return True

    # ------------------------------------------------------------------------------------------------ connections

    def _who(self, source: str) -> str:
        return self._links[source][0] if source in self._links else source or "learner"

    def _meet(self) -> None:
        """Connect to who serves now, one process of each other host, and forget who is gone."""
        if time.monotonic() < self._next_meeting_s:
            return
        self._next_meeting_s = time.monotonic() + MEET_S
        wanted: dict[str, tuple[str, Provider]] = {}
        for identity, provider in sorted(self._providers().items()):
            if provider.source != self._own:
                wanted.setdefault(provider.source, (identity, provider))
        for source, (identity, provider, _) in list(self._links.items()):
            if wanted.get(source) != (identity, provider):
                self._unlink(source)
        for source, (identity, provider) in wanted.items():
            if source not in self._links:
                link = Link(self._transport, provider.channel, self._identity, provider.address, identity)
                self._links[source] = (identity, provider, link)
                self._poller.add(link)

    def _unlink(self, source: str) -> None:
        self._next_meeting_s = 0.0
        _, _, link = self._links.pop(source)
        self._poller.remove(link)
        link.close()

    def _arrived(self, ready: WeightsReady) -> list[tuple[str, Piece]]:
        return [
            (source, piece)
            for source, (_, _, link) in list(self._links.items())
            for piece in link.receive()
            if isinstance(piece, Piece) and (piece.number, piece.incarnation) == (ready.number, ready.incarnation)
        ]


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _stands(target: Path, ready: WeightsReady) -> bool:
    try:
        return sha256((target / MANIFEST).read_bytes()).hexdigest() == ready.manifest_sha256
    except OSError:
        return False
