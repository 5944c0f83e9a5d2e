"""A version that a host is fetching: its files as far as they have come, and which blocks those are.

It lies in a hidden directory beside the complete versions, which no reader takes for one, with `.have`: one byte for each block, 1 once the block
is there. All processes of the host map that file, so whoever fetches, and whoever goes on after it died, knows what has come.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from protocol.errors import WeightsError
from protocol.manifest import MANIFEST, hash_of
from protocol.messages import Version
from protocol.pieces import Layout, Region

HAVE = ".have"
_STEP = 1 << 20


def partial_path(root: Path, version: Version) -> Path:
    """Where `version` lies while it is incomplete."""
    return root / f".{version}.partial"


def num_here(directory: Path) -> int:
    """How many blocks of an incomplete version have come; 0 where there is none."""
    try:
        return (directory / HAVE).read_bytes().count(1)
    except OSError:
        return 0


def read_layout(text: bytes, manifest_sha256: str) -> Layout:
    """The layout that a manifest describes. Raises WeightsError when it is not the announced one."""
    if sha256(text).hexdigest() != manifest_sha256:
        raise WeightsError(f"{MANIFEST} as it arrived: SHA-256 differs from the announced {manifest_sha256[:12]}...")
    try:
        return Layout(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{MANIFEST}: no manifest that a version can be fetched by ({error!r})") from None


class Partial:
    """The files of an incomplete version. Made by `begin` where it is fetched, by `look` where it is only read."""

    def __init__(self, directory: Path, layout: Layout, have: int, *, writable: bool) -> None:
        self.directory, self.layout = directory, layout
        self._fd = have
        self._map = mmap.mmap(have, max(1, layout.num_blocks), access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._files: dict[str, int] = {}
        self._good: set[Region] = set()

    @staticmethod
    def begin(directory: Path, manifest: bytes, manifest_sha256: str) -> Partial:
        """Start or go on. What lies there of another manifest goes. Raises WeightsError, and OSError when there is no room."""
        layout = read_layout(manifest, manifest_sha256)
        known = directory / MANIFEST
        if known.exists() and known.read_bytes() != manifest:
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, size in layout.sizes.items():
            with (directory / name).open("ab") as file:
                file.truncate(size)
        fd = os.open(directory / HAVE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, max(1, layout.num_blocks))
        aside = directory / f".{MANIFEST}"
        aside.write_bytes(manifest)
        aside.replace(known)  # last: who sees it sees all files
        return Partial(directory, layout, fd, writable=True)

    @staticmethod
    def look(directory: Path) -> Partial | None:
        """What is being fetched there, if anything is."""
        try:
            layout = Layout(json.loads((directory / MANIFEST).read_bytes()))
            fd = os.open(directory / HAVE, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        try:
            return Partial(directory, layout, fd, writable=False)
        except (OSError, ValueError):  # shorter than its layout says
            os.close(fd)
            return None

    @property
    def alive(self) -> bool:
        """Whether it may still grow, or has all: False for what was given up and removed."""
        return os.fstat(self._fd).st_nlink > 0 or self._map.find(b"\0", 0, self.layout.num_blocks) < 0

    def has(self, file: str, start: int, end: int) -> bool:
        """Whether these bytes have come."""
        size = self.layout.sizes.get(file)
        if size is None or start >= size:
            return True  # there is nothing to wait for
        first, last = self.layout.number(file, start), self.layout.number(file, min(end, size) - 1)
        return self._map.find(b"\0", first, last + 1) < 0

    def missing(self, regions: Iterable[Region]) -> list[Region]:
        """Those of which any block has not come."""
        return [region for region in regions if not self._whole(region)]

    def mark(self, numbers: Iterable[int], *, here: bool = True) -> None:
        """These blocks are here, or after all not."""
        for number in numbers:
            self._map[number] = here
            if not here:
                self._good.difference_update(self.layout.regions_of(number))

    def check(self, number: int) -> None:
        """Hash what this block has made whole, now that other blocks are still on their way."""
        self._check(region for region in self.layout.regions_of(number) if self._whole(region))

    def _whole(self, region: Region) -> bool:
        numbers = self.layout.numbers(region)
        return self._map.find(b"\0", numbers.start, numbers.stop) < 0

    def write(self, file: str, start: int, data: Any) -> None:
        """Put bytes in their place. Raises OSError when there is no room."""
        if file not in self._files:
            self._files[file] = os.open(self.directory / file, os.O_RDWR | os.O_CLOEXEC)
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._files[file], view, start)
            view, start = view[written:], start + written

    def take_over(self, source: Path, offset: int, region: Region) -> None:
        """Copy a region from a file of another version. Raises OSError."""
        with source.open("rb") as file:
            file.seek(offset)
            position = region.start
            while position < region.end and (data := file.read(min(_STEP, region.end - position))):
                self.write(region.file, position, data)
                position += len(data)

    def wrong(self) -> list[Region]:
        """Regions whose bytes do not have the hash that the manifest states; each is read once only, if it is right."""
        self._check(self.layout.regions)
        return [region for region in self.layout.regions if region not in self._good]

    def _check(self, regions: Iterable[Region]) -> None:
        for region in regions:
            if region not in self._good and _hash(self.directory / region.file, region) == region.xxh3_128:
                self._good.add(region)

    def finish(self, target: Path) -> None:
        """Let it appear as a complete version."""
        self.directory.rename(target)
        (target / HAVE).unlink()

    def close(self) -> None:
        """Close its files."""
        self._map.close()
        for fd in (self._fd, *self._files.values()):
            os.close(fd)


def _hash(path: Path, region: Region) -> str:
    with path.open("rb", buffering=0) as file:
        file.seek(region.start)
        return hash_of(file, region.end - region.start)[0]
