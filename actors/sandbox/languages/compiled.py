"""What compiled languages share: run the compiler in a cell, keep the program by the content of its source."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from actors.sandbox import MIB, Execution, Limits, wire
from actors.sandbox.cell import memory_file
from actors.sandbox.execution import Program
from actors.sandbox.languages import CompileError
from actors.sandbox.runner import Sandbox

LIMITS = Limits(cpu_s=30, wall_s=60, memory_bytes=2048 * MIB, output_bytes=64 * MIB)
"""Of one compilation; templates that never end reach them and are a compile error."""
_NEAR = 0.9  # the kernel counts a limit in ticks, and usage exactly
_CACHE_BYTES = 256 * MIB


class ProgramCache:
    """Compiled programs by content, the least recently used dropped first. Threads share it."""

    def __init__(self) -> None:
        self._programs: OrderedDict[bytes, Program] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Program | None:
        """The program, which counts as used now."""
        with self._lock:
            program = self._programs.get(key)
            if program is not None:
                self._programs.move_to_end(key)
            return program

    def put(self, key: bytes, program: Program) -> None:
        """Keep a program."""
        with self._lock:
            if key in self._programs:
                return
            self._programs[key] = program
            self._num_bytes += len(program.content)
            while self._num_bytes > _CACHE_BYTES and len(self._programs) > 1:
                self._num_bytes -= len(self._programs.popitem(last=False)[1].content)


class Compiler:
    """Compiles source text with one command, in which "OUT" stands for the program's path."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)
        self._cache = ProgramCache()

    def compile(self, source: str, sandbox: Sandbox, files: Mapping[str, bytes]) -> Program:
        """The program of `source`, which may include `files`; those that end in .cpp are compiled with it.

        Raises CompileError, and InfrastructureFault when the compiler could not be run.
        """
        text = source.encode(errors="surrogatepass")
        key = hashlib.sha256(repr((text, sorted(files.items()))).encode()).digest()
        kept = self._cache.get(key)
        if kept is not None:
            return kept
        out = memory_file()
        try:
            command = (*self._command, *(name for name in sorted(files) if name.endswith(".cpp")))
            compiler = Program(kind=wire.COMPILER, content=b"", arguments=command, files=files)
            execution = sandbox.run(compiler, text, LIMITS, extras=[out])
            content = os.pread(out, os.fstat(out).st_size, 0)
        finally:
            os.close(out)
        if execution.outcome != "ok" or not content:
            raise CompileError(_explain(execution))
        program = Program(kind=wire.NATIVE, content=content)
        self._cache.put(key, program)
        return program


def _explain(execution: Execution) -> Execution:
    """The compiler's run with outcome compile_error; a limit that it reached stands in stderr."""
    outcome = execution.outcome
    if outcome == "runtime_error" and execution.cpu_s > _NEAR * LIMITS.cpu_s:  # its driver survives the part that was killed
        outcome = "time_limit"
    reason = b"" if outcome in ("ok", "runtime_error") else b"\nthe compiler reached its " + outcome.encode()
    return dataclasses.replace(execution, outcome="compile_error", stderr=execution.stderr + reason)
