"""Actors of another host join a run with a token, and leave it in order or by dying."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsys import __version__
from rlsys.token import parse
from tests.system.conftest import Run, alive, members
from tests.system.hosts import Hosts, two_hosts, why_not
from tests.system.test_scale import ended, slowed
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)
from tests.system.test_survival import command


class Joiner:
    """A started `rlsys join`."""

    def __init__(self, token: str, *arguments: str, inside: str = "") -> None:
        where = ["ip", "netns", "exec", inside] if inside else []
        self.process = subprocess.Popen(
            [*where, sys.executable, "-P", "-m", "rlsys", "join", "-", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(token + "\n")
        self.process.stdin.close()
        self.process.stdin = None

    def wait(self, deadline_s: float = 120.0) -> tuple[int, str]:
        """Exit code and what it said."""
        out, _ = self.process.communicate(timeout=deadline_s)
        return self.process.returncode, out


@pytest.fixture
def join() -> Iterator[Callable[..., Joiner]]:
    joiners: list[Joiner] = []

    def make(token: str, *arguments: str, inside: str = "") -> Joiner:
        joiners.append(Joiner(token, *arguments, inside=inside))
        return joiners[-1]

    yield make
    for joiner in joiners:
        if joiner.process.poll() is None:
            os.killpg(joiner.process.pid, signal.SIGKILL)
            joiner.process.wait(30)
        assert joiner.process.stdout is not None
        joiner.process.stdout.close()


def over_tcp(config: dict[str, Any], host: str = "127.0.0.1") -> dict[str, Any]:
    config["transport"] = {"kind": "tcp", "host": host}
    return slowed(config)


def token_of(run: Run, *arguments: str, inside: str = "") -> str:
    printed = command("token", str(run.path), *arguments, inside=inside)
    assert printed.returncode == 0, printed.stderr
    return printed.stdout.strip()


def there(run: Run, *names: str) -> Callable[[dict[str, Any]], bool]:
    """Whether these have registered and work."""

    def look(status: dict[str, Any]) -> bool:
        found = {p["name"]: p for p in status.get("processes", ())}
        return all(name in found and found[name]["registered"] and found[name]["progress"] > 0 for name in names)

    return look


def gone(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: not {p["name"] for p in status.get("processes", ())} & set(names)


@pytest.mark.faults
def test_a_host_joins_with_the_right_token_alone_and_leaves_in_order(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    join: Callable[..., Joiner],
) -> None:
    run = start(over_tcp(simulated))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    old = token_of(run)
    right = token_of(run, "--rotate")
    token = parse(right, __version__)
    refused = [(join(old, "--role", "generator"), "the token is an old one")]
    refused.append(
        (join(right, "--role", "generator", "--weights", "/nonexistent"), "does not see the run's weights directory /nonexistent")
    )
    for joiner, sentence in refused:
        code, out = joiner.wait()
        assert (code, sentence in out, out.count("\n")) == (2, True, 1), out

    joiner = join(right, "--role", "generator", "--name", "there")
    run.until(there(run, "generator-1"), "work of the joined generator")
    [process] = [p for p in run.status()["processes"] if p["name"] == "generator-1"]
    assert process["host"] == "there"
    joiner.process.terminate()
    code, out = joiner.wait()
    assert (code, "all that ran here has left in order" in out) == (0, True), out
    run.until(gone("generator-1"), "departure")
    assert members({joiner.process.pid, process["pid"]}) == []
    assert "starts" in out and not [p for p in Path("/tmp").glob(f"rlsys-{token.run_id[:8]}-*") if (p / "keys.json").exists()]
    for kind in ("log", "jsonl"):
        assert (run.path / "logs" / f"generator-1.{kind}").stat().st_size > 0, "its logs came over, for people and for machines"
    ended(run)
    assert not (run.path / "join_token").exists()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts() as both:
        yield both


@pytest.mark.faults
def test_connections_that_break_lose_nothing_and_nobody_is_replaced(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    join: Callable[..., Joiner],
    hosts: Hosts,
) -> None:
    run = start(over_tcp(simulated, hosts.address), inside=hosts.ours)
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    token = token_of(run, inside=hosts.ours)
    fleet = [
        join(token, "--role", "generator", "--count", "2", inside=hosts.theirs),
        join(token, "--role", "rewarder", inside=hosts.theirs),
    ]
    run.until(there(run, "generator-1", "generator-2", "rewarder-1"), "work on the other host")
    broken = 0
    for _ in range(10):
        broken += hosts.sever()
        now = run.status()["iteration"]
        run.until(lambda status, now=now: status.get("iteration", 0) >= now + 2, "two iterations after connections broke", 60)
    assert broken >= 30, "there was nothing to break"
    assert there(run, "generator-1", "generator-2", "rewarder-1")(run.status()), "nobody was given up"
    assert all(joiner.process.poll() is None for joiner in fleet)
    for joiner in fleet:
        joiner.process.terminate()
    assert [joiner.wait()[0] for joiner in fleet] == [0, 0], "they leave in order"
    ended(run)


@pytest.mark.faults
def test_a_host_of_its_own_works_is_cut_off_for_20_s_and_dies(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    join: Callable[..., Joiner],
    hosts: Hosts,
) -> None:
    simulated["deadlines"] = {"heartbeat_s": 30.0}
    run = start(over_tcp(simulated, hosts.address), inside=hosts.ours)
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    token = token_of(run, inside=hosts.ours)
    fleet = [
        join(token, "--role", "generator", "--count", "2", "--name", "there", inside=hosts.theirs),
        join(token, "--role", "rewarder", "--name", "also there", inside=hosts.theirs),
    ]
    run.until(there(run, "generator-1", "generator-2", "rewarder-1"), "work on the other host")
    assert {p["addresses"]["completions"].rpartition(":")[0] for p in run.status()["processes"] if p["name"] == "rewarder-1"} == {
        "tcp://10.77.0.2"
    }
    hosts.cut()
    cut_s = run.status()["time_s"]
    run.until(lambda status: status.get("time_s", 0) > cut_s + 20, "20 s", 60)
    hosts.mend()
    now = run.status()["iteration"]
    run.until(lambda status: status.get("iteration", 0) >= now + 3, "three iterations after the path was mended", 120)
    assert there(run, "generator-1", "generator-2", "rewarder-1")(run.status()), "nobody was given up"
    assert run.status()["restarts"] == []
    pids = {p["pid"] for p in run.status()["processes"] if p["host"]}
    os.kill(fleet[0].process.pid, signal.SIGKILL)
    run.until(gone("generator-1", "generator-2"), "end of the generators of a host that died", 90)
    fleet[1].process.terminate()
    assert fleet[1].wait()[0] == 0
    assert not any(alive(pid) for pid in pids)
    now = run.status()["iteration"]
    run.until(lambda status: status.get("iteration", 0) >= now + 2, "two iterations without them", 120)
    ended(run)
