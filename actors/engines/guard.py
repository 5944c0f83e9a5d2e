"""Runs a server as a child of its own and sees to it that nothing of it outlives the actor. Started by path, with nothing but the standard library.

    actor --pipe (never written to)--> [ guard ] --starts--> server, in a process group of its own, with its children
                                            `--what the server prints--> log file

The guard ends the server's process group when the pipe closes (the actor closed it, or died in whatever way), when the server's first
process ends, or when it is told to by SIGTERM: first SIGTERM, after a grace period SIGKILL. It is a subreaper, so that what the server
left behind falls to it and is killed too; if the guard itself is killed, the kernel kills the server's first process, and SGLang's
children ask for the same. It exits with the server's exit code.

SGLang leaves segments in /dev/shm when it is killed, so the guard notes which ones its processes hold and removes them in the end.

Writing the log must never hurt the server: what does not fit on the disk is dropped, counted, and mentioned when there is room again.

    python -I -S guard.py PIPE_FD GRACE_S LOG -- COMMAND...
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PDEATHSIG, _SUBREAPER = 1, 36
_SEGMENTS = ("sglang_", "sgl_", "sem.", "psm_", "torch_", "nccl-", "cuda.shm.")
_LOOK_S = 5.0
_libc = ctypes.CDLL(None)


class Log:
    """Appends what the server prints; a full disk costs lines, not the server."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dropped = 0

    def write(self, data: bytes) -> None:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError:
            self._dropped += len(data)
            return
        try:
            if self._dropped:
                os.write(fd, f"[{self._dropped} bytes of this log could not be written]\n".encode())
                self._dropped = 0
            os.write(fd, data)
        except OSError:
            self._dropped += len(data)
        finally:
            os.close(fd)


def _of_the_kernel(option: int, value: int) -> None:
    _libc.prctl(option, value, 0, 0, 0)


def signal_group(group: int, number: signal.Signals) -> bool:
    """Signal a process group. Whether there was one."""
    try:
        os.killpg(group, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False


def end_all(group: int, grace_s: float, pump: object = None) -> None:
    """End the group and every process that fell to us, and reap them."""
    until = time.monotonic() + grace_s
    signal_group(group, signal.SIGTERM)
    while _reap() and time.monotonic() < until:
        if callable(pump):
            pump()
        time.sleep(0.02)
    while _reap():
        signal_group(group, signal.SIGKILL)
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def shared_memory(group: int) -> set[int]:
    """Inodes of what the group's processes have mapped from /dev/shm. (The name of a semaphore in /proc is that of a file that was renamed.)"""
    found = set()
    for pid in _members(group):
        try:
            lines = Path(f"/proc/{pid}/maps").read_text("utf-8", "replace").splitlines()
        except OSError:
            continue
        found |= {int(line.split()[4]) for line in lines if "/dev/shm/" in line}
    return found


def remove_segments(inodes: set[int]) -> None:
    """Remove those of the kinds that a server makes for itself; published weights, which it maps too, are not among them."""
    for path in Path("/dev/shm").iterdir():
        try:
            if path.name.startswith(_SEGMENTS) and path.stat().st_ino in inodes:
                path.unlink()
        except OSError:
            continue


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _members(group: int) -> list[int]:
    found = []
    for pid in _processes():
        try:
            if os.getpgid(pid) == group:
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


def _children() -> list[int]:
    found = []
    for pid in _processes():
        try:
            if int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1]) == os.getpid():
                found.append(pid)
        except (OSError, ValueError, IndexError):
            continue
    return found


_codes: dict[int, int] = {}


def _reap() -> bool:
    """Collect ended children. Whether any are left."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True
        _codes[pid] = os.waitstatus_to_exitcode(status)


def main(arguments: list[str]) -> int:
    """The guard's life; returns the server's exit code."""
    pipe, grace_s, log = int(arguments[0]), float(arguments[1]), Log(Path(arguments[2]))
    command = arguments[arguments.index("--") + 1 :]
    _of_the_kernel(_SUBREAPER, 1)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    guard = os.getpid()

    def in_child() -> None:  # the guard has one thread, so this is safe
        _of_the_kernel(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(127)

    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
        preexec_fn=in_child,  # noqa: PLW1509
    )
    assert server.stdout is not None
    output = server.stdout.fileno()
    os.set_blocking(output, False)

    def pump() -> None:
        while select.select([output], [], [], 0)[0]:
            data = os.read(output, 1 << 16)
            if not data:
                return
            log.write(data)

    ended = os.pidfd_open(server.pid)
    watched = [pipe, output, ended]
    segments: set[int] = set()
    look_s = 0.0
    while not told:
        ready = select.select(watched, [], [], 1.0)[0]
        if time.monotonic() > look_s:
            segments |= shared_memory(server.pid)
            look_s = time.monotonic() + _LOOK_S
        if output in ready:
            data = os.read(output, 1 << 16)
            if data:
                log.write(data)
            else:
                watched.remove(output)
        if pipe in ready or ended in ready:
            break
    segments |= shared_memory(server.pid)
    end_all(server.pid, grace_s, pump)
    pump()
    remove_segments(segments)
    code = _codes.get(server.pid, 1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
