"""The run directory: what stands in it, who holds it, and the other places that a run uses."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from protocol.holds import PREFIX, SHM, Hold
from rlsys.config import RunConfig, dump_config
from rlsys.published import version_bytes

PROBE_S = 0.2
"""How long a claim goes on trying: `holder` of another process has the lock for a moment when it looks who holds it."""


OWN = ("lock", "logs")
"""What may stand in a directory that a run is about to use."""


def check_new(out: Path) -> None:
    """Raise ConfigError when `out` holds anything: what a command writes is never mixed with, or put over, what somebody has there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists already; name a new directory, or remove it first")


class RunDir:
    """A run directory that this process holds by a lock; another `up` on it is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self._lock_fd = -1

    def check_free(self) -> None:
        """Raise ConfigError when the directory is in use, holds a run, or holds anything that is not ours. Makes nothing."""
        if (pid := holder(self.path)) is not None:
            raise ConfigError(f"run directory {self.path} is in use by process {pid}; choose another --run-dir")
        if (self.path / "config.yaml").exists():
            raise ConfigError(f"run directory {self.path} already holds a run; choose another --run-dir")
        try:
            foreign = sorted(path.name for path in self.path.iterdir() if path.name not in OWN) if self.path.exists() else []
        except OSError as error:
            raise ConfigError(f"run directory {self.path}: cannot be made ({error.strerror})") from None
        if foreign:
            raise ConfigError(f"run directory {self.path} is not empty (it holds {foreign[0]}); choose another --run-dir")

    def make(self) -> None:
        """Make the directory and its logs. Raises ConfigError when that cannot be."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run directory {self.path}: cannot be made ({error.strerror})") from None

    def claim(self, config: RunConfig, *, resume: bool = False) -> None:
        """Lock the directory and write the resolved configuration. Raises ConfigError when it is in use, holds a run, or cannot be written.

        With `resume` it must hold one; the configuration so far is kept as config-<n>.yaml if it differs.
        """
        self.make()
        try:
            self._lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._lock()
            known = self.path / "config.yaml"
            if known.exists() and not resume:
                raise ConfigError(f"run directory {self.path} already holds a run; choose another --run-dir")
            if known.exists() and known.read_text() != dump_config(config):
                known.rename(next(p for n in itertools.count(1) if not (p := self.path / f"config-{n}.yaml").exists()))
            os.ftruncate(self._lock_fd, 0)
            os.write(self._lock_fd, str(os.getpid()).encode())
            write_atomically(self.path / "config.yaml", dump_config(config))
        except OSError as error:
            self.release()
            raise ConfigError(f"run directory {self.path}: cannot be made ({error.strerror})") from None
        except BaseException:
            self.release()
            raise

    def abandon(self) -> None:
        """Take back what `claim` and a start that came to nothing wrote, so that the same command can be given again; logs stay."""
        for path in self.path.iterdir():
            if path.name not in OWN:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.release()

    def _lock(self) -> None:
        deadline = time.monotonic() + PROBE_S
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"run directory {self.path} is in use by process {holder(self.path) or '?'}; choose another --run-dir"
                    ) from None
                time.sleep(0.01)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def holder(path: Path) -> int | None:
    """The process id that holds a run directory now; None if nobody does."""
    try:
        fd = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.read(fd, 32).decode()
        return int(text) if text.isdigit() else None
    finally:
        os.close(fd)


def default_run_dir(config: RunConfig) -> Path:
    """runs/<name>-<time>, unused."""
    base = Path("runs") / f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for i in range(1000) if not (path := base if i == 0 else base.with_name(f"{base.name}-{i}")).exists())


def make_scratch_dir(run_id: str) -> Hold:
    """A private directory for ipc sockets and temporary files of a run, removed at its end. Short: the kernel allows sockets 107 bytes."""
    return Hold.of_new(f"{PREFIX}{run_id[:8]}-")


def choose_weights_dir(config: RunConfig, run_dir: Path, run_id: str) -> Path:
    """Where versions go: as configured, else in memory if three float32 copies take less than half of what is free there, else the run."""
    if config.weights.directory is not None:
        return config.weights.directory / f"{PREFIX}{run_id}"
    needed = 3 * 2 * version_bytes(config)
    if SHM.is_dir() and os.access(SHM, os.W_OK) and shutil.disk_usage(SHM).free > 2 * needed:
        return SHM / f"{PREFIX}{run_id}"
    return run_dir / "weights"


def check_room(directory: Path, config: RunConfig) -> None:
    """Raise ConfigError when three published versions would not fit where they go."""
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    needed = 3 * version_bytes(config)
    free = shutil.disk_usage(existing).free
    if free < needed:
        what = "adapters" if config.learner.lora is not None and config.learner.lora.publish == "adapter" else "model"
        raise ConfigError(
            f"{existing}: {free / 1e6:.0f} MB are free, three versions of the {what} need {needed / 1e6:.0f} MB; set weights.directory"
        )


def write_atomically(path: Path, text: str) -> None:
    """Write aside, then rename, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


WEIGHTS_PROBE = ".run"
"""A file in the weights directory that holds the run's id, by which a host on a shared file system sees that it is the one."""


WEIGHTS_DIR = "weights_dir"
"""A file in the run directory with the place of the weights directory."""


def sees_weights(directory: Path, run_id: str) -> bool:
    """Whether this process sees the weights directory of that run, and may read it."""
    try:
        return (directory / WEIGHTS_PROBE).read_text() == run_id
    except OSError:
        return False


def write_privately(path: Path, text: str) -> None:
    """A new file that only this user may read; what was there goes."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def read_status(run: Path) -> dict[str, Any]:
    """What the supervisor last wrote. Raises ConfigError in one sentence when there is none, or it cannot be read."""
    path = run / "status.json"
    content = read_json(path)
    if content is None or "time_s" not in content:
        if path.is_file():
            raise ConfigError(f"{path}: is no status of a run (it does not parse, or lacks its time)")
        raise ConfigError(f"{run}: holds no run (no status.json)")
    return {"processes": [], "run_dir": str(run), "state": "unknown", **content}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None when there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
