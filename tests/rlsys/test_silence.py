"""Silence is judged by the time in which the supervisor could have heard something."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import pytest

from protocol.channels import Endpoint
from protocol.node import ProcessSpec
from rlsys.config import parse_config
from rlsys.launchers import Launcher
from rlsys.rundir import RunDir
from rlsys.supervisor import Process, Supervisor
from tests.configuration import minimal


class Alive:
    """A `Handle` of a process that runs and says nothing."""

    host, pid = "", 0

    def __init__(self) -> None:
        self.spec = ProcessSpec(run_id="0" * 16, epoch=1, role="generator", index=0, start=1, run_dir="", control="")

    def exit_code(self) -> None:
        return None


@pytest.mark.parametrize(
    ("silent_s", "stood_still_s", "given_up"), [(50, (), True), (50, (40.0,), False), (50, (1.0, 1.5), True), (65, (40.0, 40.0), True)]
)
def test_a_supervisor_that_stood_still_blames_nobody_for_that_time(
    tmp_path: Path, silent_s: int, stood_still_s: tuple[float, ...], given_up: bool
) -> None:
    """Silent for 50 s where 30 are allowed: given up, unless 40 of them were the supervisor's own. Twice what is allowed is too long in any case."""
    config = parse_config(minimal(tmp_path) | {"deadlines": {"heartbeat_s": 30.0}}, "test")
    supervisor, dead = Supervisor(config, RunDir(tmp_path / "run")), list[str]()
    now = time.monotonic()
    process = Process(cast(Any, Alive()), now - 100.0, cast(Launcher, None), heard_s=now - silent_s)
    supervisor.view.processes["generator-0"] = process
    supervisor._died = lambda control, process, what, code=None: dead.append(what)  # type: ignore[method-assign]
    for seconds in stood_still_s:
        supervisor._stood_still(time.monotonic() - seconds)
    supervisor._watch(cast(Endpoint, None), [])
    assert bool(dead) == given_up
    assert all(what.startswith(f"generator-0@1 has been silent for {silent_s} s") for what in dead)
