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
import random
import resource
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

from actors.sandbox import asserts, calls, interpreter, linux, wire
from actors.sandbox.linux import SeccompFilter
from actors.sandbox.seccomp import PROGRAM

_RESERVE_BYTES = 64 << 20  # address space of the zygote and of shared libraries, on top of what the program may use
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
_leave = os._exit  # a program may replace the attribute
RANDOM_SEED = 0  # every run starts with the same random state and string hashes, so that a verdict can be had again
SERIES_SLICE_S = 0.05
"""A series starts no further run after so much processor time: what is slow is worth a process of its own, on any idle cell."""
CONTEST_NAMES: dict[str, object] = {}
"""Filled by the zygote when it is warm."""
_main_names: dict[str, object] = {}
_RECURSION_LIMIT = 1000  # the interpreter's default
_WARM_RUNS = 24  # the interpreter specialises a function at about its tenth call
_WARM_SOURCE = b"""
import sys
def main():
    n = int(input())
    a, b = map(int, input().split())
    return [a + b + int(line) for line in sys.stdin], [0] * n
print(*main()[0], sep="\\n")
"""
_STAGE = 100  # where the descriptors of a job are parked if one stands where another belongs


def confinement(job: wire.Job, num_streams: int, seccomp: SeccompFilter) -> tuple[linux.Step, ...]:
    """What binds the fork before the program runs; made in the zygote, once for all jobs of the same kind and limits."""
    seconds = -(-int(job.cpu_s * 1e6) // 1_000_000)
    space = job.memory_bytes + _RESERVE_BYTES
    steps = [linux.SET_SID]
    if job.kind == wire.NATIVE:
        steps += [linux.close_step(num_streams, PROGRAM - 1), linux.close_step(PROGRAM + 1)]
        steps += [linux.limit_step(resource.RLIMIT_NOFILE, PROGRAM, PROGRAM)]
    else:
        steps += [linux.close_step(num_streams)]
    # soft below hard: SIGXCPU then says without doubt that it was the processor time
    steps += [linux.limit_step(resource.RLIMIT_CPU, seconds, seconds + 1), linux.limit_step(resource.RLIMIT_AS, space, space)]
    steps += [linux.limit_step(resource.RLIMIT_FSIZE, job.output_bytes, job.output_bytes)]
    steps += [linux.limit_step(resource.RLIMIT_NPROC, job.num_threads, job.num_threads)]
    return (*steps, linux.drop_capabilities_step(), linux.FORBID_NEW_PRIVILEGES, seccomp.step())


def run(job: wire.Job, descriptors: list[int], steps: tuple[linux.Step, ...], tmp: str, started: mmap.mmap) -> NoReturn:
    """Become the job. `descriptors` are program, stdin, stdout, stderr and extras, as received; `steps` is its `confinement`.

    `started` is a page shared with the zygote: its first byte becomes 1 when all confinement is in place. It is gone before the
    program runs, so a program cannot pretend that the fault was ours.
    """
    try:
        is_python = job.kind != wire.NATIVE
        source = _read_all(descriptors[0]) if is_python else b""
        kept = descriptors[1 : len(descriptors) - len(job.files)]
        if not is_python:
            os.dup2(descriptors[0], PROGRAM, inheritable=False)
        _place(kept)
        if job.kind in (wire.NATIVE, wire.COMPILER):
            for number in (signal.SIGXFSZ, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)  # Python ignores both, and exec inherits that
        linux.perform(steps)
        started[0] = 1
        if job.kind == wire.NATIVE:
            linux.exec_descriptor(PROGRAM, ["./solution", *job.arguments], ENVIRONMENT)
    except BaseException as error:
        started[0] = 0
        os.write(2, repr(error).encode())
        _leave(1)
    started.close()
    if job.kind == wire.PYTHON:
        sys.argv[1:] = job.arguments
        run_python(source)
    if job.kind == wire.SERIES:
        run_series(source, (len(kept) - 2) // 2)
    try:
        if job.kind == wire.COMPILER:
            _leave(_compile(job.arguments, tmp))
        if job.kind == wire.SESSION:
            interpreter.run()
        if job.kind == wire.ASSERTS:
            asserts.run(source)
        calls.run(source, CONTEST_NAMES if job.arguments else {})
    except SystemExit as stop:
        _leave(_finish(_exit_code(stop)))
    except BaseException:
        _print_traceback()
        _leave(_finish(1))


def place_files(job: wire.Job, descriptors: list[int], tmp: str) -> None:
    """Write the files that the job shall find."""
    for name, descriptor in zip(job.files, descriptors[len(descriptors) - len(job.files) :], strict=True):
        if name.endswith("/"):
            Path(tmp, name).mkdir()
        else:
            Path(tmp, name).write_bytes(_read_all(descriptor))


def _read_all(descriptor: int) -> bytes:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    return os.pread(descriptor, size, 0)


def _place(descriptors: list[int]) -> None:
    """Make `descriptors` 0, 1, 2, ..."""
    if min(descriptors) < len(descriptors):
        descriptors = [os.dup2(descriptor, _STAGE + target) for target, descriptor in enumerate(descriptors)]
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)


def warm() -> None:
    """Run a small program often enough that the interpreter has specialised its own code and filled its caches for what every job does.

    A fork would do so again each time, on pages that it must then copy. Descriptors 1 and 2 are /dev/null; so is 0 afterwards.
    """
    nothing = [os.dup2(number, _STAGE + number) for number in range(3)]
    text = os.memfd_create("warm")
    os.write(text, b"2\n3 4\n5\n")
    for _ in range(_WARM_RUNS):
        _read_all(text)
        os.lseek(text, 0, os.SEEK_SET)
        _place([text, *nothing[1:]])
        open_stdio()
        linux.perform([linux.NOTHING] * 8)
        _run_as_main(compile(_WARM_SOURCE, "solution.py", "exec", dont_inherit=True))
        _leaves_something()
        _flush()
    _place(nothing)
    for descriptor in (text, *nothing):
        os.close(descriptor)
    open_stdio()


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
    code = 0
    try:
        compiled = compile(source, "solution.py", "exec", dont_inherit=True)
    except BaseException:
        code = 1
        _print_traceback()
    else:
        code = _run_as_main(compiled)
    if not code and not _leaves_something():
        _leave(0 if _flush() else 120)
    _leave(_finish(code))


def run_series(source: bytes, num_inputs: int) -> NoReturn:
    """Run `source` on several inputs, one after the other, until a run fails, takes long, or leaves something behind.

    The first run is exactly that of `run_python`. Descriptors: 0 and 1 belong to the first input; 3 receives one byte for each run that
    ended well; (4, 5), (6, 7), ... are stdin and stdout of the others.
    """
    gc.enable()
    try:
        compiled = compile(source, "solution.py", "exec", dont_inherit=True)
    except BaseException:
        _print_traceback()
        _leave(_finish(1))
    for number in range(num_inputs):
        if number:
            os.dup2(2 + 2 * number, 0)
            os.dup2(3 + 2 * number, 1)
            open_stdio()
            sys.setrecursionlimit(_RECURSION_LIMIT)
            random.seed(RANDOM_SEED)
        code = _run_as_main(compiled)
        leaves_something = _leaves_something()
        if leaves_something or code:
            code = _finish(code)
        elif not _flush():
            code = 1
        if code:
            _leave(code)
        try:
            os.write(3, b".")
        except OSError:  # the program closed it: this run ended well, and there will be no further one
            break
        if leaves_something or time.process_time() > SERIES_SLICE_S:
            break
    _leave(0)


def _compile(command: tuple[str, ...], tmp: str) -> int:
    """Run a compiler on the source in descriptor 0, with `OUT` in its arguments for the program, which is copied to descriptor 3."""
    out = f"{tmp}/program"
    words = [word.replace("OUT", out) for word in command]
    code = os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(words[0], words, ENVIRONMENT | {"TMPDIR": tmp}), 0)[1])
    if code == 0:
        os.ftruncate(3, 0)  # an attempt on another cell may have begun to write
        os.lseek(3, 0, os.SEEK_SET)
        with Path(out).open("rb") as program:
            while os.sendfile(3, program.fileno(), None, 1 << 24):
                pass
    return code & 0xFF


