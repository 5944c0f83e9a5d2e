"""Where a host keeps versions that came over the network: one directory for all actors of a run there, in memory if there is room.

Everyone who uses it holds a shared lock on it; the last one to leave removes it. What a run left behind whose processes were all killed goes
when the next cache is made.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

USERS = ".users"
SHM = Path("/dev/shm")
_PREFIX, _SUFFIX = "rlsys-", "-cache"


def choose_cache_dir(run_id: str, needed_bytes: int, fallback: Path, configured: Path | None = None) -> Path:
    """As configured, else in memory if twice what is needed is free there, else `fallback`."""
    name = f"{_PREFIX}{run_id}-{os.getuid()}{_SUFFIX}"
    if configured is not None:
        return configured / name
    if (SHM / name).is_dir():
        return SHM / name
    if SHM.is_dir() and os.access(SHM, os.W_OK) and shutil.disk_usage(SHM).free > 2 * needed_bytes:
        return SHM / name
    return fallback


class HostCache:
    """One process's part in the cache `directory`, from `__init__` to `leave`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._fd = -1
        sweep_caches(directory.parent)
        while self._fd < 0:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with suppress(FileNotFoundError):  # the last user of before has just removed it
                fd = os.open(directory / USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(fd, fcntl.LOCK_SH)
                self._fd = _kept(fd, directory / USERS)
        boot = Path("/proc/sys/kernel/random/boot_id")
        here = directory.stat()
        text = f"{boot.read_text() if boot.exists() else os.uname().nodename} {here.st_dev} {here.st_ino}"
        self.key = sha256(text.encode()).hexdigest()[:16]
        """The same for all processes that share the cache, and for nobody else."""

    def leave(self) -> None:
        """Use it no longer; the last one removes it."""
        if self._fd < 0:
            return
        with suppress(BlockingIOError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._fd)
        self._fd = -1


def _kept(fd: int, path: Path) -> int:
    """`fd` if it still is the file at `path`, else -1."""
    with suppress(FileNotFoundError):
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    os.close(fd)
    return -1


def sweep_caches(parent: Path = SHM) -> None:
    """Remove caches of this user that nobody uses: of processes that were killed."""
    for directory in parent.glob(f"{_PREFIX}*-{os.getuid()}{_SUFFIX}"):
        with suppress(OSError):
            fd = os.open(directory / USERS, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(fd)
