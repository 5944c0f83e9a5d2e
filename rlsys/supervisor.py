"""The supervisor (`rlsys up`): starts every process, introduces them to each other, watches them, and ends them all.

    every process --Register, Heartbeat, Finished, Event--> [ supervisor ] --Peers, Leave, Stop--> every process
    dashboard --Snapshot--> [ supervisor ] --> progress on the terminal, status.json, exit.json
    rlsys scale --Order--> [ supervisor ] --Answer--> rlsys scale

A process that dies or falls silent is killed with its whole group, fenced off in the ledger, and started again (all ranks of the learner
together), with a pause that grows; rlsys/restarts.py says when that ends. Fleets change while it runs: who leaves takes nothing new, finishes
what it has and is not replaced (rlsys/scaling.py). The run ends when dispatcher and learner have finished, when it is
told to stop, at a fault that a restart cannot mend, or when every process waits. Whatever the end, no process is left `shutdown_s` later, and
exit.json says how it ended.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from protocol.addresses import numeric
from protocol.channels import Endpoint, Keys, Poller, Transport
from protocol.clock import now_s
from protocol.errors import ConfigError
from protocol.holds import SHM, Hold, sweep
from protocol.intervals import is_waiting
from protocol.ledger import Ledger
from protocol.messages import ClockEcho, Event, Finished, Heartbeat, Leave, Message, Peers, Refused, Register, Snapshot, Stop
from protocol.node import ProcessSpec
from rlsys.config import RunConfig, dump_config
from rlsys.hosts import Door, Grant, Host, describe_keys
from rlsys.launchers import Handle, Launcher
from rlsys.launchers.local import LocalLauncher, cpu_seconds, end_leftover, start_ticks
from rlsys.lines import open_lines
from rlsys.logs import bound
from rlsys.orders import ADDRESS, Orders
from rlsys.restarts import GiveUp, RestartPolicy
from rlsys.roles import BUG, USER_ERROR
from rlsys.rundir import (
    WEIGHTS_DIR,
    WEIGHTS_PROBE,
    RunDir,
    check_room,
    choose_weights_dir,
    make_scratch_dir,
    read_json,
    write_atomically,
    write_privately,
)
from rlsys.scaling import FLEETS, QueueRule, leavers, newcomers, resized, sizes_of
from rlsys.states import Observer, limits, to_data
from rlsys.topology import processes
from rlsys.waits import Explanation, ProcessState, explain, nothing_moves, starts_server

log = logging.getLogger("rlsys.supervisor")

STATUS_S = 1.0
"""How often status.json is written."""
LATE_S = 2.0
"""A turn of the supervisor's loop takes a tenth of a second; one that took so long was held up from outside, and perhaps so were all others."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended."""

    outcome: str
    """done, interrupted, stopped, or failed."""
    reason: str = ""
    role: str = ""
    """The guilty process of a failure."""
    user_error: bool = False

    @property
    def exit_code(self) -> int:
        return {"done": 0, "interrupted": 130, "stopped": 0}.get(self.outcome, 2 if self.user_error else 1)


@dataclass(slots=True)
class Process:
    """What the supervisor knows of one process: its present start, or, between two starts, the last."""

    child: Handle
    started_s: float
    launcher: Launcher
    registered: Register | None = None
    heartbeat: Heartbeat | None = None
    heard_s: float = 0.0
    excused_s: float = 0.0
    """Of the time since then, what the supervisor itself stood still."""
    progress: int = -1
    """What it said last that it has done."""
    moved_s: float = 0.0
    """When that number changed."""
    finished: bool = False
    error: str = ""
    restart_at_s: float | None = None
    """It is dead and comes back then."""
    restarts: int = 0
    added: bool = False
    """It came while the run went on: if it cannot live, the run goes on without it."""
    leaving: str = ""
    """Why it leaves the run; empty if it stays."""
    leaving_since_s: float = 0.0
    device: str = ""
    """What it samples or trains on, as it says itself."""

    @property
    def name(self) -> str:
        return self.child.spec.name

    @property
    def role(self) -> str:
        return self.child.spec.role

    @property
    def pid(self) -> int:
        """Of a process of this host; 0 for one of another."""
        return 0 if self.child.host else self.child.pid

    @property
    def stuck_s(self) -> float:
        """How long it has been at one piece of work without a result; 0 while it waits. One that is busy for hours but gets on is not stuck."""
        beat = self.heartbeat
        if beat is None or is_waiting(beat.doing):
            return 0.0
        return min(time.time() - beat.since_s, time.monotonic() - self.moved_s)


@dataclass(slots=True)
class Phase:
    """A named stretch of the run with its wall and CPU time."""

    name: str
    wall_s: float
    cpu_s: float


