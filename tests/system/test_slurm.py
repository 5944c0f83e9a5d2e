"""docs/cluster/slurm.sbatch on a real Slurm: a controller and three nodes, each a host of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.audit import audit_run
from rlsys.rundir import read_json
from tests.system.slurm import Slurm, cluster, why_not
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)

SCRIPT = Path(__file__).parents[2] / "docs" / "cluster" / "slurm.sbatch"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
STARTS_S = 180.0
"""Eight processes start, on two cores that may be busy."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing := why_not():
        pytest.skip(missing)
    with cluster(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


class Job:
    """The script, submitted for a run directory; again and again if need be."""

    def __init__(self, slurm: Slurm, directory: Path, config: dict[str, Any]) -> None:
        self.slurm, self.run, self.output, self.number = slurm, directory / "runs" / "one", directory / "job.out", ""
        self._config = directory / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))

    def submit(self, *options: str) -> None:
        environment = {"CONFIG": str(self._config), "RUN": str(self.run)}
        command = ["sbatch", "--parsable", f"--output={self.output}", *options, str(SCRIPT)]
        self.number = self.slurm.run(*command, environment=environment).strip()

    @property
    def state(self) -> str:
        return self.slurm.job(self.number)["JobState"]

    def status(self) -> dict[str, Any]:
        return read_json(self.run / "status.json") or {}

    def sampling_hosts(self) -> set[str]:
        """Nodes whose joined generators have sampled something."""
        processes = self.status().get("processes", ())
        return {p["host"] for p in processes if p["host"] and p["name"].startswith("generator-") and p["progress"] > 0}

    def iteration(self) -> int:
        return int(self.status().get("iteration", 0))

    def until(self, condition: Callable[[], object], what: str, deadline_s: float = STARTS_S) -> None:
        self.slurm.until(
            condition, what, lambda: f"job {self.slurm.job(self.number)}\n{self.said()}\n{json.dumps(self.status())[:2000]}", deadline_s
        )

    def until_it_works(self, *nodes: str) -> None:
        """The joined nodes sample, and the run gets on."""
        self.until(lambda: self.state == "RUNNING" and (self.run / "status.json").exists(), "start")
        self.until(lambda: self.sampling_hosts() == set(nodes), f"generators that sample on {nodes}")
        assert self.slurm.processes().keys() == {self.slurm.job(self.number)["BatchHost"], *nodes}
        before = self.iteration()
        self.until(lambda: self.iteration() >= before + 2, "two more iterations")

    def until_over(self) -> tuple[str, str]:
        """State and exit code, once nothing of the run is left on any node."""
        self.until(lambda: self.state in OVER, "end", 90)
        self.until(lambda: not self.slurm.processes(), "nodes on which nothing is left", 30)
        return self.state, self.slurm.job(self.number)["ExitCode"]

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture
def job(slurm: Slurm, simulated: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., Job]]:  # noqa: F811
    jobs: list[Job] = []

    def make(**changes: Any) -> Job:
        simulated["deadlines"] = {"heartbeat_s": 15.0}
        for options in (simulated["generators"]["options"], simulated["rewarders"]["options"], simulated["learner"]["step_options"]):
            options["speed"] = 100
        jobs.append(Job(slurm, tmp_path, simulated | changes))
        return jobs[-1]

    yield make
    for made in jobs:
        if made.number and made.state not in OVER:
            slurm.run("scancel", made.number)
            made.until_over()


def assert_nothing_is_lost(run: Path) -> None:
    result = audit_run(run)
    assert (result["lost"], result["doubled"], result["too_stale"]) == (0, 0, 0), result["findings"]


def test_a_job_of_three_nodes_with_gpus_runs_to_its_end(job: Callable[..., Job]) -> None:
    made = job(iterations=40)
    made.submit("--gpus-per-node=1")
    made.until_it_works("n2", "n3")
    [step] = [line for line in made.slurm.run("scontrol", "-o", "show", "step").splitlines() if "Tasks=2" in line]
    assert "TresPerTask=cpu:32" in step and "TresPerNode=gres:gpu:1" in step, step
    assert made.until_over() == ("COMPLETED", "0:0"), made.said()
    assert (read_json(made.run / "exit.json") or {})["outcome"] == "done"
    assert made.said().count("rlsys: every iteration is done") == 2, "both nodes left in order"
    assert_nothing_is_lost(made.run)
    made.submit("--gpus-per-node=1")
    assert made.until_over() == ("COMPLETED", "0:0"), made.said()
    assert "every iteration is done; raise iterations to go on" in made.said()


def test_a_job_ends_in_order_before_its_time_is_over_and_goes_on_and_outlives_a_node(job: Callable[..., Job]) -> None:
    made = job(iterations=100000)
    made.submit("--gpus-per-node=0")
    made.until_it_works("n2", "n3")
    made.slurm.run("scancel", "--signal=TERM", made.number)
    made.until(lambda: len(made.status()["processes"]) == 6, "departure of the other nodes")
    assert made.state == "RUNNING"
    made.slurm.run("scontrol", "update", f"JobId={made.number}", f"TimeLimit={minutes_left(made)}")
    assert made.until_over() == ("COMPLETED", "0:0"), made.said()
    assert "the run ended early: told to stop" in made.said()

    reached = made.iteration()
    (made.run / "status.json").unlink()
    made.submit("--gpus-per-node=0")
    made.until_it_works("n2", "n3")
    assert made.iteration() > reached
    made.slurm.kill("n3")
    made.until(lambda: made.slurm.states()["n3"].startswith("down"), "a node that is known to be down")
    made.until_it_works("n2")
    assert made.state == "RUNNING"

    made.slurm.run("scancel", made.number)
    assert made.until_over()[0] == "CANCELLED"
    assert_nothing_is_lost(made.run)
    made.slurm.boot("n3")
    made.until(lambda: made.slurm.states()["n3"] == "idle", "a node that is back")


def minutes_left(made: Job) -> int:
    """A time limit that is less than the script's two minutes away."""
    hours, minutes, _ = made.slurm.job(made.number)["RunTime"].split(":")
    return int(hours) * 60 + int(minutes) + 2


def test_a_job_whose_first_node_dies_is_queued_again_and_goes_on(job: Callable[..., Job]) -> None:
    made = job(iterations=100000)
    made.submit("--gpus-per-node=0")
    made.until_it_works("n2", "n3")
    reached = made.iteration()
    made.slurm.kill("n1")
    made.until(lambda: made.state == "PENDING", "job that waits again")
    (made.run / "status.json").unlink()
    made.slurm.boot("n1")
    made.until(lambda: made.slurm.states() == dict.fromkeys(("n1", "n2", "n3"), "idle"), "idle nodes")
    made.slurm.run("scontrol", "update", f"JobId={made.number}", "StartTime=now")
    made.until_it_works("n2", "n3")
    assert made.iteration() > reached
    made.slurm.run("scancel", "--signal=TERM", "--batch", made.number)
    assert made.until_over() == ("COMPLETED", "0:0"), made.said()
    assert_nothing_is_lost(made.run)


def test_a_run_that_fails_at_its_start_ends_the_job_with_its_code_and_its_reason(job: Callable[..., Job]) -> None:
    made = job(rewarders={"reward": "nowhere:Reward"})
    made.submit("--gpus-per-node=0")
    assert made.until_over() == ("FAILED", "2:0"), made.said()
    assert made.said().startswith("rlsys: reward 'nowhere:Reward'"), made.said()
