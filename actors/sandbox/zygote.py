"""The zygote: a warm Python in its cell that forks once per job.

Waits for: a Job on the control socket (the owner ended: exit), or the end of the job that runs. As PID 1 of its pid namespace it
takes every process of the cell with it when it ends, and it ends with its owner: the socket closes, or its parent dies.

Started by `cell.py` as `python -I -S -c ... <socket fd> <options as JSON>`. Nothing secret is ever in its memory, for each job
starts as a copy of it: it forwards descriptors and never reads them.
"""

from __future__ import annotations

import _sitebuiltins
import array
import builtins
import gc
import json
import mmap
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from actors.sandbox import calls, confine, job, linux, rootfs, seccomp, wire

PRELOAD = tuple(
    """abc array atexit base64 bisect builtins calendar cmath collections contextlib copy dataclasses datetime decimal enum errno
    fractions functools gc heapq io inspect itertools json linecache math numbers operator os queue random re shutil signal stat
    statistics string struct sys textwrap threading time traceback types typing unicodedata""".split()  # noqa: SIM905 - 46 quoted names
)
"""Modules that judged programs import most; importing one of them then costs a dictionary look-up."""

_MAX_DESCRIPTORS = 4 + 1 + 2 * wire.LONGEST_SERIES
_MAX_CONFINEMENTS = 64  # a service that takes its limits from callers would otherwise grow here
_DEFAULT_STACK_BYTES = 256 << 20  # recursion in compiled programs; the hard limit is open, `memory_bytes` bounds it anyway


def main() -> None:
    """Become a cell and serve jobs until the owner ends."""
    control = socket.socket(fileno=int(sys.argv[1]))
    options = json.loads(sys.argv[2])
    try:
        if os.getppid() != options["owner"]:
            return
        if options["profile"] == "namespaces":
            confine.enter_namespaces(options["trees"], options["packages"])
        else:
            confine.enter_landlock(options["trees"], options["packages"], options["tmp"])
            options["no_writing"] = confine.ruleset_without_writing()
    except OSError as error:
        control.send(wire.FAILED + str(error).encode())
        return
    zygote = Zygote(control, options)
    control.send(wire.READY)
    zygote.serve()


