"""Real sockets: delivery, refusal, credits, and keys."""

import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from protocol.addresses import split
from protocol.channels import CHANNELS, LARGE_BYTES, Endpoint, Keys, Link, Poller, Transport
from protocol.codec import encode
from protocol.errors import WireError
from protocol.messages import Credit, Hello, Inventory, Message, Piece, PieceRequest
from protocol.strangers import UNKNOWN, Patience
from tests.protocol.examples import equal, example

RUN = 7
DEADLINE_S = 120.0


@pytest.fixture
def transport() -> Iterator[Transport]:
    with tempfile.TemporaryDirectory(prefix="rlsys-") as directory:
        transport = Transport(RUN, Path(directory))
        yield transport
        transport.close()


@pytest.fixture
def tcp() -> Iterator[Callable[[Keys | None], Transport]]:
    made: list[Transport] = []

    def make(keys: Keys | None) -> Transport:
        made.append(Transport(RUN, None, keys=keys))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def wait_for(endpoint: Endpoint, count: int = 1, deadline_s: float = DEADLINE_S) -> list[tuple[str, Message]]:
    got: list[tuple[str, Message]] = []
    end = time.monotonic() + deadline_s
    while len(got) < count and time.monotonic() < end:
        endpoint.socket.poll(50)
        got += endpoint.receive()
    return got


def wait_link(link: Link, deadline_s: float = DEADLINE_S) -> Message:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        link.socket.poll(50)
        for message in link.receive():
            return message
    raise AssertionError(f"nothing arrived from {link.peer} within {deadline_s} s")


def hello(identity: str) -> Hello:
    return Hello(role="generator", index=0, identity=identity, epoch=1)


