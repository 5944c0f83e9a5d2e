"""Any process dies at any time: the run ends by itself, and nothing is lost, doubled or too stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.holds import SHM, sweep
from protocol.ledger import Ledger
from rlsys.audit import audit_run
from tests.system.conftest import Run, assert_gone

ROLES = ("dispatcher", "generator", "rewarder", "learner", "dashboard")
PROCESSES = ("dispatcher-0", "generator-0", "rewarder-0", "learner-0", "dashboard-0")


def surviving(config: dict[str, Any], iterations: int) -> dict[str, Any]:
    """A run that is killed all the time and may be: the limits of restarts are no part of these tests."""
    config["iterations"] = iterations
    config["generators"]["count"] = config["rewarders"]["count"] = 2
    config["restarts"] = {**dict.fromkeys(ROLES, 10_000), "backoff_s": 0.05, "max_backoff_s": 0.5}
    return config


def sound(run: Run, iterations: int) -> dict[str, Any]:
    """The audit of a finished run, which must find nothing, and every group of every iteration ended."""
    result = audit_run(run.path)
    assert (result["lost"], result["doubled"], result["too_stale"]) == (0, 0, 0), json.dumps(result["findings"], indent=1)
    assert result["groups_in_flight"] == 0
    assert result["iterations"] == iterations
    return result


def command(*arguments: str, timeout_s: float = 1500.0, inside: str = "") -> subprocess.CompletedProcess[str]:
    where = ["ip", "netns", "exec", inside] if inside else []
    return subprocess.run(
        [*where, sys.executable, "-P", "-m", "rlsys", *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )


def rehearse(run: Run, kills: int, seed: int, *arguments: str) -> dict[str, Any]:
    """`rlsys chaos` as users call it; every victim must have come back to work."""
    words = ["--json", "--kills", str(kills), "--seed", str(seed), "--timeout", "300"]
    done = command("chaos", str(run.path), *words, *arguments, timeout_s=600 + 60 * kills)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def killed_all_over(config: dict[str, Any], start: Callable[..., Run], hurry: Path, kills: int, seed: int) -> None:
    """Random kills over all roles while the run goes on. Rewards take their time until all are done, and then it ends by itself.

    An iteration takes 2 s at least, so 4 for each kill are enough to recover from it, and the third that is left takes 40 s each.
    """
    iterations = 6 * kills
    options = {"seconds": 0.25, "count": iterations * 16 * 2 // 3, "until": str(hurry)}
    config["rewarders"] = {"reward": "tests.system.rewards:CrawlingReward", "options": options}
    run = start(surviving(config, iterations))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration", 300)
    result = rehearse(run, kills, seed, "--pause", "0.2")
    hurry.touch()
    assert len(result["hits"]) == kills, f"the run was over after {len(result['hits'])} kills; status {run.status().get('iteration')}"
    assert all(hit["useful_after_s"] is not None for hit in result["hits"]), result["hits"]
    assert run.wait(1200, restarts=True) == 0, run.err
    record = run.exit_record
    assert record["outcome"] == "done"
    assert [restart["identity"] for restart in record["restarts"]] == [hit["identity"] for hit in result["hits"]], "only the killed died"
    audit = sound(run, iterations)
    assert audit["states"]["eval evaluated"] == 12
    assert [evaluation["version"] for evaluation in record["evaluations"]] == [0, iterations]


def swept_of(run: Run) -> list[Path]:
    """Where a run keeps what is no part of its directory: what is there still after what any start does on this host."""
    sweep()
    ledger = Ledger(run.path / "ledger.sqlite", read_only=True)
    try:
        places = [Path(ledger.get(key)) for key in ("scratch", "weights")]
    finally:
        ledger.close()
    return [place for place in places if place.exists() and run.path not in place.parents]


def paced(config: dict[str, Any]) -> dict[str, Any]:
    """A reward that takes its time, so that a few iterations last as long as a few kills."""
    config["rewarders"] = {"reward": "tests.system.rewards:SlowReward", "options": {"seconds": 0.1}}
    return config


def test_five_kills_over_all_roles(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    killed_all_over(config, start, tmp_path / "hurry", kills=5, seed=11)


@pytest.mark.faults
def test_twenty_kills_over_all_roles(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    killed_all_over(config, start, tmp_path / "hurry", kills=20, seed=12)


@pytest.mark.slow
def test_two_hundred_kills_over_all_roles(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    killed_all_over(config, start, tmp_path / "hurry", kills=200, seed=13)


@pytest.mark.faults
@pytest.mark.parametrize("victim", PROCESSES)
def test_a_killed_process_comes_back_and_the_run_is_whole(config: dict[str, Any], start: Callable[..., Run], victim: str) -> None:
    run = start(surviving(config, 60))
    run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations")
    os.kill(run.pids()[victim], signal.SIGKILL)
    assert run.wait(200, restarts=True) == 0, run.err
    assert [restart["name"] for restart in run.exit_record["restarts"]] == [victim]
    assert f"{victim}@1 was killed by SIGKILL; it is started again" in run.out
    sound(run, 60)


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["stop", "partition"])
@pytest.mark.parametrize("role", ROLES)
def test_a_hung_or_cut_off_process_is_found_named_and_replaced(
    config: dict[str, Any], start: Callable[..., Run], role: str, mode: str
) -> None:
    config = paced(surviving(config, 60))
    config["deadlines"]["heartbeat_s"] = 5.0
    run = start(config)
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    result = rehearse(run, 1, 1, "--roles", role, "--mode", mode)
    [hit] = result["hits"]
    assert hit["useful_after_s"] is not None
    assert run.wait(300, restarts=True) == 0, run.err
    [restart] = run.exit_record["restarts"]
    assert restart["identity"] == hit["identity"]
    assert "has been silent for" in restart["how"]
    assert restart["time_s"] - hit["time_s"] < 5.0 + 5.0, "the deadline, and what a busy machine adds"
    sound(run, 60)


@pytest.mark.faults
def test_slow_processes_are_no_dead_ones(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """Stopped nine tenths of the time for a while, each in turn: nothing is replaced, nothing is sampled twice."""
    run = start(paced(surviving(config, 40)))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    for seed, role in enumerate(("dispatcher", "generator", "rewarder", "learner")):
        rehearse(run, 1, seed, "--roles", role, "--mode", "slow", "--pause", "0.1")
    assert run.wait(300) == 0, run.err
    assert sound(run, 40)["reissued"] == 0


@pytest.mark.faults
def test_who_is_at_work_for_long_but_gets_on_is_not_hung(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """One reward actor has always something to score, for longer than one piece of work may take."""
    config["iterations"] = 2
    config["data"].pop("eval")
    config["rewarders"] = {"reward": "tests.system.rewards:SlowReward", "options": {"seconds": 1.0}}
    config["deadlines"]["busy_s"] = 10.0
    run = start(config)
    assert run.wait(200) == 0, run.err
    sound(run, 2)


@pytest.mark.faults
def test_a_supervisor_dies_twice_and_the_run_goes_on_each_time(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """On other fleets each time, told at once, while what is left of the old processes may still be there."""
    run = start(paced(surviving(config, 16)))
    run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations")
    run.process.kill()
    run.resume("--set", "generators.count=1")
    run.until(lambda status: status.get("epoch") == 2 and status.get("iteration", 0) >= 6, "six iterations")
    assert [name for name in run.pids() if name.startswith("generator")] == ["generator-0"]
    refused = command("up", "--resume", str(run.path))
    assert (refused.returncode, f"is in use by process {run.process.pid}" in refused.stderr) == (2, True), refused.stderr
    run.process.kill()
    run.resume("--set", "generators.count=3", "--set", "rewarders.count=1")
    assert run.wait(300) == 0, run.err
    record = run.exit_record
    assert (record["outcome"], record["epoch"], record["restarts"]) == ("done", 3, [])
    sound(run, 16)


def test_a_dead_supervisor_takes_its_children_along_and_the_run_goes_on_with_another_fleet(
    config: dict[str, Any], start: Callable[..., Run], tmp_path: Path
) -> None:
    config["iterations"] = 12
    options = {"seconds": 0.1, "count": 6 * 16, "until": str(tmp_path / "hurry")}
    config["rewarders"] = {"reward": "tests.system.rewards:CrawlingReward", "options": options}
    run = start(config)
    run.until(lambda status: status.get("iteration", 0) >= 3, "three iterations")
    pids = set(run.pids().values())
    in_memory = Path((run.path / "weights_dir").read_text()).parent == SHM
    assert len(swept_of(run)) == 1 + in_memory, "scratch and weights are held"
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait()
    assert run.exit_record == {}
    assert_gone(pids)
    run.until_gone(lambda: swept_of(run), "what the dead supervisor left in /tmp and in memory")
    (tmp_path / "hurry").touch()

    refused = command("up", "--resume", str(run.path), "--set", "sampling.group_size=2")
    assert refused.returncode == 2
    assert "--set sampling.group_size: cannot change when a run goes on" in refused.stderr
    resumed = command("up", "--resume", str(run.path), "--set", "generators.count=2", "--plain", timeout_s=600)
    assert resumed.returncode == 0, resumed.stderr
    record = run.exit_record
    assert (record["outcome"], record["epoch"], record["restarts"]) == ("done", 2, [])
    assert [evaluation["version"] for evaluation in record["evaluations"]] == [0, 12]
    sound(run, 12)
    again = command("up", "--resume", str(run.path))
    assert (again.returncode, "every iteration is done" in again.stderr) == (0, True)

    done = command("audit", str(run.path))
    assert (done.returncode, "0 lost, 0 doubled, 0 too stale" in done.stdout) == (0, True), done.stdout
    replayed = command("replay", str(run.path), "--json")
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    result = json.loads(replayed.stdout)
    assert len(result["iterations"]) == 12
    assert all(row["equal"] for row in result["iterations"])
    assert result["weights_equal"] is True
    changed = json.loads(command("replay", str(run.path), "--json", "--set", "learner.optimizer.lr=0.01", "--until", "4").stdout)
    assert next(row["equal"] for row in changed["iterations"]), "the first loss comes before any update"
    assert not all(row["equal"] for row in changed["iterations"])
