"""Interpreter sessions: code that a model runs over several turns, with state kept in between.

A session is one process in a cell of its own, from the first call to `close`. Each call runs source text in the same namespace and
returns what it wrote, and, as a notebook does, the value of a last expression. A call that reaches its time limit is interrupted
with TimeoutError; if that is not enough, the session ends. All of it, files in /tmp included, is gone when the session closes.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Self

from actors.sandbox import MIB, Limits, wire
from actors.sandbox.cell import CellError
from actors.sandbox.execution import Program, Running
from actors.sandbox.pool import CellPool
from actors.sandbox.waiting import readable

MAX_CALLS = 8
CALL_LIMIT_S = 60.0
OUTPUT_CHARACTERS = 8192
"""Of one call: what is longer keeps its two ends around a mark that says how much is missing."""

_INTERRUPT_GRACE_S = 2.0
_LENGTH = struct.Struct("=I")
_LONGEST_REPLY_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one call gave."""

    output: str
    """stdout, stderr and the value of a last expression, in the order in which they came."""
    status: str
    """ok, error (the code raised), time_limit, ended (the process is gone: a limit, an exit or a crash), too_many_calls."""


class Session:
    """State over up to `max_calls` calls. Used by one thread; close it, or use it as a context, to free its cell."""

    def __init__(
        self, pool: CellPool, memory_bytes: int = 1024 * MIB, max_calls: int = MAX_CALLS, call_limit_s: float = CALL_LIMIT_S
    ) -> None:
        """Waits for a cell. Raises InfrastructureFault."""
        self._pool = pool
        self._calls_left = max_calls
        self._call_limit_s = call_limit_s
        self._lease = pool.lease()
        self._cells = self._lease.__enter__()
        self._socket, theirs = socket.socketpair()
        seconds = (call_limit_s + _INTERRUPT_GRACE_S) * max_calls  # the grace too: else one deaf call reaches this limit before its own
        limits = Limits(cpu_s=seconds, wall_s=7 * 86400.0, memory_bytes=memory_bytes, output_bytes=64 * MIB)
        try:
            self._running: Running | None = self._begin(theirs, limits)
        except BaseException:
            self._socket.close()
            self._lease.__exit__(None, None, None)
            raise
        finally:
            theirs.close()

    def _begin(self, theirs: socket.socket, limits: Limits) -> Running:
        program = Program(kind=wire.SESSION, content=b"")
        try:
            return Running(self._cells[0], program, b"", limits, extras=[theirs.fileno()])
        except CellError:
            self._pool.replace(self._cells, self._cells[0])
            return Running(self._cells[0], program, b"", limits, extras=[theirs.fileno()])

    def run(self, source: str) -> Turn:
        """Run `source` after all that was run before. Raises InfrastructureFault when the cell broke."""
        if self._running is None:
            return Turn(output="", status="ended")
        if self._calls_left == 0:
            return Turn(output="", status="too_many_calls")
        self._calls_left -= 1
        body = source.encode(errors="surrogatepass")
        limit = struct.pack("=d", self._call_limit_s)
        try:
            self._socket.settimeout(self._call_limit_s + _INTERRUPT_GRACE_S)
            self._socket.sendall(_LENGTH.pack(len(body)) + limit + body)
            status, output = self._receive()
        except TimeoutError:
            self._end()
            return Turn(output="", status="time_limit")
        except OSError:
            said = self._end()
            return Turn(output=shorten(said), status="ended")
        return Turn(output=shorten(output), status=status)

    def _receive(self) -> tuple[str, str]:
        """The reply, which the judged process writes itself: its length is bounded and its text is text."""
        (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        if length > _LONGEST_REPLY_BYTES:
            raise ConnectionError("a reply without bound")
        status, _, output = self._exactly(length).decode(errors="replace").partition("\n")
        return status if status in ("ok", "error", "time_limit") else "error", output

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self._socket.recv(min(size, 1 << 20))
            if not part:
                raise ConnectionError("the session's process is gone")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _end(self) -> str:
        """End the process; returns what it last wrote to stderr. Raises CellError when the cell is broken."""
        running, self._running = self._running, None
        if running is None:
            return ""
        try:
            if not readable([running], 0.2):
                running.cell.end_job()
            execution, _ = running.collect()
        except CellError:
            self._pool.replace(self._cells, running.cell)
            raise
        return execution.stderr.decode(errors="replace") + ("" if execution.outcome == "ok" else f"\n[{execution.outcome}]")

    def close(self) -> None:
        """End the process, clean its cell, free it. Safe to call twice."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        try:
            self._end()
        finally:
            self._lease.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shorten(text: str, limit: int = OUTPUT_CHARACTERS) -> str:
    """`text`, or its two ends around a mark."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"