def test_messages_go_both_ways_and_carry_the_identity(transport: Transport) -> None:
    server = Endpoint(transport, "tasks", "tasks")
    link = Link(transport, "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    link.send(hello("generator-0@1"))
    [(peer, message)] = wait_for(server)
    assert peer == "generator-0@1"
    assert equal(message, hello("generator-0@1"))
    task = example("GroupTask")
    assert server.send(peer, task)
    assert equal(wait_link(link), task)


def test_a_message_of_the_wrong_channel_or_direction_is_refused_and_named(transport: Transport, caplog: pytest.LogCaptureFixture) -> None:
    server = Endpoint(transport, "tasks", "tasks")
    link = Link(transport, "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    link.send(example("GroupTask"))  # flows down, never up
    link.send(hello("generator-0@1"))
    assert len(wait_for(server)) == 1
    assert server.refused == 1
    assert "GroupTask from generator-0@1: not a message of channel tasks" in caplog.text


def test_garbage_is_refused_and_does_not_stop_the_channel(transport: Transport) -> None:
    server = Endpoint(transport, "tasks", "tasks")
    stranger = transport.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(server.address)
    for parts in ([b"x"], [b"", b"", b""], [b"RL" + bytes(9) + b"Credit", b"\xc1"]):
        stranger.send_multipart(parts)
    stranger.send_multipart([bytes(f) for f in encode(Credit(total=3), RUN + 1)])
    link = Link(transport, "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    link.send(Credit(total=3))
    got = wait_for(server)
    assert [peer for peer, _ in got] == ["generator-0@1"]
    end = time.monotonic() + DEADLINE_S
    while server.refused < 4 and time.monotonic() < end:
        wait_for(server, 1, 0.1)
    assert server.refused == 4


def test_sending_to_a_peer_that_is_gone_says_so(transport: Transport) -> None:
    server = Endpoint(transport, "tasks", "tasks")
    link = Link(transport, "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    link.send(hello("generator-0@1"))
    [(peer, _)] = wait_for(server)
    assert server.send(peer, example("GroupTask"))
    link.close()
    end = time.monotonic() + DEADLINE_S
    while server.send(peer, Inventory(number=1)):
        assert time.monotonic() < end, "the endpoint never noticed that its peer is gone"
    assert not server.send("rewarder-9@1", Credit(total=1))


def test_tcp_binds_a_free_port_on_loopback(tcp: Callable[[Keys | None], Transport]) -> None:
    server = Endpoint(tcp(None), "tasks", "tasks")
    host, _, port = server.address.removeprefix("tcp://").partition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_tcp_with_the_runs_key_admits_its_peers_and_nobody_else(tcp: Callable[[Keys | None], Transport]) -> None:
    keys = Keys.make()
    server = Endpoint(tcp(keys), "tasks", "tasks")
    other = Keys.make()
    strangers = [
        Link(tcp(None), "tasks", "generator-8@1", server.address, "dispatcher-0@1"),
        Link(tcp(Keys(keys.public, other.secret)), "tasks", "generator-7@1", server.address, "dispatcher-0@1"),
        Link(tcp(other), "tasks", "generator-6@1", server.address, "dispatcher-0@1"),
    ]
    for link in strangers:
        with suppress(WireError):  # turned away already: such a socket takes nothing any more
            link.send(hello("stranger"))
    # a peer that speaks CURVE to the right server, but with a key of its own
    own_key = tcp(None).socket(zmq.DEALER)
    own_key.linger = 0
    own_key.curve_publickey, own_key.curve_secretkey, own_key.curve_serverkey = other.public, other.secret, keys.public
    own_key.connect(server.address)
    own_key.send_multipart([bytes(f) for f in encode(hello("stranger"), RUN)])
    friend = Link(tcp(keys), "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    friend.send(hello("generator-0@1"))
    assert [peer for peer, _ in wait_for(server)] == ["generator-0@1"]
    assert wait_for(server, 1, 0.5) == []


def test_who_is_refused_at_the_handshake_is_counted_and_logged(
    tcp: Callable[[Keys | None], Transport], caplog: pytest.LogCaptureFixture
) -> None:
    """Garbage, and a peer without keys: with the address where the kernel remembers it. The friend is not named."""
    keys = Keys.make()
    server = Endpoint(tcp(keys), "tasks", "tasks")
    friend = Link(tcp(keys), "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    friend.send(hello("generator-0@1"))
    assert [peer for peer, _ in wait_for(server)] == ["generator-0@1"]
    _, port = split(server.address)
    with socket.create_connection(("127.0.0.1", int(port))) as garbage, suppress(ConnectionResetError):
        garbage.settimeout(DEADLINE_S)
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while garbage.recv(4096):
            pass
    stranger = tcp(None).socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(f"tcp://127.0.0.9:0;127.0.0.1:{port}")
    end = time.monotonic() + DEADLINE_S
    with caplog.at_level("WARNING", "rlsys.channels"):
        while time.monotonic() < end and server.strangers.count < 2:
            server.socket.poll(50)
            list(server.receive())
    assert server.strangers.count >= 2
    assert re.search(rf"refused at the handshake of tasks: \d+ connections from (127\.0\.0\.[19]|{UNKNOWN}) \(", caplog.text), caplog.text
    assert server.refused == 0
    friend.close()


def test_every_channel_joins_roles_that_exist() -> None:
    roles = {"supervisor", "dispatcher", "generator", "rewarder", "learner", "dashboard", "client", "host"}
    for channel in CHANNELS.values():
        assert {channel.binder, *channel.connectors} <= roles
        assert channel.up
        assert channel.one_way == (not channel.down)


def test_a_peer_says_only_what_its_role_may_under_its_own_name_and_epoch(transport: Transport) -> None:
    server = Endpoint(replace(transport, epoch=2), "completions", "completions")
    cases = {
        "rewarder-0@1": Hello(role="rewarder", index=0, identity="rewarder-0@1", epoch=2),
        "generator-1@1": Hello(role="generator", index=0, identity="generator-0@1", epoch=2),
        "generator-2@1": Hello(role="generator", index=2, identity="generator-2@1", epoch=1),
        "generator-3@1": Hello(role="generator", index=3, identity="generator-3@1", epoch=2),
    }
    for identity, message in cases.items():
        Link(transport, "completions", identity, server.address, "rewarder-0@1").send(message)
    got: list[str] = []
    deadline = time.monotonic() + DEADLINE_S
    while server.refused < 3 or not got:
        got += [peer for peer, _ in server.receive()]
        assert time.monotonic() < deadline, (server.refused, got)
    assert got == ["generator-3@1"]
    assert server.refused == 3


def test_one_call_takes_no_more_than_its_share(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.channels.AT_ONCE", 10)
    server = Endpoint(transport, "tasks", "tasks")
    link = Link(transport, "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    for _ in range(35):
        link.send(hello("generator-0@1"))
    sizes: list[int] = []
    deadline = time.monotonic() + DEADLINE_S
    while sum(sizes) < 35:
        sizes.append(len(list(server.receive())))
        assert time.monotonic() < deadline
    assert max(sizes) <= 10


def test_who_floods_is_left_alone_for_moments_and_others_are_heard_meanwhile(transport: Transport) -> None:
    server = Endpoint(transport, "tasks", "tasks")
    poller = Poller()
    poller.add(server)
    flooder = Link(transport, "tasks", "nobody-0@1", server.address, "dispatcher-0@1")
    friend = Link(transport, "tasks", "generator-0@1", server.address, "dispatcher-0@1")
    heard = pauses = 0
    sent = 1
    flooder.send(hello("nobody-0@1"))
    deadline = time.monotonic() + 600
    while heard < 20 or not pauses or server.refused < sent:
        if heard < 20 or not pauses:
            sent += 10
            for _ in range(10):
                flooder.send(hello("nobody-0@1"))
            friend.send(hello("generator-0@1"))
        before = server.refused
        heard += len([peer for peer, _ in server.receive() if peer == "generator-0@1"])
        assert server.refused - before <= 2 * Patience.PER_S * Patience.PAUSE_S, "one call refuses no more than a pause is for"
        if server.away_until_s > time.monotonic():
            assert not poller.wait(0.0) or server.away_until_s <= time.monotonic(), "a socket that is left alone wakes nobody"
            pauses += 1
        poller.wait(0.1)
        assert time.monotonic() < deadline, (heard, pauses, sent, server.refused)
    assert server.refused == sent


class Relay:
    """A way to a tcp port that can be cut."""

    def __init__(self, port: int) -> None:
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed, or nobody listens at the port
            while True:
                near = self._keep(self._listener.accept()[0])
                far = self._keep(socket.create_connection(("127.0.0.1", self._port)))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _keep(self, end: socket.socket) -> socket.socket:
        with self._lock:
            self._open.append(end)
        return end

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass

    def cut(self) -> None:
        """Every connection breaks; new ones are taken."""
        with self._lock:
            ends, self._open = self._open, []
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=10)  # before the cut: what it has just accepted is closed too
        self.cut()


def test_a_connection_that_breaks_is_noticed_and_a_new_link_of_that_name_is_heard() -> None:
    keys = Keys.make()
    ours, theirs = Transport(RUN, None, "127.0.0.1", keys), Transport(RUN, None, "127.0.0.1", keys)
    server = Endpoint(ours, "tasks", "tasks")
    relay = Relay(split(server.address)[1])
    try:
        link = Link(theirs, "tasks", "generator-0@1", relay.address, "dispatcher-0@1")
        link.send(hello("generator-0@1"))
        assert [peer for peer, _ in wait_for(server)] == ["generator-0@1"]
        assert not link.broke()
        relay.cut()
        deadline = time.monotonic() + DEADLINE_S
        while not link.broke():
            assert time.monotonic() < deadline
        link.close()
        again = Link(theirs, "tasks", "generator-0@1", relay.address, "dispatcher-0@1")
        again.send(hello("generator-0@1"))
        assert [peer for peer, _ in wait_for(server)] == ["generator-0@1"]
        assert server.send("generator-0@1", Inventory(number=4))
        deadline = time.monotonic() + DEADLINE_S
        while not (got := list(again.receive())):
            assert time.monotonic() < deadline
        assert got == [Inventory(number=4)]
    finally:
        relay.close()
        theirs.close()
        ours.close()


def test_a_large_array_is_decoded_where_the_socket_put_it_and_stays(tcp: Callable[[Keys | None], Transport]) -> None:
    keys = Keys.make()
    ours, theirs = tcp(keys), tcp(keys)
    server = Endpoint(ours, "pieces", "pieces")
    link = Link(theirs, "pieces", "generator-0@1", server.address, "learner-0@1")
    sizes = [LARGE_BYTES - 1, LARGE_BYTES, 1 << 20]
    sent = [np.random.default_rng(size).integers(0, 256, size, np.uint8) for size in sizes]
    pieces = [Piece(number=1, incarnation=0, file="f", start=index, has="here", data=data) for index, data in enumerate(sent)]
    link.send(PieceRequest(number=1, incarnation=0, file="f", start=0, end=1))
    (peer, _), *_ = wait_for(server)
    got = []
    for piece in pieces:
        server.send(peer, piece)
        got.append(wait_link(link))
    link.close()
    theirs.close()
    for message, data in zip(got, sent, strict=True):
        assert isinstance(message, Piece)
        assert np.array_equal(message.data, data), "its memory is not the socket's to take back"
        assert not message.data.flags.writeable, "nobody changes what came"
        assert isinstance(message.data.base, bytes) == (len(data) < LARGE_BYTES)


def test_a_poll_of_nothing_waits_and_uses_no_processor_time() -> None:
    poller, began, used = Poller(), time.monotonic(), time.thread_time()
    assert not poller.wait(0.3)
    assert time.monotonic() - began >= 0.3
    assert time.thread_time() - used < 0.1


INTERRUPTED = """
import os, signal
from protocol.channels import Waker
waker = Waker()
signal.signal(signal.SIGTERM, lambda *_: waker.wake())
def after_a_signal(call):
    def patched(*arguments):
        setattr(os, call.__name__, call)
        signal.raise_signal(signal.SIGTERM)
        call(*arguments)
    setattr(os, call.__name__, patched)
after_a_signal(os.eventfd_write)
waker.wake()
assert os.eventfd_read(waker.fd) == 2
after_a_signal(os.close)
waker.close()
waker.close()
waker.wake()
"""


def test_a_signal_may_wake_in_the_middle_of_a_wake_and_of_the_end() -> None:
    subprocess.run([sys.executable, "-c", INTERRUPTED], cwd=Path(__file__).resolve().parents[2], timeout=DEADLINE_S, check=True)
