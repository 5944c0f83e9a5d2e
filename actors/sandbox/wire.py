"""What owner and zygote say to each other over the control socket (AF_UNIX, SOCK_SEQPACKET: one message, one packet).

owner  -> zygote   Job, with its descriptors by SCM_RIGHTS      b"end": kill the job that runs
zygote -> owner    b"ready" or b"failed: why" once, then one Report for each Job
"""

from __future__ import annotations

import json
import struct
from typing import NamedTuple

PYTHON, NATIVE, COMPILER, SERIES, CALLS, ASSERTS, SESSION = range(7)
"""Kinds of job: Python source in the first descriptor; a compiled program in the first descriptor; a compiler, its command in the
arguments;
Python source that is run on several inputs (`job.run_series`); Python source that answers calls (`calls.py`); their tests (`asserts.py`);
a session (`interpreter.py`).
"""

LONGEST_SERIES = 32
"""Inputs of one SERIES: each takes two descriptors."""

CUT_BY_NOTHING, CUT_BY_WALL, CUT_BY_OWNER = range(3)
READY, FAILED, END = b"ready", b"failed: ", b"end"

_JOB = struct.Struct("=iiqqqq")
_REPORT = struct.Struct("=iiiqqqiq")


class Job(NamedTuple):
    """One fork. Descriptors that travel with it: program, stdin, stdout, stderr, then extras that become 3, 4, ... in the job."""

    kind: int
    cpu_s: float
    wall_s: float
    memory_bytes: int
    output_bytes: int
    num_threads: int
    arguments: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    """Names of files in its working directory, filled from the last descriptors; a name that ends in "/" makes a directory."""

    def pack(self) -> bytes:
        """The packet."""
        head = _JOB.pack(
            self.kind, self.num_threads, round(self.cpu_s * 1e6), round(self.wall_s * 1e6), self.memory_bytes, self.output_bytes
        )
        return head + json.dumps([self.arguments, self.files]).encode() if self.arguments or self.files else head

    @classmethod
    def unpack(cls, packet: bytes) -> Job:
        """The inverse of `pack`."""
        kind, threads, cpu_us, wall_us, memory, output = _JOB.unpack_from(packet)
        arguments, files = json.loads(packet[_JOB.size :]) if len(packet) > _JOB.size else ((), ())
        return cls(kind, cpu_us / 1e6, wall_us / 1e6, memory, output, threads, tuple(arguments), tuple(files))


class Report(NamedTuple):
    """How a job ended."""

    exit_code: int
    """Negative: the signal."""
    cut: int
    """Who ended it: CUT_BY_NOTHING (itself or a limit of the kernel), CUT_BY_WALL, CUT_BY_OWNER."""
    started: int
    """0: it could not be forked or confined, and nothing of the program ran; the reason stands in stderr."""
    cpu_us: int
    wall_us: int
    peak_kib: int
    strays: int
    """Processes that it left behind, all killed."""
    ended_us: int
    """When, on the clock that all processes of a host share; before its lines were closed, so before whoever saw them close ended."""

    def pack(self) -> bytes:
        """The packet."""
        return _REPORT.pack(*self)

    @classmethod
    def unpack(cls, packet: bytes) -> Report:
        """The inverse of `pack`."""
        return cls(*_REPORT.unpack(packet))
