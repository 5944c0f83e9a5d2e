"""What the fork does: confine itself, then run the program. Nothing here returns; the process ends in every path.

Reads of the program that trust nothing of it: the exit code, the output files and, in `calls.py`, tagged plain data.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import io
import mmap
import os
import resource
import signal
import sys
import threading
import traceback
import types
from typing import NoReturn

from actors.sandbox import linux, wire
from actors.sandbox.linux import SeccompFilter

_RESERVE_BYTES = 64 << 20  # address space of the zygote and of shared libraries, on top of what the program may use
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
_STAGE = 100  # where the descriptors of a job are parked if one stands where another belongs


def run(job: wire.Job, descriptors: list[int], seccomp: SeccompFilter, tmp: str, started: mmap.mmap) -> NoReturn:
    """Become the job. `descriptors` are program, stdin, stdout, stderr and extras, as received.

    `started` is a page shared with the zygote: its first byte becomes 1 when all confinement is in place. It is gone before the
    program runs, so a program cannot pretend that the fault was ours.
    """
    try:
        os.setsid()
        if job.kind == wire.PYTHON:
            source = _read_all(descriptors[0])
            kept = descriptors[1:]
        else:
            kept = [*descriptors[1:], descriptors[0]]
        _place(kept)
        _limit(job)
        os.chdir(tmp)
        if job.kind != wire.PYTHON:
            for number in (signal.SIGXFSZ, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)  # Python ignores both, and exec inherits that
        linux.drop_capabilities()
        linux.forbid_new_privileges()
        seccomp.install()
        started[0] = 1
        if job.kind == wire.NATIVE:
            os.set_inheritable(len(kept) - 1, False)
            linux.exec_descriptor(len(kept) - 1, ["./solution", *job.arguments], ENVIRONMENT)
        elif job.kind == wire.COMPILER:
            os.close(len(kept) - 1)
            os.execve(job.arguments[0], list(job.arguments), ENVIRONMENT)
    except BaseException as error:
        started[0] = 0
        os.write(2, repr(error).encode())
        os._exit(1)
    started.close()
    run_python(source)


def _read_all(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0)


def _place(descriptors: list[int]) -> None:
    """Make `descriptors` 0, 1, 2, ... and close all others, the control socket among them."""
    if min(descriptors) < len(descriptors):
        descriptors = [os.dup2(descriptor, _STAGE + target) for target, descriptor in enumerate(descriptors)]
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
    linux.close_from(len(descriptors))


def _limit(job: wire.Job) -> None:
    seconds = -(-int(job.cpu_s * 1e6) // 1_000_000)
    space = job.memory_bytes + _RESERVE_BYTES
    # soft below hard: SIGXCPU then says without doubt that it was the processor time
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (job.output_bytes, job.output_bytes))
    resource.setrlimit(resource.RLIMIT_NPROC, (job.num_threads, job.num_threads))


def open_stdio() -> None:
    """sys.stdin, stdout and stderr on 0, 1 and 2, as a fresh interpreter has them on files."""
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8", errors="surrogateescape")
    unbuffered = io.FileIO(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(unbuffered), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)


def run_python(source: bytes) -> NoReturn:
    """Run `source` as __main__ and exit as the interpreter would."""
    gc.enable()
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    code = 0
    try:
        exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException:
        code = 1
        _print_traceback()
    finish(code)


def finish(code: int) -> NoReturn:
    """Join threads, run exit functions, flush, exit: what an interpreter does at its end, program-written parts included."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        code = code or 1
    try:
        sys.stdout.flush()
    except BaseException:
        code = code or 120  # the code of an interpreter that cannot flush its output
    os._exit(code)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return int(stop.code) & 0xFF
    try:
        print(stop.code, file=sys.stderr)
    except BaseException:
        pass
    return 1


def _print_traceback() -> None:
    try:
        traceback.print_exc(limit=-8)
        sys.stderr.flush()
    except BaseException:
        pass
