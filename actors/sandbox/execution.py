"""One job on one cell, from bytes to an `Execution`: descriptors out, report and files back, and what they mean."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.sandbox import Execution, Limits, Outcome, wire
from actors.sandbox.cell import Cell, CellError, memory_file

STDERR_BYTES = 4096
_OUT_OF_MEMORY = (b"MemoryError", b"std::bad_alloc", b"memory allocation of ")
"""What Python, C++ and Rust write when an allocation fails. A program that writes it itself only renames its own failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """Something that a cell can run."""

    kind: int
    """wire.PYTHON (source text), wire.NATIVE (an executable file), wire.CALLS (source text), ..."""
    content: bytes
    arguments: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files in its working directory, by name; a name that ends in "/" is an empty directory."""


class Running:
    """A job that a cell works on, and the files through which it speaks."""

    def __init__(
        self, cell: Cell, program: Program, stdin: bytes | int, limits: Limits, stdout: int | None = None, extras: Sequence[int] = ()
    ) -> None:
        """Begin. `stdin` may be a descriptor (of a pipe), `stdout` too; `extras` become 3, 4, ... in the job. Raises CellError."""
        self.cell = cell
        self._limits = limits
        self._own: list[int] = []
        try:
            content = self._file(program.content)
            source = self._file(stdin) if isinstance(stdin, bytes) else stdin
            self._stdout = self._file() if stdout is None else stdout
            self._stderr = self._file()
            job = wire.Job(
                program.kind,
                limits.cpu_s,
                limits.wall,
                limits.memory_bytes,
                limits.output_bytes,
                limits.num_threads,
                program.arguments,
                tuple(program.files),
            )
            files = [self._file(text) for text in program.files.values()]
            cell.start(job, [content, source, self._stdout, self._stderr, *extras, *files])
        except BaseException:
            self._release()
            raise
        self._stdout_is_file = stdout is None

    def _file(self, content: bytes = b"") -> int:
        descriptor = memory_file(content)
        self._own.append(descriptor)
        return descriptor

    def _release(self) -> None:
        for descriptor in self._own:
            os.close(descriptor)
        self._own = []

    def fileno(self) -> int:
        """Readable when the job has ended."""
        return self.cell.fileno()

    def abandon(self) -> None:
        """End the job and forget it. Raises CellError when the cell is broken."""
        try:
            self.cell.end_job()
            self.cell.finish()
        finally:
            self._release()

    def collect(self) -> tuple[Execution, wire.Report]:
        """Block until the job has ended. Raises CellError when nothing is known about it."""
        try:
            report = self.cell.finish()
            stdout_size = os.fstat(self._stdout).st_size if self._stdout_is_file else 0
            stderr_size = os.fstat(self._stderr).st_size
            limit = self._limits.output_bytes
            stderr = os.pread(self._stderr, STDERR_BYTES, max(0, min(stderr_size, limit) - STDERR_BYTES))
            if not report.started:
                self.cell.broken = True
                raise CellError(f"sandbox cell {self.cell.pid} could not start a job: {stderr.decode(errors='replace')}")
            stdout = os.pread(self._stdout, min(stdout_size, limit), 0) if self._stdout_is_file else b""
        finally:
            self._release()
        outcome = judge(report, self._limits, max(stdout_size, stderr_size), stderr)
        execution = Execution(
            outcome=outcome,
            stdout=stdout,
            stderr=stderr,
            exit_code=report.exit_code,
            cpu_s=report.cpu_us / 1e6,
            wall_s=report.wall_us / 1e6,
            peak_memory_bytes=report.peak_kib << 10,
        )
        return execution, report


def run_series(cell: Cell, program: Program, stdins: Sequence[bytes], limits: Limits) -> list[Execution]:
    """Run a Python program on `stdins` in one process, as far as that tells the truth.

    Returns executions of the first inputs, often of all, sometimes of none. The first one is what it would be alone. The others ended
    well; but where their output is wrong, what an earlier run left behind may be the reason, and only a run alone decides. Raises CellError.
    """
    stdins = stdins[: wire.LONGEST_SERIES]
    files = [memory_file() for _ in range(len(stdins))]
    try:
        for stdin in stdins[1:]:
            files.append(memory_file(stdin))
        status, stdouts, others = files[0], files[1 : len(stdins)], files[len(stdins) :]
        extras = [status, *(file for pair in zip(others, stdouts, strict=True) for file in pair)]
        series = dataclasses.replace(program, kind=wire.SERIES)
        first, report = Running(cell, series, stdins[0], limits, extras=extras).collect()
        num_ended = min(os.fstat(status).st_size, len(stdins))
        if num_ended == 0:
            return [] if is_suspect(first, report, limits) else [first]
        sizes = [len(first.stdout), *(os.fstat(file).st_size for file in stdouts[: num_ended - 1])]
        if max(*sizes, len(first.stderr)) >= limits.output_bytes:
            return []
        outputs = [first.stdout, *(os.pread(file, size, 0) for file, size in zip(stdouts, sizes[1:], strict=False))]
        share = first.cpu_s / num_ended
        well = dataclasses.replace(first, outcome="ok", exit_code=0, stderr=b"", cpu_s=share)
        return [dataclasses.replace(well, stdout=output) for output in outputs]
    finally:
        for file in files:
            os.close(file)


def judge(report: wire.Report, limits: Limits, output_size: int, stderr: bytes) -> Outcome:
    """Which outcome a report and the sizes of the output files are.

    What ended the program comes first: one that ran out of memory did not run out of time, however slow the machine was until then.
    """
    if output_size >= limits.output_bytes or report.exit_code == -signal.SIGXFSZ:
        return "output_limit"
    if report.cut == wire.CUT_BY_WALL or report.exit_code == -signal.SIGXCPU:
        return "time_limit"
    if report.exit_code and any(word in stderr for word in _OUT_OF_MEMORY):
        return "memory_limit"
    if report.cpu_us > limits.cpu_s * 1e6:
        return "time_limit"
    if report.peak_kib << 10 > limits.memory_bytes:
        return "memory_limit"
    return "runtime_error" if report.exit_code else "ok"


def is_suspect(execution: Execution, report: wire.Report, limits: Limits) -> bool:
    """Whether a wall limit may be the machine's fault: it was reached before the processor time was used up."""
    return report.cut == wire.CUT_BY_WALL and execution.cpu_s < limits.cpu_s
