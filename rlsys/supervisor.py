"""The supervisor (`rlsys up`): starts every process, introduces them to each other, watches them, and ends them all.

    every process --Register, Heartbeat, Finished, Event--> [ supervisor ] --Peers, Stop--> every process
    dashboard --Snapshot--> [ supervisor ] --> progress on the terminal, status.json, exit.json

A process that dies or falls silent is killed with its whole group, fenced off in the ledger, and started again (all ranks of the learner
together), with a pause that grows; rlsys/restarts.py says when that ends. The run ends when dispatcher and learner have finished, when it is
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from protocol.channels import Endpoint, Keys, Poller, Transport
from protocol.clock import now_s
from protocol.intervals import is_waiting
from protocol.ledger import Ledger
from protocol.messages import ClockEcho, Event, Finished, Heartbeat, Message, Peers, Register, Snapshot, Stop
from protocol.node import ProcessSpec
from rlsys.config import RunConfig
from rlsys.launchers.local import Child, cpu_seconds, end_leftover, start_ticks
from rlsys.logs import bound
from rlsys.restarts import GiveUp, RestartPolicy
from rlsys.roles import BUG, USER_ERROR, WEIGHTS_DIR
from rlsys.rundir import RunDir, check_room, choose_weights_dir, make_scratch_dir, read_json, write_atomically
from rlsys.states import Observer, limits, to_data
from rlsys.topology import processes
from rlsys.waits import Explanation, ProcessState, explain, nothing_moves

log = logging.getLogger("rlsys.supervisor")

STATUS_S = 1.0
"""How often status.json is written."""


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

    child: Child
    started_s: float
    registered: Register | None = None
    heartbeat: Heartbeat | None = None
    heard_s: float = 0.0
    progress: int = -1
    """What it said last that it has done."""
    moved_s: float = 0.0
    """When that number changed."""
    finished: bool = False
    error: str = ""
    restart_at_s: float | None = None
    """It is dead and comes back then."""
    restarts: int = 0
    device: str = ""
    """What it samples or trains on, as it says itself."""

    @property
    def name(self) -> str:
        return self.child.spec.name

    @property
    def pid(self) -> int:
        return self.child.pid

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
    status: dict[str, Any] = field(default_factory=dict)
    """What status.json holds; made anew every second."""


class Supervisor:
    """One run. `run` returns how it ended; `stop` may be called from a signal handler."""

    def __init__(self, config: RunConfig, run_dir: RunDir, *, resume: bool = False) -> None:
        self.config, self.run_dir, self._resume = config, run_dir, resume
        self.view = View(config, run_dir.path)
        self.on_event: Callable[[Event], object] = lambda event: None
        self.on_tick: Callable[[], object] = lambda: None
        self._processes = self.view.processes
        self._ending: Ending | None = None
        self._next_status_s = 0.0
        self._observer, self._states = Observer(), list[ProcessState]()
        self._stalled = False
        self._progress, self._moved_s = -1, time.monotonic()
        self._mark_s, self._mark_cpu_s, self._phase = time.monotonic(), 0.0, "start-up"
        self._run_id = secrets.token_hex(8)
        self._epoch = 1
        self._ledger: Ledger | None = None
        self._policy = RestartPolicy(config.restarts)
        self._unwritten = set[str]()
        self._scratch: Path | None = None
        self._weights_dir: Path | None = None
        self._transport: Transport | None = None

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
            poller.add(control)
            for role, index in processes(self.config):
                self._start(role, index, control.address)
            while self._ending is None:
                poller.wait(0.1)
                alive = [process for process in self._processes.values() if process.restart_at_s is None]
                ended = [process for process in alive if process.child.exit_code() is not None]
                for peer, message in control.receive():  # after looking who ended, so that the last words of the dead are heard first
                    self._on_message(control, peer, message)
                self._watch(control, ended)
                self._restart_due(control)
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
        self._weights_dir = choose_weights_dir(config, path, f"{self._run_id}-{self._epoch}" if self._resume else self._run_id)
        check_room(self._weights_dir, config)
        (path / WEIGHTS_DIR).write_text(str(self._weights_dir))
        self._scratch = make_scratch_dir(self._run_id)
        for key, value in (("run_id", self._run_id), ("epoch", self._epoch), ("scratch", self._scratch), ("weights", self._weights_dir)):
            self._ledger.put(key, str(value))
        keys = None
        if config.transport.kind == "tcp":
            keys = Keys.make()
            (path / "keys.json").unlink(missing_ok=True)
            fd = os.open(path / "keys.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump({"public": keys.public.decode(), "secret": keys.secret.decode()}, file)
        self._transport = Transport(int(self._run_id, 16), None if keys else self._scratch, config.transport.host, keys)
        return Endpoint(self._transport, "control", "control")

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

    def _start(self, role: str, index: int, control: str) -> None:
        assert self._ledger is not None
        start = self._ledger.next_start(role, index, self._epoch)
        spec = ProcessSpec(
            run_id=self._run_id,
            epoch=self._epoch,
            role=role,
            index=index,
            start=start,
            run_dir=str(self.run_dir.path),
            control=control,
            socket_dir=str(self._scratch) if self.config.transport.kind == "ipc" else "",
            host=self.config.transport.host,
        )
        threads = {"learner": self.config.learner.threads, "generator": self.config.generators.threads}.get(role, 1)
        environment = {"OMP_NUM_THREADS": str(threads), "TMPDIR": str(self._scratch)}
        before = self._processes.get(spec.name)
        child = Child(spec, self.run_dir.logs / f"{spec.name}.log", environment)
        self._ledger.started(role, index, start, child.pid, start_ticks(child.pid))
        self._processes[spec.name] = Process(child, time.monotonic(), restarts=before.restarts if before else 0)

    # ------------------------------------------------------------------------------------------------ watching

    def _on_message(self, control: Endpoint, peer: str, message: Message) -> None:
        process = self._processes.get(peer.partition("@")[0])
        if process is None or process.child.spec.identity != peer or process.restart_at_s is not None:
            return
        process.heard_s, received_s = time.monotonic(), now_s()
        if isinstance(message, Register):
            process.registered = message
            self._introduce(control)
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
            if all(self._processes[name].finished for name in ("dispatcher-0", "learner-0")) and not message.error:
                self.stop("done", "every iteration is done")

    def _introduce(self, control: Endpoint) -> None:
        known = [p.registered for p in self._processes.values() if p.registered is not None and p.restart_at_s is None]
        peers = Peers(peers=[{"role": r.role, "index": r.index, "identity": r.identity, "addresses": r.addresses} for r in known])
        for register in known:
            control.send(register.identity, peers)

    def _watch(self, control: Endpoint, ended: list[Process]) -> None:
        now, limits = time.monotonic(), self.config.deadlines
        for process in list(self._processes.values()):
            identity, code = process.child.spec.identity, process.child.exit_code()
            if process.restart_at_s is not None:
                continue
            beat = process.heartbeat
            if code is not None:
                if process in ended:
                    self._died(control, process, f"{identity} {_how(code)}", code)
            elif not process.heard_s and now - process.started_s > limits.startup_s:
                self._died(control, process, f"{identity} gave no sign of life within {limits.startup_s:g} s of its start")
            elif process.heard_s and now - process.heard_s > limits.heartbeat_s:
                doing = beat.doing if beat else "unknown"
                self._died(control, process, f"{identity} has been silent for {now - process.heard_s:.0f} s; it was last at: {doing}")
            elif beat and process.stuck_s > limits.busy_s:
                stuck = f"{identity} has been at {beat.doing!r} for {process.stuck_s:.0f} s without a result"
                self._died(control, process, f"{stuck} (deadlines.busy_s is {limits.busy_s:g})")
            if self._ending is not None:
                return
        self._watch_stall()

    def _watch_stall(self) -> None:
        """Nothing useful happened in the whole ring for stall_s, and the learner computes nothing: say who does what and end."""
        beats = [p.heartbeat for p in self._processes.values() if p.child.spec.role != "dashboard" and p.heartbeat is not None]
        progress = sum(beat.progress for beat in beats)
        training = any(b.identity.startswith("learner") and not is_waiting(b.doing) for b in beats)
        if progress != self._progress or training or len(beats) < len(self._processes) - 1:
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
        role = process.child.spec.role
        if code in (USER_ERROR, BUG) or (code == 0 and self._ending is not None):
            self._fail(process, what, user_error=code == USER_ERROR)
            return
        unit = "learner" if role == "learner" else process.name
        error = "" if process.error.startswith(GROUP_FAULTS) else process.error
        verdict = self._policy.died(unit, role, time.monotonic(), what, error)
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
                self._start(process.child.spec.role, process.child.spec.index, control.address)

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
        following = {"training started": "training", "training ended": "final evaluation and end"}.get(event.name)
        if following and following in (self._phase, *(phase.name for phase in self.view.phases)):
            return False
        if following:
            self._next_phase(following)
        return True

    def _next_phase(self, name: str) -> None:
        now, cpu = time.monotonic(), cpu_seconds({p.child.pid for p in self._processes.values()})
        self.view.phases.append(Phase(self._phase, now - self._mark_s, cpu - self._mark_cpu_s))
        self._mark_s, self._mark_cpu_s, self._phase = now, cpu, name

    def _tick(self) -> None:
        if time.monotonic() >= self._next_status_s:
            self._next_status_s = time.monotonic() + STATUS_S
            self._states = self._observer.states(self._processes.values())
            self._watch_movement()
            self.view.status = self.status()
            for process in self._processes.values():
                bound(process.child.log_path, self.config.observe.log_mb * 1e6)
            self._write("status.json", json.dumps(self.view.status))  # indented JSON is encoded in Python, slowly
        self.on_tick()

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
            with (self.run_dir.path / "metrics.jsonl").open("a") as file:
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
            "state": "running" if self._ending is None else self._ending.outcome,
            "time_s": now,
            "since_s": self.view.started_s,
            "training_since_s": self.view.training_since_s,
            **self.view.snapshot,
            "epoch": self._epoch,
            "evaluations": self.view.evaluations,
            "restarts": self.view.restarts,
            "limits": asdict(limits(self.config)),
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
                }
                for p in self._processes.values()
            ],
        }

    # ------------------------------------------------------------------------------------------------ ending

    def _end(self, control: Endpoint | None) -> None:
        """Ask, then terminate, then kill: all within shutdown_s. A second Ctrl-C changes nothing."""
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
            self._write("status.json", json.dumps(self.status() | {"processes": []}, indent=1))
            self._write("exit.json", json.dumps(exit_record, indent=1) + "\n")
            (self.run_dir.path / "keys.json").unlink(missing_ok=True)
            for directory in (self._scratch, self._weights_dir):
                if directory is not None:
                    shutil.rmtree(directory, ignore_errors=True)
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
        while any(p.child.exit_code() is None for p in self._processes.values()):
            if control is not None:
                for peer, message in control.receive():  # also those that register only now must hear of the end
                    if isinstance(message, Snapshot):
                        self.view.snapshot = message.values
                    elif isinstance(message, Register | Heartbeat) and peer not in told:
                        told.add(peer)
                        control.send(peer, Stop(reason=ending.reason or ending.outcome))
                for identity in {p.child.spec.identity for p in self._processes.values()} - told:
                    if control.send(identity, Stop(reason=ending.reason or ending.outcome)):
                        told.add(identity)
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
                self._ledger.stopped(spec.role, spec.index, spec.start, _how(code) if code else "ended with the run")
        if control is not None:
            for _, message in control.receive():
                if isinstance(message, Snapshot):
                    self.view.snapshot = message.values


GROUP_FAULTS = ("InfrastructureFault", "DeadlineExceeded")
"""Errors that tell of another process's death rather than of a fault that would come again."""


def in_words(beat: Heartbeat) -> str:
    """What a process does: "learner-0 waits 41 s for trajectories from rewarder (3 groups of iteration 7)"."""
    name, seconds = beat.identity.partition("@")[0], max(0.0, time.time() - beat.since_s)
    detail = f" ({beat.detail})" if beat.detail else ""
    if not is_waiting(beat.doing):
        return f"{name} has been at {beat.doing!r} for {seconds:.0f} s{detail}"
    return f"{name} waits {seconds:.0f} s for {beat.doing.removeprefix('waiting:')} from {beat.peer}{detail}"


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}" if code else "ended before the run did"
