"""`rlsys chaos RUN`: kill, stop, slow down or cut off processes of a live run, one after the other, by a seeded plan; for rehearsals and tests.

    plan(seed, kills, roles) --victim, pause--> wait until the ring works --> signal --> wait until it works again --> report

A victim is a process of the run by its name, pid and start time, so that nothing else is ever hit. The next fault comes when the
replacement of the last victim has done something useful, or after `--timeout`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from protocol.errors import ConfigError
from protocol.ledger import Ledger
from rlsys.launchers.local import start_ticks
from rlsys.rundir import holder, read_json

MODES = ("kill", "stop", "slow", "partition")
"""SIGKILL; SIGSTOP for good (found by silence); stopped nine tenths of the time for `slow_s`; cut off from all peers for good."""
ROLES = ("dispatcher", "generator", "rewarder", "learner", "dashboard")
SLOW_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Fault:
    """One step of the plan."""

    role: str
    pick: float
    """In [0, 1): which process of the role."""
    pause_s: float
    """After the ring works, before the fault."""


@dataclass(slots=True)
class Hit:
    """One fault that was done."""

    name: str
    identity: str
    mode: str
    time_s: float
    useful_after_s: float | None = None
    """Until its replacement had done something useful; None when it did not come back in time or was not to be replaced."""


def plan(seed: int, kills: int, roles: Sequence[str], mean_pause_s: float) -> list[Fault]:
    """The faults of a seed, in order. Pure."""
    rng = random.Random(seed)
    return [Fault(rng.choice(list(roles)), rng.random(), rng.expovariate(1.0 / mean_pause_s)) for _ in range(kills)]


class Chaos:
    """Faults in one live run. `say` is told of each."""

    def __init__(self, run: Path, mode: str, *, timeout_s: float, slow_s: float, say: Callable[[str], None]) -> None:
        if holder(run) is None:
            raise ConfigError(f"{run}: holds no live run")
        self._run, self._mode, self._timeout_s, self._slow_s, self._say = run, mode, timeout_s, slow_s, say
        self.hits: list[Hit] = []

    def go(self, faults: Sequence[Fault]) -> list[Hit]:
        """Do the faults until they are done or the run has ended."""
        for fault in faults:
            if not self._until(partial(self._victims, fault.role)) or not self._pause(fault.pause_s):
                break
            victims = self._victims(fault.role)
            if not victims:
                continue
            self._hit(victims[int(fault.pick * len(victims))])
        return self.hits

    def _hit(self, process: dict[str, Any]) -> None:
        hit = Hit(process["name"], process["identity"], self._mode, time.time())
        pid = process["pid"]
        self.hits.append(hit)
        self._say(f"{self._mode} {process['identity']} (pid {pid}), which was at: {process['doing']}")
        if self._mode == "slow":
            self._slow(pid)
            return
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "partition": signal.SIGUSR2}[self._mode]
        _send(pid, number)
        if self._until(lambda: self._useful(hit)):
            hit.useful_after_s = round(time.time() - hit.time_s, 3)

    def _useful(self, hit: Hit) -> bool:
        """Whether the next start of the process has done something, or waits for a peer although it could."""
        process = next((p for p in self._processes() if p["name"] == hit.name), None)
        if process is None or process["identity"] == hit.identity:
            return False
        return bool(process["progress"] > 0 or process["doing"] in IDLE)

    def _slow(self, pid: int) -> None:
        end = time.monotonic() + self._slow_s
        try:
            while time.monotonic() < end and _send(pid, signal.SIGSTOP):
                time.sleep(SLOW_PERIOD_S * 0.9)
                _send(pid, signal.SIGCONT)
                time.sleep(SLOW_PERIOD_S * 0.1)
        finally:
            _send(pid, signal.SIGCONT)

    def _processes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (read_json(self._run / "status.json") or {}).get("processes", [])
        return found

    def _victims(self, role: str) -> list[dict[str, Any]]:
        """Living processes of a role that have got to work, verified by the start time that the supervisor wrote down."""
        ledger = Ledger(self._run / "ledger.sqlite", read_only=True)
        try:
            ticks = {f"{s.role}-{s.index}@{s.start}": s.ticks for s in ledger.starts()}
        finally:
            ledger.close()
        ready = [p for p in self._processes() if p["name"].startswith(f"{role}-") and p["doing"] not in NOT_READY]
        return [p for p in ready if ticks.get(p["identity"]) and start_ticks(p["pid"]) == ticks[p["identity"]]]

    def _pause(self, seconds: float) -> bool:
        """Whether the run still lives afterwards."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and holder(self._run) is not None:
            time.sleep(min(0.05, max(0.0, end - time.monotonic())))
        return holder(self._run) is not None

    def _until(self, condition: Callable[[], object]) -> bool:
        """Whether `condition` came true within the time and while the run lived."""
        end = time.monotonic() + self._timeout_s
        while holder(self._run) is not None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.05)
        return False


NOT_READY = ("starting", "dead, comes back")
IDLE = tuple(
    f"waiting:{what}" for what in ("tasks", "completions", "observations", "end of run", "outcomes", "version", "credits", "trajectories")
)
"""Waits of a process that is ready for work and has none."""


def _send(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
        return True
    except ProcessLookupError:
        return False


def chaos(
    run: Path, *, seed: int, kills: int, roles: Sequence[str], mode: str, mean_pause_s: float, timeout_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Rehearse; returns what was done as plain data."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ConfigError(f"--roles: {unknown[0]!r} is no role that can be hit; known: {', '.join(ROLES)}")
    hits = Chaos(run, mode, timeout_s=timeout_s, slow_s=5.0, say=say).go(plan(seed, kills, roles, mean_pause_s))
    return {"run": str(run), "seed": seed, "mode": mode, "hits": [asdict(hit) for hit in hits], "alive": holder(run) is not None}
