"""Processes on this host: each a child of the supervisor, in a session of its own, with its log in the run directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import ConfigError, DeadlineExceeded
from protocol.holds import inherited
from protocol.node import PARENT, ProcessSpec
from rlsys.config import RunConfig
from rlsys.launchers import how_it_ended

if TYPE_CHECKING:
    from rlsys.hosts import Door

KILL_S = 30.0
"""From SIGKILL to the end of a process: only one that hangs in the kernel, at a dead file server say, takes longer than a moment."""


class Child:
    """One started process. Ending it ends its whole process group, sandbox cells and engines included."""

    host = ""

    def __init__(self, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> None:
        self.spec = spec
        self.log_path = log_path
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rlsys", "run", json.dumps(asdict(spec))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=inherited(),  # what it uses stays until it has ended, should its parent be killed first
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", PARENT: str(os.getpid()), **environment},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def how(self) -> str:
        """How it ended, in words."""
        return how_it_ended(self._process.returncode or 0)

    def exit_code(self) -> int | None:
        """None while it runs; negative is a signal's number. What is left of its group is killed when it has ended."""
        if self._process.returncode is None:
            with suppress(ChildProcessError):  # somebody else has reaped it
                if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return None  # looked at once: `poll` below could find it ended a moment later, and reap it before its group is killed
                self.signal_group(signal.SIGKILL)  # before it is reaped: afterwards its number may be that of another group
        return self._process.poll()

    def signal_group(self, number: signal.Signals) -> None:
        """Signal every process of the group; nothing happens when it has ended, and what was left of the group with it."""
        if self._process.returncode is not None:
            return
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def kill(self) -> None:
        """SIGKILL the whole group and wait until the process is gone (a stopped one dies as well)."""
        self.signal_group(signal.SIGKILL)
        try:
            self._process.wait(timeout=KILL_S)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(
                f"{self.spec.identity} (pid {self.pid}) was killed and is still there after {KILL_S:g} s: it hangs in the kernel"
            ) from None

    def tail(self, lines: int = 20) -> list[str]:
        """The end of its log."""
        return tail(self.log_path, lines)


class LocalLauncher:
    """Children of the supervisor on this host."""

    def __init__(self, address: str = "") -> None:
        if address:
            raise ConfigError(f"--address {address}: the local launcher starts children of its own and has no address; leave it out")

    def adapt(self, config: RunConfig) -> RunConfig:
        """As it is."""
        return config

    def reserve(self, config: RunConfig, fleet: Sequence[tuple[str, int]], door: Door | None, *, live: bool = False) -> None:
        """There is no limit but the machine."""

    def release(self, role: str, index: int) -> None:
        """Nothing was taken for it."""

    def turn(self) -> None:
        """The kernel tells who has ended."""

    def start(self, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> Child:
        """Start a child."""
        return Child(spec, log_path, environment)

    def close(self) -> None:
        """Nothing is left to give back."""


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file; none if it cannot be read."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 64_000))
            return log.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def start_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since the boot; 0 when there is none (a zombie is none)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[19])


def end_leftover(pid: int, ticks: int) -> bool:
    """Kill the group of a process that an earlier supervisor started, if it still lives and is that very process."""
    if pid <= 0 or not ticks or start_ticks(pid) != ticks:
        return False
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def cpu_seconds(pids: set[int]) -> float:
    """CPU time so far of every process in the sessions led by `pids`, ended and reaped descendants included."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) in pids:  # session
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, and both of reaped children
    return ticks / os.sysconf("SC_CLK_TCK")
