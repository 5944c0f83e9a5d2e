"""The system calls that isolation needs and that Python does not offer. Sources: the man pages of section 2 that are named below.

Everything raises OSError with the call's name. Nothing here decides policy; `rootfs.py`, `confine.py` and `zygote.py` do.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None)

# unshare(2)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000
# mount(2), umount2(2), mount_setattr(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
# prctl(2)
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38

_SYS_CAPSET, _SYS_PIVOT_ROOT, _SYS_SECCOMP, _SYS_EXECVEAT = 126, 155, 317, 322
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_CLOSE_RANGE, _SYS_MOUNT_SETATTR = 428, 429, 436, 442
_SYS_LANDLOCK_CREATE, _SYS_LANDLOCK_ADD, _SYS_LANDLOCK_RESTRICT = 444, 445, 446
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_OPEN_TREE_CLONE_CLOEXEC = 0x80001
_MOVE_MOUNT_F_EMPTY_PATH = 4


def _check(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(number: int, what: str, *arguments: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones (unshare(2))."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    encoded = [None if part is None else part.encode() for part in (source, target, kind)]
    _check(_libc.mount(*encoded, ctypes.c_ulong(flags), data.encode()), f"mount {kind or 'flags'} on {target}")


def unmount(target: str) -> None:
    """Detach what is mounted on `target` (umount2(2), MNT_DETACH)."""
    _check(_libc.umount2(target.encode(), MNT_DETACH), f"umount {target}")


def clone_tree(path: str) -> int:
    """A descriptor of a detached copy of the mounts at `path` and below (open_tree(2))."""
    flags = _OPEN_TREE_CLONE_CLOEXEC | _AT_RECURSIVE
    return _syscall(_SYS_OPEN_TREE, f"open_tree {path}", _AT_FDCWD, path.encode(), ctypes.c_uint(flags))


def restrict_tree(tree: int, attributes: int) -> None:
    """Add mount attributes to a cloned tree and everything in it (mount_setattr(2), Linux 5.12)."""
    request = struct.pack("=QQQQ", attributes, 0, 0, 0)
    flags = ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE)
    _syscall(_SYS_MOUNT_SETATTR, "mount_setattr", tree, b"", flags, request, ctypes.c_size_t(len(request)))


def attach_tree(tree: int, target: str) -> None:
    """Mount a cloned tree on `target` (move_mount(2))."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    _syscall(_SYS_MOVE_MOUNT, f"move_mount on {target}", tree, b"", _AT_FDCWD, target.encode(), flags)


def pivot_root_here() -> None:
    """Make the working directory the root and drop the old one (pivot_root(2), "pivot_root(".", ".")")."""
    _syscall(_SYS_PIVOT_ROOT, "pivot_root", b".", b".")
    unmount(".")
    os.chdir("/")


def die_with_parent(signal_number: int = 9) -> None:
    """A signal for the caller when the thread that forked it ends (prctl(2)). Cleared by every change of uid: set it after."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl pdeathsig")


def set_dumpable(dumpable: bool) -> None:
    """Whether processes of the same uid may trace the caller and read its /proc files (prctl(2))."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "prctl dumpable")


def become_subreaper() -> None:
    """Adopt orphaned descendants (prctl(2))."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl subreaper")


def forbid_new_privileges() -> None:
    """No exec may grant what the caller does not have (prctl(2)); seccomp and landlock ask for it."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs")


_NO_CAPABILITIES = (struct.pack("=Ii", 0x2008_0522, 0), b"\0" * 24)


def drop_capabilities() -> None:
    """Empty the effective, permitted and inheritable sets (capset(2))."""
    _syscall(_SYS_CAPSET, "capset", *_NO_CAPABILITIES)


class Step(NamedTuple):
    """A call of the C library with its arguments laid out beforehand; it answers -1 for an error."""

    name: str
    function: Callable[..., int]
    arguments: tuple[Any, ...]


def perform(steps: Iterable[Step]) -> None:
    """Make the calls in order. Raises OSError with the name of the first that fails.

    For a fresh fork: every name that is looked up, every object that is made there costs a copy of the page that it stands on.
    """
    for name, function, arguments in steps:
        if function(*arguments) == -1:
            raise OSError(f"{name} failed")


def limit_step(resource: int, soft: int, hard: int) -> Step:
    """setrlimit(2)."""
    return Step(f"setrlimit {resource}", _libc_with_gil.setrlimit, (resource, struct.pack("=QQ", soft, hard)))


def drop_capabilities_step() -> Step:
    """Empty the effective, permitted and inheritable sets (capset(2))."""
    return Step("capset", _libc_with_gil.syscall, (ctypes.c_long(_SYS_CAPSET), *_NO_CAPABILITIES))


