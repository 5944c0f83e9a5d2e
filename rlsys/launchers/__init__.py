"""Launchers: how a process of a run is started, watched and ended. The supervisor decides what runs; a launcher knows where and how.

`local` starts children of the supervisor on this host, `ray` places them on the nodes of a Ray cluster; hosts that join (rlsys/hosts.py) are
launchers of what they brought along.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from protocol.node import ProcessSpec
    from rlsys.config import RunConfig
    from rlsys.hosts import Door

LAUNCHERS = {
    "local": "rlsys.launchers.local:LocalLauncher",
    "ray": "rlsys.launchers.ray:RayLauncher",
}
"""Name -> launcher; the class is called with what `--address` says, empty without."""


def how_it_ended(code: int) -> str:
    """An exit code in words that follow a name."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else "ended before the run did"


class Handle(Protocol):
    """One started process, as its supervisor holds it."""

    spec: ProcessSpec
    log_path: Path
    """On the supervisor's host, whichever the process runs on."""

    @property
    def pid(self) -> int:
        """On the host that it runs on; 0 before it is known."""
        ...

    @property
    def host(self) -> str:
        """Where it runs, in words; empty for a child of the supervisor."""
        ...

    def how(self) -> str:
        """How it ended, in words that follow its name."""
        ...

    def exit_code(self) -> int | None:
        """None while it runs, as far as is known; negative is a signal's number."""
        ...

    def signal_group(self, number: signal.Signals) -> None:
        """Signal it and everything that it started. Nothing happens when it is gone."""
        ...

    def kill(self) -> None:
        """End it and everything that it started, now. From then on it has an exit code, whether or not its host can be reached."""
        ...

    def tail(self, lines: int = 20) -> list[str]:
        """The end of its log."""
        ...


class Launcher(Protocol):
    """Starts processes in one way."""

    def adapt(self, config: RunConfig) -> RunConfig:
        """The configuration as this launcher can run it; asked before anything else."""
        ...

    def reserve(self, config: RunConfig, fleet: Sequence[tuple[str, int]], door: Door | None, *, live: bool = False) -> None:
        """Find places for processes (role, index) that shall be started. Raises ConfigError when there are none: what lacks, what is free.

        `live`: the run goes on meanwhile, so that it must not take long.
        """
        ...

    def release(self, role: str, index: int) -> None:
        """A process has left for good: its place is free."""
        ...

    def turn(self) -> None:
        """Called all the time: notice what was lost, give back what is not needed any more."""
        ...

    def start(self, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> Handle:
        """Start the process `spec`; what it prints is appended to `log_path`."""
        ...

    def close(self) -> None:
        """The run has ended, and all its processes with it: give back what they ran on."""
        ...
