"""A real Slurm for tests: a controller and nodes on this machine, each with a network, a host name and processes of its own. Needs root.

    head (slurmctld, sbatch ...) ---- bridge `wire` ---- n1, n2, n3 (slurmd, steps, what they run)

They share the file system alone, as the nodes of a cluster do. To kill a node is to switch it off: the kernel ends all that runs there.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.hosts import ip
from tests.system.hosts import why_not as why_no_hosts

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
HEAD = "head"
NODES = ("n1", "n2", "n3")
GPUS = 8
"""Of each node: null devices that only Slurm takes for GPUs."""

SLURM = """
ClusterName=rlsys
SlurmctldHost={head}(10.78.0.254)
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=15
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName=n[1-{nodes}] NodeAddr=10.78.0.[1-{nodes}] CPUs=64 RealMemory=1024 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && mount -t tmpfs shm /dev/shm && shift 2 && "$@"; exit $?'
"""The first process of a host; not the daemon itself, for it has to reap what its daemon leaves."""


def why_not() -> str:
    """Why there can be no such cluster here; empty if there can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    return f"no Slurm here: {', '.join(missing)} not found" if missing else why_no_hosts()


class Slurm:
    """A cluster that is up."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self._environment |= {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TMPDIR": str(directory / "tmp"),  # what a node that is switched off leaves is not left in /tmp
            "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        }

    def start(self) -> None:
        """Returns once every node is idle."""
        for name in ("state", "gpus", "tmp"):
            (self._directory / name).mkdir()
        for number in range(GPUS):
            os.mknod(self._directory / "gpus" / f"gpu{number}", stat.S_IFCHR, os.makedev(1, 3))
        (self._directory / "slurm.conf").write_text(SLURM.format(head=HEAD, directory=self._directory, nodes=len(NODES), gpus=GPUS))
        (self._directory / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={self._directory}/gpus/gpu[0-{GPUS - 1}]\n")
        (self._directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        names = "".join(f"10.78.0.{number} {name}\n" for number, name in [*enumerate(NODES, 1), (254, HEAD)])
        (self._directory / "hosts").write_text(f"127.0.0.1 localhost\n{names}")

        self._add_namespace(HEAD, 254)
        self._boot(HEAD, "slurmctld", "-D", "-c")
        for number, name in enumerate(NODES, 1):
            self._add_namespace(name, number)
            self.boot(name)
        self.until(lambda: self.states() == dict.fromkeys(NODES, "idle"), "idle nodes", self.states)

    def boot(self, name: str) -> None:
        """Switch a node on."""
        self._boot(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str) -> None:
        """Switch a node off: nothing that runs there says another word."""
        host = self._hosts.pop(name)
        host.kill()  # unshare --kill-child: the first process of the host goes with it, and all others with that one
        host.wait(30)

    def run(self, *command: str, environment: dict[str, str] | None = None) -> str:
        """What a command on the head says. Raises AssertionError when it fails."""
        full = ["ip", "netns", "exec", _namespace(HEAD), *command]
        done = subprocess.run(full, capture_output=True, text=True, timeout=60, check=False, env=self._environment | (environment or {}))
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """Node -> idle, alloc, down* ..."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-N", "-o", "%N %t").splitlines())

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(word.split("=", 1) for word in self.run("scontrol", "-o", "show", "job", number).split() if "=" in word)

    def until(self, condition: Callable[[], object], what: str, shown: Callable[[], object] = str, deadline_s: float = 60.0) -> None:
        """Wait for it; `shown` tells what there was instead."""
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, f"no {what} within {deadline_s:g} s: {shown()}"
            time.sleep(0.2)

    def processes(self) -> dict[str, list[str]]:
        """Node -> command lines of what runs there beside its daemon; nodes without any are left out."""
        found: dict[str, list[str]] = {}
        for name in self._hosts.keys() & set(NODES):
            inside = subprocess.run(["ip", "netns", "pids", _namespace(name)], capture_output=True, text=True, check=True).stdout.split()
            for pid in inside:
                try:
                    line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue  # it has ended
                if line and f"slurmd -D -N {name}" not in line:
                    found.setdefault(name, []).append(line)
        return found

    def close(self) -> None:
        """Switch everything off, the controller last."""
        for name in sorted(self._hosts, key=lambda name: name == HEAD):
            self.kill(name)
        for name in (*NODES, HEAD):
            if Path("/run/netns", _namespace(name)).exists():
                ip("netns", "del", _namespace(name))

    def _add_namespace(self, name: str, number: int) -> None:
        namespace, head = _namespace(name), _namespace(HEAD)
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "set", "lo", "up")
        if name == HEAD:
            ip("-n", namespace, "link", "add", "wire", "type", "bridge")
        else:
            ip("-n", namespace, "link", "add", "wire", "type", "veth", "peer", "name", name, "netns", head)
            ip("-n", head, "link", "set", name, "master", "wire", "up")
        ip("-n", namespace, "address", "add", f"10.78.0.{number}/24", "dev", "wire")
        ip("-n", namespace, "link", "set", "wire", "up")

    def _boot(self, name: str, *daemon: str) -> None:
        host = [
            "nsenter",
            f"--net=/run/netns/{_namespace(name)}",
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--uts",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        with (self._directory / f"{name}.out").open("ab") as out:
            self._hosts[name] = subprocess.Popen(
                [*host, "bash", "-c", HOST, "host", name, str(self._directory / "hosts"), *daemon],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self._environment,
            )


def _namespace(name: str) -> str:
    return f"rlsys-slurm-{os.getpid()}-{name}"


@contextmanager
def cluster(directory: Path) -> Iterator[Slurm]:
    """A cluster whose files lie in `directory`; nothing of it runs afterwards, whatever happened."""
    slurm = Slurm(directory)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.close()
