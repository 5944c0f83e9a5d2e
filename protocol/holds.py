"""Directories that belong to living processes alone: a run's scratch, versions in memory, caches of hosts, the sandbox's temporary files.

Whoever uses one holds a shared lock (flock) on a file in it, and children of a process can take its holds over. The kernel lets go when the last
of them has ended, in whatever way: a directory whose lock nobody holds was left by processes that were killed. `sweep` removes those.

It never removes what another user made, what is not under our prefix, what has no such file (a version of rlsys without holds made it, or
somebody else), or what was made on another host, whose locks this kernel may not know of: file systems that are shared have their own ideas.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("rlsys.holds")

PREFIX = "rlsys-"
USERS = ".users"
"""The file whose lock counts. It says where that is: this boot of the machine, and the host's name."""
SHM = Path("/dev/shm")

_mine: set[int] = set()


class Hold:
    """This process's part in a directory, from `__init__` to `release`, `leave` or `remove`."""

    def __init__(self, directory: Path) -> None:
        """Hold `directory`, which is made for this user alone unless it exists. Raises OSError when it cannot be made."""
        self.directory = directory
        self._fd = -1
        while self._fd < 0:
            with suppress(FileExistsError):  # and gone again by the time that mkdir looks what it is
                directory.mkdir(parents=True, mode=0o700)
            self._fd = _take(directory, os.O_CREAT)
        _mine.add(self._fd)

    @classmethod
    def of_new(cls, prefix: str, parent: Path | None = None) -> Hold:
        """A new directory of this user alone, with a name that nobody can foresee. Raises OSError when it cannot be made."""
        hold = cls.__new__(cls)
        hold._fd = -1
        while hold._fd < 0:  # again, in case that it was swept away between its making and its locking
            hold.directory = (parent or Path(tempfile.gettempdir())) / f"{prefix}{secrets.token_hex(4)}"
            try:  # the directory is made inside: an interrupt may come as soon as it stands, and without the lock's file no sweep removes it
                hold.directory.mkdir(mode=0o700)
                hold._fd = _take(hold.directory, os.O_CREAT)
            except FileExistsError:
                continue
            except BaseException:
                shutil.rmtree(hold.directory, ignore_errors=True)
                raise
        _mine.add(hold._fd)
        return hold

    @classmethod
    def beside(cls, directory: Path) -> Hold | None:
        """Hold what another process of this host holds as well; None when `directory` is no such thing."""
        fd = _take(directory, 0) if (directory / USERS).exists() else -1
        if fd < 0:
            return None
        hold = cls.__new__(cls)
        hold.directory, hold._fd = directory, fd
        _mine.add(fd)
        return hold

    def __enter__(self) -> Path:
        return self.directory

    def __exit__(self, *error: object) -> None:
        self.remove()

    def release(self) -> None:
        """Let go. The directory stays, for those who hold it still, or a sweep."""
        if self._fd >= 0:
            _mine.discard(self._fd)
            os.close(self._fd)
            self._fd = -1

    def leave(self) -> None:
        """Let go; the last one removes the directory."""
        if self._fd >= 0:
            with suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(self._fd, self.directory):
                    _clear(self.directory)
        self.release()

    def remove(self) -> None:
        """Remove the directory, whoever else holds it, and let go."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.release()


def inherited() -> tuple[int, ...]:
    """Descriptors of all that this process holds: a child that keeps them open (`pass_fds`) holds the same."""
    return tuple(_mine)


def sweep(*parents: Path) -> list[Path]:
    """Remove what killed processes of this user left on this host in `parents`; those of temporary files and of memory, if none are named."""
    found = [path for parent in parents or (Path(tempfile.gettempdir()), SHM) for path in sorted(parent.glob(f"{PREFIX}*"))]
    gone = [path for path in found if _sweep_one(path)]
    if gone:
        log.info("removed what killed processes left: %s", ", ".join(map(str, gone)))
    return gone


def _sweep_one(directory: Path) -> bool:
    """Remove `directory` if it is ours and nobody holds it. Who wants to hold it meanwhile waits, and makes it anew."""
    with suppress(OSError):  # nothing of ours, held, or gone by now
        if directory.is_symlink() or directory.stat().st_uid != os.getuid():
            return False
        fd = os.open(directory / USERS, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            of = os.pread(fd, 1 << 10, 0).decode("utf-8", "replace").splitlines()
            if not _is_at(fd, directory) or set(_host().splitlines()).isdisjoint(of):
                return False
            _clear(directory)
        finally:
            os.close(fd)
        return True
    return False


def _clear(directory: Path) -> None:
    """Remove a directory that this process holds alone, the file of the lock last: from then on others make their own and come in.

    A removal that is interrupted is done again by the next sweep.
    """
    for entry in directory.iterdir():
        if entry.name != USERS:
            entry.unlink() if entry.is_symlink() or not entry.is_dir() else shutil.rmtree(entry)
    (directory / USERS).unlink()
    directory.rmdir()


def _take(directory: Path, flags: int) -> int:
    """A descriptor that holds `directory`, -1 when it went away meanwhile."""
    try:
        fd = os.open(directory / USERS, os.O_RDWR | flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return -1
    with suppress(OSError):  # a file system without locks, or a full one: nobody will sweep it then
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.pwrite(fd, _host().encode(), 0)
    if _is_at(fd, directory):
        return fd
    os.close(fd)
    return -1


def _is_at(fd: int, directory: Path) -> bool:
    """Whether the file that is locked is the one that counts: it may have been removed with all of its directory, and made anew by others."""
    try:
        return os.path.samestat(os.fstat(fd), (directory / USERS).stat())
    except FileNotFoundError:
        return False


def _host() -> str:
    """This boot of this machine, and its name: containers of one machine share the first, boots of one host the second."""
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.uname().nodename + "\n"
