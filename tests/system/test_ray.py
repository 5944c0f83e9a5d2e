"""The same run on a Ray cluster of several nodes: placed by Ray, whole when a node goes and another comes, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import Run, alive
from tests.system.test_join import there
from tests.system.test_scale import ended, pids_of, scaled, slowed
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)
from tests.system.test_survival import command, sound

pytestmark = pytest.mark.slow

CLUSTER = """
    import json, sys
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": int(sys.argv[1]), "object_store_memory": 80 << 20})
    nodes = []
    print(json.dumps(cluster.address), flush=True)
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "add":
            nodes.append(cluster.add_node(num_cpus=int(arguments[0]), object_store_memory=80 << 20))
            cluster.wait_for_nodes()
        elif word == "remove":
            cluster.remove_node(nodes.pop(int(arguments[0])), allow_graceful=False)
        elif word == "end":
            break
        print("ok", flush=True)
    cluster.shutdown()
    print("ok", flush=True)
"""


class Cluster:
    """Several raylets on this machine, in a process of their own."""

    def __init__(self, head_cpus: int, *nodes: int) -> None:
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        environment["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CLUSTER), str(head_cpus)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self.address = self._line().strip('"')
        for cpus in nodes:
            self.add(cpus)

    def add(self, cpus: int) -> None:
        """Another node."""
        self._say(f"add {cpus}")

    def remove(self, place: int) -> None:
        """A node dies, and all on it."""
        self._say(f"remove {place}")

    def end(self) -> None:
        """All of it."""
        try:
            self._say("end")
            self._process.communicate(timeout=60)
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.communicate(timeout=30)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._line()
        assert answer == "ok", answer

    def _line(self) -> str:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, "the cluster ended"
            if line.startswith(('"', "ok")):
                return line.strip()


@pytest.fixture
def cluster() -> Iterator[Callable[..., Cluster]]:
    pytest.importorskip("ray")
    made: list[Cluster] = []

    def make(head_cpus: int, *nodes: int) -> Cluster:
        made.append(Cluster(head_cpus, *nodes))
        return made[-1]

    yield make
    for one in made:
        one.end()


def nodes_of(address: str) -> dict[str, Any]:
    """What runs on the cluster now: living actors, and what is free."""
    script = """
        import json, sys, ray
        from ray._private.state import actors
        ray.init(address=sys.argv[1], log_to_driver=False)
        living = [actor["Address"]["NodeID"] for actor in actors(actor_state_name="ALIVE").values()]
        print("\\n" + json.dumps({"actors": living, "free": ray.available_resources().get("CPU", 0), "cpus": ray.cluster_resources()["CPU"]}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), address], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def test_a_cluster_without_room_and_none_at_all_are_sentences(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    cluster: Callable[..., Cluster],
) -> None:
    nowhere = start(simulated, "--launcher", "ray", "--address", "127.0.0.1:1")
    assert nowhere.wait(180) == 2
    assert "no Ray cluster at 127.0.0.1:1" in nowhere.err, nowhere.err
    small = cluster(2)
    simulated["rewarders"]["concurrency"] = 4
    full = start(simulated, "--launcher", "ray", "--address", small.address)
    assert full.wait(180) == 2, full.err
    last = full.err.strip().splitlines()[-1]
    assert "the Ray cluster has no room for" in last and "1 rewarder of 4 CPU" in last and "is missing; free are" in last, full.err
    assert nodes_of(small.address)["actors"] == []


