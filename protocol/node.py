"""What every process of a run does besides its own work: register, find its peers, say that it lives, show what it waits for, stop.

    supervisor --Peers, Leave, Stop--> [ Node ] --Register, Heartbeat, Finished, Event--> supervisor
                                          |------Metrics, Intervals, Event-------------> dashboard

A process builds a Node, binds its channels with `serve`, names the channels it wants with `join`, calls `start`, and then
calls `poll` in its loop. `poll` raises RunEnded when the supervisor says stop, so that no wait outlives the run.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.channels import CHANNELS, Endpoint, Keys, Link, Poller, Transport, Waker
from protocol.clock import Alignment, now_s
from protocol.errors import RunEnded
from protocol.intervals import Recorder, record_here
from protocol.messages import ClockEcho, Event, Finished, Heartbeat, Leave, Message, Metrics, Peers, Refused, Register, Stop

log = logging.getLogger("rlsys.node")

HEARTBEAT_S = 0.5
"""How often a process says that it lives. Costs about 0.1 % of a core."""
UNOBSERVED = 1000
"""Most observations that are kept while there is no dashboard: one that is slow to start misses none of a run's first iterations."""
FLUSH_BEATS = 2
"""Heartbeats between two flushes of what it recorded: a message for each of its tracks, which is most of what recording costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """Who a process is. The supervisor hands it over as one JSON argument; `keys_file` is read, never passed."""

    run_id: str
    """16 hexadecimal digits."""
    epoch: int
    role: str
    index: int
    start: int
    """Counts the starts of this role and index, from 1."""
    run_dir: str
    control: str
    """Address of the supervisor's control channel."""
    socket_dir: str = ""
    """For ipc; empty for tcp."""
    host: str = "127.0.0.1"
    """What tcp sockets are bound to: an address of the host that the process runs on."""
    place: int = -1
    """Which of its role's processes on its host it is, where that decides its device; -1 where `index` does."""
    weights_dir: str = ""
    """Where this process finds published versions, if not where the learner says."""

    @property
    def identity(self) -> str:
        """Unique per start: "generator-0@1"."""
        return f"{self.role}-{self.index}@{self.start}"

    @property
    def name(self) -> str:
        """Stable over restarts: "generator-0"."""
        return f"{self.role}-{self.index}"

    def transport(self) -> Transport:
        """How this process binds and connects."""
        keys_file = Path(self.run_dir) / "keys.json"
        keys = Keys(*(json.loads(keys_file.read_text())[k].encode() for k in ("public", "secret"))) if keys_file.exists() else None
        return Transport(int(self.run_id, 16), Path(self.socket_dir) if self.socket_dir else None, self.host, keys, epoch=self.epoch)


