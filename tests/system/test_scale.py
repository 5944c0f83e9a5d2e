"""Fleets of a live run grow and shrink: nothing is lost, doubled or too stale, and who left has gone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from protocol.ledger import Ledger
from tests.system.conftest import Run, alive
from tests.system.test_simulated import simulated  # noqa: F401  (a fixture)
from tests.system.test_survival import command, sound


def scaled(run: Run, *words: str) -> dict[str, Any]:
    """`rlsys scale` as users call it; it must be done when it returns."""
    done = command("scale", str(run.path), *words, "--json", "--timeout", "300")
    assert done.returncode == 0, f"{done.stdout} {done.stderr} {json.dumps(run.status().get('fleets'))}"
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def pids_of(run: Run) -> set[int]:
    """Every process that the run ever started."""
    ledger = Ledger(run.path / "ledger.sqlite", read_only=True)
    try:
        return {start.pid for start in ledger.starts()}
    finally:
        ledger.close()


def ended(run: Run, *, restarts: bool = False) -> None:
    """End a run before its time: nothing is lost, doubled or too stale, nobody had to be replaced, and no process is left."""
    command("down", str(run.path), "--timeout", "120")
    run.wait(restarts=True)
    audit = json.loads(command("audit", str(run.path), "--json").stdout)
    assert (audit["lost"], audit["doubled"], audit["too_stale"]) == (0, 0, 0), audit["findings"]
    assert restarts or run.exit_record["restarts"] == [], "who leaves is not replaced"
    assert not any(alive(pid) for pid in pids_of(run))


def slowed(config: dict[str, Any]) -> dict[str, Any]:
    """Without an end of its own, so that commands are given meanwhile; an iteration takes about a second."""
    config["iterations"] = 100_000
    config["generators"]["count"] = 1
    for options in (config["generators"]["options"], config["rewarders"]["options"], config["learner"]["step_options"]):
        options["speed"] = 100
    return config


def test_actors_come_and_go_while_the_run_goes_on(simulated: dict[str, Any], start: Callable[..., Run]) -> None:  # noqa: F811
    run = start(slowed(simulated))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    refused = command("scale", str(run.path), "generators=0")
    assert (refused.returncode, "generators=0: at least 1 is needed" in refused.stderr) == (2, True), refused.stderr
    assert scaled(run, "generators=3", "rewarders=2")["changed"] == {
        "generators": {"before": 1, "count": 3},
        "rewarders": {"before": 1, "count": 2},
    }
    assert {"generator-0", "generator-1", "generator-2", "rewarder-1"} <= run.pids().keys()
    assert scaled(run, "generators=1", "rewarders=1")["fleets"]["generators"] == {"count": 1, "wanted": 1, "leaving": 0, "joined": 0}
    assert not {"generator-1", "generator-2", "rewarder-1"} & run.pids().keys()
    now = run.status()["iteration"]
    run.until(lambda status: status.get("iteration", 0) > now, "an iteration with those who stayed")
    ended(run)
    for name in ("generator-2", "generator-1", "rewarder-1"):
        assert re.search(rf"{name} left in order", run.out), run.out
    ledger = Ledger(run.path / "ledger.sqlite", read_only=True)
    assert [(fleet, count) for _, fleet, count, _ in ledger.sizes()] == [
        ("generators", 3),
        ("rewarders", 2),
        ("generators", 1),
        ("rewarders", 1),
    ]
    ledger.close()
    assert command("scale", str(run.path), "generators=2").returncode == 2


@pytest.mark.slow
def test_one_to_three_generators_and_back_ten_times(simulated: dict[str, Any], start: Callable[..., Run]) -> None:  # noqa: F811
    run = start(slowed(simulated))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    for _ in range(10):
        for count in (3, 1):
            scaled(run, f"generators={count}")
            now = run.status().get("iteration", 0)
            run.until(lambda status, now=now: status.get("iteration", 0) >= now + 1, "an iteration with that many", 120)
    ended(run)
    assert yaml.safe_load((run.path / "config.yaml").read_text())["generators"]["count"] == 1, "what a resume takes"


@pytest.mark.faults
def test_an_actor_that_cannot_live_here_is_given_up_and_the_run_goes_on(
    simulated: dict[str, Any],  # noqa: F811
    start: Callable[..., Run],
) -> None:
    simulated["generators"]["engine"] = "tests.system.engines:OneDevice"
    run = start(slowed(simulated))
    run.until(lambda status: status.get("iteration", 0) >= 1, "first iteration")
    done = command("scale", str(run.path), "generators=2", "--timeout", "60")
    assert (done.returncode, "generators is not 2: changed again meanwhile, or not all could live here" in done.stderr) == (1, True), (
        done.stderr
    )
    assert run.status()["fleets"]["generators"] == {"count": 1, "wanted": 1, "leaving": 0, "joined": 0}
    now = run.status()["iteration"]
    run.until(lambda status: status.get("iteration", 0) > now, "an iteration without it")
    ended(run)
    assert re.search(r"generator-1 left, not in order: engine 1: there is one device here", run.out), run.out


@pytest.mark.faults
def test_the_learner_changes_its_size_at_a_commit(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["iterations"] = 30
    config["rewarders"] = {"reward": "tests.system.rewards:SlowReward", "options": {"seconds": 0.05}}
    run = start(config)
    run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations")
    scaled(run, "learner=2")
    assert {"learner-0", "learner-1"} <= run.pids().keys()
    now = run.status()["iteration"]
    run.until(lambda status: status.get("iteration", 0) >= now + 2, "two more iterations")
    scaled(run, "learner=1")
    assert "learner-1" not in run.pids()
    assert run.wait(300, restarts=True) == 0, run.err
    assert run.exit_record["restarts"] == []
    sound(run, 30)
    assert not any(alive(pid) for pid in pids_of(run))


@pytest.mark.faults
def test_reward_actors_follow_what_waits_for_them(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["iterations"] = 12
    config["rewarders"] = {
        "reward": "tests.system.rewards:SlowReward", "options": {"seconds": 0.2}, "min": 1, "max": 3, "scale_after_s": 0.5,
    }  # fmt: skip
    run = start(config)
    run.until(lambda status: status.get("fleets", {}).get("rewarders", {}).get("count", 0) >= 2, "another reward actor")
    assert run.wait(300, restarts=True) == 0, run.err
    sound(run, 12)
    ledger = Ledger(run.path / "ledger.sqlite", read_only=True)
    sizes = ledger.sizes()
    ledger.close()
    assert sizes and all(fleet == "rewarders" and 1 <= count <= 3 and why.startswith("by itself") for _, fleet, count, why in sizes)
