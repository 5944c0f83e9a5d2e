"""The supervisor's door for other hosts: who may come in, what runs there, and what the supervisor knows of it.

    host --JoinRequest--> [ door ] --Joined (the run's keys)--> host          (rlsys/launchers/agent.py is the host's end)
    host --HostReport, twice a second--> [ door ] --HostOrders, all that shall run there--> host

Reports and orders say everything each time, so that a lost one changes nothing: a host starts what is wanted and not known to it, and ends
what is not wanted. The socket has a key pair of its own, which is in the token; what is said to it without the token's secret is refused.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from protocol.channels import Endpoint, Keys, Transport
from protocol.messages import HostOrders, HostReport, Joined, JoinRequest, Message, Refused
from protocol.node import ProcessSpec
from rlsys import __version__
from rlsys.config import RunConfig
from rlsys.launchers import how_it_ended
from rlsys.launchers.local import tail
from rlsys.rundir import write_privately
from rlsys.token import Token

log = logging.getLogger("rlsys.hosts")

JOIN_ROLES = ("generator", "rewarder")
TOKEN_FILE = "join_token"
OWN_FIELDS = ("run_dir", "control", "socket_dir", "host", "weights_dir", "place")
"""Fields of a ProcessSpec that each host knows better."""
KILLED = -int(signal.SIGKILL)


class RemoteChild:
    """A process on another host. What is asked of it is asked of its host, whenever that can be reached."""

    def __init__(self, host: Host, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> None:
        self.spec, self.log_path, self._host = spec, log_path, host
        self.environment = dict(environment)
        self.remote_pid = 0
        self.code: int | None = None
        self.why = ""

    @property
    def pid(self) -> int:
        return self.remote_pid

    @property
    def host(self) -> str:
        return self._host.place or self._host.name

    def exit_code(self) -> int | None:
        """As the host reported it; killed once the host is gone."""
        return self.code

    def how(self) -> str:
        """How it ended, in words."""
        return self.why or how_it_ended(self.code or 0)

    def lost(self, code: int, why: str) -> None:
        """Its host is gone, and whatever became of it: nobody listens to it any more."""
        if self.code is None:
            self.code, self.why = code, why

    def signal_group(self, number: signal.Signals) -> None:
        """SIGKILL ends it through its host; what is milder the run's own messages say."""
        if number == signal.SIGKILL and self.code is None:
            self.kill()

    def kill(self) -> None:
        """From now on its host is to end it, and it counts as dead."""
        self.lost(KILLED, "")
        self._host.forget(self)

    def tail(self, lines: int = 20) -> list[str]:
        """The end of its log, as far as it was sent."""
        return tail(self.log_path, lines)


@dataclass(slots=True)
class Host:
    """One host that joined or is expected: a launcher of processes there."""

    name: str
    role: str = ""
    count: int = 0
    place: str = ""
    """Where it is, if its name does not say it: the node of a host that the run itself brought up."""
    once: bool = False
    """It is there for one process, and goes with it."""
    started: bool = False
    identity: str = ""
    """On the socket; empty until it has come in."""
    heard_s: float = field(default_factory=time.monotonic)
    ready: bool = False
    """It has said that it can run processes."""
    leaving: bool = False
    gone: str = ""
    """Why it is no longer there."""
    children: dict[str, RemoteChild] = field(default_factory=dict)
    """Those that shall run, by identity."""
    push: Callable[[], object] = lambda: None

    def start(self, spec: ProcessSpec, log_path: Path, environment: Mapping[str, str]) -> RemoteChild:
        """Let a process run there."""
        child = RemoteChild(self, spec, log_path, {k: v for k, v in environment.items() if k != "TMPDIR"})
        if self.gone:
            child.lost(KILLED, self.gone)
            return child
        self.children[spec.identity], self.started = child, True
        self.push()
        return child

    def forget(self, child: RemoteChild) -> None:
        """It shall no longer run there."""
        if self.children.pop(child.spec.identity, None) is not None:
            self.push()

    def orders(self, stop: str = "") -> HostOrders:
        """All that shall be there."""
        if self.once and self.started and not self.children:
            stop = stop or "its process has ended"
        wanted = [
            {"spec": {k: v for k, v in asdict(child.spec).items() if k not in OWN_FIELDS}, "environment": child.environment}
            for child in self.children.values()
        ]
        return HostOrders(wanted=[] if stop else wanted, stop=stop)

    def adapt(self, config: RunConfig) -> RunConfig:
        """A host that joins takes the configuration of the run."""
        return config

    def reserve(self, config: RunConfig, fleet: Sequence[tuple[str, int]], door: Door | None, *, live: bool = False) -> None:
        """It asked for what it runs."""

    def release(self, role: str, index: int) -> None:
        """Nothing was taken for it."""

    def turn(self) -> None:
        """Its reports tell."""

    def close(self) -> None:
        """Nothing of its own to give back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a host is told when it is let in."""

    epoch: int
    control: str
    keys: Keys
    config: Callable[[], str]
    run_dir: Path
    weights_dir: Path
    silent_s: float


