"""A host that does not see the weights directory gets every version over the run's sockets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from protocol.manifest import versions
from tests.system.conftest import Run, members
from tests.system.hosts import two_hosts, why_not
from tests.system.test_join import over_tcp, there, token_of
from tests.system.test_scale import ended
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)

APART = ["unshare", "--map-root-user", "--mount"]


@contextmanager
def joined_apart(run: Run, weights: Path, inside: str = "", asked_in: str = "") -> Iterator[subprocess.Popen[str]]:
    """Two generators of a host on which `weights` is another, empty directory. It is gone at the end.

    The host is the namespace `inside`; the token is asked for in `asked_in`, the run's.
    """
    if subprocess.run([*APART, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this user may not make mount namespaces here")
    script = f"mount -t tmpfs none {weights} && exec {sys.executable} -P -m rlsys join - --role generator --count 2 --name apart"
    joiner = subprocess.Popen(
        [*(["ip", "netns", "exec", inside] if inside else []), *APART, "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert joiner.stdin is not None
        joiner.stdin.write(token_of(run, inside=asked_in) + "\n")
        joiner.stdin.close()
        joiner.stdin = None
        yield joiner
    finally:
        if joiner.poll() is None:
            os.killpg(joiner.pid, signal.SIGKILL)
            joiner.communicate(timeout=30)


def at(tmp_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """With weights and the caches of hosts in directories of their own."""
    places = {"directory": tmp_path / "weights", "cache": tmp_path / "kept"}
    for place in places.values():
        place.mkdir()
    return {**config, "weights": {name: str(place) for name, place in places.items()}}


def newest(cache: Path) -> int:
    """The newest complete version that the host has; -1 for none."""
    return max((v.number for d in cache.glob("*-cache") for v, _ in versions(d)), default=-1)


def left_in_order(joiner: subprocess.Popen[str], cache: Path) -> None:
    joiner.terminate()
    out, _ = joiner.communicate(timeout=120)
    assert joiner.returncode == 0 and "all that ran here has left in order" in out, out
    assert members({joiner.pid}) == [] and list(cache.iterdir()) == [], "the last one removes the host's cache"


def test_a_host_with_another_mount_gets_every_version_over_the_network(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    cache = tmp_path / "kept"
    run = start(at(tmp_path, over_tcp(simulated)))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    with joined_apart(run, tmp_path / "weights") as joiner:
        run.until(there(run, "generator-1", "generator-2"), "work of generators that see no weights")
        now = newest(cache)
        assert now >= 0
        run.until(lambda status: newest(cache) >= now + 2, "newer versions over there")
        left_in_order(joiner, cache)
    done = run.status()["iteration"]
    run.until(lambda status: status["iteration"] >= done + 4, "the learner's last word of what it sent, which comes twice a second")
    ended(run)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    sent, received = (max(row.get(f"weights/{name}_bytes_total", 0.0) for row in rows) for name in ("sent", "received"))
    assert 0 < received <= sent, "what two generators of one host received, the learner sent once"


@pytest.mark.faults
def test_over_a_thin_path_that_is_cut_for_20_s_versions_come_whole_and_nothing_is_lost(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    tmp_path: Path,
) -> None:
    if why_not():
        pytest.skip(why_not())
    cache = tmp_path / "kept"
    with two_hosts() as hosts:
        for name in (hosts.ours, hosts.theirs):
            thin = ["root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms"]
            subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", "wire", *thin], check=True, capture_output=True)
        simulated["deadlines"] = {"heartbeat_s": 40.0}
        run = start(at(tmp_path, over_tcp(simulated, hosts.address)), inside=hosts.ours)
        run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
        with joined_apart(run, tmp_path / "weights", inside=hosts.theirs, asked_in=hosts.ours) as joiner:
            run.until(there(run, "generator-1", "generator-2"), "work of generators that see no weights")
            hosts.cut()
            cut_s = run.status()["time_s"]
            run.until(lambda status: status.get("time_s", 0) > cut_s + 20, "20 s", 60)
            hosts.mend()
            now = newest(cache)
            run.until(lambda status: newest(cache) >= now + 3, "newer versions over there", 120)
            assert run.status()["restarts"] == []
            left_in_order(joiner, cache)
        ended(run)
