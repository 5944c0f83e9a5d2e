"""Every channel between processes: who binds, who connects, what crosses it in which direction. The only file that imports zmq.

Data channels are ROUTER/DEALER with credits: a consumer says how many messages it takes (`Credit.total`, cumulative since Hello), and a
producer sends no more than that, so that no queue grows without bound and the least busy peer gets the next message. PUSH/PULL would feed
peers in turn, slow and dying ones too; it carries observations alone.

Addresses are never fixed: `ipc://` in a private directory of the run, or `tcp://` on port 0, and the bound address is published through the
supervisor. `tcp` between hosts uses CURVE with the run's own key pair; a peer without it gets nothing.
"""

from __future__ import annotations

import logging
import math
import os
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from protocol import messages as m
from protocol.addresses import bracketed
from protocol.codec import decode, encode
from protocol.errors import WireError
from protocol.strangers import EVERY_S, Patience, Strangers, closed_here, read_tables

log = logging.getLogger("rlsys.channels")


@dataclass(frozen=True, slots=True)
class Channel:
    """One kind of connection. `up` flows from the connecting side to the binding side, `down` the other way."""

    binder: str
    connectors: tuple[str, ...]
    up: tuple[type[m.Message], ...]
    down: tuple[type[m.Message], ...]
    why: str
    one_way: bool = False


EVERYONE = ("dispatcher", "generator", "rewarder", "learner", "dashboard")

CHANNELS = {
    "control": Channel(
        "supervisor",
        EVERYONE,
        (m.Register, m.Heartbeat, m.Finished, m.Event, m.Snapshot),
        (m.Peers, m.Leave, m.Stop, m.Refused, m.ClockEcho),
        "who lives, who leaves, who stops",
    ),
    "orders": Channel("supervisor", ("client",), (m.Order,), (m.Answer, m.Refused), "commands that change a live run"),
    "hosts": Channel(
        "supervisor",
        ("host",),
        (m.JoinRequest, m.HostReport),
        (m.Joined, m.HostOrders, m.Refused),
        "what runs on other hosts; with keys of its own, because the run's are handed out here",
    ),
    "tasks": Channel(
        "dispatcher",
        ("generator", "rewarder"),
        (m.Hello, m.Credit, m.Holdings),
        (m.GroupTask, m.Inventory, m.Refused),
        "a credit is a group that a generator wants; reward actors only say what they hold",
    ),
    "completions": Channel(
        "rewarder",
        ("generator",),
        (m.Hello, m.Completion),
        (m.Credit, m.Ack, m.Refused),
        "a credit is a completion that a reward actor takes",
    ),
    "trajectories": Channel("learner", ("rewarder",), (m.Hello, m.Trajectory), (m.Credit, m.Ack, m.Refused), "acknowledged once journaled"),
    "weights": Channel(
        "learner", ("generator", "dispatcher"), (m.Hello, m.WeightsLoaded), (m.WeightsReady, m.Refused), "the newest version, also on Hello"
    ),
    "pieces": Channel(
        "learner", ("generator",), (m.PieceRequest,), (m.Piece, m.Refused), "bytes of a version, for hosts that do not see its files"
    ),
    "passing": Channel("generator", ("generator",), (m.PieceRequest,), (m.Piece, m.Refused), "the same, from a host that has them already"),
    "outcomes": Channel(
        "dispatcher", ("learner",), (m.Hello, m.GroupOutcome, m.Journaled), (m.Refused,), "terminal states, and what is in the journal"
    ),
    "observe": Channel(
        "dashboard",
        EVERYONE,
        (m.Metrics, m.Event, m.Intervals, m.Distribution, m.Trajectory),
        (),
        "metrics and intervals; may be lost with the dashboard",
        True,
    ),
}
"""Name -> channel. The supervisor's `control` address is given to every process at its start, all others come with `Peers`."""

