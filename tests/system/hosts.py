"""Hosts for tests: network namespaces with a link between them, made and removed by root."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
def two_hosts() -> Iterator[Hosts]:
    """Both, joined by a wire; they are removed at the end, whatever happened."""
    hosts = Hosts(f"rlsys-a-{os.getpid()}", f"rlsys-b-{os.getpid()}")
    try:
        for name in (hosts.ours, hosts.theirs):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", hosts.ours, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", hosts.theirs)
        for name, number in ((hosts.ours, 1), (hosts.theirs, 2)):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
        yield hosts
    finally:
        for name in (hosts.ours, hosts.theirs):
            if Path("/run/netns", name).exists():
                ip("netns", "del", name)