def close_step(first: int, last: int = 0xFFFF_FFFF) -> Step:
    """Close every descriptor from `first` to `last` (close_range(2))."""
    numbers = (ctypes.c_uint(first), ctypes.c_uint(last), 0)
    return Step("close_range", _libc_with_gil.syscall, (ctypes.c_long(_SYS_CLOSE_RANGE), *numbers))


NOTHING = Step("getppid", _libc_with_gil.getppid, ())
SET_SID = Step("setsid", _libc_with_gil.setsid, ())
FORBID_NEW_PRIVILEGES = Step("prctl no_new_privs", _libc_with_gil.prctl, (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


_fork, _kill, _wait4 = _libc_with_gil.fork, _libc_with_gil.kill, _libc_with_gil.wait4
_wait_status = ctypes.c_int()
_usage = ctypes.create_string_buffer(144)
_wait_arguments = (ctypes.byref(_wait_status), 0, _usage)
_USAGE_HEAD = struct.Struct("=qqqqq")  # user seconds and microseconds, system seconds and microseconds, peak resident KiB


def raw_fork() -> int:
    """fork(2) without Python's at-fork handlers, which touch about 100 pages (a third of a job's cost). -1 is an error."""
    return int(_fork())


def kill_quietly(pid: int) -> bool:
    """SIGKILL (kill(2)); False where there is no such process. No exception, which would cost more than the call."""
    return bool(_kill(pid, 9) == 0)


def reap(pid: int) -> tuple[int, int, int, int]:
    """Wait for a child (wait4(2)): its pid or -1 where there is none, wait status, processor microseconds, peak resident KiB."""
    reaped = _wait4(pid, *_wait_arguments)
    user_s, user_us, system_s, system_us, peak_kib = _USAGE_HEAD.unpack_from(_usage)
    return reaped, _wait_status.value, (user_s + system_s) * 1_000_000 + user_us + system_us, peak_kib


def close_range(first: int, last: int = 0xFFFF_FFFF) -> None:
    """Close every descriptor from `first` to `last` (close_range(2))."""
    _syscall(_SYS_CLOSE_RANGE, "close_range", ctypes.c_uint(first), ctypes.c_uint(last), 0)


def exec_descriptor(descriptor: int, arguments: list[str], environment: dict[str, str]) -> None:
    """Become the program in `descriptor` (execveat(2) with AT_EMPTY_PATH). Returns only by raising."""
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*[word.encode() for word in arguments], None)
    variables = [f"{key}={value}".encode() for key, value in environment.items()]
    envp = (ctypes.c_char_p * (len(variables) + 1))(*variables, None)
    _syscall(_SYS_EXECVEAT, "execveat", descriptor, b"", argv, envp, _AT_EMPTY_PATH)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class SeccompFilter:
    """A compiled filter, ready to be installed by any number of forks."""

    def __init__(self, instructions: bytes) -> None:
        self._buffer = ctypes.create_string_buffer(instructions, len(instructions))
        self._program = _FilterProgram(len(instructions) // 8, ctypes.cast(self._buffer, ctypes.c_void_p))

    def step(self) -> Step:
        """Bind the caller and all that it starts to the filter (seccomp(2)); needs FORBID_NEW_PRIVILEGES first."""
        return Step("seccomp", _libc_with_gil.syscall, (ctypes.c_long(_SYS_SECCOMP), 1, 0, ctypes.byref(self._program)))


def landlock_abi() -> int:
    """The landlock version of this kernel; 0 where there is none (landlock(7))."""
    return max(0, int(_libc.syscall(ctypes.c_long(_SYS_LANDLOCK_CREATE), None, ctypes.c_size_t(0), 1)))


def landlock_ruleset(handled_fs: int, handled_net: int, scoped: int, abi: int) -> int:
    """A new ruleset that denies what it handles (landlock_create_ruleset(2)); the attribute's size follows the ABI."""
    attribute = struct.pack("=QQQ", handled_fs, handled_net, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    return _syscall(_SYS_LANDLOCK_CREATE, "landlock_create_ruleset", attribute, ctypes.c_size_t(len(attribute)), 0)


def landlock_allow(ruleset: int, path: str, access: int) -> None:
    """Allow `access` at `path` and below (landlock_add_rule(2))."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, descriptor)
        _syscall(_SYS_LANDLOCK_ADD, f"landlock_add_rule {path}", ruleset, 1, rule, 0)
    finally:
        os.close(descriptor)


def landlock_restrict(ruleset: int) -> None:
    """Bind the caller and all that it starts to the ruleset (landlock_restrict_self(2))."""
    _syscall(_SYS_LANDLOCK_RESTRICT, "landlock_restrict_self", ruleset, 0)
