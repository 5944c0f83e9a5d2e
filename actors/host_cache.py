"""Where a host keeps versions that came over the network: one directory for all actors of a run there, in memory if there is room.

Everyone who uses it holds it (protocol/holds.py); the last one to leave removes it. What a run left behind whose processes were all killed goes
when the next cache is made.
"""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path

from protocol.holds import PREFIX, SHM, Hold, sweep


def choose_cache_dir(run_id: str, needed_bytes: int, fallback: Path, configured: Path | None = None) -> Path:
    """As configured, else in memory if twice what is needed is free there, else `fallback`."""
    name = f"{PREFIX}{run_id}-{os.getuid()}-cache"
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
        sweep(directory.parent)
        self._hold = Hold(directory)
        boot = Path("/proc/sys/kernel/random/boot_id")
        here = directory.stat()
        text = f"{boot.read_text() if boot.exists() else os.uname().nodename} {here.st_dev} {here.st_ino}"
        self.key = sha256(text.encode()).hexdigest()[:16]
        """The same for all processes that share the cache, and for nobody else."""

    def leave(self) -> None:
        """Use it no longer; the last one removes it."""
        self._hold.leave()
