"""Any process dies at any time: the run ends by itself, and nothing is lost, doubled or too stale."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from rlsys.audit import audit_run
from tests.system.conftest import Run

ROLES = ("dispatcher", "generator", "rewarder", "learner", "dashboard")


def surviving(config: dict[str, Any], iterations: int) -> dict[str, Any]:
    """A run that is killed all the time and may be: the limits are no part of these tests."""
    config["iterations"] = iterations
    config["generators"]["count"] = config["rewarders"]["count"] = 2
    config["restarts"] = {**dict.fromkeys(ROLES, 10_000), "backoff_s": 0.05, "max_backoff_s": 0.5}
    return config


def sound(run: Run) -> dict[str, Any]:
    """The audit of a finished run, which must find nothing, and every group of every iteration ended."""
    result = audit_run(run.path)
    assert (result["lost"], result["doubled"], result["too_stale"]) == (0, 0, 0), json.dumps(result["findings"], indent=1)
    assert result["groups_in_flight"] == 0
    return result


def rehearse(run: Run, *arguments: str) -> dict[str, Any]:
    """`rlsys chaos` as users call it."""
    command = [sys.executable, "-P", "-m", "rlsys", "chaos", str(run.path), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("victim", ["dispatcher-0", "generator-0", "rewarder-0", "learner-0", "dashboard-0"])
def test_a_killed_process_comes_back_and_the_run_is_whole(config: dict[str, Any], start: Callable[..., Run], victim: str) -> None:
    iterations = 60
    run = start(surviving(config, iterations))
    run.until(lambda status: status.get("iteration", 0) >= 2, "two iterations")
    os.kill(run.pids()[victim], signal.SIGKILL)
    assert run.wait(200, restarts=True) == 0, run.err
    record = run.exit_record
    assert record["outcome"] == "done"
    assert record["iterations_done"] == iterations or victim == "dashboard-0"
    assert [restart["name"] for restart in record["restarts"]] == [victim], record["restarts"]
    assert f"{victim}@1 was killed by SIGKILL; it is started again" in run.out
    result = sound(run)
    assert result["iterations"] == iterations
    assert result["states"]["eval evaluated"] == 12
    assert [evaluation["version"] for evaluation in record["evaluations"]] == [0, iterations]
