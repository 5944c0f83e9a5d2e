"""Disks that are full or may not be written, for a moment."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing beyond `num_bytes` of any file fails in this process, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    """Nothing can be made, renamed or removed in `directory` or below, nor any file there opened to write; also when the tests run as root."""
    everything = [directory, *directory.rglob("*")]
    modes = {path: path.stat().st_mode for path in everything}
    for path in reversed(everything):
        path.chmod(modes[path] & ~0o222)
    try:
        with _bound_by_modes():
            yield
    finally:
        for path in everything:
            if path.exists():
                path.chmod(modes[path])


_CAPABILITIES_3 = 0x20080522
_OVERRIDE = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what lets root pass by the modes of files."""


@contextmanager
def _bound_by_modes() -> Iterator[None]:
    """This thread, and those that it starts, heed modes although they are root's (capset(2))."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()

    def call(function: str) -> None:
        if getattr(libc, function)(header, sets):
            raise OSError(ctypes.get_errno(), function)

    call("capget")
    effective = sets[0]
    sets[0] = effective & ~_OVERRIDE
    call("capset")
    try:
        yield
    finally:
        sets[0] = effective
        call("capset")
