"""The sandbox: code written by a model runs here and nowhere else.

    owner (reward actor) --- control socket ---> cell: zygote, PID 1 of its own namespaces --fork per job--> candidate
      Sandbox (pool.py)        cell.py             zygote.py                                                   job.py

A `Sandbox` keeps a few *cells*. A cell is a warm Python process in its own user, pid, mount, net, ipc and uts namespaces (or
under landlock where those are not allowed) that forks once for each *job*. The fork sets its limits, drops what it may do by
seccomp and runs the program on memfds. Nothing that the owner wants to keep secret (expected outputs) is ever in a cell
together with the program that it judges.

This file holds the types that both sides share; it imports nothing heavy, for the zygote imports it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20

Outcome = Literal["ok", "runtime_error", "time_limit", "memory_limit", "output_limit", "compile_error"]
"""How one execution ended. `ok` says only that it ended by itself with exit code 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one execution may use. Reaching a limit is a verdict, never an error of ours."""

    cpu_s: float = 10.0
    """Processor seconds of all threads together."""
    wall_s: float | None = None
    """Real seconds; None is three times `cpu_s` and a second, so that a busy machine does not decide verdicts."""
    memory_bytes: int = 1024 * MIB
    output_bytes: int = 16 * MIB
    """Of stdout, of stderr and of each file."""
    num_threads: int = 64

    @property
    def wall(self) -> float:
        """The wall limit in force, in seconds."""
        return 3 * self.cpu_s + 1 if self.wall_s is None else self.wall_s


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One program, run once."""

    outcome: Outcome
    stdout: bytes = b""
    """At most `Limits.output_bytes`."""
    stderr: bytes = b""
    """The last 4 KiB."""
    exit_code: int = 0
    """Negative: the signal that ended it."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    peak_memory_bytes: int = 0
    """Largest resident set. Never below that of the warm zygote (about 15 MiB), from which every job is forked."""
