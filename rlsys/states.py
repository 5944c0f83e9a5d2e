"""From what the supervisor heard and what the operating system shows to the states that `rlsys/waits.py` reasons about."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Protocol

from protocol.clock import now_s
from protocol.messages import Heartbeat, Register
from rlsys.config import RunConfig
from rlsys.waits import Limits, ProcessState

LOOK_S = 3.0
"""Whoever is silent or without a result for so long is looked up in /proc; before that nobody pays for it."""
_TICKS = os.sysconf("SC_CLK_TCK")


def limits(config: RunConfig) -> Limits:
    """From when on something is strange in this run."""
    deadlines = config.deadlines
    return Limits(
        silent_s=deadlines.silent_s,
        quiet_s=deadlines.quiet_s,
        deaf_s=max(deadlines.quiet_s, deadlines.heartbeat_s / 2),
        startup_s=max(deadlines.quiet_s, deadlines.startup_s / 2),
    )


class Heard(Protocol):
    """What the supervisor keeps of a process."""

    heartbeat: Heartbeat | None
    registered: Register | None
    heard_s: float
    started_s: float

    @property
    def name(self) -> str: ...
    @property
    def pid(self) -> int:
        """0 for a process of another host, which nobody can look up here."""
        ...


class Observer:
    """Remembers when each process last got on, and how much processor time it had used."""

    def __init__(self) -> None:
        self._progress: dict[str, tuple[int, float]] = {}
        self._cpu: dict[int, tuple[float, float, bool]] = {}

    def states(self, processes: Iterable[Heard]) -> list[ProcessState]:
        """The state of each process now."""
        now, wall = time.monotonic(), now_s()
        states = [self._state(process, now, wall) for process in processes]
        return self._look(states, {p.name: p.pid for p in processes if p.pid}, now)

    def _state(self, process: Heard, now: float, wall: float) -> ProcessState:
        beat = process.heartbeat
        if beat is None:
            age = now - process.started_s
            return ProcessState(name=process.name, for_s=age, silent_s=age, registered=process.registered is not None)
        count, since = self._progress.get(beat.identity, (-1, now))
        if beat.progress != count:
            since = now
        self._progress[beat.identity] = (beat.progress, since)
        return ProcessState(
            name=process.name,
            doing=beat.doing,
            peer=beat.peer,
            detail=beat.detail,
            for_s=max(0.0, wall - beat.since_s),
            silent_s=now - process.heard_s,
            quiet_s=now - since,
            registered=process.registered is not None,
            facts=beat.facts,
        )

    def _look(self, states: list[ProcessState], pids: Mapping[str, int], now: float) -> list[ProcessState]:
        strange = {s.name for s in states if s.name in pids and (s.silent_s > LOOK_S or s.quiet_s > LOOK_S)}
        if not strange:
            self._cpu.clear()
            return states
        seen = kernel_view({pids[name] for name in strange})
        found = []
        for state in states:
            if state.name not in strange or pids[state.name] not in seen:
                found.append(state)
                continue
            pid = pids[state.name]
            stopped, ready, cpu_s = seen[pid]
            before_s, before_cpu_s, computing = self._cpu.get(pid, (now, cpu_s, True))
            if now - before_s > 0.5:
                computing = ready or cpu_s - before_cpu_s > 0.05 * (now - before_s)
                self._cpu[pid] = (now, cpu_s, computing)
            else:
                self._cpu.setdefault(pid, (now, cpu_s, True))
            found.append(replace(state, stopped=stopped, computing=computing and not stopped))
        return found


def kernel_view(leaders: set[int]) -> dict[int, tuple[bool, bool, float]]:
    """For each process that leads a session: whether it is stopped; whether any of the session runs or waits for a processor, as on a
    machine that is too busy; and the processor seconds of the whole session so far."""
    stopped: dict[int, bool] = {}
    ready: set[int] = set()
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields_ = (entry / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:
            continue
        session = int(fields_[3])
        if session in leaders:
            ticks[session] = ticks.get(session, 0) + sum(int(field) for field in fields_[11:15])
            if fields_[0] == "R":
                ready.add(session)
            if int(entry.name) == session:
                stopped[session] = fields_[0] in "Tt"
    return {pid: (stopped[pid], pid in ready, ticks[pid] / _TICKS) for pid in stopped}


def to_data(state: ProcessState) -> dict[str, Any]:
    """Plain data for status.json; `from_data` is its inverse."""
    data = asdict(state)
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in data.items()}


def from_data(data: Mapping[str, Any], later_s: float = 0.0) -> ProcessState:
    """A state that was written `later_s` seconds ago. It has been at the same for so much longer, as far as anybody knows; that nothing was
    heard of it since is the writer's silence and not its own."""
    state = ProcessState(**{spec.name: data[spec.name] for spec in fields(ProcessState) if spec.name in data})
    return replace(state, for_s=state.for_s + later_s)
