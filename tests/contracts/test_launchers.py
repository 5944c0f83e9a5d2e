"""Every way to start a process keeps the same promises: children of this process, and those of a host that joined, as actors on Ray are."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.channels import Endpoint, Keys, Transport
from protocol.node import ProcessSpec
from protocol.registry import resolve
from rlsys import __version__
from rlsys.config import dump_config, parse_config
from rlsys.hosts import Door, Grant, Host
from rlsys.launchers import LAUNCHERS, Handle, Launcher
from rlsys.launchers.agent import Agent
from rlsys.rundir import WEIGHTS_PROBE, write_atomically
from rlsys.token import parse
from tests.configuration import minimal
from tests.system.conftest import alive

RUN_ID = "00000000000000ab"
DEADLINE_S = 120.0

Started = tuple[Launcher, Callable[[], object]]
"""A launcher, and what its supervisor does all the time."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The directory of a run whose supervisor listens but never answers."""
    path = tmp_path / "run"
    (path / "logs").mkdir(parents=True)
    write_atomically(path / "config.yaml", dump_config(parse_config(minimal(tmp_path), "test")))
    return path


@pytest.fixture(params=["local", "joined"])
def launcher(request: pytest.FixtureRequest, run_dir: Path, tmp_path: Path) -> Iterator[Started]:
    if request.param == "local":
        local: Launcher = resolve("local", LAUNCHERS, "launcher")("")
        yield local, lambda: None
        local.close()
        return
    keys, weights = Keys.make(), tmp_path / "weights"
    weights.mkdir()
    (weights / WEIGHTS_PROBE).write_text(RUN_ID)
    supervisor = Transport(int(RUN_ID, 16), None, "127.0.0.1", keys)
    control = Endpoint(supervisor, "control", "control")
    grant = Grant(
        epoch=1, control=control.address, keys=keys, config=(run_dir / "config.yaml").read_text, run_dir=run_dir, weights_dir=weights,
        silent_s=120.0,
    )  # fmt: skip
    door = Door(RUN_ID, "127.0.0.1", grant)
    hosts: list[Host] = []
    door.on_join = hosts.append
    agent = Agent(parse(door.token, __version__), name="there", role="rewarder", count=1)
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    until(lambda: hosts, door.turn)
    yield hosts[0], door.turn
    door.close("the test is over")
    thread.join(timeout=DEADLINE_S)
    assert not thread.is_alive()
    supervisor.close()


def until(condition: Callable[[], object], turn: Callable[[], object]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        turn()
        assert time.monotonic() < end
        time.sleep(0.01)


def spec(run_dir: Path, role: str) -> ProcessSpec:
    return ProcessSpec(
        run_id=RUN_ID, epoch=1, role=role, index=0, start=1, run_dir=str(run_dir), control="ipc:///nowhere", socket_dir=str(run_dir)
    )


def test_a_process_is_started_seen_and_ended_for_good(launcher: Started, run_dir: Path) -> None:
    start, turn = launcher
    handle: Handle = start.start(spec(run_dir, "rewarder"), run_dir / "logs" / "rewarder-0.log", {"OMP_NUM_THREADS": "1"})
    until(lambda: handle.pid, turn)
    assert alive(handle.pid) and handle.exit_code() is None
    handle.kill()
    assert handle.exit_code() == -signal.SIGKILL
    assert "SIGKILL" in handle.how()
    until(lambda: not alive(handle.pid), turn)
    handle.kill()  # again changes nothing
    handle.signal_group(signal.SIGTERM)
    start.release("rewarder", 0)


def test_exit_code_and_last_words_of_a_process_that_ends_by_itself_are_known(
    launcher: Started, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, killpg = list[bool](), os.killpg

    def noted(group: int, number: int) -> None:
        there.append(Path(f"/proc/{group}").exists())
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", noted)
    start, turn = launcher
    handle = start.start(spec(run_dir, "teacher"), run_dir / "logs" / "teacher-0.log", {})
    until(lambda: handle.exit_code() is not None, turn)
    assert handle.exit_code() == 1
    assert "exit code 1" in handle.how()
    assert any("'teacher'" in line for line in handle.tail()), handle.tail()
    handle.signal_group(signal.SIGKILL)
    handle.kill()
    assert there and all(there), "once it is reaped, its number may be another's: nothing is sent there"