_NOW, _NOW_AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)  # as integers: arithmetic on enums costs more than a small send
_READABLE = int(zmq.POLLIN)
_BOUND = (zmq.ROUTER, zmq.PULL)
_TURNED_AWAY = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_ACCEPTED, _ADMITTED, _GONE = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_HANDSHAKE_SUCCEEDED), int(zmq.EVENT_DISCONNECTED)
LOOK_S = 1.0
"""Between two looks at who was refused at the handshake."""
AT_ONCE = 4096
"""Messages that one call takes from a socket: a few milliseconds of decoding, more than a busy channel gathers between two polls."""
MAX_FRAME_BYTES = 128 << 20
"""A larger frame ends the connection that it came on, before it takes memory: twice what the largest message needs."""
LARGE_BYTES = 64 << 10
"""A frame from this size on is decoded where the socket put it; copying a smaller one costs less than keeping the socket's own memory."""
HIGH_WATER_MARK = 10_000
"""Messages a socket queues per peer. Credits keep every data channel far below; reaching it is reported, not waited for."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The run's CURVE key pair (Z85 text). Both ends of every `tcp` socket use it, so that holding it is what admits a peer."""

    public: bytes
    secret: bytes

    @staticmethod
    def make() -> Keys:
        """A fresh pair."""
        return Keys(*zmq.curve_keypair())


@dataclass(frozen=True, slots=True)
class Transport:
    """How this process binds and connects: over `ipc` in `directory` or over `tcp` on `host`, for run number `run`."""

    run: int
    directory: Path | None = None
    host: str = "127.0.0.1"
    keys: Keys | None = None
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    opened: list[zmq.Socket[bytes]] = field(default_factory=list)
    epoch: int = 0
    """Of the run; a Hello of another one is refused. 0 takes all."""
    server_key: bytes = b""
    """Whom to connect to, where that is not whoever holds the own key."""
    admits_all: bool = False
    """Whether peers with any key may connect here: for the door of a run, which looks at their token before it says anything."""
    severed: threading.Event = field(default_factory=threading.Event)

    def cut(self) -> None:
        """From now on nothing arrives and nothing leaves, as behind a broken network: for fault rehearsals."""
        self.severed.set()

    def apart(self) -> Transport:
        """The same way to bind and connect, with sockets and a thread for input and output of its own: for a thread that moves much."""
        _keep_freed_memory()
        return replace(self, context=zmq.Context(), opened=[])

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        """A socket that `close` closes."""
        socket = self.context.socket(kind)
        self.opened.append(socket)
        return socket

    def close(self, linger_s: float = 0.0) -> None:
        """Close every socket, giving what was sent `linger_s` to leave, then the authenticator and the context."""
        # who connects first: libzmq (4.3.5, session_base.cpp) aborts the process where the bound end goes while the other, closed without
        # lingering, is half-way through a message of several frames
        for socket in sorted(self.opened, key=lambda one: not one.closed and one.type in _BOUND):
            socket.close(linger=round(linger_s * 1000))
        authenticator = _authenticators.pop(id(self.context), None)
        if authenticator is not None:
            authenticator.stop()
        self.context.term()

    def bind_address(self, name: str) -> str:
        """Where to bind a socket called `name`: port 0 on tcp, a file on ipc."""
        return f"ipc://{self.directory / name}" if self.directory else f"tcp://{bracketed(self.host)}:*"

    def secure(self, socket: zmq.Socket[bytes], address: str, *, server: bool) -> None:
        """Turn CURVE on for a `tcp` socket, before it binds or connects."""
        if self.keys is None or not address.startswith("tcp"):
            return
        socket.curve_publickey, socket.curve_secretkey = self.keys.public, self.keys.secret
        if server:
            if not self.admits_all:
                _admit_only(self.context, self.keys.public)
            socket.curve_server = True
        else:
            socket.curve_serverkey = self.server_key or self.keys.public


def _keep_freed_memory() -> None:
    """Let malloc keep up to 62 MB of what it gets back for the next message, as it does in any process that has freed as large a block once.

    By itself it returns all but a little to the kernel, which gives it back page by page, zeroed: for blocks of weights that took more
    processor time than TCP.
    (glibc raises both of its thresholds with the largest block that is freed, up to 32 MB. This one comes zeroed and is never touched.)
    """
    bytes(31 << 20)


_authenticators: dict[int, ThreadAuthenticator] = {}


