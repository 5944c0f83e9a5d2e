"""How a process becomes a cell: the two profiles, strongest first.

namespaces  own user, pid, mount, net, ipc and uts namespaces, and the root of `rootfs.py`. As root or unprivileged.
landlock    where namespaces are not allowed (most containers): the host's files outside the list and TCP are denied by landlock,
            other sockets and other processes by seccomp.

Started by root, a cell first becomes the uid SANDBOX_UID, so that nothing in it was ever root in the user namespace of the host
and so that limits on the number of processes, from which root is exempt, bind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.sandbox import linux, rootfs

PROFILES = ("namespaces", "landlock")
SANDBOX_UID = 61_999
"""Belongs to nobody on usual systems and lies below 65536, so that it is mapped inside rootless containers too."""
TMP_BYTES = 64 << 20
"""Of /tmp; room for the largest input and output, which checkers read from files there."""
_INSIDE_ID = 1000  # not 0: an exec inside the cell then never looks like root's


def _become_unprivileged() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID)
        os.setresuid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID)
        linux.set_dumpable(True)  # or /proc/self/uid_map could not be written


def enter_namespaces(trees: Sequence[str], packages: Mapping[str, str]) -> None:
    """Become PID 1 of a cell. The calling process stays behind as its parent, waits for it, and exits with it.

    Raises OSError where the kernel does not allow it.
    """
    processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if os.geteuid() == 0:
        linux.unshare(linux.CLONE_NEWNS)  # the new root may show directories that only root can reach
        rootfs.build(trees, packages)
        _become_unprivileged()
        built = True
    else:
        built = False
    uid, gid = os.getuid(), os.getgid()
    linux.die_with_parent()
    everything = linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWNET
    linux.unshare(everything | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{_INSIDE_ID} {uid} 1"), ("gid_map", f"{_INSIDE_ID} {gid} 1")):
        descriptor = os.open(f"self/{name}", os.O_WRONLY, dir_fd=processes)
        os.write(descriptor, line.encode())
        os.close(descriptor)
    os.close(processes)
    first = os.fork()
    if first:
        linux.close_range(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 0xFF)
    linux.die_with_parent()
    if not built:
        rootfs.build(trees, packages)
    rootfs.mount_tmp(TMP_BYTES)


# landlock(7): access rights
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_MAKE_CHAR, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = 1 << 6, 1 << 9, 1 << 10, 1 << 11, 1 << 12
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_ALL_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""ABI -> the file-system rights that it knows."""


def _all_rights(abi: int) -> int:
    return max(rights for version, rights in _ALL_RIGHTS.items() if version <= abi)


def enter_landlock(trees: Sequence[str], packages: Mapping[str, str], tmp: str) -> None:
    """Confine the calling process, which goes on as the zygote; `tmp` is its only writable directory. Raises OSError."""
    abi = linux.landlock_abi()
    if not abi:
        raise OSError(f"this kernel ({os.uname().release}) has no landlock, or it is switched off")
    every = _all_rights(abi)
    ruleset = linux.landlock_ruleset(every, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0, abi)
    rules = dict.fromkeys((*rootfs.SYSTEM_TREES, *trees, *packages.values()), _READING)
    rules |= dict.fromkeys((str(Path(path).parent) for path in packages.values()), _READ_DIR)  # an import lists it
    rules["/dev/null"] = _READ_FILE | _WRITE_FILE
    rules[tmp] = every & ~(_EXECUTE | _MAKE_CHAR | _MAKE_SOCK | _MAKE_FIFO | _MAKE_BLOCK | _MAKE_SYM)
    for path, access in rules.items():
        if Path(path).exists():
            linux.landlock_allow(ruleset, path, access & every & (~0 if Path(path).is_dir() else _ON_FILES))
    if os.geteuid() == 0 and all(_everyone_may_enter(path) for path in (*trees, *packages.values())):
        os.chown(tmp, SANDBOX_UID, SANDBOX_UID)
        _become_unprivileged()
    else:
        linux.drop_capabilities()  # an interpreter in root's home: the cell stays uid 0, with nothing but its file ownership
    linux.forbid_new_privileges()
    linux.landlock_restrict(ruleset)
    os.close(ruleset)
    linux.become_subreaper()
    linux.die_with_parent(signal.SIGTERM)  # the zygote then kills its job, which no pid namespace does for it


def ruleset_without_writing() -> int:
    """A ruleset, to be put on top, under which only /dev/null can be written."""
    abi = linux.landlock_abi()
    ruleset = linux.landlock_ruleset(_all_rights(abi) & ~_READING, 0, 0, abi)
    linux.landlock_allow(ruleset, "/dev/null", _WRITE_FILE)
    return ruleset


def _everyone_may_enter(path: str) -> bool:
    """Whether other users can reach the directory."""
    return all(place.stat().st_mode & 0o005 == 0o005 for place in [Path(path), *Path(path).parents] if place.exists())
