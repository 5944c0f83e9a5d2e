"""The journal: append-only, checksummed records of every trajectory and every batch, in the run directory.

A record is a head and a body: [mark: 4 bytes][length of the body: 4][xxh3-64 of the body: 8][xxh32 of the head so far: 4][body], the body a
msgpack list of frames as they came off the wire. `append` returns once the bytes are with the operating system (they outlive the process);
`sync` forces them to disk (they outlive the machine).

What was torn by a crash is cut off when the journal is opened again, but never what a commit stands for; a record that was damaged later is
left out when it is read, and reading goes on at the next good head, whatever the damaged one says of its length. Both say so.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgpack
import xxhash

from protocol.errors import DataError, JournalError

log = logging.getLogger("rlsys.journal")

_MARK = b"\xf5RL\xff"
"""Begins every record. Neither UTF-8 text nor token ids hold these bytes, so that nothing that a model wrote is taken for a record."""
_HEAD = struct.Struct("<4sIQ")
_CHECK = struct.Struct("<I")
_HEAD_BYTES = _HEAD.size + _CHECK.size
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


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes `start` to `end` of a segment hold no good record."""

    path: Path
    start: int
    end: int

    @property
    def segment(self) -> int:
        return int(self.path.stem)


class Journal:
    """Appends records to numbered segment files in `directory`. Any thread may call it.

    Raises DataError when the disk is full or may not be written; what was appended before stands.
    """

    def __init__(self, directory: Path, committed: tuple[int, int] = (-1, 0)) -> None:
        """`committed`: (segment, offset) up to which commits stand for what is there; nothing before it is ever cut off."""
        self._directory = directory
        self._lock = threading.RLock()
        self._fd = -1
        self._size = 0
        with self._explained():
            directory.mkdir(parents=True, exist_ok=True)
            cut_torn_tail(directory, committed)
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
        head = _HEAD.pack(_MARK, len(body), xxhash.xxh3_64_intdigest(body))
        data = head + _CHECK.pack(xxhash.xxh32_intdigest(head)) + body
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


def cut_torn_tail(directory: Path, committed: tuple[int, int] = (-1, 0)) -> int:
    """Cut what a crash left unfinished at the end of the newest segment; returns how many bytes that were.

    That is what follows the last good record, and no commit stands for it; what one does stand for is damaged, and stays.
    """
    newest = max(segments(directory), default=None)
    if newest is None:
        return 0
    path = _path(directory, newest)
    size = path.stat().st_size
    good = max((record.end for record in _read_segment(path, lambda damage: None)), default=0)
    keep = max(good, min(committed[1], size) if committed[0] == newest else 0)
    if keep > good:
        log.warning("%s: bytes %d to %d are damaged, although they were committed; they stay as they are", path, good, keep)
    if size > keep:
        log.warning("%s: the last %d bytes were not completely written; the journal ends at byte %d", path, size - keep, keep)
        os.truncate(path, keep)
    return size - keep


def read_records(directory: Path, first_segment: int = 0, on_damage: Callable[[Damage], object] | None = None) -> Iterator[Record]:
    """Every good record from a segment on, oldest first. `on_damage` is told of what is between them; the default logs it.

    The last record of a journal that is being written may be half there: that is no damage.
    """
    for number in segments(directory):
        if number >= first_segment:
            with suppress(FileNotFoundError):  # a live run has just removed it, because nothing needs it any more
                yield from _read_segment(_path(directory, number), on_damage or _log_damage)


def read_journal(directory: Path, *, strict: bool = False) -> Iterator[list[bytes]]:
    """The frames of every good record, oldest first; with `strict` a damaged one raises JournalError."""

    def refuse(damage: Damage) -> None:
        if strict:
            raise JournalError(f"{damage.path}: damaged record before byte {damage.end}")

    for record in read_records(directory, 0, refuse):
        yield record.frames


def _log_damage(damage: Damage) -> None:
    log.warning("%s: bytes %d to %d are damaged and are left out", damage.path, damage.start, damage.end)


def _read_segment(path: Path, on_damage: Callable[[Damage], object]) -> Iterator[Record]:
    """Records of one file. After a damaged one reading goes on at the next good head."""
    with path.open("rb") as file:
        size, at = path.stat().st_size, 0
        while at < size:
            length, checksum = _head(file.read(_HEAD_BYTES))
            end = at + _HEAD_BYTES + length
            if length >= 0 and end <= size:
                body = file.read(length)
                if xxhash.xxh3_64_intdigest(body) == checksum:
                    yield Record(int(path.stem), end, msgpack.unpackb(body))
                    at = end
                    continue
                file.seek(end)
                if end < size and _head(file.read(_HEAD_BYTES))[0] < 0:
                    end = _next_head(file, at + 1, size)
            else:
                end = _next_head(file, at + 1, size)
            on_damage(Damage(path, at, end))
            file.seek(end)
            at = end


def _head(data: bytes) -> tuple[int, int]:
    """(length, checksum) of the body that follows; (-1, 0) when this is no head, or a damaged one."""
    if len(data) < _HEAD_BYTES or _CHECK.unpack_from(data, _HEAD.size)[0] != xxhash.xxh32_intdigest(data[: _HEAD.size]):
        return -1, 0
    mark, length, checksum = _HEAD.unpack_from(data)
    return (length, checksum) if mark == _MARK else (-1, 0)


def _next_head(file: BinaryIO, start: int, size: int) -> int:
    """Where the next good head from `start` on stands; `size` if there is none."""
    file.seek(start)
    data = file.read(size - start)
    at = data.find(_MARK)
    while at >= 0 and _head(data[at : at + _HEAD_BYTES])[0] < 0:
        at = data.find(_MARK, at + 1)
    return start + at if at >= 0 else size
