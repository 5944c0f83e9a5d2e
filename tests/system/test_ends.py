"""Every end of a run is orderly: no process is left, and exit.json says how it ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.logs import merged
from tests.system.conftest import DEADLINE_S, Run, alive, assert_gone

ROLES = ["dispatcher-0", "generator-0", "rewarder-0", "learner-0", "dashboard-0"]


def endless(config: dict[str, Any]) -> dict[str, Any]:
    """A run that is still going when the test ends it."""
    config["iterations"] = 100_000
    config["evaluation"] = {"at_start": False, "at_end": False}
    return config


def training(status: dict[str, Any]) -> bool:
    return status.get("iteration", 0) >= 1


def rlsys(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "rlsys", *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


NO_RESTARTS = dict.fromkeys(("generator", "rewarder", "dispatcher", "learner", "dashboard"), 0)


@pytest.mark.parametrize("victim", ROLES)
def test_without_restarts_a_crash_names_the_guilty_role(config: dict[str, Any], start: Callable[..., Run], victim: str) -> None:
    run = start(endless(config) | {"restarts": NO_RESTARTS})
    run.until(training, "first iteration")
    pids = run.pids()
    os.kill(pids[victim], signal.SIGKILL)
    assert run.wait() == 1
    assert_gone(set(pids.values()))
    assert run.exit_record["outcome"] == "failed"
    assert run.exit_record["role"] == victim
    assert f"{victim}@1 was killed by SIGKILL" in run.err
    assert f"logs are in {run.path / 'logs'}" in run.err


def test_a_guard_may_end_a_run(config: dict[str, Any], start: Callable[..., Run]) -> None:
    """Sampler and trainer never agree to a thousandth of a millionth of a nat: the guard speaks once it has five iterations to go by."""
    run = start(endless(config) | {"guards": {"action": "stop", "drift": 1e-9}}, "--plain")
    assert run.wait() == 1
    said = "guard: log-prob drift at iteration 4: log-probs of sampler and trainer differ by "
    assert f"rlsys: the run failed: {said}" in run.err
    assert "Look at: whether sampler and trainer use the same dtype and chat template" in run.out
    record = run.exit_record
    assert (record["outcome"], record["exit_code"], record["role"]) == ("failed", 1, "")
    assert record["reason"].startswith(said)
    assert record["iterations_done"] >= 5, "what was trained while the news travelled counts"
    guard = next(r for r in merged(run.path / "logs", level="warning") if "drift" in r["message"])
    assert (guard["process"], guard["iteration"]) == ("dashboard-0", 4)
    assert any(r["message"].startswith("the run ended: failed, guard: log-prob drift") for r in merged(run.path / "logs", "supervisor"))
    shown = " ".join(rlsys("top", str(run.path)).stdout.split())  # it wraps lines
    assert said.strip() in shown, "top says why it is over"
    assert "samples running" not in shown, "and nothing of what no longer runs"
    assert said.strip() in rlsys("why", str(run.path)).stdout


def test_ctrl_c_ends_in_order(config: dict[str, Any], start: Callable[..., Run]) -> None:
    run = start(endless(config))
    run.until(training, "first iteration")
    pids = set(run.pids().values())
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    assert_gone(pids)
    assert run.exit_record["outcome"] == "interrupted"
    assert run.exit_record["iterations_done"] >= 1
    assert "the run ended early: interrupted by the user" in run.err


def test_down_ends_a_detached_run_and_status_and_logs_tell_of_it(config: dict[str, Any], start: Callable[..., Run]) -> None:
    run = start(endless(config), "--detach")
    assert run.wait() == 0, run.err
    assert run.out.strip() == str(run.path)
    run.until(training, "first iteration")
    pids = set(run.pids().values())
    status = rlsys("status", str(run.path))
    assert "running" in status.stdout
    assert "learner-0" in status.stdout
    again = start_again(run)
    assert again.returncode == 2
    assert "in use" in again.stderr
    down = rlsys("down", str(run.path), "--timeout", "120")
    assert down.returncode == 0, down.stderr
    assert_gone(pids)
    assert run.exit_record["outcome"] == "stopped"
    assert "stopped" in rlsys("status", str(run.path)).stdout
    assert "learner-0@1 ends" in rlsys("logs", str(run.path), "learner").stdout
    assert rlsys("down", str(run.path)).stdout.strip().endswith("not running")


def start_again(run: Run) -> "subprocess.CompletedProcess[str]":
    return rlsys("up", str(run.config_path), "--run-dir", str(run.path))


def test_a_users_broken_reward_ends_the_run_with_its_traceback(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["rewarders"] = {"reward": "tests.system.rewards:BrokenReward"}
    run = start(config)
    assert run.wait(restarts=True) == 1
    assert run.exit_record["role"] == "rewarder-0"
    assert "the same as before its restart" in run.err
    assert "KeyError: 'answer'" in run.err


def test_a_user_error_inside_a_process_is_one_line_and_exit_code_2(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["sampling"]["max_prompt_tokens"] = 1
    run = start(config)
    assert run.wait() == 2
    assert "every prompt is longer than 1 tokens" in run.err
    assert "Traceback" not in run.err


def test_the_supervisors_death_ends_every_process(config: dict[str, Any], start: Callable[..., Run]) -> None:
    run = start(endless(config))
    run.until(training, "first iteration")
    pids = set(run.pids().values())
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait()
    assert_gone(pids)
    assert "dead" in rlsys("status", str(run.path)).stdout


def test_a_hung_process_is_found_and_named_where_nothing_may_be_restarted(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config["deadlines"] = {"heartbeat_s": 12.0, "shutdown_s": 3.0}  # nobody else is silent for so long, and who is stopped hears of no end
    config["restarts"] = NO_RESTARTS
    run = start(endless(config))
    run.until(training, "first iteration")
    pid = run.pids()["rewarder-0"]
    os.kill(pid, signal.SIGSTOP)
    assert run.wait() == 1
    assert "rewarder-0@1 has been silent for" in run.err
    assert not alive(pid)


def test_a_ring_in_which_nothing_moves_says_who_waits_for_whom(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    config["rewarders"] = {"reward": "tests.system.rewards:HangingReward", "options": {"file": str(tmp_path / "go")}}
    config["deadlines"]["stall_s"] = 3.0
    run = start(config)
    assert run.wait() == 1
    assert "nothing has moved" in run.err
    assert "learner-0 waits" in run.err
    assert "rewarder-0" in run.err