class Zygote:
    """One job at a time."""

    def __init__(self, control: socket.socket, options: dict[str, Any]) -> None:
        self._control = control
        self._is_pid_1 = options["profile"] == "namespaces"
        self._tmp = "/tmp" if self._is_pid_1 else options["tmp"]
        self._no_writing = options.get("no_writing", -1)
        self._clean_files = rootfs.tmp_files() if self._is_pid_1 else 0
        self._started = mmap.mmap(-1, mmap.PAGESIZE)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        single = seccomp.build()
        self._confinements: dict[Any, tuple[linux.Step, ...]] = {}
        self._running = 0
        os.chdir(self._tmp)  # where every job starts
        if not self._is_pid_1:
            signal.signal(signal.SIGTERM, lambda *_: self._end_now())
        self._filters = {
            wire.PYTHON: single,
            wire.SERIES: single,
            wire.CALLS: single,
            wire.ASSERTS: single,
            wire.SESSION: single,
            wire.NATIVE: seccomp.build(may_exec=True),
            wire.COMPILER: seccomp.build(may_fork=True, may_signal=self._is_pid_1),
        }
        self._warm_up(options)

    def _warm_up(self, options: dict[str, Any]) -> None:
        """Import what programs use, forget what they must not see, and freeze the heap so that forks share it."""
        for name in (*PRELOAD, *options["preload"]):
            try:
                __import__(name)
            except ImportError:
                continue
        job.CONTEST_NAMES.update(calls.contest_names())
        sys.path[:] = [entry for entry in sys.path if entry and entry != options["source"]]
        sys.path += ["/packages"] if self._is_pid_1 else options["package_parents"]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("actors", "protocol")]:
            del sys.modules[name]
        builtins.exit, builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D"), _sitebuiltins.Quitter("quit", "Ctrl-D")
        sys.argv[:] = ["solution.py"]
        os.environ.clear()
        os.environ.update(job.ENVIRONMENT | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # PID 1 is deaf to a job's signals only while it has no handler
        linux.set_dumpable(False)  # no job traces it, though it has the same uid
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_STACK, (_DEFAULT_STACK_BYTES, resource.RLIM_INFINITY))
        job.warm()
        random.seed(job.RANDOM_SEED)
        gc.collect()
        gc.freeze()
        gc.disable()

    def serve(self) -> None:
        """Until the owner closes the socket."""
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        while True:
            packet, ancillary, _, _ = self._control.recvmsg(1 << 16, room)
            if not packet:
                return
            descriptors = array.array("i")
            for _, _, data in ancillary:
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
            if packet != wire.END:  # an END that comes after the job's end means nothing
                report = self._run(wire.Job.unpack(packet), descriptors.tolist())
                self._clean()
                for descriptor in descriptors:
                    os.close(descriptor)
                self._control.send(report.pack())

    def _run(self, asked: wire.Job, descriptors: list[int]) -> wire.Report:
        self._started[0] = 0
        try:
            steps = self._confinement(asked, len(descriptors)) if self._is_pid_1 else ()
        except struct.error as error:
            os.write(descriptors[3], f"limits that no kernel takes: {error}".encode())
            return wire.Report(0, wire.CUT_BY_NOTHING, 0, 0, 0, 0, 0, 0)
        started_s = time.monotonic()
        pid = linux.raw_fork()
        if pid == 0:
            self._become_job(asked, descriptors, steps)
        if pid < 0:
            os.write(descriptors[3], b"fork failed")
            return wire.Report(0, wire.CUT_BY_NOTHING, 0, 0, 0, 0, 0, 0)
        self._running = pid
        cut = self._wait(pid, started_s + asked.wall_s)
        _, status, cpu_us, peak_kib = linux.reap(pid)
        ended_s = time.monotonic()
        strays = self._reap_strays(pid)
        self._running = 0
        wall_us, ended_us = int((ended_s - started_s) * 1e6), int(ended_s * 1e6)
        return wire.Report(os.waitstatus_to_exitcode(status), cut, self._started[0], cpu_us, wall_us, peak_kib, strays, ended_us)

    def _confinement(self, asked: wire.Job, num_descriptors: int) -> tuple[linux.Step, ...]:
        """Jobs of one run differ in few ways, so their steps are kept."""
        num_streams = num_descriptors - 1 - len(asked.files)
        key = (asked[: wire.Job._fields.index("arguments")], num_streams)
        if key not in self._confinements:
            if len(self._confinements) >= _MAX_CONFINEMENTS:
                self._confinements.clear()
            self._confinements[key] = job.confinement(asked, num_streams, self._filters[asked.kind])
        return self._confinements[key]

    def _become_job(self, asked: wire.Job, descriptors: list[int], steps: tuple[linux.Step, ...]) -> NoReturn:
        """In the fork."""
        try:
            if asked.files:
                job.place_files(asked, descriptors, self._tmp)
            if not self._is_pid_1:
                steps = job.confinement(asked, len(descriptors) - 1 - len(asked.files), self._confine_further(asked.kind))
            job.run(asked, descriptors, steps, self._tmp, self._started)
        except BaseException as error:
            os.write(descriptors[3], repr(error).encode())
        finally:
            os._exit(1)

    def _confine_further(self, kind: int) -> linux.SeccompFilter:
        """Landlock profile, in the fork. Its /tmp has no quota, so only compilers may write; other processes of the uid are in sight."""
        if kind == wire.COMPILER:
            return self._filters[kind]
        linux.die_with_parent()
        linux.forbid_new_privileges()
        linux.landlock_restrict(self._no_writing)
        return seccomp.build(may_exec=kind == wire.NATIVE, own_pid=os.getpid())

    def _wait(self, pid: int, deadline_s: float) -> int:
        """Wait for the end of the job; end it at the deadline, at the owner's word or at the owner's end. Returns who cut it."""
        handle = os.pidfd_open(pid)
        self._poll.register(handle, select.POLLIN)
        try:
            events = self._poll.poll(max(0.0, (deadline_s - time.monotonic()) * 1e3))
            for descriptor, _ in events:
                if descriptor == handle:
                    return wire.CUT_BY_NOTHING
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if events and not self._control.recv(64):
                self._end_now()
            return wire.CUT_BY_OWNER if events else wire.CUT_BY_WALL
        finally:
            self._poll.unregister(handle)
            os.close(handle)

    def _reap_strays(self, pid: int) -> int:
        """Kill and reap every other process of the job; only compilers may have any."""
        strays = 0
        while linux.kill_quietly(-1 if self._is_pid_1 else -pid) or self._is_pid_1:
            if linux.reap(-1)[0] < 0:
                break
            strays += 1
        return strays

    def _end_now(self) -> NoReturn:
        """The owner is gone. The kernel ends the cell of a PID 1; without a pid namespace the job's process group is ended here."""
        for target in (self._running, -self._running) if self._running and not self._is_pid_1 else ():
            try:
                os.kill(target, signal.SIGKILL)
            except ProcessLookupError:
                continue
        os._exit(0)

    def _clean(self) -> None:
        """An empty /tmp for the next job."""
        if self._is_pid_1:
            if rootfs.tmp_files() != self._clean_files:
                os.chdir("/")
                linux.unmount("/tmp")
                rootfs.mount_tmp(confine.TMP_BYTES)
                os.chdir("/tmp")
        else:
            for entry in Path(self._tmp).iterdir():  # only compilers can write here
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