class _OneKey:
    """ZAP callback: the run's own public key and no other."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def _admit_only(context: zmq.Context[zmq.Socket[bytes]], public: bytes) -> None:
    if id(context) not in _authenticators:
        authenticator = ThreadAuthenticator(context)
        authenticator.start()
        authenticator.configure_curve_callback(domain="*", credentials_provider=_OneKey(public))
        _authenticators[id(context)] = authenticator


class _Socket:
    """What the bound and the connected end share: non-blocking, checked on arrival, refusals counted and logged by peer."""

    def __init__(self, transport: Transport, channel: str, kind: int) -> None:
        self.channel = channel
        self.spec = CHANNELS[channel]
        self._run = transport.run
        self._severed = transport.severed
        self.socket: zmq.Socket[bytes] = transport.socket(kind)
        self.socket.linger = 0
        self.socket.sndhwm = self.socket.rcvhwm = HIGH_WATER_MARK
        self.refused = 0
        self._last_refusal_s = 0.0

    def _frames(self) -> list[bytes | memoryview] | None:
        """The frames of one message that has arrived. (`recv_multipart` asks the socket after each whether there are more.)"""
        receive = self.socket.recv
        if self._severed.is_set():
            return None
        try:
            frame = receive(_NOW, copy=False)
        except zmq.Again:
            return None
        frames: list[bytes | memoryview] = [frame.bytes]
        while frame.more:
            frame = receive(_NOW, copy=False)
            frames.append(frame.bytes if len(frame) < LARGE_BYTES else frame.buffer.toreadonly())
        return frames

    def _quiet(self) -> bool:
        """Whether nothing has arrived. Asking costs half of a receive that finds nothing, for pyzmq raises an exception then."""
        return not int(self.socket.get(zmq.EVENTS)) & _READABLE

    def _put(self, frames: Sequence[bytes | memoryview]) -> None:
        """Queue one message. Raises zmq.Again when the queue is full, before any part of it is queued."""
        if self._severed.is_set():
            return
        send = self.socket.send
        for frame in frames[:-1]:
            send(frame, _NOW_AND_MORE)
        send(frames[-1], _NOW)

    def _read(self, frames: Sequence[bytes | memoryview], allowed: tuple[type[m.Message], ...], peer: str) -> m.Message | None:
        try:
            message = decode(frames, self._run, peer)
            if not isinstance(message, allowed):
                raise WireError(f"{type(message).__name__} from {peer}: not a message of channel {self.channel}")
            fault = self._fault(message, peer)
            if fault:
                raise WireError(f"{type(message).__name__} from {peer}: {fault}")
            return message
        except WireError as error:
            self._refuse(error)
            return None

    def _refuse(self, why: object) -> None:
        self.refused += 1
        if time.monotonic() - self._last_refusal_s > 1.0:  # a flood of garbage must not become a flood of log lines
            self._last_refusal_s = time.monotonic()
            log.warning("refused on %s (%d so far): %s", self.channel, self.refused, why)

    def _fault(self, message: m.Message, peer: str) -> str:
        """Why this peer may not say that here; empty if it may."""
        return ""

    def close(self) -> None:
        """Close at once; what was not sent is lost, which delivery allows for."""
        self.socket.close(linger=0)


class Endpoint(_Socket):
    """The bound end. Peers are named by their identity."""

    def __init__(self, transport: Transport, channel: str, name: str) -> None:
        super().__init__(transport, channel, zmq.PULL if CHANNELS[channel].one_way else zmq.ROUTER)
        if not self.spec.one_way:
            self.socket.router_mandatory = self.socket.router_handover = True  # who reconnects takes its own name over
        self.socket.maxmsgsize = MAX_FRAME_BYTES
        self._epoch = transport.epoch
        address = transport.bind_address(name)
        transport.secure(self.socket, address, server=True)
        self.socket.ipv6 = "[" in address
        self.strangers = Strangers()
        self._patience = Patience()
        self.away_until_s = 0.0
        """Until when nothing is read here, because so much was refused."""
        self._looked_s = self._asked_s = float("-inf")
        self._failed = 0
        self._fresh: set[int] = set()
        """File descriptors of connections since whose beginning nobody was admitted."""
        self._monitor = self._watch(transport) if address.startswith("tcp") else None
        self.socket.bind(address)
        self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _watch(self, transport: Transport) -> zmq.Socket[bytes]:
        """Hears of failed handshakes. Without a limit to what waits there, which would hold up the thread that reads all sockets."""
        name = f"inproc://strangers-{id(self)}"
        self.socket.monitor(name, _TURNED_AWAY | _ACCEPTED | _ADMITTED | _GONE)
        monitor = transport.socket(zmq.PAIR)
        monitor.rcvhwm = 0
        monitor.linger = 0
        monitor.connect(name)
        return monitor

    def look(self) -> None:
        """Log who was refused at the handshake since the last call. `receive` calls it every second."""
        monitor = self._monitor
        if monitor is None or monitor.closed:
            return
        said = at_once = 0
        while int(monitor.get(zmq.EVENTS)) & _READABLE:
            event, value = struct.unpack_from("=HI", monitor.recv_multipart(_NOW)[0])
            if event & _TURNED_AWAY:
                said += 1
            elif event == _ACCEPTED:
                self._fresh.add(value)
            elif event == _ADMITTED:
                self._fresh.clear()  # it was one of them, and nothing says which
            elif value in self._fresh:  # what is no ZMTP at all is cut off without a word
                self._fresh.remove(value)
                at_once += 1
        self._failed += max(said, at_once)
        now_s = time.monotonic()
        if (self._failed or self.strangers.unsaid) and now_s - self._asked_s >= EVERY_S:  # the tables are long while a flood lasts
            closed = closed_here(int(self.address.rpartition(":")[2]), read_tables())
            for line in self.strangers.lines(self._failed, closed, now_s):
                log.warning("refused at the handshake of %s: %s", self.channel, line)
            self._asked_s, self._failed = now_s, 0

    def close(self) -> None:
        """Close at once, and watch no longer."""
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        super().close()

    def receive(self) -> Iterator[tuple[str, m.Message]]:
        """Messages that have arrived, with their senders' identities. Refused ones are counted and logged.

        At most AT_ONCE, so that a peer that floods its socket cannot keep the process from everything else; the next poll returns at once.
        Who sends what is refused is read for a moment, and then left alone for another (`Patience`): a Poller does not wake for it then.
        """
        now_s = time.monotonic()
        if now_s - self._looked_s > LOOK_S:
            self._looked_s = now_s
            self.look()
        if now_s < self.away_until_s or self._quiet():
            return
        for _ in range(AT_ONCE):
            frames = self._frames()
            if frames is None:
                return
            peer = "" if self.spec.one_way else bytes(frames.pop(0)).decode("utf-8", "replace")
            role = _role(peer)
            if not self.spec.one_way and role not in self.spec.connectors:  # before its message costs anything
                self._refuse(f"a message from {peer[:80]!r}: {role[:40] or 'nobody'} has no business on channel {self.channel}")
                message = None
            else:
                message = self._read(frames, self.spec.up, peer or "a peer")
            if message is not None:
                yield peer, message
            elif until_s := self._patience.refuse(time.monotonic()):
                self.away_until_s = until_s
                return

    def _fault(self, message: m.Message, peer: str) -> str:
        """Why this peer may not say that here: it is of another epoch, or lies about its name."""
        if isinstance(message, m.Hello):
            if (message.role, message.identity) != (_role(peer), peer):
                return f"it says that it is {message.role} {message.identity}"
            if self._epoch and message.epoch != self._epoch:
                return f"it is of epoch {message.epoch}, this is epoch {self._epoch}"
        return ""

    def send(self, peer: str, message: m.Message) -> bool:
        """Send to one peer. False when it is gone; a full queue raises WireError, because credits should have prevented it."""
        return self._send(peer, encode(message, self._run))

    def send_each(self, peers: Iterable[str], message: m.Message) -> None:
        """Send the same to several peers, encoded once; those that are gone are left out."""
        frames = encode(message, self._run)
        for peer in peers:
            self._send(peer, frames)

    def _send(self, peer: str, frames: Sequence[bytes | memoryview]) -> bool:
        try:
            self._put([peer.encode(), *frames])
            return True
        except zmq.Again:
            raise WireError(f"{self.channel}: {HIGH_WATER_MARK} messages wait for {peer}, which reads none") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise


class Link(_Socket):
    """The connected end: one peer."""

    def __init__(self, transport: Transport, channel: str, identity: str, address: str, peer: str) -> None:
        super().__init__(transport, channel, zmq.PUSH if CHANNELS[channel].one_way else zmq.DEALER)
        self.peer, self.address = peer, address
        if not self.spec.one_way:
            self.socket.routing_id = identity.encode()
        transport.secure(self.socket, address, server=False)
        self.socket.ipv6 = "[" in address
        self._monitor: zmq.Socket[bytes] | None = None
        if address.startswith("tcp"):
            self._monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            transport.opened.append(self._monitor)
        self.socket.connect(address)

    def broke(self) -> bool:
        """Whether the connection (tcp) has broken since the last call: it is made again by itself, but what was on the wire may be lost."""
        found = False
        while self._monitor is not None and not self._monitor.closed and int(self._monitor.get(zmq.EVENTS)) & _READABLE:
            self._monitor.recv_multipart(_NOW)
            found = True
        return found

    def close(self) -> None:
        """Close at once; what was not sent is lost, which delivery allows for."""
        if self._monitor is not None:
            self.socket.disable_monitor()
            self._monitor = None
        super().close()

    def receive(self) -> Iterator[m.Message]:
        """All messages that have arrived."""
        if self.socket.closed or self._quiet():
            return
        while not self.socket.closed and (frames := self._frames()) is not None:
            message = self._read(frames, self.spec.down, self.peer)
            if message is not None:
                yield message

    def send(self, message: m.Message) -> bool:
        """Send; False when the queue is full (observations may be lost; data never gets there, because it needs a credit)."""
        try:
            self._put(encode(message, self._run))
            return True
        except zmq.Again:
            if not self.spec.one_way:
                raise WireError(f"{self.channel}: {HIGH_WATER_MARK} messages wait for {self.peer}, which reads none") from None
            return False


class Waker:
    """Lets other threads, and signal handlers, end a poll."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.RLock()  # a signal's handler may wake while the thread that it came upon does so, or closes

    def wake(self) -> None:
        """End the present or the next poll; nothing after `close`."""
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """Forget wake-ups so far."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Wake nobody any more. Safe to call twice."""
        with self._lock:
            fd, self.fd = self.fd, -1
            if fd >= 0:
                os.close(fd)


