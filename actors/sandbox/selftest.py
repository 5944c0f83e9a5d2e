"""Which isolation this machine gives, proved by trying to break it.

`choose_profile` takes the strongest profile in which a probe program fails at everything that isolation must prevent. Where none
does, it refuses: there is no way to run a judged program without isolation.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable

from actors.sandbox import Limits, wire
from actors.sandbox.cell import Cell
from actors.sandbox.confine import PROFILES
from actors.sandbox.execution import Program, Running
from actors.sandbox.seccomp import ARCHITECTURE
from protocol.errors import InfrastructureFault

REMEDY = (
    "Allow one of: unprivileged user namespaces (`sysctl user.max_user_namespaces=15000`, on Ubuntu also "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`; in Docker `--security-opt seccomp=unconfined`), root with CAP_SYS_ADMIN, "
    "or landlock (Linux 5.13 with `lsm=landlock,...` on the kernel's command line; in Docker a default seccomp profile of 2022 or later)."
)

PROBE = """
import ctypes, json, os, signal, socket, sys
secret, victim = sys.stdin.read().split("\\n")
libc = ctypes.CDLL(None, use_errno=True)

def did(action):
    try:
        return action() not in (False, -1)
    except OSError:
        return False

def child():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return True

print(json.dumps({
    "read a file of the host": did(lambda: open(secret).close()),
    "list the home directories": did(lambda: bool(os.listdir("/home") + os.listdir("/root"))),
    "write outside /tmp": did(lambda: open("/usr/rlsys-probe", "w").close()),
    "open a TCP socket": did(lambda: socket.socket().close()),
    "open a unix socket": did(lambda: socket.socket(socket.AF_UNIX).close()),
    "start a process": did(child),
    "execute a program": libc.execve(b"/usr/bin/env", (ctypes.c_char_p * 2)(b"env", None), None) != -1,
    "signal its parent": did(lambda: os.kill(os.getppid(), signal.SIGKILL) is None and os.getppid() != 1),
    "signal its owner": did(lambda: os.kill(int(victim), 0) is None),
    "limit its parent": libc.prlimit(os.getppid(), 0, (ctypes.c_ulong * 2)(1, 1), None) != -1,
    "trace its parent": libc.ptrace(16, os.getppid(), None, None) != -1,
    "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != -1,
    "make a namespace": libc.unshare(0x10000000) != -1,
    "see descriptors of the cell": any(did(lambda: bool(os.fstat(number))) for number in range(3, 256)),
}))
"""
"""Tries what isolation must prevent, and prints what it managed. Reads a path of the host and the owner's pid."""


def failures(cell: Cell) -> list[str]:
    """What a program in `cell` can do that it must not; empty is the proof. Raises CellError when the cell is broken."""
    with tempfile.NamedTemporaryFile(prefix="rlsys-secret-") as secret:
        asked = f"{secret.name}\n{os.getpid()}".encode()
        execution, _ = Running(cell, Program(kind=wire.PYTHON, content=PROBE.encode()), asked, Limits(cpu_s=10)).collect()
    if execution.outcome != "ok":
        return [f"run the probe ({execution.outcome}: {execution.stderr.decode(errors='replace')[-300:]})"]
    return [deed for deed, managed in json.loads(execution.stdout).items() if managed]


def choose_profile(wanted: str | None, build_cell: Callable[[str], Cell]) -> str:
    """`wanted`, or the strongest profile that holds here. Raises InfrastructureFault that says what was tried and what would help."""
    if os.uname().machine != ARCHITECTURE:
        raise InfrastructureFault(f"the sandbox is written for {ARCHITECTURE}, this machine is {os.uname().machine}")
    reasons = []
    for profile in PROFILES if wanted is None else (wanted,):
        try:
            holes = try_profile(profile, build_cell)
        except InfrastructureFault as error:
            reasons.append(f"{profile}: {error}")
            continue
        if not holes:
            return profile
        reasons.append(f"{profile}: a program could {', '.join(holes)}")
    raise InfrastructureFault(f"no isolation for judged programs on this machine; {'; '.join(reasons)}. {REMEDY}")


def try_profile(profile: str, build_cell: Callable[[str], Cell]) -> list[str]:
    """Start one cell and probe it. Raises CellError when it cannot be started."""
    cell = build_cell(profile)
    try:
        cell.wait_ready()
        return failures(cell)
    finally:
        cell.close()