def test_a_run_on_three_nodes_is_placed_scaled_loses_a_node_and_gets_another(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
    cluster: Callable[..., Cluster],
) -> None:
    nodes = cluster(2, 3, 3)
    config = slowed(simulated)
    config["generators"]["count"] = config["rewarders"]["count"] = 2
    config["rewarders"]["concurrency"] = 2
    config["ray"] = {"rewarder": {"CPU": 1}}
    config["deadlines"] = {"heartbeat_s": 60.0}
    run = start(config, "--launcher", "ray", "--address", nodes.address)
    actors = ("generator-0", "generator-1", "rewarder-0", "rewarder-1")
    run.until(there(run, *actors), "work of all actors", 300)
    before = nodes_of(nodes.address)
    assert len(before["actors"]) == 5 and len(set(before["actors"])) >= 2, "the learner and four actors, on several nodes"
    assert all(p["host"] for p in run.status()["processes"] if p["name"] in (*actors, "learner-0"))

    scaled(run, "generators=3")
    scaled(run, "generators=2")
    assert "generator-2" not in run.pids()
    refused = command("scale", str(run.path), "generators=40")
    assert (refused.returncode, "the Ray cluster has no room for 38 generators of 1 CPU" in refused.stderr) == (2, True), refused.stderr

    nodes.remove(0)
    nodes.add(3)
    run.until(lambda status: status.get("restarts"), "a death that the node's removal caused", 120)
    run.until(there(run, *actors), "work of all actors again", 300)
    now = run.status()["iteration"]
    run.until(lambda status: status.get("iteration", 0) >= now + 3, "three more iterations", 200)
    died = [restart["name"] for restart in run.status()["restarts"]]
    assert len(died) == len(set(died)), f"one death each: {run.status()['restarts']}"
    pids = {p["pid"] for p in run.status()["processes"]} | pids_of(run)
    ended(run, restarts=True)
    assert not any(alive(pid) for pid in pids if pid)
    deadline = time.monotonic() + 60
    while (after := nodes_of(nodes.address))["actors"] or after["free"] != after["cpus"]:
        assert time.monotonic() < deadline, f"left on the cluster: {after}"


def test_two_learner_ranks_on_ray_learn_as_the_local_ones_do(
    config: dict[str, Any], start: Callable[..., Run], cluster: Callable[..., Cluster]
) -> None:
    nodes = cluster(1, 2, 3)
    config["learner"]["ranks"] = config["generators"]["count"] = config["rewarders"]["count"] = 2
    run = start(config, "--launcher", "ray", "--address", nodes.address)
    assert run.wait(600) == 0, run.err
    sound(run, 4)
    local = start(config)
    assert local.wait(300) == 0
    assert [e["version"] for e in run.exit_record["evaluations"]] == [e["version"] for e in local.exit_record["evaluations"]]


def test_on_ray_weights_travel_over_the_network_and_the_learner_changes_its_size(
    config: dict[str, Any], start: Callable[..., Run], cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    nodes = cluster(2, 2, 3)
    config["iterations"] = 60
    config["generators"]["count"] = 2
    config["rewarders"] = {"reward": "tests.system.rewards:SlowReward", "options": {"seconds": 0.1}, "concurrency": 2}
    config["weights"] = {"transfer": "network", "cache": str(tmp_path)}
    config["deadlines"] = {"heartbeat_s": 60.0}
    run = start(config, "--launcher", "ray", "--address", nodes.address)
    run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations", 300)
    for ranks in (2, 1):
        scaled(run, f"learner={ranks}")
        assert [name for name in sorted(run.pids()) if name.startswith("learner")] == [f"learner-{rank}" for rank in range(ranks)]
        now = run.status()["iteration"]
        run.until(lambda status, now=now: status.get("iteration", 0) >= now + 2, "two iterations with that many ranks", 200)
    no_room = command("scale", str(run.path), "learner=4", "--timeout", "120")
    assert (no_room.returncode, "learner is not 4: changed again meanwhile, or not all could live here" in no_room.stderr) == (1, True), (
        no_room.stderr
    )
    assert run.status()["fleets"]["learner"] == {"count": 1, "wanted": 1, "leaving": 0, "joined": 0}
    assert (
        "the learner group keeps its 1 ranks: the Ray cluster has no room for 4 learners"
        in (run.path / "logs" / "supervisor.jsonl").read_text()
    )
    assert run.wait(600, restarts=True) == 0, run.err
    assert run.exit_record["restarts"] == []
    sound(run, 60)
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("weights/received_bytes_total", 0.0) for row in rows) > 0, "generators fetched what they sampled with"
    deadline = time.monotonic() + 60
    while (after := nodes_of(nodes.address))["actors"] or after["free"] != after["cpus"]:
        assert time.monotonic() < deadline, f"left on the cluster: {after}"
