"""Stalls made in real processes at every edge of the ring: `why` names the guilty one each time, and nobody when all is well again."""

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

from actors.engines import EngineOptions
from actors.engines.embedded import EmbeddedEngine
from protocol.messages import Version
from rlsys.logs import merged
from rlsys.why import explain_status
from tests.system.conftest import Run
from tests.system.rewards import wait_for_file

VICTIMS = [
    ["generator-0", "generator-1"],
    ["rewarder-0"],
    ["dispatcher-0"],
    ["learner-0"],
    ["learner-1"],
    ["generator-1", "rewarder-0"],
]
"""The first holds up the whole run for certain: with one generator stopped the other may sample everything, and the run goes on."""


class LateWeights(EmbeddedEngine):
    """Takes version 3 only once a file is there: weights that do not arrive."""

    def __init__(self, options: EngineOptions) -> None:
        self._file = str(options.extra["file"])
        super().__init__(EngineOptions(model_path=options.model_path, max_context=options.max_context, slots=options.slots))

    def load_weights(self, directory: Path, version: Version) -> float:
        if version.number >= 3:
            wait_for_file(self._file)
        return super().load_weights(directory, version)


def patient(config: dict[str, Any]) -> dict[str, Any]:
    """Two of each, endless, and nobody is killed for hanging within this test."""
    config["iterations"] = 100_000
    config["evaluation"] = {"at_start": False, "at_end": False}
    config["deadlines"] = {"heartbeat_s": 300.0, "stall_s": 300.0, "silent_s": 5.0, "quiet_s": 4.0, "shutdown_s": 6.0}
    config["generators"]["count"] = 2
    return config


def blamed(run: Run, status: dict[str, Any]) -> set[str]:
    return {blame.name for blame in explain_status(status, run.process.pid)[0].guilty} if status else set()


def moves_on(run: Run) -> None:
    done = run.status().get("iteration", 0)
    run.until(lambda status: status.get("iteration", 0) > done + 1 and not blamed(run, status), "movement")


@contextmanager
def stopped(run: Run, names: list[str]) -> Iterator[None]:
    pids = [run.pids()[name] for name in names]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_stopped_process_is_named_wherever_it_stands(config: dict[str, Any], start: Callable[..., Run]) -> None:
    config = patient(config)
    config["learner"]["ranks"] = 2
    run = start(config, "--plain")
    moves_on(run)
    for names in VICTIMS:
        with stopped(run, names):
            run.until(lambda status, names=names: blamed(run, status) == set(names), f"blame of {names}")
            if names == VICTIMS[0]:
                why = run.until(lambda status: status["stalled"] and status["why"], "a stall that the run sees by itself")
                assert "generator-0 is stopped" in why
                assert "generator-1 is stopped" in why
                told = subprocess.run(
                    [sys.executable, "-P", "-m", "rlsys", "why", str(run.path), "--json"], capture_output=True, text=True, check=True
                )
                content = json.loads(told.stdout)
                assert [blame["name"] for blame in content["guilty"]] == names
                edges = {(wait["waiter"], wait["on"]) for wait in content["waits"]}
                held = any(("learner-0", name) in edges for name in names)
                not_given = ("learner-0", "dispatcher-0") in edges and any(("dispatcher-0", name) in edges for name in names)
                assert held or not_given, "samples that they hold, or groups that the dispatcher cannot give to them"
        moves_on(run)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    assert "nothing has moved for 4 s: " in run.out, "the run said so by itself"
    assert "it moves again" in run.out
    warned = [record["message"] for record in merged(run.path / "logs", level="warning")]
    assert any(message.startswith("nothing has moved for 4 s: generator-0 is stopped") for message in warned), "and its log has it"


def test_a_hang_inside_a_living_process_is_named(config: dict[str, Any], start: Callable[..., Run], tmp_path: Path) -> None:
    """A reward that never returns fills the channel before it; one that computes for as long is slow and not to blame; weights that are never
    taken starve the ring behind them."""
    config, scored, busy, taken = patient(config), tmp_path / "scored", tmp_path / "busy", tmp_path / "taken"
    options = {"file": str(scored), "busy": str(busy)}
    config["rewarders"] = {"reward": "tests.system.rewards:HangingThenBusyReward", "options": options, "concurrency": 1}
    config["generators"] |= {"count": 1, "engine": "tests.system.test_why:LateWeights", "options": {"file": str(taken)}}
    run = start(config, "--plain")

    def full_channel(status: dict[str, Any]) -> bool:
        found = explain_status(status, run.process.pid)[0] if status else None
        return found is not None and any(wait.waiter == "generator-0" and wait.what.startswith("reward credit") for wait in found.waits)

    status = run.until(lambda status: blamed(run, status) == {"rewarder-0"} and full_channel(status) and status, "blame of rewarder-0")
    found = explain_status(status, run.process.pid)[0]
    assert "'scoring'" in found.sentence
    [full] = [wait for wait in found.waits if wait.waiter == "generator-0"]
    assert full.on == "rewarder-0" and full.what.startswith("reward credit (") and "completions wait to be scored" in full.what

    scored.touch()
    run.until(lambda status: not blamed(run, status), "a reward that computes again")
    before = quiet_s(run.status(), "rewarder-0")
    run.until(
        lambda status: never_blamed(run, status) and quiet_s(status, "rewarder-0") > before + 5.0, "five more seconds without a score"
    )

    busy.touch()
    status = run.until(lambda status: blamed(run, status) == {"generator-0"} and status, "blame of generator-0")
    assert "'swap weights' (v3)" in explain_status(status, run.process.pid)[0].sentence
    taken.touch()
    moves_on(run)


def quiet_s(status: dict[str, Any], name: str) -> float:
    """Since when a process has had no result."""
    return float(next(process["quiet_s"] for process in status["processes"] if process["name"] == name))


def never_blamed(run: Run, status: dict[str, Any]) -> bool:
    found = blamed(run, status)
    assert not found, f"{found} computes, and is blamed"
    return True
