"""The journal: append-only, checksummed records of every trajectory and every batch, in the run directory.

A record is [length: 4 bytes][xxh3-64 of the body: 8 bytes][body], the body a msgpack list of frames as they came off the wire. A torn or
damaged tail ends reading at the last good record. `append` returns once the bytes are with the operating system (they outlive the process);
`sync` forces them to disk (they outlive the machine).
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
import xxhash

from protocol.errors import JournalError

_HEAD = struct.Struct("<IQ")
SEGMENT_BYTES = 256 << 20
"""A new file is begun past this size, so that old ones can be removed whole."""


class Journal:
    """Appends records to numbered segment files in `directory`. Any thread may call it."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._lock = threading.RLock()
        self._fd = -1
        self._size = 0
        self._segment = max((int(path.stem) for path in directory.glob("*.journal")), default=-1)
        self._next_segment()

    def append(self, frames: Sequence[bytes | memoryview]) -> tuple[int, int]:
        """Write one record; returns (segment, offset after it)."""
        body: bytes = msgpack.packb(list(frames), buf_size=256 + sum(map(len, frames)))
        data = _HEAD.pack(len(body), xxhash.xxh3_64_intdigest(body)) + body
        with self._lock:
            if self._size and self._size + len(data) > SEGMENT_BYTES:
                self._next_segment()
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            self._size += len(data)
            return self._segment, self._size

    def sync(self) -> None:
        """Force what was appended to disk."""
        with self._lock:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Sync and close."""
        with self._lock:
            if self._fd >= 0:
                self.sync()
                os.close(self._fd)
                self._fd = -1

    def _next_segment(self) -> None:
        self.close()
        self._segment += 1
        self._fd = os.open(self._directory / f"{self._segment:06d}.journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0


def read_journal(directory: Path, *, strict: bool = False) -> Iterator[list[bytes]]:
    """Every good record, oldest first. A damaged record ends its segment; with `strict` it raises JournalError."""
    for path in sorted(directory.glob("*.journal")):
        with path.open("rb") as file:
            while head := file.read(_HEAD.size):
                length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (0, -1)
                body = file.read(length)
                if len(body) != length or xxhash.xxh3_64_intdigest(body) != checksum:
                    if strict:
                        raise JournalError(f"{path}: damaged record before byte {file.tell()}")
                    break
                yield msgpack.unpackb(body)
