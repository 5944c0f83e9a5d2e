"""The owner's end of one cell: start it, hand it a job, collect the report, end it."""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.sandbox import wire
from actors.sandbox.waiting import readable
from protocol.errors import InfrastructureFault
from protocol.holds import Hold

START_DEADLINE_S = 30.0
"""A start takes 0.1 s; a machine that pages may need longer."""
_GRACE_S = 20.0  # a report comes milliseconds after the wall limit; a cell that is silent for so long is broken
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a verdict can be had again
    "LD_BIND_NOW": "1",  # or every fork looks up the same functions again
}
_FLAGS = ("-s", "-S", "-P", "-X", "no_debug_ranges")
"""Not -I, which ignores PYTHONHASHSEED; the environment is ours, so -s and -P shut out the rest. Without debug ranges compiling is
cheaper; tracebacks lose their carets."""
_BOOT = "import sys; sys.path.insert(0, {root!r}); from actors.sandbox.zygote import main; main()"


class CellError(InfrastructureFault):
    """A cell could not be started, died, or fell silent. Nothing is known about the job that it ran."""


def memory_file(content: bytes = b"") -> int:
    """A descriptor of an anonymous file that holds `content`, at offset 0."""
    descriptor = os.memfd_create("rlsys", os.MFD_CLOEXEC)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        os.close(descriptor)
        raise CellError(f"no memory for {len(content)} bytes of a job's input: {error}") from error
    return descriptor


class Cell:
    """A zygote in isolation. Used by one thread at a time; `start` one job, then `finish` it.

    Must be built by a thread that lives as long as the cell: the kernel kills the cell when that thread ends.
    """

    def __init__(self, profile: str, trees: Sequence[str], packages: Mapping[str, str], preload: Sequence[str] = ()) -> None:
        """Raises CellError when no process can be started; what the profile needs and the kernel refuses, `wait_ready` tells."""
        self._hold = Hold.of_new("rlsys-cell-") if profile == "landlock" else None
        tmp = ""
        if self._hold is not None:  # a cell that runs as another user passes through what we hold, to what is its own
            self._hold.directory.chmod(0o711)
            own = self._hold.directory / "tmp"
            own.mkdir(mode=0o700)
            tmp = str(own)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._errors = memory_file()
        self._deadline_s = 0.0
        self.broken = False
        """Set with every CellError: it must not be used again."""
        options = {
            "profile": profile,
            "owner": os.getpid(),
            "trees": list(trees),
            "packages": dict(packages),
            "package_parents": sorted({str(Path(path).parent) for path in packages.values()}),
            "preload": list(preload),
            "source": _SOURCE_ROOT,
            "tmp": tmp,
        }
        command = [interpreter(), *_FLAGS, "-c", _BOOT.format(root=_SOURCE_ROOT), str(theirs.fileno()), json.dumps(options)]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env=_ENVIRONMENT,
            )
        except BaseException as error:
            self._control.close()
            os.close(self._errors)
            if self._hold is not None:
                self._hold.remove()
            if isinstance(error, OSError):
                raise CellError(f"a sandbox cell cannot be started: {error}") from error
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Of the process whose end takes the whole cell with it."""
        return self._process.pid

    def fileno(self) -> int:
        """Readable when the job has ended, so that several cells can be waited for at once."""
        return self._control.fileno()

    def wait_ready(self) -> None:
        """Block until the cell takes jobs. Raises CellError with what the zygote said."""
        answer = self._receive(time.monotonic() + START_DEADLINE_S)
        if answer != wire.READY:
            said = answer.removeprefix(wire.FAILED).decode(errors="replace") or self._stderr()
            self.close()
            raise CellError(f"a sandbox cell did not start: {said or 'its process ended without a word'}")

    def start(self, job: wire.Job, descriptors: Sequence[int]) -> None:
        """Begin a job; the cell gets copies of `descriptors` (program, stdin, stdout, stderr, extras). Raises CellError."""
        self._deadline_s = time.monotonic() + job.wall_s + _GRACE_S
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            self._control.sendmsg([job.pack()], rights)
        except OSError as error:
            self.broken = True
            raise CellError(f"sandbox cell {self.pid} takes no job: {error}") from error

    def end_job(self) -> None:
        """Kill the job that runs; its report still comes."""
        try:
            self._control.send(wire.END)
        except OSError as error:
            self.broken = True
            raise CellError(f"sandbox cell {self.pid} is gone: {error}") from error

    def finish(self) -> wire.Report:
        """Block until the job has ended. Raises CellError when the cell died or fell silent."""
        packet = self._receive(self._deadline_s)
        if not packet:
            self.broken = True
            raise CellError(f"sandbox cell {self.pid} died during a job: {self._stderr() or 'killed from outside'}")
        return wire.Report.unpack(packet)

    def _receive(self, deadline_s: float) -> bytes:
        if not readable([self._control], deadline_s - time.monotonic()):
            self.broken = True
            raise CellError(f"sandbox cell {self.pid} said nothing until its deadline")
        try:
            return self._control.recv(1 << 12)
        except ConnectionError:
            return b""

    def _stderr(self) -> str:
        return os.pread(self._errors, 2000, max(0, os.fstat(self._errors).st_size - 2000)).decode(errors="replace").strip()

    def kill(self) -> None:
        """End the cell while another thread waits for it; that thread gets a CellError and closes it."""
        self._process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the cell and everything in it. Safe to call twice."""
        if self._errors < 0:
            return
        self._control.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._errors)
        self._errors = -1
        if self._hold is not None:
            self._hold.remove()


def interpreter() -> str:
    """The interpreter outside any virtual environment, which is the one whose files a cell shows."""
    return getattr(sys, "_base_executable", None) or sys.executable
