"""The rest of a run, driven by hand over real sockets, so that one role can be tested alone.

`Ring` is the supervisor's end of the control channel: it introduces whoever registers and keeps what it is told. `serve` and `link` are
peers of the role under test; `run` is that role, in a thread of its own, with the loop that a process would run.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protocol.channels import CHANNELS, Endpoint, Link, Poller, Transport
from protocol.errors import RunEnded
from protocol.messages import Heartbeat, Message, Peers, Register, Stop
from protocol.node import Node, ProcessSpec

RUN_ID = "00000000000000ab"
DEADLINE_S = 120.0
"""Of a wait for what must come: far above what a machine needs that does something else as well."""
M = TypeVar("M", bound=Message)


class Peer:
    """One end of a channel, driven by hand: what has come is kept in `got`."""

    def __init__(self, end: Endpoint | Link) -> None:
        self.end = end
        self.got: list[tuple[str, Message]] = []

    def pump(self) -> None:
        """Take what has arrived."""
        if isinstance(self.end, Endpoint):
            self.got += self.end.receive()
        else:
            self.got += [(self.end.peer, message) for message in self.end.receive()]

    def of(self, kind: type[M], peer: str = "") -> list[M]:
        """Messages of one type, from one peer if given, in the order of their arrival."""
        return [message for sender, message in self.got if isinstance(message, kind) and peer in ("", sender)]

    def tell(self, message: Message, to: str = "") -> None:
        """Send; a bound end needs to know to whom."""
        sent = self.end.send(to, message) if isinstance(self.end, Endpoint) else self.end.send(message)
        assert sent, f"{type(message).__name__} could not be sent to {to}"


class Running:
    """A role in a thread. `error` is what its body raised, None while it runs and after an orderly end."""

    def __init__(self, spec: ProcessSpec, body: Callable[[Node], object]) -> None:
        self.identity = spec.identity
        self.error: BaseException | None = None
        self.expected: type[BaseException] | None = None
        self.thread = threading.Thread(target=self._run, args=(spec, body), name=spec.identity, daemon=True)
        self.thread.start()

    def _run(self, spec: ProcessSpec, body: Callable[[Node], object]) -> None:
        node = Node(spec)
        try:
            body(node)
        except RunEnded:
            pass
        except BaseException as error:
            self.error = error
        finally:
            node.close()


class Ring:
    """Use as a context manager; leaving it stops every role and fails for one that did not end or raised unexpectedly."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._sockets = Path(tempfile.mkdtemp(prefix="rlsys-t-"))
        self._transport = Transport(int(RUN_ID, 16), self._sockets)
        self._poller = Poller()
        self._control = Endpoint(self._transport, "control", "control")
        self.control = Peer(self._control)
        self._poller.add(self._control)
        self._peers: list[Peer] = [self.control]
        self._known: dict[str, Register] = {}
        self._heard = 0
        self._running: list[Running] = []

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            for role in self._running:
                self.end(role)
            faults = [r.error for r in self._running if r.error is not None and not (r.expected and isinstance(r.error, r.expected))]
            alive = [r.identity for r in self._running if r.thread.is_alive()]
        finally:
            self._transport.close()
            shutil.rmtree(self._sockets)
        assert not alive, f"did not end: {alive}"
        if kind is None and faults:
            raise faults[0]

    # ------------------------------------------------------------------------------------------------ the role under test

    def spec(self, role: str, index: int = 0, start: int = 1) -> ProcessSpec:
        """Who a process of this run is."""
        return ProcessSpec(
            run_id=RUN_ID, epoch=1, role=role, index=index, start=start, run_dir=str(self.run_dir), control=self.control.end.address,
            socket_dir=str(self._sockets),
        )  # fmt: skip

    def run(self, role: str, body: Callable[[Node], object], index: int = 0) -> Running:
        """Start a role and wait until it has registered."""
        running = Running(self.spec(role, index), body)
        self._running.append(running)
        self.until(lambda: running.identity in self._known or running.error is not None, f"{running.identity} registers")
        return running

    def end(self, role: Running, deadline_s: float = DEADLINE_S) -> None:
        """Stop a role and wait for its end."""
        until = time.monotonic() + deadline_s
        while role.thread.is_alive() and time.monotonic() < until:
            self._control.send(role.identity, Stop(reason="the test is over"))
            self.pump()
            role.thread.join(0.05)

    def stop(self, identity: str) -> None:
        """Ask a process that is no `Running` to end."""
        assert self._control.send(identity, Stop(reason="the test is over"))

    # ------------------------------------------------------------------------------------------------ its peers

    def serve(self, identity: str, channel: str) -> Peer:
        """A peer that binds `channel`; everyone is told."""
        peer = Peer(Endpoint(self._transport, channel, f"{identity}.{channel}"))
        self._add(peer)
        known = self._known.get(identity)
        addresses = {**(known.addresses if known else {}), channel: peer.end.address}
        role, _, index = identity.partition("@")[0].rpartition("-")
        self._known[identity] = Register(role=role, index=int(index), identity=identity, pid=0, addresses=addresses)
        self._introduce()
        return peer

    def link(self, identity: str, channel: str, to: str) -> Peer:
        """A peer that connects to the role `to` on `channel`."""
        assert CHANNELS[channel].binder == to.partition("-")[0]
        peer = Peer(Link(self._transport, channel, identity, self._known[to].addresses[channel], to))
        if not peer.end.spec.one_way:  # nothing ever comes back on such a channel
            self._add(peer)
        return peer

    def leave(self, peer: Peer, identity: str) -> None:
        """A peer dies: its socket closes and everyone is told that it is gone."""
        self._peers.remove(peer)
        self._poller.remove(peer.end)
        peer.end.close()
        if self._known.pop(identity, None):
            self._introduce()

    def _add(self, peer: Peer) -> None:
        self._peers.append(peer)
        self._poller.add(peer.end)

    # ------------------------------------------------------------------------------------------------ time

    def pump(self) -> None:
        """Take what has arrived anywhere, and introduce who has registered."""
        for peer in self._peers:
            peer.pump()
        fresh = [m for _, m in self.control.got[self._heard :] if isinstance(m, Register)]
        self._heard = len(self.control.got)
        if fresh:
            self._known |= {register.identity: register for register in fresh}
            self._introduce()

    def _introduce(self) -> None:
        known = self._known.values()
        peers = Peers(peers=[{"role": r.role, "index": r.index, "identity": r.identity, "addresses": r.addresses} for r in known])
        for register in known:
            if register.pid:
                self._control.send(register.identity, peers)

    def until(self, condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Serve until `condition` holds. Fails at the deadline, and at once when a role broke unexpectedly."""
        end = time.monotonic() + deadline_s
        while True:
            self.pump()
            if condition():
                return
            for role in self._running:
                if role.error is not None and not (role.expected and isinstance(role.error, role.expected)):
                    raise role.error
            assert time.monotonic() < end, f"not within {deadline_s:g} s: {what}"
            self._poller.wait(0.05)

    def never(self, condition: Callable[[], object], what: str, after: Callable[[], object]) -> None:
        """`condition` must not hold at any time until `after` does, which shows that the role went round its loop meanwhile."""
        self.until(lambda: condition() or after(), f"{what} was watched")
        assert not condition(), what

    def heartbeats(self, identity: str) -> int:
        """How often a role has said that it lives."""
        return len(self.control.of(Heartbeat, identity))
