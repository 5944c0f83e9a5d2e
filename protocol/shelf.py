"""Serves published versions out of a directory, piece by piece, from a thread with sockets of its own.

    generators --PieceRequest--> [ shelf ] --Piece--> generators        learner: all that is published; generator: what its host has fetched

A version that somebody reads stays open, so that it can be read to its end though it was removed meanwhile. Of a version that is being fetched
here (`protocol/partial.py`) what has come already is passed on; a request for what has not come waits for it at most PARK_S.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Literal

import numpy as np

from protocol.channels import Endpoint, Poller, Transport, Waker
from protocol.errors import WireError
from protocol.manifest import MANIFEST, versions
from protocol.messages import Piece, PieceRequest, Version
from protocol.partial import Partial, partial_path
from protocol.pieces import BLOCK_BYTES

log = logging.getLogger("rlsys.shelf")

Has = Literal["here", "later", "gone"]

PARK_S = 2.0
"""How long a request waits for a block that this host is fetching itself, before it is told so."""
LOOK_S = 0.02
"""How often waiting requests are looked at: not with each one that comes, there are dozens."""
IDLE_S = 30.0
"""A version of which nothing was read for so long is closed; if it was removed, its memory is free then."""
OPEN = 3
"""Versions open at a time: with more readers apart than that, the one that was asked for the longest ago goes."""
MANIFEST_BYTES = 64 << 20
"""The manifest alone is sent in one piece."""


class _Open:
    """The open files of one version."""

    def __init__(self, directory: Path, partial: Partial | None) -> None:
        self._directory, self.partial = directory, partial
        self._files: dict[str, int] = {}
        self.used_s = time.monotonic()
        self._names = {path.name for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")}

    def read(self, file: str, start: int, end: int) -> bytes | None:
        """Bytes of a file, None for a name that is not in the version. Raises OSError."""
        self.used_s = time.monotonic()
        if file not in self._names:
            return None
        if file not in self._files:
            self._files[file] = os.open(self._directory / file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        most = MANIFEST_BYTES if file == MANIFEST else BLOCK_BYTES
        return os.pread(self._files[file], min(end - start, most), start)

    def open_all(self) -> None:
        """Keep every file readable, whatever becomes of the directory. Raises OSError when it is gone already."""
        for name in self._names:
            self.read(name, 0, 1)

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        if self.partial:
            self.partial.close()


class Shelf:
    """Serves the versions under `root` on `channel` ("pieces" of the learner, "passing" of a generator) from `start` to `close`."""

    def __init__(self, transport: Transport, channel: str, name: str, root: Path) -> None:
        self._transport = transport.apart()
        self._end = Endpoint(self._transport, channel, name)
        self._root, self._fetches = root, channel == "passing"
        self.address = self._end.address
        self.sent_bytes = 0
        self._open: dict[Version, _Open] = {}
        self._parked: deque[tuple[float, str, PieceRequest]] = deque()
        self._waker, self._stop = Waker(), False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"shelf {channel}", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def check(self) -> None:
        """Raise what ended the thread, if anything did: nobody would get a version from here any more, and nothing else would say why."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread and its sockets; what was not sent is lost."""
        self._stop = True
        if self._thread.is_alive():
            self._waker.wake()
            self._thread.join(10.0)
        else:
            self._end_all()

    def _run(self) -> None:
        poller, look_s = Poller(), 0.0
        poller.add(self._end)
        poller.add(self._waker)
        try:
            while not self._stop:
                poller.wait(LOOK_S if self._parked else 1.0)
                self._waker.clear()
                for peer, message in self._end.receive():
                    if isinstance(message, PieceRequest):
                        self._answer(peer, message, time.monotonic() + PARK_S)
                if time.monotonic() >= look_s:
                    for _ in range(len(self._parked)):
                        until, peer, request = self._parked.popleft()
                        self._answer(peer, request, until)
                    self._close_idle()
                    look_s = time.monotonic() + LOOK_S
        except BaseException as error:  # handed over, not swallowed: `check` raises it
            self._error = error
        finally:
            self._end_all()

    def _end_all(self) -> None:
        for version in list(self._open):
            self._open.pop(version).close()
        self._transport.close()
        self._waker.close()

    def _answer(self, peer: str, request: PieceRequest, until: float) -> None:
        has, data = self._look_up(request)
        if has == "later" and time.monotonic() < until:
            self._parked.append((until, peer, request))
            return
        piece = Piece(
            number=request.number,
            incarnation=request.incarnation,
            file=request.file,
            start=request.start,
            has=has,
            data=np.frombuffer(data, np.uint8),
        )
        try:
            self._end.send(peer, piece)
            self.sent_bytes += len(data)
        except WireError as error:  # it asks and does not read: its requests are lost, and it will ask others
            log.warning("%s", error)

    def _look_up(self, request: PieceRequest) -> tuple[Has, bytes]:
        version = Version(request.number, request.incarnation)
        try:
            found = self._find(version)
            if found is None:
                return self._absent(version), b""
            if found.partial and request.file != MANIFEST and not found.partial.has(request.file, request.start, request.end):
                return "later", b""
            data = found.read(request.file, request.start, request.end)
        except OSError:
            if version in self._open:
                self._open.pop(version).close()
            return "gone", b""
        return ("gone", b"") if data is None else ("here", data)

    def _absent(self, version: Version) -> Has:
        """A host that has no newer version will begin with this one in a moment, as its neighbours have."""
        newest = next(iter(versions(self._root)), None)
        return "later" if self._fetches and (newest is None or newest[0] < version) else "gone"

    def _find(self, version: Version) -> _Open | None:
        known = self._open.get(version)
        if known is not None:
            if known.partial is None or known.partial.alive:
                return known
            self._open.pop(version).close()
        directory = self._root / str(version)
        if directory.is_dir():
            made = _Open(directory, None)
        else:
            directory = partial_path(self._root, version)
            partial = Partial.look(directory)
            if partial is None:
                return None
            made = _Open(directory, partial)
        try:
            made.open_all()
        except OSError:
            made.close()
            raise
        while len(self._open) >= OPEN:
            oldest = min(self._open, key=lambda v: self._open[v].used_s)
            self._open.pop(oldest).close()
        self._open[version] = made
        return made

    def _close_idle(self) -> None:
        now = time.monotonic()
        for version in [v for v, opened in self._open.items() if now - opened.used_s > IDLE_S]:
            self._open.pop(version).close()