@dataclass(slots=True)
class View:
    """What a progress display may show. Written by the supervisor, read by the display."""

    config: RunConfig
    run_dir: Path
    processes: dict[str, Process] = field(default_factory=dict)
    """By name, such as "generator-0"."""
    snapshot: dict[str, Any] = field(default_factory=dict)
    started_s: float = field(default_factory=time.time)
    phases: list[Phase] = field(default_factory=list)
    training_since_s: float | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    restarts: list[dict[str, Any]] = field(default_factory=list)
    """What died, how, and when: {"name", "identity", "how", "time_s"}."""
    finishing: bool = False
    """Training has ended; the last evaluation goes on."""
    status: dict[str, Any] = field(default_factory=dict)
    """What status.json holds; made anew every second."""
    run_id: str = ""
    tensorboard: str = ""
    """Where a browser finds the TensorBoard that was started with the run."""


class Supervisor:
    """One run. `run` returns how it ended; `stop` may be called from a signal handler."""

    def __init__(self, config: RunConfig, run_dir: RunDir, *, resume: bool = False, launcher: Launcher | None = None) -> None:
        self._launcher = launcher or LocalLauncher()
        self.config, self.run_dir, self._resume = config, run_dir, resume
        self.view = View(config, run_dir.path)
        self.on_event: Callable[[Event], object] = lambda event: None
        self.on_tick: Callable[[], object] = lambda: None
        self._processes = self.view.processes
        self._ending: Ending | None = None
        self._next_status_s = 0.0
        self._observer, self._states = Observer(), list[ProcessState]()
        self._stalled = False
        self._newcomers = False
        """Somebody has registered and is not introduced yet."""
        self._progress, self._moved_s = -1, time.monotonic()
        self._mark_s, self._mark_cpu_s, self._phase = time.monotonic(), 0.0, "start-up"
        self._run_id = secrets.token_hex(8)
        self._epoch = 1
        self._ledger: Ledger | None = None
        self._policy = RestartPolicy(config.restarts)
        self._unwritten = set[str]()
        self._scratch: Path | None = None
        self._holds: list[Hold] = []
        """Of what is in memory or in the way of nobody but this host: if this process is killed, a later start removes it."""
        self._weights_dir: Path | None = None
        self._transport: Transport | None = None
        self._host = ""
        self._door: Door | None = None
        self._wanted_ranks, self._ranks_why = config.learner.ranks, ""
        scorers = config.rewarders
        self._queue_rule = (
            QueueRule(scorers.min, scorers.max, scorers.concurrency, scorers.scale_after_s) if scorers.min and scorers.max else None
        )

    def stop(self, outcome: str, reason: str) -> None:
        """End the run in order at the next turn of the loop."""
        self._ending = self._ending or Ending(outcome, reason)

    def tail(self, name: str) -> list[str]:
        """The end of the log of a process, such as "learner-0"."""
        return self._processes[name].child.tail() if name in self._processes else []

    def run(self) -> Ending:
        """Start everything, watch it until the end, and leave nothing behind."""
        try:
            control = self._prepare()
            poller = Poller()
            orders = Orders(self._sockets)
            orders.handlers["scale"] = lambda sizes: self._scale(control, sizes, "by hand")
            self._book.put(ADDRESS, orders.end.address)
            orders.handlers["token"] = self._new_token
            for end in (control, orders.end, *([self._door.end] if self._door else [])):
                poller.add(end)
            self._launcher.reserve(self.config, processes(self.config), self._door)
            for role, index in processes(self.config):
                self._start(role, index, control.address)
            turned_s = time.monotonic()
            while self._ending is None:
                poller.wait(0.1)
                turned_s = self._stood_still(turned_s)
                alive = [process for process in self._processes.values() if process.restart_at_s is None]
                ended = [process for process in alive if process.child.exit_code() is not None]
                for peer, message in control.receive():  # after looking who ended, so that the last words of the dead are heard first
                    self._on_message(control, peer, message)
                if self._newcomers:  # once for all of them: a fleet that starts would be introduced as often as it has members
                    self._newcomers = False
                    self._introduce(control)
                self._stop_when_done()
                orders.turn()
                if self._door is not None:
                    self._door.turn()
                self._launcher.turn()
                self._watch(control, ended)
                self._restart_due(control)
                self._follow_queue(control)
                self._tick()
            return self._ending
        except KeyboardInterrupt:
            self._ending = Ending("interrupted", "interrupted by the user")
            return self._ending
        except BaseException as error:
            self._ending = self._ending or Ending("failed", f"{type(error).__name__}: {error}", "supervisor")
            raise
        finally:
            self._end(control if "control" in locals() else None)

    # ------------------------------------------------------------------------------------------------ starting

    def _prepare(self) -> Endpoint:
        config, path = self.config, self.run_dir.path
        self._ledger = Ledger(path / "ledger.sqlite")
        if self._resume:
            self._take_over(self._ledger)
        self.view.run_id = self._run_id
        self._weights_dir = choose_weights_dir(config, path, f"{self._run_id}-{self._epoch}" if self._resume else self._run_id)
        check_room(self._weights_dir, config)
        (path / WEIGHTS_DIR).write_text(str(self._weights_dir))
        sweep()
        self._holds = [make_scratch_dir(self._run_id)]
        self._scratch = self._holds[0].directory
        if self._weights_dir.parent == SHM:
            self._holds.append(Hold(self._weights_dir))
        for key, value in (("run_id", self._run_id), ("epoch", self._epoch), ("scratch", self._scratch), ("weights", self._weights_dir)):
            self._ledger.put(key, str(value))
        keys = None
        self._host = numeric(config.transport.host)
        if config.transport.kind == "tcp":
            keys = Keys.make()
            write_privately(path / "keys.json", describe_keys(keys.public.decode(), keys.secret.decode()))
        self._transport = Transport(int(self._run_id, 16), None if keys else self._scratch, self._host, keys)
        control = Endpoint(self._transport, "control", "control")
        if keys is not None:
            self._weights_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self._weights_dir / WEIGHTS_PROBE).write_text(self._run_id)
            self._door = self._open_door(control, keys, self._weights_dir)
        return control

    def _open_door(self, control: Endpoint, keys: Keys, weights_dir: Path) -> Door:
        """Where other hosts come in."""
        grant = Grant(
            epoch=self._epoch,
            control=control.address,
            keys=keys,
            config=lambda: dump_config(self.config),
            run_dir=self.run_dir.path,
            weights_dir=weights_dir,
            silent_s=self.config.deadlines.heartbeat_s,
        )
        door = Door(self._run_id, self._host, grant)
        door.on_join = lambda host: self._host_joined(control, host)
        door.on_leave = lambda host: self._leave(
            control, [p for p in self._processes.values() if p.launcher is host], f"host {host.name} leaves"
        )
        door.on_gone = lambda host: self._host_gone(control, host)
        return door

    def _take_over(self, ledger: Ledger) -> None:
        """Go on with a run whose supervisor is gone: end what it left, and begin a new epoch."""
        ledger.check()
        self._run_id = ledger.get("run_id", self._run_id)
        self._epoch = int(ledger.get("epoch", "0")) + 1
        for start in ledger.starts():
            if start.ended_s is None:
                killed = end_leftover(start.pid, start.ticks)
                if killed:
                    log.warning(
                        "%s-%d@%d (pid %d) was left by the last supervisor and was killed", start.role, start.index, start.start, start.pid
                    )
                ledger.stopped(start.role, start.index, start.start, "killed at resume" if killed else "ended with its supervisor")
        for key in ("scratch", "weights"):
            left = ledger.get(key)
            if left and f"rlsys-{self._run_id[:8]}" in left:  # only what a supervisor of this run made for itself
                shutil.rmtree(left, ignore_errors=True)
        before = read_json(self.run_dir.path / "exit.json") or read_json(self.run_dir.path / "status.json") or {}
        self.view.evaluations += before.get("evaluations", [])
        self.view.restarts += before.get("restarts", [])
        (self.run_dir.path / "exit.json").unlink(missing_ok=True)

    @property
    def _book(self) -> Ledger:
        assert self._ledger is not None
        return self._ledger

    @property
    def _sockets(self) -> Transport:
        assert self._transport is not None
        return self._transport

    def _start(self, role: str, index: int, control: str, launcher: Launcher | None = None, *, added: bool = False) -> None:
        start = self._book.next_start(role, index, self._epoch)
        spec = ProcessSpec(
            run_id=self._run_id,
            epoch=self._epoch,
            role=role,
            index=index,
            start=start,
            run_dir=str(self.run_dir.path),
            control=control,
            socket_dir=str(self._scratch) if self.config.transport.kind == "ipc" else "",
            host=self._host,
        )
        threads = {"learner": self.config.learner.threads, "generator": self.config.generators.threads}.get(role, 1)
        environment = {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(self._scratch)}
        before = self._processes.get(spec.name)
        launcher = launcher or self._launcher
        child = launcher.start(spec, self.run_dir.logs / f"{spec.name}.log", environment)
        pid = 0 if child.host else child.pid  # a resumed run ends what is left on its own host
        self._book.started(role, index, start, pid, start_ticks(pid) if pid else 0)
        self._processes[spec.name] = Process(child, time.monotonic(), launcher, restarts=before.restarts if before else 0, added=added)

    # ------------------------------------------------------------------------------------------------ watching

    def _on_message(self, control: Endpoint, peer: str, message: Message) -> None:
        process = self._processes.get(peer.partition("@")[0])
        if process is None or process.child.spec.identity != peer or process.restart_at_s is not None:
            if isinstance(message, Register | Heartbeat):  # it was cut off and given up: whatever it has is issued again
                control.send(peer, Refused(reason="it was given up and replaced"))
            return
        process.heard_s, process.excused_s, received_s = time.monotonic(), 0.0, now_s()
        if isinstance(message, Register):
            process.registered, self._newcomers = message, True
            if process.leaving:  # told before, but on a connection that broke
                control.send(peer, Leave(reason=process.leaving))
            if process.role == "learner" and self._wanted_ranks != self.config.learner.ranks:
                control.send(peer, Leave(reason=self._ranks_why))
        elif isinstance(message, Heartbeat):
            process.heartbeat = message
            if message.progress != process.progress:
                process.progress, process.moved_s = message.progress, process.heard_s
            if not process.device and message.facts.get("device"):
                process.device = str(message.facts["device"])
                self._tell("on device", process=process.name, device=process.device)
            control.send(peer, ClockEcho(sent_s=message.sent_s, received_s=received_s, replied_s=now_s()))
        elif isinstance(message, Event):
            if not self._on_phase(message):
                return
            if message.name == "guard" and message.data.get("stop"):
                self.stop("failed", f"guard: {message.data['guard']} at iteration {message.data['iteration']}: {message.data['what']}")
            self.on_event(message)
        elif isinstance(message, Snapshot):
            self.view.snapshot = message.values
        elif isinstance(message, Finished):
            process.finished, process.error = True, message.error

    def _stop_when_done(self) -> None:
        """Dispatcher and learner have finished, and everyone knows a dashboard to send the last numbers to."""
        both = [self._processes.get(name) for name in ("dispatcher-0", "learner-0")]
        dashboard = self._processes.get("dashboard-0")
        if all(p and p.finished and not p.error for p in both) and (dashboard is None or dashboard.registered is not None):
            self.stop("done", "every iteration is done")

    def _introduce(self, control: Endpoint) -> None:
        known = [(p.registered, bool(p.leaving)) for p in self._processes.values() if p.registered is not None and p.restart_at_s is None]
        peers = Peers(
            peers=[
                {"role": r.role, "index": r.index, "identity": r.identity, "addresses": r.addresses, "leaving": leaving}
                for r, leaving in known
            ]
        )
        control.send_each((register.identity for register, _ in known), peers)

    def _stood_still(self, before_s: float) -> float:
        """A supervisor that did not run for a while (a busy machine, a stopped one) has heard nobody, which is nobody's silence. Gives now."""
        now = time.monotonic()
        if (lost_s := now - before_s) > LATE_S:
            for process in self._processes.values():
                process.excused_s += lost_s
        return now

    def _watch(self, control: Endpoint, ended: list[Process]) -> None:
        now, limits = time.monotonic(), self.config.deadlines
        for process in list(self._processes.values()):
            identity, code = process.child.spec.identity, process.child.exit_code()
            if process.restart_at_s is not None:
                continue
            beat = process.heartbeat
            if code is not None:
                if process in ended:
                    self._died(control, process, f"{identity} {process.child.how()}", code)
            elif not process.heard_s and now - process.started_s > limits.startup_s:
                self._died(control, process, f"{identity} gave no sign of life within {limits.startup_s:g} s of its start")
            elif self._door is not None and self._door.silent_s(process.launcher) > limits.heartbeat_s / 2:
                pass  # if its host falls silent, that is what has happened
            elif process.heard_s and now - process.heard_s > limits.heartbeat_s + min(process.excused_s, limits.heartbeat_s):
                doing = beat.doing if beat else "unknown"
                self._died(control, process, f"{identity} has been silent for {now - process.heard_s:.0f} s; it was last at: {doing}")
            elif beat and process.stuck_s > limits.busy_s:
                stuck = f"{identity} has been at {beat.doing!r} for {process.stuck_s:.0f} s without a result"
                self._died(control, process, f"{stuck} (deadlines.busy_s is {limits.busy_s:g})")
            elif process.leaving and now - process.leaving_since_s > limits.leave_s:
                self._died(
                    control, process, f"{identity} had not finished {limits.leave_s:g} s after it was told to leave (deadlines.leave_s)"
                )
            if self._ending is not None:
                return
        self._watch_stall()

    def _watch_stall(self) -> None:
        """Nothing useful happened in the whole ring for stall_s, the learner computes nothing and no generator starts its engine's server,
        which has a deadline of its own: say who does what and end."""
        beats = [p.heartbeat for p in self._processes.values() if p.child.spec.role != "dashboard" and p.heartbeat is not None]
        progress = sum(beat.progress for beat in beats)
        training = any(b.identity.startswith("learner") and not is_waiting(b.doing) for b in beats)
        starting = any(starts_server(p.heartbeat.facts, time.monotonic() - p.heard_s) for p in self._processes.values() if p.heartbeat)
        if progress != self._progress or training or starting or len(beats) < len(self._processes) - 1:
            self._progress, self._moved_s = progress, time.monotonic()
        elif time.monotonic() - self._moved_s > self.config.deadlines.stall_s:
            self.stop("failed", f"nothing has moved for {self.config.deadlines.stall_s:.0f} s: {'; '.join(map(in_words, beats))}")

    def _fail(self, process: Process, what: str, *, user_error: bool = False) -> None:
        if self._ending is None:
            error = process.error.removeprefix("user: ")
            reason = error if user_error and error else f"{what}: {error}" if error else what
            self._ending = Ending("failed", reason, process.name, user_error)

    # ------------------------------------------------------------------------------------------------ replacing

    def _died(self, control: Endpoint, process: Process, what: str, code: int | None = None) -> None:
        """A process ended or counts as hung: kill what is left of it, tell everyone, and either plan its return or end the run."""
        role = process.role
        if self._ending is None and process.leaving:
            self._left(control, process, what, code)
            return
        if self._ending is None and role == "learner" and self._wanted_ranks != self.config.learner.ranks and code not in (USER_ERROR, BUG):
            self._resize_learner(control, what)
            return
        if code == USER_ERROR and process.added and self._ending is None:
            self._gave_up(control, process, process.error.removeprefix("user: ") or what)
            return
        if code in (USER_ERROR, BUG) or (code == 0 and self._ending is not None):
            self._fail(process, what, user_error=code == USER_ERROR)
            return
        unit = "learner" if role == "learner" else process.name
        error = "" if process.error.startswith(GROUP_FAULTS) else process.error
        verdict = self._policy.died(unit, role, time.monotonic(), what, error)
        if isinstance(verdict, GiveUp) and process.added:
            self._gave_up(control, process, verdict.reason)
            return
        if isinstance(verdict, GiveUp):
            self._fail(process, verdict.reason)
            return
        together = [p for p in self._processes.values() if p.child.spec.role == "learner"] if role == "learner" else [process]
        for one in together:
            one.child.kill()
            one.restart_at_s, one.restarts = time.monotonic() + verdict.delay_s, one.restarts + 1
            one.registered = one.heartbeat = None
            one.finished = False
            if self._ledger is not None:
                spec = one.child.spec
                self._ledger.stopped(
                    spec.role, spec.index, spec.start, what if one is process else f"replaced with {process.child.spec.identity}"
                )
        log.warning("%s; it is started again in %.1f s", what, verdict.delay_s)
        record = {"name": process.name, "identity": process.child.spec.identity, "how": what, "time_s": time.time(), "error": process.error}
        self.view.restarts.append(record)
        self._tell("restart", **{k: v for k, v in record.items() if k not in ("time_s", "name")})
        self._introduce(control)

    def _restart_due(self, control: Endpoint) -> None:
        for process in list(self._processes.values()):
            if process.restart_at_s is not None and time.monotonic() >= process.restart_at_s and self._ending is None:
                self._start(process.role, process.child.spec.index, control.address, process.launcher, added=process.added)

    # ------------------------------------------------------------------------------------------------ hosts that come and go

    def _host_joined(self, control: Endpoint, host: Host) -> None:
        """A host is ready: give it what it came for."""
        if self._ending is not None:
            return
        for _ in range(host.count):
            used = {p.child.spec.index for p in self._processes.values() if p.role == host.role}
            [index] = newcomers(used, len(used), len(used) + 1)
            self._start(host.role, index, control.address, host, added=True)
        if host.count:
            self._tell("host joined", host=host.name, role=host.role, count=host.count)

    def _host_gone(self, control: Endpoint, host: Host) -> None:
        """A host left or is lost. What it brought along goes with it; what the run itself placed there is placed anew."""
        brought = [p for p in self._processes.values() if p.launcher is host]
        if host.count:
            self._tell("host gone", host=host.name, why=host.gone)
        for process in brought:
            process.leaving = process.leaving or host.gone
            self._left(control, process, host.gone, process.child.exit_code())

    def _new_token(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The join token, a new one if that is asked; or one for a single use."""
        if self._door is None:
            raise ConfigError(NO_DOOR)
        if options.get("rotate"):
            self._door.rotate()
        return {"token": self._door.once() if options.get("once") else self._door.token}

    # ------------------------------------------------------------------------------------------------ fleets that change

    def _scale(self, control: Endpoint, sizes: Mapping[str, Any], why: str) -> dict[str, Any]:
        """Let fleets have these sizes. Says what they had. Raises ConfigError for what cannot be."""
        before = sizes_of(self.config)
        config = resized(self.config, sizes)
        if self._ending is not None or self.view.finishing:
            raise ConfigError(f"the run is ending: {self._ending.reason if self._ending else 'its last iteration is done'}")
        changed = {fleet: count for fleet, count in sizes_of(config).items() if count != before[fleet]}
        config = resized(config, {"learner": before["learner"]})  # until the group has left at a commit
        coming, going = list[tuple[str, int]](), list[tuple[str, list[Process]]]()
        for fleet, count in changed.items():
            if fleet == "learner":
                continue
            role = FLEETS[fleet][0]
            of_role = {p.child.spec.index: p for p in self._processes.values() if p.role == role}
            staying = [index for index, p in of_role.items() if p.launcher is self._launcher and not p.leaving]
            coming += [(role, index) for index in newcomers(of_role, len(staying), count)]
            going.append((f"{fleet} are scaled to {count}", [of_role[index] for index in leavers(staying, count)]))
        self._launcher.reserve(config, coming, self._door, live=True)  # refused here, nothing has changed
        self._take_config(config)
        for fleet, count in changed.items():
            self._book.resized(fleet, count, self._epoch, why)
            self._tell("scale", fleet=fleet, before=before[fleet], count=count, why=why)
        for role, index in coming:
            self._start(role, index, control.address, added=True)
        for reason, processes_ in going:
            self._leave(control, processes_, reason)
        if "learner" in sizes:  # as large as it is already: a change that has not happened yet is taken back
            self._wanted_ranks, self._ranks_why = int(sizes["learner"]), f"the learner group shall have {sizes['learner']} ranks"
        if "learner" in changed:
            control.send(self._processes["learner-0"].child.spec.identity, Leave(reason=self._ranks_why))
        return {fleet: {"before": before[fleet], "count": int(sizes[fleet])} for fleet in sizes}

    def _take_config(self, config: RunConfig) -> None:
        """From now on this is the run's configuration, also for processes that start and for a resume."""
        self.config = self.view.config = config
        write_atomically(self.run_dir.path / "config.yaml", dump_config(config))

    def _leave(self, control: Endpoint, leaving: Sequence[Process], why: str) -> None:
        """Let these finish what they have and go. Everyone is told first, so that nothing new is sent to them."""
        for process in leaving:
            process.leaving, process.leaving_since_s = why, time.monotonic()
        self._introduce(control)
        for process in leaving:
            if process.registered is None:  # it is not there yet, or dead: nobody has given it anything that a death does not give back
                self._left(control, process, "it had not begun", None)
            else:
                control.send(process.child.spec.identity, Leave(reason=why))

    def _left(self, control: Endpoint, process: Process, what: str, code: int | None) -> None:
        """A process that was leaving is gone, in order or not: what it still had is issued again. It is not replaced."""
        spec = process.child.spec
        process.child.kill()
        how = "left in order" if code == 0 else f"left, not in order: {what}"
        if process.restart_at_s is None:
            self._book.stopped(spec.role, spec.index, spec.start, how)
        del self._processes[process.name]
        process.launcher.release(spec.role, spec.index)
        self._tell("left", process=process.name, how=how, why=process.leaving)
        self._introduce(control)

    def _gave_up(self, control: Endpoint, process: Process, reason: str) -> None:
        """An actor that was added cannot live here: the fleet is as large as it can be."""
        log.warning("%s was added and is given up: %s", process.name, reason)
        process.leaving = process.leaving or reason
        of_launcher = process.launcher is self._launcher
        self._left(control, process, reason, USER_ERROR)
        fleet = next((name for name, (role, _) in FLEETS.items() if role == process.role), "")
        if of_launcher and fleet and (count := sizes_of(self.config)[fleet]) > 1:
            self._take_config(resized(self.config, {fleet: count - 1}))
            self._book.resized(fleet, count - 1, self._epoch, f"{process.name}: {reason}")

    def _resize_learner(self, control: Endpoint, what: str) -> None:
        """The learner group has ended, at a commit if all went well: another of the wanted size goes on from there."""
        group = [p for p in self._processes.values() if p.role == "learner"]
        for process in group:
            spec = process.child.spec
            process.child.kill()
            if process.restart_at_s is None:
                self._book.stopped(spec.role, spec.index, spec.start, self._ranks_why)
            del self._processes[process.name]
        self._introduce(control)
        for process in group:
            process.launcher.release("learner", process.child.spec.index)
        config = resized(self.config, {"learner": self._wanted_ranks})
        try:
            self._launcher.reserve(config, [("learner", index) for index in range(self._wanted_ranks)], self._door, live=True)
        except ConfigError as error:
            log.warning("the learner group keeps its %d ranks: %s", len(group), error)
            self._wanted_ranks, config = len(group), self.config
            self._launcher.reserve(config, [("learner", index) for index in range(len(group))], self._door)
        self._take_config(config)
        self._tell("learner resized", before=len(group), count=self._wanted_ranks, how=what)
        for index in range(self._wanted_ranks):
            self._start("learner", index, control.address)

    def _follow_queue(self, control: Endpoint) -> None:
        """Add or remove reward actors by what waits to be scored, within the configured limits."""
        rule = self._queue_rule
        if rule is None or self._ending is not None or self.view.finishing or time.monotonic() < self._next_status_s:
            return
        facts = [(p.role, p.heartbeat.facts) for p in self._processes.values() if p.heartbeat is not None and not p.leaving]
        waiting = sum(int(found.get("outbox", 0)) for role, found in facts if role == "generator")
        taken = sum(int(found.get("active", 0)) for role, found in facts if role == "rewarder")
        count = self.config.rewarders.count
        busy = min(taken, count * rule.concurrency)
        wanted = rule.wanted(count, waiting + taken - busy, busy, time.monotonic())
        if wanted != count:
            why = (
                f"{waiting + taken - busy} completions waited" if wanted > count else f"{busy} of {count * rule.concurrency} places in use"
            )
            try:
                self._scale(control, {"rewarders": wanted}, f"by itself: {why}")
            except ConfigError as error:  # no room for more: as many as there are go on
                log.warning("reward actors stay at %d: %s", count, error)

    # ------------------------------------------------------------------------------------------------ showing

    def _on_phase(self, event: Event) -> bool:
        """Wall and CPU time between the events that part a run. False for an event that a process told again after a restart."""
        if event.name == "eval":  # told again by a dispatcher that came back
            if event.data in self.view.evaluations:
                return False
            others = [known for known in self.view.evaluations if known["version"] != event.data["version"]]
            self.view.evaluations[:] = sorted([*others, event.data], key=lambda result: int(result["version"]))
        elif event.name == "training started" and self.view.training_since_s is None:
            self.view.training_since_s = event.time_s
        self.view.finishing = self.view.finishing or event.name == "training ended"
        following = {"training started": "training", "training ended": "final evaluation and end"}.get(event.name)
        if following and following in (self._phase, *(phase.name for phase in self.view.phases)):
            return False
        if following:
            self._next_phase(following)
        return True

    def _next_phase(self, name: str) -> None:
        now, cpu = time.monotonic(), cpu_seconds({p.pid for p in self._processes.values() if p.pid})
        self.view.phases.append(Phase(self._phase, now - self._mark_s, cpu - self._mark_cpu_s))
        self._mark_s, self._mark_cpu_s, self._phase = now, cpu, name

    def _tick(self) -> None:
        self._write_status()
        self.on_tick()

    def _write_status(self) -> None:
        """Every STATUS_S, also while the run ends."""
        if time.monotonic() < self._next_status_s:
            return
        self._next_status_s = time.monotonic() + STATUS_S
        self._states = self._observer.states(self._processes.values())
        self._watch_movement()
        self.view.status = self.status()
        for process in self._processes.values():
            for path in (process.child.log_path, process.child.log_path.with_name(f"{process.name}-server.log")):
                bound(path, self.config.observe.log_mb * 1e6)
        self._write("status.json", json.dumps(self.view.status))  # indented JSON is encoded in Python, slowly

    def _write(self, name: str, text: str) -> None:
        """A file that tells of the run. A full disk ends no run by that: what the run itself needs says so on its own."""
        try:
            write_atomically(self.run_dir.path / name, text)
            self._unwritten.discard(name)
        except OSError as error:
            if name not in self._unwritten:
                self._unwritten.add(name)
                log.warning("%s cannot be written (%s); it is tried again", self.run_dir.path / name, error.strerror)

    def _watch_movement(self) -> None:
        """Once nothing has moved for `quiet_s`, say who waits for whom; say so too when it goes on."""
        stalled = self._ending is None and nothing_moves(self._states, self.config.deadlines.quiet_s)
        if stalled and not self._stalled:
            self._tell("stalled", for_s=self.config.deadlines.quiet_s, why=self._explain().sentence)
        elif self._stalled and not stalled and self._ending is None:
            self._tell("moving again")
        self._stalled = stalled

    def _tell(self, name: str, **data: Any) -> None:
        """An event of the supervisor's own: shown, and appended to metrics.jsonl beside those that the dashboard writes."""
        event = Event(identity="supervisor", time_s=time.time(), name=name, data=data)
        try:
            with open_lines(self.run_dir.path / "metrics.jsonl") as file:
                file.write(json.dumps({"time_s": event.time_s, "identity": event.identity, "event": name, **data}) + "\n")
        except OSError as error:
            log.warning("metrics.jsonl lacks the event %r (%s)", name, error.strerror)
        self.on_event(event)

    def _explain(self) -> Explanation:
        return explain(self._states, limits(self.config), now_s())

    def status(self) -> dict[str, Any]:
        """The state of the run as plain data: what `rlsys status --json` prints."""
        states = {state.name: state for state in self._states}
        now = time.time()
        return {
            "run_dir": str(self.run_dir.path),
            "run_id": self._run_id,
            "pid": os.getpid(),
            "state": "running" if self._ending is None else "ending",
            "reason": self._ending.reason if self._ending else "",
            "tensorboard": self.view.tensorboard,
            "time_s": now,
            "since_s": self.view.started_s,
            "training_since_s": self.view.training_since_s,
            **self.view.snapshot,
            "epoch": self._epoch,
            "evaluations": self.view.evaluations,
            "restarts": self.view.restarts,
            "limits": asdict(limits(self.config)),
            "fleets": self._fleets(),
            "stalled": self._stalled,
            "why": self._explain().sentence,
            "processes": [
                {
                    "pid": p.child.pid,
                    "identity": p.child.spec.identity,
                    "restarts": p.restarts,
                    "progress": p.heartbeat.progress if p.heartbeat else 0,
                    **to_data(states.get(p.name, ProcessState(name=p.name, registered=False))),
                    "addresses": p.registered.addresses if p.registered else {},
                    "host": p.child.host,
                    "leaving": p.leaving,
                }
                for p in self._processes.values()
            ],
        }

    def _fleets(self) -> dict[str, dict[str, int]]:
        """How many of each fleet are there, how many shall be, and how many of those who are there leave."""
        wanted = sizes_of(self.config) | {"learner": self._wanted_ranks}
        found = {}
        for fleet, (role, _) in FLEETS.items():
            there = [p for p in self._processes.values() if p.role == role]
            joined = sum(p.launcher is not self._launcher for p in there)
            leaving = sum(bool(p.leaving) for p in there)
            found[fleet] = {"count": len(there) - leaving, "wanted": wanted[fleet] + joined, "leaving": leaving, "joined": joined}
        return found

    # ------------------------------------------------------------------------------------------------ ending

    def _end(self, control: Endpoint | None) -> None:
        """Ask, the dashboard last, then terminate, then kill: all within shutdown_s. A second Ctrl-C changes nothing."""
        old = signal.signal(signal.SIGINT, signal.SIG_IGN)
        ending = self._ending or Ending("failed", "the supervisor broke")
        if self._processes:
            self._next_phase("")
        try:
            self._end_processes(control, ending)
        finally:
            exit_record = {
                "outcome": ending.outcome,
                "exit_code": ending.exit_code,
                "reason": ending.reason,
                "role": ending.role,
                "started_s": self.view.started_s,
                "ended_s": time.time(),
                "phases": [{"name": p.name, "wall_s": round(p.wall_s, 3), "cpu_s": round(p.cpu_s, 3)} for p in self.view.phases],
                "epoch": self._epoch,
                "evaluations": self.view.evaluations,
                "restarts": self.view.restarts,
                "iterations": self.config.iterations,
                "iterations_done": self.config.iterations if ending.outcome == "done" else self.view.snapshot.get("iteration", 0),
            }
            over = {"state": ending.outcome, "processes": [], "queues": {}, "now": {}, "memory": {}, "prometheus": "", "tensorboard": ""}
            self._write("status.json", json.dumps(self.status() | over, indent=1))
            self._write("exit.json", json.dumps(exit_record, indent=1) + "\n")
            (self.run_dir.path / "keys.json").unlink(missing_ok=True)
            for hold in self._holds:
                hold.remove()
            if self._weights_dir is not None:
                shutil.rmtree(self._weights_dir, ignore_errors=True)
            sweep()
            if self.config.weights.cache is not None:
                sweep(self.config.weights.cache)
            if self._door is not None:
                self._door.close(ending.reason or ending.outcome)
            self._launcher.close()
            if self._transport is not None:
                self._transport.close()
            if self._ledger is not None:
                self._ledger.close()
            self.run_dir.release()
            signal.signal(signal.SIGINT, old)

    def _end_processes(self, control: Endpoint | None, ending: Ending) -> None:
        deadline = time.monotonic() + self.config.deadlines.shutdown_s
        terminate_at = deadline - self.config.deadlines.shutdown_s * 0.4
        kill_at = deadline - self.config.deadlines.shutdown_s * 0.15
        told: set[str] = set()
        while alive := {p.role for p in self._processes.values() if p.child.exit_code() is None}:
            stays = (
                "" if alive == {"dashboard"} or time.monotonic() > terminate_at else "dashboard"
            )  # it hears the last words of all others
            if self._door is not None:
                self._door.turn()
            self._launcher.turn()
            if control is not None:
                for peer, message in control.receive():  # also those that register only now must hear of the end
                    self._note(peer, message)
                    if isinstance(message, Register | Heartbeat) and peer not in told and peer.rpartition("-")[0] != stays:
                        told.add(peer)
                        control.send(peer, Stop(reason=ending.reason or ending.outcome))
                for identity in {p.child.spec.identity for p in self._processes.values() if p.role != stays} - told:
                    if control.send(identity, Stop(reason=ending.reason or ending.outcome)):
                        told.add(identity)
            self._write_status()
            now = time.monotonic()
            for process in self._processes.values():
                if process.child.exit_code() is None and now > terminate_at:
                    process.child.signal_group(signal.SIGKILL if now > kill_at else signal.SIGTERM)
            if now > deadline + 5.0:
                raise RuntimeError(
                    "processes outlived SIGKILL: " + ", ".join(i for i, p in self._processes.items() if p.child.exit_code() is None)
                )
            time.sleep(0.05)
        for process in self._processes.values():
            if self._ledger is not None and process.restart_at_s is None:
                spec, code = process.child.spec, process.child.exit_code()
                self._ledger.stopped(spec.role, spec.index, spec.start, process.child.how() if code else "ended with the run")
        if control is not None:
            for peer, message in control.receive():
                self._note(peer, message)

    def _note(self, peer: str, message: Message) -> None:
        """What still counts while the run ends: who lives, and the last numbers."""
        process = self._processes.get(peer.partition("@")[0])
        if process is not None and process.child.spec.identity == peer:
            process.heard_s = time.monotonic()
            if isinstance(message, Heartbeat):
                process.heartbeat = message
        if isinstance(message, Snapshot):
            self.view.snapshot = message.values


NO_DOOR = (
    "the run's sockets are files of this host (transport.kind is ipc), so no other host can join: start it, or resume it, with "
    "--set transport.kind=tcp --set transport.host=ADDRESS, an address of this host that the others reach"
)
GROUP_FAULTS = ("InfrastructureFault", "DeadlineExceeded")
"""Errors that tell of another process's death rather than of a fault that would come again."""


def in_words(beat: Heartbeat) -> str:
    """What a process does: "learner-0 waits 41 s for trajectories from rewarder (3 groups of iteration 7)"."""
    name, seconds = beat.identity.partition("@")[0], max(0.0, time.time() - beat.since_s)
    detail = f" ({beat.detail})" if beat.detail else ""
    if not is_waiting(beat.doing):
        return f"{name} has been at {beat.doing!r} for {seconds:.0f} s{detail}"
    return f"{name} waits {seconds:.0f} s for {beat.doing.removeprefix('waiting:')} from {beat.peer}{detail}"
