"""The seccomp filters: which system calls a job may make. Everything else answers EPERM.

EPERM and not a kill, because a program that merely asks (a thread library probing a feature) goes on, and because killing
costs about 0.1 % random failures. Three filters, from one table:

single    one process with threads; runs Python.
native    the same and execveat of the one descriptor PROGRAM, which is closed by the exec and can never be opened again.
compiler  may fork, exec and wait; runs compilers, never candidates.

Written for x86-64. Source of the calling convention and of the return values: seccomp(2), linux/filter.h, linux/audit.h.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable

from actors.sandbox.linux import SeccompFilter

ARCHITECTURE = "x86_64"
_AUDIT_ARCH = 0xC000_003E
_X32_BIT = 0x4000_0000

_ALLOWED = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "msync": 26, "mincore": 27, "madvise": 28,
    "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "sendto": 44,
    "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "exit": 60, "uname": 63,
    "flock": 73, "fsync": 74, "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81,
    "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "unlink": 87, "readlink": 89, "umask": 95, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
    "getpgrp": 111, "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "getpriority": 140,
    "sched_getparam": 143, "sched_getscheduler": 145, "arch_prctl": 158, "gettid": 186, "time": 201, "futex": 202,
    "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217, "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
    "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "get_robust_list": 274, "epoll_pwait": 281, "eventfd": 284, "eventfd2": 290,
    "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getcpu": 309, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
    "close_range": 436, "faccessat2": 439,
}  # fmt: skip
_PROCESSES = {"fork": 57, "vfork": 58, "execve": 59, "wait4": 61, "waitid": 247, "link": 86, "symlink": 88, "chmod": 90, "fchmod": 91,
              "setrlimit": 160, "fchmodat": 268, "utimensat": 280, "fallocate": 285, "sendfile": 40}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL, _IOCTL, _FCNTL, _PRLIMIT, _SOCKETPAIR, _EXECVEAT = 56, 435, 62, 234, 16, 72, 302, 53, 322

PROGRAM = 250
"""Descriptor of a compiled program. It lies above RLIMIT_NOFILE of the job, so none can be opened there."""

_CLONE_THREAD = 0x1_0000
_NEW_NAMESPACES = 0x7E02_0080  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET} and NEWTIME
_AF_UNIX = 1
_HARMLESS_IOCTLS = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGPGRP TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
_HARMFUL_FCNTLS = (8, 10, 15, 1024, 1026)  # F_SETOWN F_SETSIG F_SETOWN_EX (signals to others) F_SETLEASE F_NOTIFY

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF_0000, 0x8000_0000, 0x0005_0000
_DENY = _ERRNO | errno.EPERM


def _step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand & 0xFFFF_FFFF)


def _argument(index: int) -> bytes:
    """Load the low 32 bits of argument `index` of the call."""
    return _step(_LOAD, 16 + 8 * index)


def _when(number: int, body: bytes) -> bytes:
    """Run `body`, which returns, for one system call; the number is loaded before and not changed for the others."""
    return _step(_EQUAL, number, 0, len(body) // 8) + body


def _only(index: int, values: Iterable[int]) -> bytes:
    """Allow the call if an argument is one of `values`."""
    checks = b"".join(_step(_EQUAL, value, 0, 1) + _step(_RETURN, _ALLOW) for value in values)
    return _argument(index) + checks + _step(_RETURN, _DENY)


def _none_of(index: int, values: Iterable[int]) -> bytes:
    checks = b"".join(_step(_EQUAL, value, 0, 1) + _step(_RETURN, _DENY) for value in values)
    return _argument(index) + checks + _step(_RETURN, _ALLOW)


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Inclusive runs of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _search(ranges: list[tuple[int, int]]) -> bytes:
    """Allow the numbers in `ranges` by binary search: the kernel walks a filter once per system call that exists when it is installed."""
    if len(ranges) <= 3:
        body = b""
        for first, last in ranges:
            body += _step(_AT_LEAST, first, 0, 2) + _step(_AT_LEAST, last + 1, 1, 0) + _step(_RETURN, _ALLOW)
        return body + _step(_RETURN, _DENY)
    middle = len(ranges) // 2
    low = _search(ranges[:middle])
    return _step(_AT_LEAST, ranges[middle][0], len(low) // 8, 0) + low + _search(ranges[middle:])


def build(*, may_exec: bool = False, may_fork: bool = False, may_signal: bool = True, own_pid: int | None = None) -> SeccompFilter:
    """A filter. Where no pid namespace hides other processes, `own_pid` binds signals to one process, or `may_signal` is False."""
    numbers = set(_ALLOWED.values())
    if may_fork:
        numbers |= set(_PROCESSES.values())
    head = _step(_LOAD, 4) + _step(_EQUAL, _AUDIT_ARCH, 1, 0) + _step(_RETURN, _KILL_PROCESS)
    head += _step(_LOAD, 0) + _step(_AT_LEAST, _X32_BIT, 0, 1) + _step(_RETURN, _KILL_PROCESS)
    # clone3 keeps its flags in memory that a filter cannot read: answer ENOSYS, and the C library falls back to clone
    special = _when(_CLONE3, _step(_RETURN, _ERRNO | errno.ENOSYS))
    refused = _argument(0) + _step(_ANY_BIT, _NEW_NAMESPACES, 0, 1) + _step(_RETURN, _DENY)
    if may_fork:
        special += _when(_CLONE, refused + _step(_RETURN, _ALLOW))
    else:
        special += _when(_CLONE, refused + _step(_ANY_BIT, _CLONE_THREAD, 0, 1) + _step(_RETURN, _ALLOW) + _step(_RETURN, _DENY))
    if may_exec:
        special += _when(_EXECVEAT, _only(0, [PROGRAM]))
    signals = _only(0, [own_pid]) if own_pid is not None else _step(_RETURN, _ALLOW if may_signal else _DENY)
    special += _when(_KILL, signals) + _when(_TGKILL, signals)
    special += _when(_IOCTL, _only(1, _HARMLESS_IOCTLS)) + _when(_FCNTL, _none_of(1, _HARMFUL_FCNTLS))
    # limits of itself only: with the zygote's pid it could starve the zygote of processor time
    special += _when(_PRLIMIT, _only(0, [0])) + _when(_SOCKETPAIR, _only(0, [_AF_UNIX]))
    return SeccompFilter(head + special + _search(_ranges(numbers)))