def _role(identity: str) -> str:
    """ "generator-0@1" -> "generator"."""
    return identity.partition("@")[0].rpartition("-")[0]


class Poller:
    """Waits for any of several sockets and wakers."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._ends: list[Endpoint] = []

    def add(self, item: _Socket | Waker | int) -> None:
        """Watch a socket, a waker or a file descriptor."""
        self._poller.register(_pollable(item), zmq.POLLIN)
        if isinstance(item, Endpoint):
            self._ends.append(item)

    def remove(self, item: _Socket | Waker | int) -> None:
        """Watch it no longer."""
        self._poller.unregister(_pollable(item))
        if isinstance(item, Endpoint):
            self._ends.remove(item)

    def wait(self, timeout_s: float) -> bool:
        """Whether anything can be read, after at most `timeout_s`. Signals end it early. Sockets that are left alone do not count."""
        now_s = time.monotonic()
        away = [end for end in self._ends if end.away_until_s > now_s]
        for end in away:
            self._poller.unregister(end.socket)
            timeout_s = min(timeout_s, end.away_until_s - now_s)
        try:
            if not self._poller.sockets:  # a poll of nothing returns at once
                time.sleep(max(0.0, timeout_s))
                return False
            return bool(self._poller.poll(max(0, math.ceil(timeout_s * 1000))))
        except InterruptedError:
            return False
        finally:
            for end in away:
                self._poller.register(end.socket, zmq.POLLIN)


def _pollable(item: _Socket | Waker | int) -> zmq.Socket[bytes] | int:
    return item.socket if isinstance(item, _Socket) else item.fd if isinstance(item, Waker) else item
