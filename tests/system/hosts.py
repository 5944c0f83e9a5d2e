"""Hosts for tests: network namespaces with a link between them, made and removed by root."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Hosts:
    """Two hosts: the run's, and another, each with an address of its own and nothing else in common but the file system."""

    ours: str
    theirs: str
    address: str = "10.77.0.1"

    def cut(self) -> None:
        """Nothing passes between them; no connection is told."""
        ip("-n", self.theirs, "link", "set", "wire", "down")

    def mend(self) -> None:
        """They reach each other again."""
        ip("-n", self.theirs, "link", "set", "wire", "up")

    def sever(self) -> int:
        """Every connection of the other host to ours breaks; new ones can be made. Says how many broke."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.theirs, "ss", "-K", "-H", "-t", "dst", self.address], capture_output=True, text=True, check=False
        )
        return len(done.stdout.splitlines())

    def sever_some(self, chance: random.Random, share: float) -> int:
        """The same for some of them, each with this chance."""
        shown = ["ip", "netns", "exec", self.theirs, "ss", "-H", "-t", "-n", "state", "established", "dst", self.address]
        rows = subprocess.run(shown, capture_output=True, text=True, check=True).stdout.splitlines()
        ports = [row.split()[2].rpartition(":")[2] for row in rows if chance.random() < share]
        broken = 0
        for port in ports:
            kill = ["ip", "netns", "exec", self.theirs, "ss", "-K", "-H", "-t", "-n", "dst", self.address, "sport", "=", f":{port}"]
            broken += len(subprocess.run(kill, capture_output=True, text=True, check=False).stdout.splitlines())
        return broken


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why there can be no such hosts here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root"
    name = f"rlsys-try-{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "wire", "type", "veth", "peer", "name", "other")
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here ({getattr(error, 'stderr', '') or error})"
    return ""


@contextmanager
def two_hosts(delay_s: float = 0.0) -> Iterator[Hosts]:
    """Both, joined by a wire, on which a frame takes `delay_s`; they are removed at the end, whatever happened."""
    hosts = Hosts(f"rlsys-a-{os.getpid()}", f"rlsys-b-{os.getpid()}")
    try:
        for name in (hosts.ours, hosts.theirs):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        with _carried(hosts, delay_s) if delay_s else nullcontext():
            if not delay_s:
                ip("-n", hosts.ours, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", hosts.theirs)
            for name, number in ((hosts.ours, 1), (hosts.theirs, 2)):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "wire")
                ip("-n", name, "link", "set", "wire", "up")
            yield hosts
    finally:
        for name in (hosts.ours, hosts.theirs):
            if Path("/run/netns", name).exists():
                ip("netns", "del", name)


@contextmanager
def _carried(hosts: Hosts, delay_s: float) -> Iterator[None]:
    """A wire that a process carries, see wire.py."""
    command = ["ip", "netns", "exec", hosts.ours, sys.executable, "-P", str(Path(__file__).parent / "wire.py"), hosts.theirs, str(delay_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", "the wire is not carried"
        yield
        assert process.poll() is None, "the wire broke for good"
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