class Door:
    """Lets hosts in and keeps track of them. `on_join` and `on_gone` are called from `turn`."""

    def __init__(self, run_id: str, host: str, grant: Grant) -> None:
        self._run_id, self._grant = run_id, grant
        keys = Keys.make()
        self._transport = Transport(0, None, host, keys, admits_all=True)
        self.end = Endpoint(self._transport, "hosts", "hosts")
        self._server_key = keys.public.decode()
        self._secret = ""
        self._once: set[str] = set()
        """Secrets for one use that nobody has used yet."""
        self._old: set[str] = set()
        self._refused, self._told_s = 0, float("-inf")
        self._expected: dict[str, Host] = {}
        self._hosts: dict[str, Host] = {}
        self.on_join: Callable[[Host], object] = lambda host: None
        self.on_leave: Callable[[Host], object] = lambda host: None
        self.on_gone: Callable[[Host], object] = lambda host: None
        self.rotate()

    # ------------------------------------------------------------------------------------------------ tokens

    def _token(self, secret: str) -> str:
        return Token(self._run_id, self.end.address, self._server_key, secret, __version__).text()

    @property
    def token(self) -> str:
        """The present join token, for any number of uses."""
        return self._token(self._secret)

    def rotate(self) -> str:
        """Make a new token; those before open nothing any more, those for one use neither."""
        self._old |= self._once | ({self._secret} if self._secret else set())
        self._once.clear()
        self._secret = secrets.token_hex(24)
        write_privately(self._grant.run_dir / TOKEN_FILE, self.token + "\n")
        return self.token

    def once(self) -> str:
        """A token besides that ends with its first use, for one host."""
        secret = secrets.token_hex(24)
        self._once.add(secret)
        return self._token(secret)

    def expect(self, name: str) -> tuple[Host, str]:
        """A host that the run itself brings up, and a token for it alone."""
        secret = secrets.token_hex(24)
        host = self._expected[secret] = Host(name, once=True)
        return host, self._token(secret)

    def expect_again(self, host: Host) -> str:
        """Another token for a host that was expected and has not come; the one before opens nothing any more."""
        for secret in [secret for secret, expected in self._expected.items() if expected is host]:
            del self._expected[secret]
            self._old.add(secret)
        secret = secrets.token_hex(24)
        self._expected[secret] = host
        return self._token(secret)

    # ------------------------------------------------------------------------------------------------ talking

    def turn(self) -> None:
        """Take what has arrived, and notice who has fallen silent."""
        for peer, message in self.end.receive():
            reply = self._on_message(peer, message)
            if reply is not None:
                self.end.send(peer, reply)
        now = time.monotonic()
        for host in list(self._hosts.values()):
            if now - host.heard_s > self._grant.silent_s:
                self.lose(host, f"host {host.name} has been silent for {now - host.heard_s:.0f} s")

    def _on_message(self, peer: str, message: Message) -> Message | None:
        if isinstance(message, JoinRequest):
            return self._let_in(peer, message)
        host = self._hosts.get(peer)
        if host is None:
            return Refused(reason="the run does not know this host (any more): it was silent too long, or never let in")
        if isinstance(message, HostReport):
            return self._heard(host, message)
        return None

    def _let_in(self, peer: str, request: JoinRequest) -> Message:
        known = self._hosts.get(peer)
        if known is None:
            reason = self._refusal(request)
            if reason:
                self._refused += 1
                if time.monotonic() - self._told_s > 1.0:  # who holds an old token could knock all day
                    self._told_s = time.monotonic()
                    log.warning("%s (%s) was not let in (%d refused so far): %s", request.name[:60], peer, self._refused, reason)
                return Refused(reason=reason)
            known = self._expected.pop(request.secret, None) or Host(request.name, request.role, request.count)
            known.place = request.name
            known.identity = peer
            self._hosts[peer] = known
            if request.secret in self._once:
                self._once.discard(request.secret)
                self._old.add(request.secret)
            log.info("host %s joins", known.name)
        known.heard_s = time.monotonic()
        known.push = lambda: self.end.send(peer, known.orders())
        grant = self._grant
        return Joined(
            epoch=grant.epoch,
            control=grant.control,
            public=grant.keys.public.decode(),
            secret=grant.keys.secret.decode(),
            config=grant.config(),
            run_dir=str(grant.run_dir),
            weights_dir=str(grant.weights_dir),
            silent_s=grant.silent_s,
        )

    def _refusal(self, request: JoinRequest) -> str:
        if request.run_id != self._run_id:
            return f"the token is for run {request.run_id}, this is run {self._run_id}"
        if request.version != __version__:
            return f"the run has rlsys {__version__}, this host has rlsys {request.version}: install the run's version there"
        if request.secret in self._expected:
            return ""
        if request.secret in self._old:
            return "the token is an old one: it was used up or replaced; `rlsys token RUN` prints the present one"
        if request.secret not in self._once and not hmac.compare_digest(request.secret.encode(), self._secret.encode()):
            return "the token is wrong: `rlsys token RUN` prints the right one"
        if request.role not in JOIN_ROLES or request.count < 1:
            return f"hosts can add {' and '.join(f'{role}s' for role in JOIN_ROLES)}, one or more, not {request.count} x {request.role!r}"
        return ""

    def _heard(self, host: Host, report: HostReport) -> Message:
        host.heard_s = time.monotonic()
        for name, text in report.logs.items():
            self._log(host, name, text)
        for identity, pid, code in report.processes:
            child = host.children.get(identity)
            if child is not None:
                child.remote_pid = int(pid)
                child.code = child.code if code is None else int(code)
        if report.lacks:
            self.lose(host, f"host {host.name} cannot run it: {report.lacks}", code=2)
        elif report.leaving and not host.leaving:
            host.leaving = True
            self.on_leave(host)
        elif not host.ready:
            host.ready = True
            self.on_join(host)
        done = host.leaving and all(child.code is not None for child in host.children.values())
        if done and not host.gone:
            self.lose(host, f"host {host.name} left in order")
            return host.orders(stop="all that ran here has left in order")
        return host.orders(stop=f"the run does without this host: {report.lacks}" if report.lacks else "")

    def _log(self, host: Host, name: str, text: bytes) -> None:
        for child in host.children.values():  # only of processes that the run started there, so that a name is never a path
            path = next((p for p in (child.log_path, child.log_path.with_suffix(".jsonl")) if p.name == name), None)
            if path is not None:
                with path.open("ab") as file:
                    file.write(text)
                return

    def lose(self, host: Host, why: str, code: int = KILLED) -> None:
        """A host is gone, and with it all that ran there."""
        if host.gone:
            return
        host.gone = why
        self._hosts.pop(host.identity, None)
        for child in host.children.values():
            child.lost(code, why)
        self.on_gone(host)

    def silent_s(self, host: object) -> float:
        """How long nothing was heard of it; 0 for what is no host that joined."""
        return time.monotonic() - host.heard_s if isinstance(host, Host) and host.identity else 0.0

    def close(self, why: str) -> None:
        """The run is over: tell every host."""
        for host in self._hosts.values():
            self.end.send(host.identity, host.orders(stop=why or "the run is over"))
        self._transport.close(linger_s=1.0)
        (self._grant.run_dir / TOKEN_FILE).unlink(missing_ok=True)


def describe_keys(public: str, secret: str) -> str:
    """What `keys.json` holds."""
    return json.dumps({"public": public, "secret": secret})


def fresh_identity() -> str:
    """Under which a host speaks; new with each start of its agent."""
    return f"host-{secrets.randbits(40)}@{os.getpid()}"
