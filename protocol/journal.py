"""The journal: append-only, checksummed records of every trajectory and every batch, in the run directory.

A record is [length: 4 bytes][xxh3-64 of the body: 8 bytes][body], the body a msgpack list of frames as they came off the wire. `append`
returns once the bytes are with the operating system (they outlive the process); `sync` forces them to disk (they outlive the machine).

What was torn by a crash is cut off when the journal is opened again; a record that was damaged later is left out when it is read. Both say so.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgpack
import xxhash

from protocol.errors import DataError, JournalError

log = logging.getLogger("rlsys.journal")

_HEAD = struct.Struct("<IQ")
SEGMENT_BYTES = 256 << 20
"""A new file is begun past this size, so that old ones can be removed whole."""


NOT_WRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the user can mend: room, or permission."""


@dataclass(frozen=True, slots=True)
class Record:
    """One good record and where it stands: segment number, and the byte after it."""

    segment: int
    end: int
    frames: list[bytes]


class Journal:
    """Appends records to numbered segment files in `directory`. Any thread may call it.

    Raises DataError when the disk is full or may not be written; what was appended before stands.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.RLock()
        self._fd = -1
        self._size = 0
        with self._explained():
            directory.mkdir(parents=True, exist_ok=True)
            cut_torn_tail(directory)
        self._segment = max(segments(directory), default=-1)
        self._next_segment()

    @property
    def position(self) -> tuple[int, int]:
        """(segment, offset after the last record)."""
        with self._lock:
            return self._segment, self._size

    def append(self, frames: Sequence[bytes | memoryview]) -> tuple[int, int]:
        """Write one record; returns (segment, offset after it). When it cannot be written it is not there at all."""
        body: bytes = msgpack.packb(list(frames), buf_size=256 + sum(map(len, frames)))
        data = _HEAD.pack(len(body), xxhash.xxh3_64_intdigest(body)) + body
        with self._lock:
            if self._size and self._size + len(data) > SEGMENT_BYTES:
                self._next_segment()
            view = memoryview(data)
            with self._explained():
                try:
                    while view:
                        view = view[os.write(self._fd, view) :]
                except OSError:
                    if self._fd >= 0 and len(view) < len(data):
                        os.ftruncate(self._fd, self._size)  # else the next record would follow half a one
                    raise
            self._size += len(data)
            return self._segment, self._size

    def sync(self) -> None:
        """Force what was appended to disk."""
        with self._lock, self._explained():
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Sync and close."""
        with self._lock:
            if self._fd >= 0:
                self.sync()
                os.close(self._fd)
                self._fd = -1

    def trim(self, before: int, keep_bytes: int | None) -> list[int]:
        """Remove the oldest segments below number `before` while all together take more than `keep_bytes` (None: keep all)."""
        if keep_bytes is None:
            return []
        sizes = {number: _path(self._directory, number).stat().st_size for number in segments(self._directory)}
        total, removed = sum(sizes.values()), []
        for number in sorted(sizes):
            if total <= keep_bytes or number >= before:
                break
            _path(self._directory, number).unlink()
            total -= sizes[number]
            removed.append(number)
        return removed

    def _next_segment(self) -> None:
        path = _path(self._directory, self._segment + 1)
        with self._explained():
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.close()
        self._fd, self._size, self._segment = fd, 0, self._segment + 1

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A full or a read-only disk as a sentence."""
        try:
            yield
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            free = f"; {_free(self._directory)}" if self._directory.is_dir() else ""
            raise DataError(f"{self._directory}: the journal cannot be written ({error.strerror}){free}") from None


def _free(directory: Path) -> str:
    return f"{shutil.disk_usage(directory).free / 1e6:.0f} MB are free"


def segments(directory: Path) -> list[int]:
    """The numbers of the segment files, in order."""
    return sorted(int(path.stem) for path in directory.glob("*.journal") if path.stem.isdigit())


def _path(directory: Path, segment: int) -> Path:
    return directory / f"{segment:06d}.journal"


def cut_torn_tail(directory: Path) -> int:
    """Cut what a crash left unfinished at the end of the newest segment; returns how many bytes that were."""
    newest = max(segments(directory), default=None)
    if newest is None:
        return 0
    path = _path(directory, newest)
    good = max((record.end for record in _read_segment(path, lambda end: None)), default=0)
    torn = path.stat().st_size - good
    if torn:
        log.warning(
            "%s: the last %d bytes were not completely written; the journal ends at its last good record, byte %d", path, torn, good
        )
        os.truncate(path, good)
    return torn


def read_records(directory: Path, first_segment: int = 0, on_damage: Callable[[Path, int], None] | None = None) -> Iterator[Record]:
    """Every good record from a segment on, oldest first. `on_damage(path, byte)` is told of each that is not; the default logs it.

    The last record of a journal that is being written may be half there: that is no damage.
    """
    for number in segments(directory):
        if number < first_segment:
            continue
        path = _path(directory, number)
        yield from _read_segment(path, lambda end, path=path: (on_damage or _log_damage)(path, end))  # type: ignore[misc]


def read_journal(directory: Path, *, strict: bool = False) -> Iterator[list[bytes]]:
    """The frames of every good record, oldest first; with `strict` a damaged one raises JournalError."""

    def refuse(path: Path, end: int) -> None:
        if strict:
            raise JournalError(f"{path}: damaged record before byte {end}")

    for record in read_records(directory, 0, refuse):
        yield record.frames


def _log_damage(path: Path, end: int) -> None:
    log.warning("%s: the record before byte %d is damaged and is left out", path, end)


def _read_segment(path: Path, on_damage: Callable[[int], None]) -> Iterator[Record]:
    """Records of one file. After a damaged one reading goes on where its length says that the next begins, if that is in the file."""
    with path.open("rb") as file:
        size = path.stat().st_size
        while head := file.read(_HEAD.size):
            length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (size, -1)
            if file.tell() + length > size:
                on_damage(size)
                return
            body = file.read(length)
            if xxhash.xxh3_64_intdigest(body) != checksum:
                on_damage(file.tell())
                continue
            yield Record(int(path.stem), file.tell(), msgpack.unpackb(body))