def _run_as_main(compiled: types.CodeType) -> int:
    """Execute a module body as __main__; returns the exit code."""
    global _main_names
    module = types.ModuleType("__main__")
    _main_names = vars(module)
    _main_names["__builtins__"] = builtins
    sys.modules["__main__"] = module
    try:
        exec(compiled, _main_names)
    except SystemExit as stop:
        return _exit_code(stop)
    except BaseException:
        _print_traceback()
        return 1
    return 0


def _leaves_something() -> bool:
    """Whether threads still run or exit functions wait."""
    try:
        return threading.active_count() > 1 or atexit._ncallbacks() > 0
    except BaseException:
        return True


def _finish(code: int) -> int:
    """Join threads, run exit functions, flush: what an interpreter does at its end, program-written parts included."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        code = code or 1
    return code if _flush() else code or 120  # the code of an interpreter that cannot flush its output


def _flush() -> bool:
    """Flush the standard streams and, by dropping the program's objects, every file that it forgot to close."""
    try:
        sys.stdout.flush()
        original = sys.__stdout__
        if original is not None and original is not sys.stdout and not original.closed:
            original.flush()
        _main_names.clear()
        # a full collection also empties the free lists, which touches a hundred pages: only where objects grew that old
        gc.collect(2 if gc.get_count()[2] else 1)
    except BaseException:
        return False
    return True


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
