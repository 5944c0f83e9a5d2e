"""What a run shows while it ends and afterwards: the real supervisor, over real sockets, with threads in place of its processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import RunEnded
from protocol.messages import Snapshot
from protocol.node import Node, ProcessSpec
from rlsys.chronicle import chronicle
from rlsys.commands import board_of
from rlsys.config import RunConfig, parse_config
from rlsys.logs import merged
from rlsys.rundir import RunDir, read_json, write_atomically
from rlsys.supervisor import Supervisor
from rlsys.top import top
from rlsys.why import why
from tests.configuration import minimal

DEADLINE_S = 120.0
SHOWN = {
    "iterations": 9,
    "rewards": [0.5],
    "queues": {"queues/samples_running": 12.0},
    "prometheus": "http://127.0.0.1:1/metrics",
    "now": {"throughput/sampled_tokens_per_s": 5.0},
}


class InAThread:
    """A `Handle`: registers, tells a snapshot if it is the dashboard, and takes its time to end until the run's status says that it does."""

    host = ""

    def __init__(self, spec: ProcessSpec, log_path: Path, seen: list[dict[str, Any]], told: list[str]) -> None:
        self.spec, self.log_path, self.pid, self._seen, self._told = spec, log_path, os.getpid(), seen, told
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        node, status = Node(self.spec), Path(self.spec.run_dir) / "status.json"
        shows = self.spec.role == "dashboard"
        try:
            node.start()
            while True:
                if shows:
                    node.tell(Snapshot(time_s=time.time(), values={**SHOWN, "iteration": 1}))
                node.poll(0.5)
        except RunEnded:
            self._told.append(self.spec.name)
            end = time.monotonic() + DEADLINE_S
            while shows and time.monotonic() < end and (read_json(status) or {}).get("state") != "ending":
                try:
                    node.poll(0.05)
                except RunEnded:
                    pass
            if shows:
                self._seen.append(read_json(status) or {})
                node.tell(Snapshot(time_s=time.time(), values={**SHOWN, "iteration": 4}))
        finally:
            node.close()

    def exit_code(self) -> int | None:
        return None if self._thread.is_alive() else 0

    def how(self) -> str:
        return "ended"

    def signal_group(self, number: signal.Signals) -> None:
        """Nothing to signal."""

    def kill(self) -> None:
        self._thread.join(DEADLINE_S)

    def tail(self, lines: int = 20) -> list[str]:
        return []


class Threads:
    """A `Launcher` that starts no process."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.told: list[str] = []
        """Who heard of the end, in order."""

    def adapt(self, config: RunConfig) -> RunConfig:
        return config

    def reserve(self, *_: object) -> None: ...

    def release(self, role: str, index: int) -> None: ...

    def turn(self) -> None: ...

    def close(self) -> None: ...

    def start(self, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> InAThread:
        return InAThread(spec, log_path, self.seen, self.told)


def test_a_run_that_ends_says_so_and_leaves_no_figures_of_what_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deadlines = {"shutdown_s": 2 * DEADLINE_S, "heartbeat_s": 5 * DEADLINE_S, "busy_s": 5 * DEADLINE_S}  # a machine may stall
    config = parse_config({**minimal(tmp_path), "iterations": 9, "deadlines": deadlines}, "test")
    directory = RunDir(tmp_path / "run")
    directory.claim(config)
    threads = Threads()
    supervisor = Supervisor(config, directory, launcher=threads)

    def stop_once_shown() -> None:
        if supervisor.view.snapshot and all(p.registered for p in supervisor.view.processes.values()):
            assert supervisor.view.status["state"] == "running"
            supervisor.view.tensorboard = "http://127.0.0.1:2/"
            supervisor.stop("failed", "guard: entropy collapse")

    supervisor.on_tick = stop_once_shown
    with chronicle(directory.path, 1.0, lambda: (supervisor.view.run_id, supervisor.view.snapshot.get("iteration", -1))) as record:
        supervisor.on_event = record
        ending = supervisor.run()

    assert (ending.outcome, ending.exit_code) == ("failed", 1)
    assert len(threads.told) == 5 and threads.told[-1] == "dashboard-0", "it takes the last words of all others"
    [between] = threads.seen
    assert (between["state"], between["reason"], between["tensorboard"]) == ("ending", "guard: entropy collapse", "http://127.0.0.1:2/")
    assert {process["name"] for process in between["processes"]} >= {"learner-0", "dashboard-0"}
    after = read_json(directory.path / "status.json") or {}
    assert (after["state"], after["reason"], after["processes"]) == ("failed", "guard: entropy collapse", [])
    assert not any(after[name] for name in ("queues", "now", "memory", "prometheus", "tensorboard")), "nothing of what has ended"
    assert (read_json(directory.path / "exit.json") or {})["iterations_done"] == 4, "the dashboard's last word counts"
    assert {r["run"] for r in merged(directory.path / "logs", "supervisor")} <= {supervisor.view.run_id}

    with (tmp_path / "top").open("w") as out:
        assert top(directory.path, out, once=True) == 0
    shown = (tmp_path / "top").read_text()
    assert "failed" in shown and "guard: entropy collapse" in shown and "iteration 4/9" in shown and "samples running" not in shown
    assert why(directory.path, as_json=False) == 0
    assert "the run is over: failed, guard: entropy collapse" in capsys.readouterr().out


def test_nobody_is_blamed_while_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status = {
        "state": "ending",
        "reason": "told to stop",
        "time_s": time.time(),
        "processes": [{"name": "dashboard-0", "pid": os.getpid()}],
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    monkeypatch.setattr("rlsys.why.holder", lambda run: os.getpid())
    assert why(tmp_path, as_json=False) == 0
    assert capsys.readouterr().out == "the run is ending: told to stop; still there: dashboard-0\n"
    assert why(tmp_path, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["guilty"] == []


def test_a_detached_run_names_its_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsys.commands.holder", lambda run: 5)
    (tmp_path / "status.json").write_text('{"tensorboard": ""}')
    writer = threading.Timer(0.3, lambda: write_atomically(tmp_path / "status.json", '{"tensorboard": "http://127.0.0.1:2/"}'))
    writer.start()
    assert board_of(tmp_path, 5) == "TensorBoard at http://127.0.0.1:2/ (ends with the run)"
    writer.join()
    (tmp_path / "status.json").unlink()
    assert "`rlsys status" in board_of(tmp_path, 6), "the run has ended meanwhile: nothing is waited for"