class Node:
    """The process's end of every channel. One thread owns it; `wake`, `tell`, `event`, `finished` and `stop` may be called from others."""

    def __init__(self, spec: ProcessSpec, recorder: Recorder | None = None) -> None:
        self.spec = spec
        self.identity = spec.identity
        self.recorder = recorder or Recorder(spec.identity)
        record_here(self.recorder)
        self._tracks: list[Recorder] = []
        self.clock = Alignment()
        self.transport = spec.transport()
        self.gauges: Callable[[], Mapping[str, float]] = dict
        """Called at each flush: numbers of this moment, for the dashboard."""
        self.progress: Callable[[], int] = int
        """Called at each heartbeat: a count that grows with every useful thing done."""
        self.facts: Callable[[], dict[str, Any]] = dict
        """Called at each heartbeat: what of the ring's work is here, for `rlsys why`; see rlsys/waits.py."""
        self._stop_reason: str | None = None
        self.leaving = ""
        """Why this process shall take nothing new, finish what it has and end; empty while it shall stay. Any thread may read it."""
        self.leavers: frozenset[str] = frozenset()
        """Who finishes what it has and then leaves: nobody sends them anything new."""
        self._waker = Waker()
        self._poller = Poller()
        self._poller.add(self._waker)
        self._control = Link(self.transport, "control", self.identity, spec.control, "supervisor")
        self._poller.add(self._control)
        self._served: dict[str, Endpoint] = {}
        self._links: dict[str, dict[str, Link]] = {}
        self._on_link: dict[str, Callable[[Link], None]] = {}
        self._on_gone: dict[str, Callable[[str], None]] = {}
        self._on_connector_gone: dict[str, Callable[[str], None]] = {}
        self._outbox: deque[Message] = deque()
        self._unobserved: deque[Message] = deque(maxlen=UNOBSERVED)
        self._published: dict[str, str] = {}
        self._peers: list[dict[str, Any]] = []
        self._next_beat_s = 0.0
        self._register: Register | None = None
        self._beats = 0
        self.observations_lost = 0
        self.closed = False
        self.join("observe")

    def serve(self, channel: str, on_gone: Callable[[str], None] | None = None) -> Endpoint:
        """Bind a channel. Its address is published by `start`; `on_gone` is called with the identity of each connecting process that died."""
        if on_gone:
            self._on_connector_gone[channel] = on_gone
        endpoint = Endpoint(self.transport, channel, f"{self.spec.name}.{self.spec.start}.{channel}")
        self._served[channel] = endpoint
        self._poller.add(endpoint)
        return endpoint

    def join(
        self, channel: str, on_link: Callable[[Link], None] | None = None, on_gone: Callable[[str], None] | None = None
    ) -> dict[str, Link]:
        """Connect to every process that serves `channel`, now and later. Returns the live map identity -> link.

        `on_link` is called with each new link (to say Hello), `on_gone` with the identity of each that went.
        """
        if on_link:
            self._on_link[channel] = on_link
        if on_gone:
            self._on_gone[channel] = on_gone
        return self._links.setdefault(channel, {})

    def publish_address(self, name: str, address: str) -> None:
        """Publish, with `start`, an address that is no channel of ours (the meeting point of the learner's ranks)."""
        self._published[name] = address

    def identities_of(self, *roles: str) -> set[str]:
        """Who lives in these roles, as far as the supervisor has told."""
        return {p["identity"] for p in self._peers if p["role"] in roles}

    def addresses_of(self, name: str) -> dict[str, str]:
        """Addresses published under `name`: "role-index" -> address."""
        return {f"{p['role']}-{p['index']}": p["addresses"][name] for p in self._peers if name in p["addresses"]}

    def peers_with(self, name: str) -> dict[str, dict[str, str]]:
        """Who published an address under `name`: identity -> all its addresses. From any thread."""
        return {p["identity"]: p["addresses"] for p in self._peers if name in p["addresses"]}

    def start(self) -> None:
        """Register with the supervisor; Peers follow."""
        addresses = {channel: endpoint.address for channel, endpoint in self._served.items()} | self._published
        spec = self.spec
        self._register = Register(role=spec.role, index=spec.index, identity=self.identity, pid=os.getpid(), addresses=addresses)
        self._control.send(self._register)
        self.beat()

    def track(self, name: str, first: str = "starting") -> Recorder:
        """A recorder for another thread of this process; what it records goes out with each heartbeat."""
        recorder = Recorder(self.identity, first, track=name, keep=self.recorder.keep)
        self._tracks.append(recorder)
        return recorder

    def poll(self, timeout_s: float) -> None:
        """Wait until something arrives, at most `timeout_s`, and do the housekeeping. Raises RunEnded once the run stops."""
        now = time.monotonic()
        self._poller.wait(min(timeout_s, max(0.0, self._next_beat_s - now)))
        self._waker.clear()
        for message in self._control.receive():
            self._handle(message)
        if time.monotonic() >= self._next_beat_s:
            self.beat()
        if self._stop_reason is not None:
            raise RunEnded(self._stop_reason)

    def watch(self, fd: int) -> None:
        """Let `poll` also wake when a file descriptor can be read."""
        self._poller.add(fd)

    def wake(self) -> None:
        """End the present or the next poll; from any thread."""
        self._waker.wake()

    def stop(self, reason: str) -> None:
        """Make the next poll raise RunEnded; from any thread or a signal handler."""
        self._stop_reason = self._stop_reason or reason
        self._waker.wake()

    @property
    def stopping(self) -> bool:
        return self._stop_reason is not None

    def event(self, name: str, **data: Any) -> None:
        """Tell supervisor and dashboard of something worth a line; from any thread."""
        self.tell(Event(identity=self.identity, time_s=time.time(), name=name, data=data))

    def metrics(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers of one iteration, or of this moment (iteration -1), to the dashboard."""
        self.observe(
            Metrics(identity=self.identity, iteration=iteration, time_s=time.time(), values={k: float(v) for k, v in values.items()})
        )

    def observe(self, message: Message) -> None:
        """Send an observation to the dashboard; while there is none yet, or none any more, keep the newest for it. Or count it as lost."""
        if not self._links["observe"]:
            self.observations_lost += len(self._unobserved) == UNOBSERVED
            self._unobserved.append(message)
        for link in self._links["observe"].values():
            self.observations_lost += not link.send(message)

    def tell(self, message: Message) -> None:
        """Send the supervisor a message of the control channel, after those told before; from any thread."""
        self._outbox.append(message)
        self._next_beat_s = 0.0
        self._waker.wake()

    def finished(self, error: str = "") -> None:
        """This process's part is done; from any thread."""
        self.tell(Finished(identity=self.identity, error=error))

    def beat(self) -> None:
        """Heartbeat, events, intervals and gauges; and a look at the connections."""
        self._mend()
        self._next_beat_s = time.monotonic() + HEARTBEAT_S
        now = self.recorder.activity
        self._control.send(
            Heartbeat(
                identity=self.identity,
                doing=now.name,
                peer=now.peer,
                since_s=now.since_s + self.clock.offset_s,
                detail=now.detail,
                progress=self.progress(),
                sent_s=now_s(),
                facts=self.facts(),
            )
        )
        while self._outbox:
            message = self._outbox.popleft()
            self._control.send(message)
            if isinstance(message, Event):
                self.observe(message)
        if self._links["observe"]:
            self._beats += 1
            if self._beats % FLUSH_BEATS == 1 or self.closed:
                self.flush_intervals()
            usage = resource.getrusage(resource.RUSAGE_SELF)
            values = {"process/cpu_s": usage.ru_utime + usage.ru_stime, "process/rss_bytes": float(resident_bytes())}
            self.metrics(-1, {**values, **self.gauges()})

    def flush_intervals(self) -> None:
        """What every track of this process recorded since the last time, to the dashboard."""
        for recorder in (self.recorder, *self._tracks):
            if recorder.keep:
                self.observe(recorder.drain(self.clock.offset_s))

    def close(self) -> None:
        """Flush what was recorded and close every socket, giving the last messages a moment to leave."""
        self.closed = True
        self.beat()
        self._waker.close()
        self.transport.close(linger_s=0.5)

    def _handle(self, message: Message) -> None:
        if isinstance(message, Stop):
            self.stop(message.reason)
        elif isinstance(message, Refused):
            self.stop(f"refused by the supervisor: {message.reason}")
        elif isinstance(message, Leave):
            self.leaving = self.leaving or message.reason or "told to leave"
        elif isinstance(message, Peers):
            self._meet(message)
        elif isinstance(message, ClockEcho):
            self.clock.observe(message.sent_s, message.received_s, message.replied_s, now_s())

    def _meet(self, message: Peers) -> None:
        gone = {p["identity"]: p["role"] for p in self._peers}
        for peer in message.peers:
            gone.pop(peer["identity"], None)
        self._peers = message.peers
        self.leavers = frozenset(p["identity"] for p in message.peers if p.get("leaving"))
        for identity, role in gone.items():
            for channel, call in self._on_connector_gone.items():
                if role in CHANNELS[channel].connectors:
                    call(identity)
        for channel, links in self._links.items():
            binder = CHANNELS[channel].binder
            wanted = {p["identity"]: p["addresses"][channel] for p in message.peers if p["role"] == binder and channel in p["addresses"]}
            for identity in [known for known in links if known not in wanted]:
                self._part(channel, identity)
            for identity, address in wanted.items():
                if identity not in links:
                    self._connect(channel, identity, address)

    def _part(self, channel: str, identity: str) -> None:
        link = self._links[channel].pop(identity)
        if not link.spec.one_way:
            self._poller.remove(link)
        link.close()
        if channel in self._on_gone:
            self._on_gone[channel](identity)

    def _connect(self, channel: str, identity: str, address: str) -> None:
        link = self._links[channel][identity] = Link(self.transport, channel, self.identity, address, identity)
        if not link.spec.one_way:
            self._poller.add(link)
        if channel in self._on_link:
            self._on_link[channel](link)
        if channel == "observe":
            while self._unobserved:
                self.observe(self._unobserved.popleft())

    def _mend(self) -> None:
        """After a connection broke with both ends alive, begin anew as after a death: what was on the wire may be lost, and a Hello tells the rest.

        The supervisor hears Register again and answers with all that this process should know.
        """
        if self._control.broke() and self._register is not None:
            self._control.send(self._register)
        for channel, links in self._links.items():
            for identity, link in list(links.items()):
                if link.broke():
                    log.warning("the connection to %s on channel %s broke; it is made anew", identity, channel)
                    self._part(channel, identity)
                    self._connect(channel, identity, link.address)


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux); ends at once if that was before the asking."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        parent = os.environ.get(PARENT)
        if parent and os.getppid() != int(parent):
            os._exit(1)


PARENT = "RLSYS_PARENT"
"""Environment variable: the pid of the supervisor."""


def on_terminate(node: Node) -> None:
    """SIGTERM stops in order; SIGINT is the supervisor's affair; SIGUSR2 cuts all connections for good (`rlsys chaos --mode partition`)."""
    signal.signal(signal.SIGTERM, lambda *_: node.stop("terminated"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda *_: node.transport.cut())
